"""Following a shared pool without asking its database at each request: the change number comes to us.

PostgreSQL notifies of each change. Where that does not arrive (a connection pooler may swallow it), a look twice a
second finds it. While the server is away, what is known stays in force.
"""

from __future__ import annotations

import logging
import select
import socket
import threading
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any, TypeVar, cast

from sqlalchemy import URL

from loraretriever.errors import PoolAwayError
from loraretriever.pool.postgres import CHANNEL, connect

_log = logging.getLogger(__name__)
POLL_SECONDS = 0.5
_RETRY_SECONDS = 0.5  # between attempts to connect again
_MAX_REMEMBERED = 100_000
T = TypeVar("T")


class Memory:
    """What was read of a pool, each with the number of the change that was known then."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[Hashable, tuple[int, Any]] = {}

    def recall(self, key: Hashable, number: int, read: Callable[[], T]) -> T:
        """What was read under this key at this change, or else is read now; what was known, where it cannot be.

        Raises:
            PoolAwayError: it cannot be read, and never was.
        """
        known = self._values.get(key)
        if known is not None and known[0] == number:
            return cast(T, known[1])
        try:
            value = read()
        except PoolAwayError:
            if known is None:
                raise
            return cast(T, known[1])
        with self._lock:
            if len(self._values) >= _MAX_REMEMBERED:
                self._values.clear()
            self._values[key] = number, value  # if a change came meanwhile, it is read again
        return value


class ChangeWatch:
    """The number of the pool's last change, as a thread hears of it."""

    def __init__(self, url: URL, number: int) -> None:
        """Start the thread.

        Args:
            url: the database.
            number: the change that is known.
        """
        self._url = url
        self._lock = threading.Lock()
        self._number = number
        self._own = 0  # changes that were made here
        self._waker, self._wakened = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="loraretriever-changes", daemon=True)
        self._thread.start()

    @property
    def number(self) -> int:
        """The last change that is known here."""
        return self._number

    def advance(self, number: int) -> None:
        """A change was committed here."""
        with self._lock:
            self._own += 1
            self._number = max(number, self._number)

    def close(self) -> None:
        """End the thread."""
        self._waker.close()
        self._thread.join()
        self._wakened.close()

    def _run(self) -> None:
        import psycopg

        is_away = False
        while True:
            with suppress(psycopg.Error), connect(self._url) as connection:
                connection.add_notify_handler(lambda notice: None)  # or they would be kept
                connection.execute(f"LISTEN {CHANNEL}")
                while True:
                    self._look(connection)
                    if is_away:
                        _log.warning("the pool's database is back")
                        is_away = False
                    if self._wait(POLL_SECONDS, connection):
                        return
            if not is_away:
                _log.warning("the pool's database is away; what is known of the pool stays in force")
                is_away = True
            if self._wait(_RETRY_SECONDS):
                return

    def _look(self, connection: Any) -> None:
        own = self._own
        row = connection.execute("SELECT change FROM pool").fetchone()
        if row is None:
            return
        with self._lock:
            # A smaller number was read before a change that was made here, or the database was restored from a copy.
            if row[0] > self._number or own == self._own:
                self._number = row[0]

    def _wait(self, seconds: float, *others: Any) -> bool:
        """Wait for a notification, or so long; returns whether it is the end."""
        ready, _, _ = select.select([self._wakened, *others], [], [], seconds)
        return self._wakened in ready
