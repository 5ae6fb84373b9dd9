"""What a host keeps of a storage: adapters by digest, looked at whenever they are used, the least recently used go.

All processes of a host share the folder. Who uses an entry holds a lock on it, so that nobody deletes it meanwhile.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from loraretriever.errors import PoolError
from loraretriever.pool.files import discard, locked, rename, staging_folder
from loraretriever.pool.storage import DISK_FULL, FOLDER, Storage
from loraretriever.pool.weights import digest_in

ENTRY = "[0-9a-f]" * 64
_LOCKS = "fetching"  # a folder of locks: of those who want the same adapter, one fetches it
_MEMORY = Path("/dev/shm")  # files here are in memory


class StorageCache:
    """Adapters of a storage, on this host's disk when it has room, fetched when they are wanted."""

    def __init__(self, storage: Storage, folder: Path, max_bytes: int) -> None:
        """Use a folder of the pool's own.

        Args:
            storage: where the adapters come from.
            folder: its subfolder `adapters` holds them.
            max_bytes: of all of them together; the newest stays even if it alone is larger.
        """
        self._storage = storage
        self._state = folder
        self._folder = folder / FOLDER
        self._max_bytes = max_bytes

    @contextmanager
    def files(self, digest: str) -> Iterator[Path]:
        """A folder with an adapter's files, which stay there inside the block.

        Raises:
            NotStoredError: the storage has none.
            PoolError: it cannot be reached, or has something else; or there is no room for them anywhere.
        """
        with ExitStack() as kept:
            found = self._held(digest, kept)
            if found is None:
                self._fetch(digest)
                found = self._held(digest, kept) or self._aside(digest, kept)
            yield found

    @contextmanager
    def fresh(self, digest: str) -> Iterator[Path]:
        """A folder with the files as the storage has them now.

        Raises:
            NotStoredError, PoolError: as `files`.
        """
        with ExitStack() as kept:
            yield self._aside(digest, kept)

    def _held(self, digest: str, kept: ExitStack) -> Path | None:
        """The entry, if it is there and whole, under a lock that `kept` releases; what is damaged is deleted."""
        entry = self._folder / digest
        handle = _locked_entry(entry, fcntl.LOCK_SH)
        if handle is None:
            return None
        if digest_in(entry) == digest:
            kept.callback(os.close, handle)
            with suppress(OSError):
                os.utime(entry)  # used now
            return entry
        os.close(handle)
        with suppress(OSError), locked(self._state):
            discard_unused(entry, self._state)
        return None

    def _fetch(self, digest: str) -> None:
        """Bring an adapter into the cache, if it can be kept there. On a full disk the others go."""
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._state / _LOCKS).mkdir(exist_ok=True)
            with (self._state / _LOCKS / digest[:2]).open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if (self._folder / digest).exists():  # another one was faster
                    return
                try:
                    self._store(digest)
                except OSError as error:
                    if error.errno not in DISK_FULL:
                        raise
                    with locked(self._state):
                        make_room(self._folder, self._state, 0)
                    self._store(digest)

    def _store(self, digest: str) -> None:
        with staging_folder(self._state) as staging:
            staged = staging / digest
            staged.mkdir()
            self._storage.download(digest, staged)
            with locked(self._state):
                make_room(self._folder, self._state, self._max_bytes - size_of(staged))
                rename(staged, self._folder / digest)

    def _aside(self, digest: str, kept: ExitStack) -> Path:
        """An adapter in a folder for one use: in the temporary folder, or else in memory."""
        places = [Path(tempfile.gettempdir()), *([_MEMORY] if _MEMORY.is_dir() else [])]
        for place in places:
            with ExitStack() as own:
                try:
                    folder = Path(own.enter_context(tempfile.TemporaryDirectory(dir=place, prefix="loraretriever-")))
                    self._storage.download(digest, folder)
                except OSError as error:
                    reason = error
                    continue
                kept.push(own.pop_all())
                return folder
        raise PoolError(
            f"the adapter {digest} cannot be kept in {self._state}, {' or '.join(map(str, places))}: {reason}. Free "
            "some space, or look at the permissions."
        )


def make_room(folder: Path, state: Path, max_bytes: int, keep_seconds: float = 0.0) -> None:
    """Delete the least recently used entries of a folder until the rest has so many bytes.

    Those stay that somebody uses, or that were used in the last `keep_seconds`. Call it under the lock of `state`,
    where what is deleted goes first.
    """
    entries = []
    for entry in folder.glob(ENTRY):
        with suppress(OSError):
            entries.append((entry.stat().st_mtime_ns, size_of(entry), entry))
    total = sum(size for _, size, _ in entries)
    newest = time.time_ns() - int(keep_seconds * 1e9)
    for used, size, entry in sorted(entries):
        if total <= max_bytes or used > newest:
            break
        if discard_unused(entry, state):
            total -= size


def discard_unused(entry: Path, state: Path) -> bool:
    """Delete an entry unless somebody uses it; returns whether it is gone."""
    handle = _locked_entry(entry, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if handle is None:
        return not entry.exists()
    try:
        discard(entry, state)
    finally:
        os.close(handle)
    return True


def size_of(entry: Path) -> int:
    """The bytes of the files in a folder."""
    return sum(file.stat().st_size for file in entry.iterdir())


def _locked_entry(entry: Path, kind: int) -> int | None:
    """A handle that holds a lock on a folder; None when it is not there, or is locked and `kind` does not wait."""
    try:
        handle = os.open(entry, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, kind)
        if os.stat(entry).st_ino == os.fstat(handle).st_ino:  # else it was deleted while this waited
            return handle
    except OSError:
        pass
    os.close(handle)
    return None
