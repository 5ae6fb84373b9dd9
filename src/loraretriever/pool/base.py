"""What all methods of a pool stand on: its places, its database, its change number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from sqlalchemy import select
from sqlalchemy.orm import Session

from loraretriever.errors import PoolError
from loraretriever.pool import changes, plain
from loraretriever.pool.content import GRACE_SECONDS
from loraretriever.pool.database import Database
from loraretriever.pool.files import file_errors, locked
from loraretriever.pool.jobs import JobStore
from loraretriever.pool.keys import KeyStore
from loraretriever.pool.layout import Layout, absolute_model
from loraretriever.pool.reading import PoolReader, PoolView
from loraretriever.pool.schema import AdapterRow


class PoolBase(PoolReader):
    """A pool that is open: see `Pool`."""

    def __init__(self, layout: Layout, database: Database, base_model: str = "") -> None:
        """Use `Pool.create` or `Pool.open`."""
        super().__init__(layout, database)
        self.problems: tuple[str, ...] = ()
        self.base_model = base_model
        self.grace_seconds = GRACE_SECONDS
        self.keys = KeyStore(database)
        self.jobs = JobStore(database)

    def view(self, view: str | None) -> PoolView:
        """What a tenant may see: its own adapters and those of nobody; "": the latter alone; None: everything."""
        return PoolView(self, view)

    def tenants(self) -> frozenset[str]:
        """The tenants that have adapters."""
        with self._database.read() as session:
            query = select(AdapterRow.tenant).where(AdapterRow.current, AdapterRow.tenant.is_not(None)).distinct()
            return frozenset(tenant for tenant in session.scalars(query) if tenant is not None)

    @property
    def location(self) -> Path | str:
        """The pool's folder, or of a shared pool the URL without the password."""
        return self._layout.name if self._layout.url is not None else self._layout.root

    @property
    def is_plain(self) -> bool:
        """Whether it is a plain folder of adapters, which others may change: see `Pool.refresh`."""
        return self._layout.plain

    @property
    def state_folder(self) -> Path:
        """A folder of this host for what is derived from the pool; a database in a file is there too."""
        return self._layout.state

    def watch(self) -> None:
        """From now on remember what is read of adapters until the pool changes; follow a shared pool unasked.

        Of a shared pool `change` is then what came here: of other processes' changes usually within milliseconds, of
        this pool's own at once. While its database is away, what is known of adapters and keys stays in force.
        """
        self._database.watch()

    def set_encoder(self, name: str | None) -> None:
        """Choose the sentence encoder; of a folder the absolute path is kept.

        Raises:
            InvalidInputError: the name is empty.
        """
        if name is not None:
            name = absolute_model(name, "encoder")
        with self._database.write() as session:
            row = self._row(session)
            if row.encoder != name:
                row.encoder = name
                changes.count_change(session)

    def close(self) -> None:
        """Close the connections to the database."""
        self.jobs.close()
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _editing(self, action: str) -> Iterator[Session]:
        """A session that commits at the end; in a plain folder under the lock, with the adapters in their places."""
        if not self._layout.plain:
            with self._database.write() as session:
                yield session
            return
        self._check_takes_adapters()
        with file_errors(action), locked(self._layout.state):
            plain.put_back_replaced(self._layout)
            with self._database.write() as session:
                yield session

    def _check_takes_adapters(self) -> None:
        if not self._layout.takes_adapters:
            raise PoolError(f"the folder {self._layout.root} is read-only. Copy the pool to a folder of your own.")
