"""The content of adapters: loaded by digest, and kept for a while when it is removed.

A request loads what its adapters were when it came in. In a pool made by `create` the content of a removed adapter
stays for a grace period, in a plain folder all that was ever replaced or removed does.

In a shared pool content is in a storage. It is promised to an `add` by a row, as if it had been removed, before it is
stored; so nobody deletes it before the add commits, and somebody does if it never commits.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from loraretriever.errors import AdapterNotFoundError, PoolAwayError, PoolError
from loraretriever.pool import plain, records
from loraretriever.pool.cache import StorageCache
from loraretriever.pool.database import Database
from loraretriever.pool.files import discard, locked
from loraretriever.pool.layout import CONTENT_FOLDER, Layout
from loraretriever.pool.schema import AdapterRow, RemovedRow
from loraretriever.pool.storage import NotStoredError, Storage
from loraretriever.pool.weights import WEIGHTS_FILE, load_weights
from loraretriever.types import AdapterWeights

GRACE_SECONDS = 3600.0
_PROMISED = timedelta(hours=6)  # the longest that storing an adapter may take
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Published:
    """Files in a storage that no row names yet. `promise`: the row that keeps them from being deleted."""

    promise: int
    is_new: bool  # they were not there before


def load_current(layout: Layout, database: Database, name: str) -> AdapterWeights:
    """The weights of an adapter's current revision.

    Raises:
        AdapterNotFoundError: there is none of that name.
        PoolError: the files cannot be read.
    """
    with database.read() as session:
        row = records.find_row(session, name)
        session.expunge_all()
    if layout.storage is not None:
        with files(layout, row.folder) as folder:
            return load_weights(folder, name, row.digest)
    folder = layout.root / row.folder
    if row.stamp is not None and plain.changed_weights(row.stamp, folder):
        raise PoolError(f"the files of adapter {name!r} in {folder} have changed. Open the pool again.")
    return load_weights(folder, name, row.digest)


def load_revision(layout: Layout, database: Database, name: str, digest: str) -> AdapterWeights:
    """The weights that an adapter had with this content, whether or not it has been revised or removed since.

    Raises:
        AdapterNotFoundError: they are no longer there.
        PoolError: the files cannot be read.
    """
    load = _load_plain if layout.plain else _load_stored
    found = load(layout, database, name, digest)
    if found is None:
        raise AdapterNotFoundError(
            f"adapter {name!r} was revised or removed meanwhile: its content {digest} is no longer in the pool. "
            "Ask again, for the pool as it is now."
        )
    return found


@contextmanager
def files(layout: Layout, folder: str, fresh: bool = False) -> Iterator[Path]:
    """A folder with an adapter's files, by the folder of its row; of a storage a copy, made now if `fresh`.

    Raises:
        PoolError: the storage cannot be read, or does not have them.
    """
    if layout.storage is None:
        yield layout.root / folder
        return
    cache = _cache(layout)
    digest = folder.rpartition("/")[2]
    with cache.fresh(digest) if fresh else cache.files(digest) as found:
        yield found


def place_of(layout: Layout, folder: str) -> str:
    """Where an adapter's files are, for messages."""
    return f"{layout.storage}/{folder}" if layout.storage is not None else str(layout.root / folder)


def publish(layout: Layout, database: Database, digest: str, folder: Path) -> Published | None:
    """Bring an adapter's files into the pool's storage, if it has one, before a row names them."""
    if layout.storage is None:
        return None
    with database.write() as session:
        is_used = session.scalars(select(AdapterRow.id).where(AdapterRow.digest == digest)).first() is not None
        promise = RemovedRow(name="", digest=digest, folder="", expires=_now() + _PROMISED)
        session.add(promise)
        session.flush()
        published = Published(promise.id, is_new=not is_used)
    if is_used:
        try:
            with _cache(layout).fresh(digest):
                return published
        except PoolAwayError:
            raise
        except PoolError:  # lost or damaged
            published = replace(published, is_new=True)
    Storage(layout.storage).upload(digest, folder)
    return published


def redeem(session: Session, published: Published) -> None:
    """Take the promise back that nobody deletes the files, in the transaction that makes a row which names them.

    Raises:
        PoolError: storing them took so long that somebody may have.
    """
    promise = session.get(RemovedRow, published.promise)
    if promise is None:
        raise PoolError(f"storing the adapter took more than {_PROMISED}. Add it again.")
    session.delete(promise)


