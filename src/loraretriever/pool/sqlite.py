"""SQLite below a pool: one file, one writer at a time."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event

from loraretriever.errors import PoolError

_BUSY_SECONDS = 60.0


class Sqlite:
    """Connections to a SQLite file; it is made by the first one when it is missing."""

    expected = "Expected a SQLite file that this process may read and write, on a disk with space left."

    def __init__(self, file: Path) -> None:
        self.driver_error: type[Exception] = sqlite3.Error
        self.name = str(file)
        self.reading: Engine = _engine(file)
        self.writing: Engine = self.reading.execution_options(writes=True)

    @contextmanager
    def migrating(self) -> Iterator[Connection]:
        """A connection in a transaction that commits at the end. Call it under the pool's lock."""
        with self.reading.connect() as connection:
            connection.connection.driver_connection.execute("PRAGMA journal_mode = WAL")  # type: ignore[union-attr]
        with self.writing.connect() as connection:
            # A table that is made anew would take the rows with it that refer to its own. This cannot be
            # switched inside a transaction.
            driver: Any = connection.connection.driver_connection
            driver.execute("PRAGMA foreign_keys = OFF")
            try:
                with connection.begin():
                    yield connection
                    if connection.exec_driver_sql("PRAGMA foreign_key_check").first() is not None:
                        raise PoolError(f"{self.name} holds rows that belong to nothing; restore it from a copy.")
            finally:
                driver.execute("PRAGMA foreign_keys = ON")

    def check(self) -> list[str]:
        """What SQLite finds damaged in its file."""
        with self.reading.connect() as connection:
            damage = [str(row[0]) for row in connection.exec_driver_sql("PRAGMA quick_check") if row[0] != "ok"]
            orphans = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
        return damage + [f"row {row[1]} of {row[0]} belongs to no {row[2]}" for row in orphans]

    def is_away(self, error: BaseException) -> bool:
        """A file is not away for a while."""
        return False


def _engine(file: Path) -> Engine:
    engine = create_engine(URL.create("sqlite", database=str(file)), connect_args={"timeout": _BUSY_SECONDS})

    # The driver's own transactions start late and cannot be told to be immediate, so they are ours
    # (SQLAlchemy's documentation of SQLite describes this). A write that starts as a read could not wait for
    # another writer: SQLite refuses it at once.
    @event.listens_for(engine, "connect")
    def _connect(connection: Any, record: object) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = FULL")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine
