"""One process that serves: what it needs, how it begins, and how it ends."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from loraretriever.config import ServerSettings, Settings
from loraretriever.errors import LoraRetrieverError
from loraretriever.server.errors import ApiError
from loraretriever.server.sockets import raise_file_limit

if TYPE_CHECKING:
    from fastapi import FastAPI

_log = logging.getLogger(__name__)
_HEAD_BYTES = 64 * 1024  # of a request's first line and headers
_CLOSING_SECONDS = 2  # for clients to take what was written to them, once no request runs
_ABORT_SECONDS = 5.0  # for requests to end that were told to
_ABORTED = "the server stopped before this was finished; send the request again to another one, or later."


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What a process needs in order to serve. It travels to worker processes as it is.

    `shared`: a folder for what worker processes count together; None where there is one process.
    """

    pool: str
    settings: Settings
    server: ServerSettings
    shared: Path | None = None


OpenApp = Callable[[Plan], AbstractContextManager["FastAPI"]]


@contextmanager
def open_app(plan: Plan) -> Iterator[FastAPI]:
    """The application over its pool, in a process of its own; it loads its models when it is started."""
    from loraretriever.engine.memory import keep_freed_memory
    from loraretriever.pipeline import LoraRetriever
    from loraretriever.server import logs, tracing
    from loraretriever.server.app import create_app

    logs.configure(plan.server.log_level, plan.server.log_format)
    close_tracing = tracing.configure(plan.server.otlp_endpoint)
    keep_freed_memory()
    try:
        # All fields by name: a field that is None here is set nowhere, so the environment is not asked twice.
        with LoraRetriever.open(plan.pool, **dataclasses.asdict(plan.settings)) as retriever:
            yield create_app(retriever, plan.server, multiprocess_dir=plan.shared)
    finally:
        close_tracing()


def serve_here(
    plan: Plan,
    listener: socket.socket,
    on_ready: Callable[[], None],
    open_app: OpenApp = open_app,
    is_replacement: bool = False,
) -> None:
    """Serve in this process until a signal ends it.

    Args:
        on_ready: called once, when the models are loaded.
        is_replacement: begin to listen only then; other processes listen at the same socket meanwhile.

    Raises:
        LoraRetrieverError: the models cannot be loaded.
    """

    def freeze() -> None:
        # Half a million objects of the libraries and the models stay as long as the process. A collection that looks
        # at them stops all threads for up to a second, between requests and again at the end.
        gc.collect()
        gc.freeze()
        on_ready()

    raise_file_limit()
    with open_app(plan) as app:
        server = GracefulServer(app, plan.server, freeze, is_replacement)
        try:
            server.run([listener])
        except SystemExit as error:  # how uvicorn says that the application did not start
            raise LoraRetrieverError("the application could not start; the log says why.") from error
        failure = app.state.server.loading_error
    if failure is not None:
        raise failure


class GracefulServer(uvicorn.Server):
    """A server that answers while it ends: new requests are told to go elsewhere, running ones have time to finish.

    The application's `app.state.server` says `is_loaded` and `loading_error`, and is told `is_stopping`; it refuses
    requests by itself.
    """

    def __init__(
        self,
        app: FastAPI,
        settings: ServerSettings,
        on_ready: Callable[[], None],
        is_replacement: bool = False,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        """`leave` ends the process at once with an exit code. The other arguments are those of `serve_here`."""
        self._state = app.state.server
        self._app = _Abortable(app, self._state, is_replacement)
        self._seconds = settings.shutdown_seconds
        self._on_ready: Callable[[], None] | None = on_ready
        self._leave = leave
        self._running: set[asyncio.Task[None]] | None = None  # when told to stop: what ran then
        self._deadline = 0.0
        config = uvicorn.Config(
            self._app,
            loop="uvloop",
            http=_BoundedProtocol,
            ws="none",
            lifespan="on",
            interface="asgi3",
            log_config=None,
            access_log=False,  # the application writes its own, with what it knows of a request
            server_header=False,
            timeout_graceful_shutdown=_CLOSING_SECONDS,
        )
        super().__init__(config)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by a signal: the first one lets running requests finish, a second SIGINT ends the process at once."""
        if self._state.is_stopping and sig == signal.SIGINT:
            self._leave(128 + sig)
        self._state.is_stopping = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; True ends the server."""
        await super().on_tick(counter)
        if self._state.is_stopping:
            return await self._has_stopped()
        if self._on_ready is not None and self._state.is_loaded:
            self._on_ready()
            self._on_ready = None
        return self._state.loading_error is not None

    async def _has_stopped(self) -> bool:
        if self._running is None:
            self._running = set(self.server_state.tasks)
            self._deadline = time.monotonic() + self._seconds
            _log.info("stopping; %d requests have %g s to finish", len(self._running), self._seconds)
        self._running = {task for task in self._running if not task.done()}
        if self._running and time.monotonic() >= self._deadline:
            _log.warning("%d requests did not finish in time and are aborted", len(self._running))
            await self._app.abort(self._running)
            return True
        if not self._running and not self._state.is_loaded:
            _log.info("stopped while the models were being loaded")
            self._leave(0)  # a thread cannot be told to stop loading, and there is nothing yet to be put in order
        return not self._running


class _Abortable:
    """An application whose requests can be ended from outside, with an answer that says so."""

    def __init__(self, app: ASGIApp, state: Any, waits_until_loaded: bool) -> None:
        self._app = app
        self._state = state
        self._waits_until_loaded = waits_until_loaded

    async def abort(self, tasks: set[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=_ABORT_SECONDS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, self._when_loaded(send))
            return
        start: Message | None = None

        async def note_start(message: Message) -> None:
            nonlocal start
            start = start or message
            await send(message)

        try:
            await self._app(scope, receive, note_start)
        except asyncio.CancelledError:  # only a server that ends cancels requests
            error = ApiError(503, _ABORTED, code="stopping", retry_after=5.0)
            if start is None:
                await error.response()(scope, receive, send)
            elif _is_event_stream(start):
                event = b"data: " + json.dumps(error.body()).encode() + b"\n\n"
                await send({"type": "http.response.body", "body": event, "more_body": False})
            # Other answers break off: uvicorn closes the connection, and the client sees that they are not whole.

    def _when_loaded(self, send: Send) -> Send:
        """Holds back the message after which the server begins to listen."""

        async def hold(message: Message) -> None:
            while message["type"] == "lifespan.startup.complete" and self._waits_until_loaded:
                if self._state.is_loaded or self._state.loading_error or self._state.is_stopping:
                    break
                await asyncio.sleep(0.1)
            await send(message)

        return hold


def _is_event_stream(start: Mapping[str, Any]) -> bool:
    kinds = [value for name, value in start.get("headers", ()) if name == b"content-type"]
    return any(kind.startswith(b"text/event-stream") for kind in kinds)


class _BoundedProtocol(HttpToolsProtocol):
    """HTTP/1.1 that reads only so much of a request's head; httptools would keep all that a client sends."""

    _reads_head = False
    _head_bytes = 0

    def data_received(self, data: bytes) -> None:
        began_before = self._reads_head  # else the end of a body may be in the data, too
        super().data_received(data)
        if began_before and self._reads_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > _HEAD_BYTES:
                self.send_400_response(f"The request's headers have more than {_HEAD_BYTES} bytes.")

    def on_message_begin(self) -> None:
        self._reads_head = True
        self._head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._reads_head = False
        super().on_headers_complete()
