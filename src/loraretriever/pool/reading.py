"""What can be read of a pool: by everybody who may see all of it, or by one tenant."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy.orm import Session

from loraretriever.errors import PoolError
from loraretriever.pool import changes, embeddings, records
from loraretriever.pool.database import Database
from loraretriever.pool.embeddings import SampleIds, Vectors
from loraretriever.pool.layout import VIEW_PREFIX, Layout
from loraretriever.pool.names import public_name
from loraretriever.pool.schema import PoolRow
from loraretriever.types import Adapter, PoolEntry, Sample

if TYPE_CHECKING:
    from loraretriever.pool.base import PoolBase

Adapters = list[Adapter]  # inside the class, `list` is its method
Samples = list[Sample]


class PoolReader:
    """The reading methods of `Pool` and of `PoolView`. Names are those in the pool, unless said otherwise."""

    def __init__(self, layout: Layout, database: Database, view: str | None = None) -> None:
        """`view`: None for all of the pool, a tenant, or "" for the adapters that belong to nobody."""
        self._layout = layout
        self._database = database
        self._view = view
        self._asked = threading.local()  # what `missing_embeddings` told this thread

    @property
    def change(self) -> int:
        """A number that grows with each committed change to adapters or samples, by any process.

        It counts all tenants' changes: for readers that follow the pool, not for users.
        """
        return self._database.change

    def changes_since(self, change: int) -> frozenset[str] | None:
        """Names of the adapters that the changes after this one touched: what a reader of that change must read again.

        None: read all of them. The change is newer than the pool, or so old that the log no longer has what followed.
        """
        with self._database.read() as session:
            names = changes.changes_since(session, change, self._view)
        if names is None or not self._view:
            return names
        # An own adapter hides another of the same public name as long as it is there.
        return names | {public_name(name, self._view) for name in names}

    @property
    def encoder(self) -> str | None:
        """The sentence encoder that this pool is to be read with: a folder or a hub id; None: the reader's default."""
        return self._database.remembered("encoder", lambda session: self._row(session).encoder)

    def list(self, enabled_only: bool = False) -> Adapters:
        """All adapters, by name."""
        with self._database.read() as session:
            rows = records.current_rows(session, self._view, enabled_only)
            return records.to_adapters(session, rows, self._layout.root)

    def get(self, name: str) -> Adapter:
        """One adapter.

        Raises:
            AdapterNotFoundError: there is none of that name; the message gives names like it.
        """

        def read(session: Session) -> Adapter:
            return records.to_adapters(session, [records.find_row(session, name, self._view)], self._layout.root)[0]

        return self._database.remembered(("get", self._view, name), read)

    def find(self, public: str) -> Adapter:
        """The adapter that a user means by a name: the tenant's own one, or else one that belongs to nobody.

        Raises:
            AdapterNotFoundError: there is none of that name; the message gives names like it.
        """

        def read(session: Session) -> Adapter:
            row = records.find_public_row(session, public, self._view)
            return records.to_adapters(session, [row], self._layout.root)[0]

        return self._database.remembered(("find", self._view, public), read)

    def public(self, adapter: Adapter) -> str:
        """The name by which a user knows an adapter: `find` gives the adapter for it."""
        return public_name(adapter.name, self._view)

    def samples(self, name: str) -> Samples:
        """An adapter's samples, in order."""
        with self._database.read() as session:
            found = records.samples_of(session, records.find_row(session, name, self._view))
        return [sample for sample in found if not sample.counter]

    def counter_samples(self, name: str) -> Samples:
        """The prompts that an adapter must not be chosen for, in order."""
        with self._database.read() as session:
            found = records.samples_of(session, records.find_row(session, name, self._view))
        return [sample for sample in found if sample.counter]

    def entries(self, encoder_tag: str, names: Collection[str] | None = None) -> tuple[int, dict[str, PoolEntry]]:
        """The change number and, by name, what retrieval reads of the enabled adapters, all in one state of the pool.

        With `names` only those; one that is gone or disabled is absent.
        """
        with self._database.read() as session:
            return embeddings.load_entries(session, encoder_tag, names, self._view)

    def embeddings(self, encoder_tag: str, names: Collection[str] | None = None) -> dict[str, Vectors]:
        """For each enabled adapter whose samples are all embedded: their vectors, shape (samples, dimension)."""
        _, found = self.entries(encoder_tag, names)
        return {name: entry.vectors for name, entry in found.items() if entry.vectors is not None}

    def missing_embeddings(self, encoder_tag: str, names: Collection[str] | None = None) -> dict[str, Samples]:
        """For each enabled adapter with samples or counter samples that this encoder has not embedded: those.

        With `names` only for these adapters.
        """
        with self._database.read() as session:
            found = embeddings.missing(session, encoder_tag, names, self._view)
        self._asked.ids = {name: ids for name, (ids, _) in found.items()}
        return {name: samples for name, (_, samples) in found.items()}

    def store_embeddings(self, encoder_tag: str, vectors: Mapping[str, Vectors]) -> None:
        """Store vectors for what `missing_embeddings` gave this thread, one per sample, in order.

        For an adapter that it did not give: one for each of its samples, and then of its counter samples. Samples
        that are gone since then are passed over. Vectors of a few encoders are kept.
        """
        asked: dict[str, SampleIds] = getattr(self._asked, "ids", {})
        with self._database.write() as session:
            embeddings.store(session, encoder_tag, vectors, asked, self._view)
        for name in vectors:
            asked.pop(name, None)

    def _row(self, session: Session) -> PoolRow:
        row = records.pool_row(session)
        if row is None:
            raise PoolError(
                f"the pool at {self._layout.name} was never finished. Make it with: "
                f"loraretriever pool init --pool {self._layout.name}"
            )
        return row


class PoolView(PoolReader):
    """What a tenant may see of a pool: its own adapters, and those that belong to nobody and have no own one's name.

    Nothing that it returns depends on another tenant's adapters, the number `change` aside. The view "" has what
    belongs to nobody, the view None all there is, as the pool itself.
    """

    def __init__(self, pool: PoolBase, view: str | None) -> None:
        """Use `Pool.view`. The pool must stay open."""
        super().__init__(pool._layout, pool._database, view)
        self._pool = pool

    @property
    def name(self) -> str | None:
        """Whose view this is: None, "" or a tenant."""
        return self._view

    @property
    def base_model(self) -> str:
        """The name of the base model of all adapters."""
        return self._pool.base_model

    @property
    def state_folder(self) -> Path:
        """Where what is derived from this view may be kept: a folder of its own, which need not be there yet."""
        if self._view is None:
            return self._layout.state
        return self._layout.state / f"{VIEW_PREFIX}{hashlib.sha256(self._view.encode()).hexdigest()[:32]}"
