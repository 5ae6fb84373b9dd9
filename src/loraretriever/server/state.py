"""What the endpoints of one server share."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, ParamSpec, TypeVar, cast

from fastapi import Depends
from starlette.requests import HTTPConnection

from loraretriever.pipeline import LoraRetriever
from loraretriever.server.errors import STOPPING, ApiError
from loraretriever.server.sockets import is_loopback, resolve_address

if TYPE_CHECKING:
    from loraretriever.config import ServerSettings
    from loraretriever.server.jobs import JobRunner
    from loraretriever.server.limits import Limiter
    from loraretriever.server.metrics import Metrics
    from loraretriever.server.streaming import Courier

P = ParamSpec("P")
T = TypeVar("T")
THREADS = 16  # for what blocks: routing, tokenising, the pool's database


class ServerState:
    """The pool with its models, and what counts, bounds and runs the work on it."""

    def __init__(
        self,
        retriever: LoraRetriever,
        settings: ServerSettings,
        metrics: Metrics,
        limiter: Limiter,
        jobs: JobRunner,
    ) -> None:
        """`retriever` is opened and closed by the caller."""
        self.retriever = retriever
        self.settings = settings
        self.metrics = metrics
        self.limiter = limiter
        self.jobs = jobs
        self.courier: Courier  # of the event loop; made when the application starts
        self.started = time.time()
        _, (address, *_) = resolve_address(settings.host, settings.port)
        self.may_be_open = is_loopback(address)  # as long as the pool has no keys
        self._stopping_since: float | None = None
        self.loading_error: Exception | None = None
        self.is_loaded = False
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="server")

    @property
    def is_stopping(self) -> bool:
        """Whether new work is refused."""
        return self._stopping_since is not None

    @is_stopping.setter
    def is_stopping(self, value: bool) -> None:
        if value and self._stopping_since is None:
            self._stopping_since = time.monotonic()

    @property
    def seconds_to_stop(self) -> float:
        """What is left of the time that running work has to finish; a second at least."""
        passed = 0.0 if self._stopping_since is None else time.monotonic() - self._stopping_since
        return max(1.0, self.settings.shutdown_seconds - passed)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call what blocks in a thread, in the context of the caller."""
        call = functools.partial(contextvars.copy_context().run, function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    def later(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call what blocks in a thread, and do not wait for it. When the threads have ended, nothing is called."""
        with suppress(RuntimeError):
            self._threads.submit(function, *args, **kwargs)

    def check_serving(self) -> None:
        """Raises an error unless the models are loaded and new work is taken."""
        if self.is_stopping:
            raise ApiError(503, STOPPING, code="stopping", retry_after=5.0)
        if self.loading_error is not None:
            raise ApiError(503, "the models cannot be loaded; the server's log says why.", code="load_failed")
        if not self.is_loaded:
            raise ApiError(503, "the models are being loaded; try again.", code="loading", retry_after=2.0)

    def close(self) -> None:
        """End the threads; waits for what they do."""
        self._threads.shutdown(wait=True, cancel_futures=True)


def server_state(connection: HTTPConnection) -> ServerState:
    """The state of the server that a request came to."""
    return cast(ServerState, connection.app.state.server)


async def _server_state(connection: HTTPConnection) -> ServerState:
    """The same as a dependency: FastAPI calls those that are no coroutines in threads of its own."""
    return server_state(connection)


State = Annotated[ServerState, Depends(_server_state)]
