"""PostgreSQL below a pool that several hosts share.

All writers of a pool take one advisory lock before anything else, as they do with SQLite: the number of the pool's
change grows in the order of the commits, and no writer can be in another one's way later, by a deadlock or by a
conflict of snapshots. Readers see one snapshot and wait for nobody.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as NoConnectionLeft

from loraretriever.errors import InvalidInputError, require_extra

CHANNEL = "loraretriever_change"  # of notifications, each with the number of a change; revision 0004 sends them
_WRITERS_LOCK = 0x10AA_0001  # one pool to a database, so any number will do
_CONNECT: Mapping[str, Any] = {
    "connect_timeout": 5,
    # A host that is gone does not say so: the connection is given up after some 20 seconds without an answer.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 2,
    "tcp_user_timeout": 20_000,
    "application_name": "loraretriever",
}
# A writer whose host is gone must not keep its lock for longer.
_SETTINGS = "SET lock_timeout = '60s'; SET idle_in_transaction_session_timeout = '60s'; SET timezone = 'UTC'"
_CONNECTIONS = 20  # of one process at most; a server has 16 threads that ask


class Postgres:
    """Connections to a PostgreSQL database. Its password is in no message."""

    expected = "Expected a PostgreSQL server that answers, and a user who may read and write there."

    def __init__(self, url: URL) -> None:
        with require_extra("postgres"):
            import psycopg
        self.driver_error: type[Exception] = psycopg.Error
        self.name = shown_url(url)
        engine = _engine(url)
        self.reading: Engine = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        self.writing: Engine = engine.execution_options(isolation_level="READ COMMITTED", writes=True)

    @contextmanager
    def migrating(self) -> Iterator[Connection]:
        """A connection in a transaction that commits at the end, after all other writers."""
        with self.writing.begin() as connection:
            yield connection

    def check(self) -> list[str]:
        """Damage is the server's to find."""
        return []

    def is_away(self, error: BaseException) -> bool:
        """Whether the server cannot be reached, is stopping or is busy: what failed may work soon."""
        import psycopg

        cause = error.orig if isinstance(error, DBAPIError) else error
        return isinstance(cause, (psycopg.OperationalError, psycopg.InterfaceError, NoConnectionLeft))


def parse_url(text: str) -> URL:
    """The URL of a database.

    Raises:
        InvalidInputError: it is none; the message does not show it, because it may hold a password.
    """
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        url = None
    if url is None or url.get_backend_name() not in ("postgresql", "postgres") or not url.database:
        raise InvalidInputError(
            "the pool's URL cannot be used; expected postgresql://USER@HOST/DATABASE, or the path of a folder."
        )
    if isinstance(password := url.query.get("password"), str):  # in its place it is hidden
        url = url.difference_update_query(["password"]).set(password=password)
    return url.set(drivername="postgresql+psycopg")


def shown_url(url: URL) -> str:
    """A database's URL without password and options, for messages."""
    shown = URL.create("postgresql", username=url.username, host=url.host, port=url.port, database=url.database)
    return shown.render_as_string(hide_password=False)


def connect(url: URL) -> Any:
    """A connection of psycopg that is in no transaction: its commands take effect at once."""
    import psycopg

    # Not from the text of the URL, which an error could show.
    named = url.translate_connect_args(username="user", database="dbname")
    return psycopg.connect(**{**_connect_arguments(url), **url.query, **named}, autocommit=True)


def _connect_arguments(url: URL) -> dict[str, Any]:
    """How psycopg connects; options in the URL go before ours."""
    return {name: value for name, value in _CONNECT.items() if name not in url.query}


def _engine(url: URL) -> Engine:
    engine = create_engine(
        url,
        connect_args=_connect_arguments(url),
        pool_pre_ping=True,  # the server may have been restarted since the last use
        pool_size=5,
        max_overflow=_CONNECTIONS - 5,
        hide_parameters=True,
    )

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, record: object) -> None:
        connection.autocommit = True
        connection.execute(_SETTINGS)
        connection.autocommit = False

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        if connection.get_execution_options().get("writes"):
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_WRITERS_LOCK})")

    return engine
