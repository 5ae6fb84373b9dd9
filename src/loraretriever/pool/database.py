"""A pool's database: connections, transactions, migrations. Only this module knows that it is SQLite."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from loraretriever.errors import PoolError

DATABASE_FILE = "pool.db"
HEAD_REVISION = "0003"  # the last one in migrations/versions; known here so that opening need not import Alembic
_BUSY_SECONDS = 60.0


class Database:
    """Sessions on a pool's database. Threads may share it; each session belongs to one thread."""

    def __init__(self, file: Path) -> None:
        """Connect to the SQLite file; it is made by the first connection when it is missing."""
        self.file = file
        self._engine = _sqlite_engine(file)
        self._writing = self._engine.execution_options(writes=True)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session that sees one state of the database, whatever others commit meanwhile."""
        with self._errors(), Session(self._engine) as session:
            yield session

    def read_number(self, query: str) -> int:
        """One number, without a session, which would take ten times as long: for what is asked at each request."""
        with self._errors(), closing(self._engine.raw_connection()) as connection:
            cursor = connection.cursor()
            cursor.execute(query)
            (number,) = cast("tuple[int]", cursor.fetchone())
            return number

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session that commits at the end, or changes nothing when an error leaves the block."""
        with self._errors(), Session(self._writing) as session, session.begin():
            yield session

    def migrate(self) -> None:
        """Bring the tables to the newest revision, in one transaction. Call it under the pool's lock.

        Raises:
            PoolError: a newer version of this package made the database.
        """
        with self._errors():
            with self._engine.connect() as connection:
                revision = _revision(connection)
            if revision == HEAD_REVISION:
                return
            with self._engine.connect() as connection:
                connection.connection.driver_connection.execute("PRAGMA journal_mode = WAL")  # type: ignore[union-attr]
            with self._writing.connect() as connection:
                # A table that is made anew would take the rows with it that refer to its own. This cannot be
                # switched inside a transaction.
                driver: Any = connection.connection.driver_connection
                driver.execute("PRAGMA foreign_keys = OFF")
                try:
                    with connection.begin():
                        _upgrade(connection, self.file)
                        if connection.exec_driver_sql("PRAGMA foreign_key_check").first() is not None:
                            raise PoolError(f"{self.file} holds rows that belong to nothing; restore it from a copy.")
                finally:
                    driver.execute("PRAGMA foreign_keys = ON")

    @property
    def is_current(self) -> bool:
        """Whether the tables are of the newest revision."""
        with self._errors(), self._engine.connect() as connection:
            return _revision(connection) == HEAD_REVISION

    def check(self) -> list[str]:
        """What SQLite finds damaged in its file."""
        with self._errors(), self._engine.connect() as connection:
            damage = [str(row[0]) for row in connection.exec_driver_sql("PRAGMA quick_check") if row[0] != "ok"]
            orphans = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
        damage += [f"row {row[1]} of {row[0]} belongs to no {row[2]}" for row in orphans]
        return [f"{self.file}: {each}" for each in damage]

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (SQLAlchemyError, sqlite3.Error) as error:
            cause = getattr(error, "orig", None) or error
            raise PoolError(
                f"the pool's database {self.file} cannot be used: {cause}. Expected a SQLite file that this process "
                "may read and write, on a disk with space left."
            ) from error


def _sqlite_engine(file: Path) -> Engine:
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


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return None if found is None else str(found)


def _upgrade(connection: Connection, file: Path) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        revision = _revision(connection)
        if revision is not None:
            ScriptDirectory.from_config(config).get_revision(revision)
        command.upgrade(config, "head")
    except CommandError as error:
        raise PoolError(
            f"{file} is of revision {revision!r}; expected {HEAD_REVISION!r} or an older one. A newer version of "
            "loraretriever made it: upgrade the package."
        ) from error
