"""How many requests and tokens a key may use: token buckets, shared by all processes of a server."""

from __future__ import annotations

import logging
import math
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from loraretriever.errors import PoolError
from loraretriever.pool import Key
from loraretriever.pool.files import locked

FILE = "limits.db"  # in the pool's state folder
_log = logging.getLogger(__name__)
_OPEN_SECONDS = 30.0  # that opening waits for other processes
_BUSY_SECONDS = 0.05  # that a request waits for them at most
_ALONE_SECONDS = 1.0  # without the file, after it could not be used
_ROUNDING = 1e-9
_PUT = "INSERT INTO buckets VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE SET level = excluded.level, at = excluded.at"

Buckets = Mapping[str, tuple[float, float]]  # by name: how much is in it, and when that was so (s)
Amounts = Mapping[str, float]  # by name of a bucket


class Limiter:
    """Bounds each key's requests and tokens per minute.

    A bucket holds one minute's allowance and fills up steadily. A request finds one of each there, or must wait. It
    takes its one request at once, and its tokens when they are known, at its end: they may leave a debt, which delays
    the next request.

    Processes share the buckets in a file. When another one keeps it locked, this one goes on with the buckets as it
    last saw them, and tells the file a second later what was taken: a request waits for a lock no longer than 50 ms.
    """

    def __init__(self, file: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """Nothing is bounded before.

        Args:
            file: shared by the processes of one host, and made when it is missing; None: there is one process only.
            clock: seconds; the same in all processes of the host.

        Raises:
            PoolError: the file cannot be used.
        """
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[float, float]] = {}
        self._untold: dict[str, float] = {}  # what was taken without the file
        self._alone_until = -math.inf
        self._connection = None if file is None else _open(file)

    def admit(self, key: Key) -> float | None:
        """Count a request of a key: None, or if a limit is reached the seconds after which one may succeed."""
        limits = {f"requests {key.id}": key.requests_per_minute, f"tokens {key.id}": key.tokens_per_minute}
        known = {name: limit for name, limit in limits.items() if limit is not None}
        return self._take(known, {name: float(name.startswith("requests")) for name in known}, 1.0) or None

    def charge(self, key: Key, tokens: int) -> None:
        """Take the tokens of a request that was answered: its prompt's and its answer's."""
        if key.tokens_per_minute is not None and tokens > 0:
            name = f"tokens {key.id}"
            self._take({name: key.tokens_per_minute}, {name: tokens}, -math.inf)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _take(self, limits: Mapping[str, int], amounts: Amounts, least: float) -> float:
        """Take these amounts if each bucket has the least one in it; returns the seconds until it has, or 0."""
        if not limits:
            return 0.0
        now = self._clock()
        with self._lock:
            if self._connection is not None and now >= self._alone_until:
                try:
                    return self._take_shared(self._connection, limits, amounts, least, now)
                except sqlite3.Error as error:
                    self._alone_until = now + _ALONE_SECONDS
                    _log.warning("for %.0f s this process counts its requests alone: %s", _ALONE_SECONDS, error)
            wait, after = _taken(self._seen, limits, amounts, least, now)
            self._seen |= after
            if self._connection is not None and not wait:
                for name, amount in amounts.items():
                    self._untold[name] = self._untold.get(name, 0.0) + amount
            return wait

    def _take_shared(
        self, connection: sqlite3.Connection, limits: Mapping[str, int], amounts: Amounts, least: float, now: float
    ) -> float:
        connection.execute("BEGIN IMMEDIATE")
        try:
            _, settled = _taken(_read(connection, limits), limits, self._untold, -math.inf, now)
            wait, after = _taken(settled, limits, amounts, least, now)
            connection.executemany(_PUT, [(name, *bucket) for name, bucket in after.items()])
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        self._seen |= after
        for name in limits:
            self._untold.pop(name, None)
        return wait


def _taken(
    buckets: Buckets, limits: Mapping[str, int], amounts: Amounts, least: float, now: float
) -> tuple[float, dict[str, tuple[float, float]]]:
    """The seconds to wait, and the buckets now, with the amounts taken out unless one must wait.

    Semantics: level' = min(limit, level + (now - at) limit / 60), and then level' - amount if all level' >= least.
    """
    levels = {}
    for name, limit in limits.items():
        level, at = buckets.get(name, (math.inf, now))
        levels[name] = min(float(limit), level + max(0.0, now - at) * limit / 60)  # the clock starts anew with the host
    wait = max((least - level) * 60 / limits[name] for name, level in levels.items())
    if wait > _ROUNDING:
        return wait, {name: (level, now) for name, level in levels.items()}
    return 0.0, {name: (level - amounts.get(name, 0.0), now) for name, level in levels.items()}


def _read(connection: sqlite3.Connection, names: Collection[str]) -> dict[str, tuple[float, float]]:
    places = ", ".join("?" * len(names))
    found = connection.execute(f"SELECT name, level, at FROM buckets WHERE name IN ({places})", list(names))
    return {name: (level, at) for name, level, at in found}


def _open(file: Path) -> sqlite3.Connection:
    try:
        with locked(file.parent):  # of several processes one makes the file
            try:
                return _connect(file)
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError:
                # It is written without waiting for the disk, so that it may be damaged when the host has crashed.
                for each in (file, *(file.with_name(file.name + end) for end in ("-wal", "-shm"))):
                    each.unlink(missing_ok=True)
                return _connect(file)
    except (OSError, sqlite3.Error) as error:
        raise PoolError(
            f"cannot count requests in {file}: {error}. Expected a file that may be written. Delete it, or make room."
        ) from error


def _connect(file: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(file, timeout=_OPEN_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = OFF")
        columns = "name TEXT PRIMARY KEY NOT NULL, level REAL NOT NULL, at REAL NOT NULL"
        connection.execute(f"CREATE TABLE IF NOT EXISTS buckets ({columns}) WITHOUT ROWID")
        connection.execute(f"PRAGMA busy_timeout = {int(_BUSY_SECONDS * 1000)}")
    except BaseException:
        connection.close()
        raise
    return connection