def retire(session: Session, name: str, grace_seconds: float) -> None:
    """Note the content of an adapter that is about to be removed."""
    query = select(AdapterRow.digest, AdapterRow.folder).where(AdapterRow.name == name).distinct()
    expires = _now() + timedelta(seconds=grace_seconds)
    rows = [{"name": name, "digest": digest, "folder": folder} for digest, folder in session.execute(query)]
    session.execute(insert(RemovedRow).values(expires=expires), rows)


def expired(session: Session) -> set[str]:
    """The digests of content whose grace period is over and that nobody names now; it is no longer noted."""
    due = RemovedRow.expires <= _now()
    digests = set(session.scalars(select(RemovedRow.digest).where(due)))
    session.execute(delete(RemovedRow).where(due))
    for batch in records.batches(set(digests)):
        for column in (AdapterRow.digest, RemovedRow.digest):
            digests -= set(session.scalars(select(column).where(column.in_(batch))))
    return digests


def sweep(layout: Layout, database: Database) -> None:
    """Delete content that nothing names: of removed adapters after their grace period, of adds that were killed.

    Call it under the lock. What cannot be deleted now is deleted by another call.
    """
    if layout.storage is not None:
        with suppress(PoolError), database.write() as session:
            Storage(layout.storage).delete(expired(session))  # before the commit; no `add` can come in between
        return
    found = os.listdir(layout.content) if layout.content.is_dir() else []
    with database.write() as session:
        expired(session)
        # Not through the session, which is slower: a large pool has ten thousand.
        connection = session.connection()
        columns = (AdapterRow.digest, RemovedRow.digest)
        used = {digest for column in columns for (digest,) in connection.execute(select(column))}
    delete_content(layout, [name for name in found if name not in used])


def delete_content(layout: Layout, digests: Iterable[str]) -> None:
    """Delete content of these digests, where it is. Call it under the lock."""
    for digest in digests:
        folder = layout.content / digest
        if _DIGEST.fullmatch(digest) and folder.exists():  # others would not be ours to delete
            discard(folder, layout.state)


def _cache(layout: Layout) -> StorageCache:
    assert layout.storage is not None
    return StorageCache(Storage(layout.storage), layout.root, layout.disk_bytes)


def _load_stored(layout: Layout, database: Database, name: str, digest: str) -> AdapterWeights | None:
    row = path = None
    try:
        with database.read() as session:
            row = records.revision_row(session, name, digest)
            removed = select(RemovedRow.folder).where(RemovedRow.name == name, RemovedRow.digest == digest)
            path = row.folder if row is not None else session.scalars(removed).first()
    except PoolAwayError:
        if _DIGEST.fullmatch(digest):  # which the caller read in the database before
            path = f"{CONTENT_FOLDER}/{digest}"
    if path is None or (layout.storage is None and not (layout.root / path / WEIGHTS_FILE).exists()):
        return None
    try:
        with files(layout, path) as folder:
            return load_weights(folder, name, digest)
    except NotStoredError:
        if row is not None and row.current:
            raise
        return None


def _load_plain(layout: Layout, database: Database, name: str, digest: str) -> AdapterWeights | None:
    found = _load_in_place(layout, database, name, digest)
    if found is None:
        # Its folder may be on the move: then it is in its place again, or with the removed ones, once the lock is free.
        with locked(layout.state):
            found = _load_in_place(layout, database, name, digest)
    if found is None and (folder := plain.find_removed(layout, name, digest)):
        return load_weights(folder, name, digest)
    return found


def _load_in_place(layout: Layout, database: Database, name: str, digest: str) -> AdapterWeights | None:
    """From the adapter's folder, when configuration and weights are those that were admitted, before and afterwards."""
    with database.read() as session:
        row = records.revision_row(session, name, digest)
        session.expunge_all()
    if row is None or row.stamp is None:
        return None
    folder: Path = layout.root / row.folder
    if plain.changed_weights(row.stamp, folder):
        return None
    try:
        weights = load_weights(folder, name, digest)
    except PoolError:
        if plain.changed_weights(row.stamp, folder):
            return None
        raise
    return None if plain.changed_weights(row.stamp, folder) else weights


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)
