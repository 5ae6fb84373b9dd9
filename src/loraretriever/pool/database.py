"""A pool's database: sessions, transactions, migrations; SQLite in a folder, PostgreSQL by URL."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Protocol, TypeVar, cast

from sqlalchemy import URL, Connection, Engine, inspect, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from loraretriever.errors import PoolAwayError, PoolError
from loraretriever.pool.postgres import Postgres
from loraretriever.pool.sqlite import Sqlite
from loraretriever.pool.watching import ChangeWatch, Memory

DATABASE_FILE = "pool.db"
HEAD_REVISION = "0004"  # the last one in migrations/versions; known here so that opening need not import Alembic
CHANGE = "change"  # what a session's `info` holds of the change that it counted
T = TypeVar("T")


class Backend(Protocol):
    """What differs between SQLite and PostgreSQL."""

    name: str  # for messages
    expected: str  # what is needed for it to work
    driver_error: type[Exception]
    reading: Engine  # its transactions see one state
    writing: Engine  # its transactions run one after the other

    def migrating(self) -> AbstractContextManager[Connection]:
        """A connection in a transaction that may change tables, and commits at the end."""
        ...

    def check(self) -> list[str]:
        """What is damaged."""
        ...

    def is_away(self, error: BaseException) -> bool:
        """Whether an error tells that the database cannot be reached now."""
        ...


class Database:
    """Sessions on a pool's database. Threads may share it; each session belongs to one thread."""

    def __init__(self, place: Path | URL) -> None:
        """Nothing is connected yet.

        Args:
            place: a SQLite file, which is made when it is missing, or the URL of a PostgreSQL database.
        """
        self._url = place if isinstance(place, URL) else None
        self._backend: Backend = Postgres(place) if isinstance(place, URL) else Sqlite(place)
        self.name = self._backend.name
        self._watch: ChangeWatch | None = None
        self._memory: Memory | None = None

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session that sees one state of the database, whatever others commit meanwhile."""
        with self._errors(), Session(self._backend.reading) as session:
            yield session

    @property
    def change(self) -> int:
        """The number of the last change: as it is in the database, or with `watch` as it came here."""
        if self._watch is not None:
            return self._watch.number
        # Without a session, which would take ten times as long: it is asked at each request.
        with self._errors(), closing(self._backend.reading.raw_connection()) as connection:
            cursor = connection.cursor()
            cursor.execute("SELECT change FROM pool")
            (number,) = cast("tuple[int]", cursor.fetchone())
            return number

    def watch(self) -> None:
        """From now on remember, and be told of changes, where the database can tell: `change` then asks nobody."""
        self._memory = self._memory or Memory()
        if self._url is not None and self._watch is None:
            self._watch = ChangeWatch(self._url, self.change)

    def remembered(self, key: Hashable, read: Callable[[Session], T]) -> T:
        """What is read in a session; with `watch` only once after each change."""

        def load() -> T:
            with self.read() as session:
                return read(session)

        return load() if self._memory is None else self._memory.recall(key, self.change, load)

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session that commits at the end, or changes nothing when an error leaves the block."""
        with self._errors(), Session(self._backend.writing) as session:
            with session.begin():
                yield session
            change = session.info.get(CHANGE)
        if change is not None and self._watch is not None:
            self._watch.advance(change)

    def migrate(self) -> None:
        """Bring the tables to the newest revision, in one transaction. Call it under the pool's lock.

        Raises:
            PoolError: a newer version of this package made the database.
        """
        if self.is_current:
            return
        with self._errors(), self._backend.migrating() as connection:
            _upgrade(connection, self.name)

    @property
    def is_current(self) -> bool:
        """Whether the tables are of the newest revision."""
        with self._errors(), self._backend.reading.connect() as connection:
            return _revision(connection) == HEAD_REVISION

    def check(self) -> list[str]:
        """What is damaged in the database, in words."""
        with self._errors():
            return [f"{self.name}: {each}" for each in self._backend.check()]

    def close(self) -> None:
        """Close all connections."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        self._backend.reading.dispose()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (SQLAlchemyError, self._backend.driver_error) as error:
            cause = str(getattr(error, "orig", None) or error).strip()
            kind = PoolAwayError if self._backend.is_away(error) else PoolError
            raise kind(f"the pool's database {self.name} cannot be used: {cause}. {self._backend.expected}") from error


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return None if found is None else str(found)


def _upgrade(connection: Connection, name: str) -> None:
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
            f"{name} is of revision {revision!r}; expected {HEAD_REVISION!r} or an older one. A newer version of "
            "loraretriever made it: upgrade the package."
        ) from error
