"""What all methods of a pool stand on: its places, its database, its change number."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from sqlalchemy import select
from sqlalchemy.orm import Session

from loraretriever.errors import PoolError
from loraretriever.pool import changes, plain, records
from loraretriever.pool.database import Database
from loraretriever.pool.files import file_errors, locked
from loraretriever.pool.layout import Layout, absolute_model
from loraretriever.pool.schema import PoolRow


class PoolBase:
    """A pool that is open: see `Pool`."""

    def __init__(self, layout: Layout, database: Database, base_model: str = "") -> None:
        """Use `Pool.create` or `Pool.open`."""
        self._layout = layout
        self._database = database
        self._asked = threading.local()  # what `missing_embeddings` told this thread
        self.problems: tuple[str, ...] = ()
        self.base_model = base_model

    @property
    def location(self) -> Path:
        """The pool's folder."""
        return self._layout.root

    @property
    def state_folder(self) -> Path:
        """The folder of the database, where what is derived from the pool may be kept too."""
        return self._layout.state

    @property
    def change(self) -> int:
        """A number that grows with each committed change to adapters or samples, by any process."""
        with self._database.read() as session:
            return session.scalars(select(PoolRow.change)).one()

    def changes_since(self, change: int) -> frozenset[str] | None:
        """Names of the adapters that the changes after this one touched: what a reader of that change must read again.

        None: read all of them. The change is newer than the pool, or so old that the log no longer has what followed.
        """
        with self._database.read() as session:
            return changes.changes_since(session, change)

    @property
    def encoder(self) -> str | None:
        """The sentence encoder that this pool is to be read with: a folder or a hub id; None: the reader's default."""
        with self._database.read() as session:
            return self._row(session).encoder

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

    def _row(self, session: Session) -> PoolRow:
        row = records.pool_row(session)
        if row is None:
            raise PoolError(
                f"the pool at {self._layout.root} was never finished. Make it with: "
                f"loraretriever pool init --pool {self._layout.root}"
            )
        return row
