"""One process: the socket, and how it ends while requests run."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import signal
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import JSONResponse, StreamingResponse

from loraretriever.config import ServerSettings, Settings
from loraretriever.errors import LoraRetrieverError, ModelLoadError
from loraretriever.server import run
from loraretriever.server.run import GracefulServer, Plan
from loraretriever.server.sockets import listen, url_of

WAIT = 30.0


class Served:
    """A small application on a real socket, in a thread; its requests go on when the test says so."""

    def __init__(self, is_replacement: bool = False, **settings: object) -> None:
        self.state = SimpleNamespace(is_loaded=False, loading_error=None, is_stopping=False)
        self.entered, self.ready = threading.Event(), threading.Event()
        self.cancelled = threading.Event()
        self.go_on: asyncio.Event | None = None
        self.listener = listen("127.0.0.1", 0)
        self.url = url_of(self.listener)
        self.left: list[int] = []  # exit codes of what would have ended the process
        self.server = GracefulServer(
            self._app(), ServerSettings(**settings), self.ready.set, is_replacement, self.left.append
        )
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],))

    def _app(self) -> FastAPI:
        app = FastAPI()
        app.state.server = self.state

        async def wait() -> None:
            self.loop, self.go_on = asyncio.get_running_loop(), asyncio.Event()
            self.entered.set()
            try:
                await self.go_on.wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise

        @app.get("/plain")
        async def plain() -> JSONResponse:
            await wait()
            return JSONResponse({"done": True})

        @app.get("/stream")
        async def stream(kind: str = "text/event-stream") -> StreamingResponse:
            async def events() -> AsyncIterator[bytes]:
                yield b"data: 1\n\n"
                await wait()
                yield b"data: [DONE]\n\n"

            return StreamingResponse(events(), media_type=kind)

        @app.get("/ready")
        async def ready() -> JSONResponse:
            return JSONResponse({}, 503 if self.state.is_stopping or not self.state.is_loaded else 200)

        return app

    def stop(self, number: int = signal.SIGTERM) -> None:
        self.server.handle_exit(number, None)

    def release(self) -> None:
        self.loop.call_soon_threadsafe(self.go_on.set)

    def join(self) -> None:
        self.thread.join(WAIT)
        assert not self.thread.is_alive()


@contextmanager
def served(**settings: object) -> Iterator[Served]:
    server = Served(**settings)
    server.thread.start()
    try:
        yield server
    finally:
        server.stop()
        server.join()
        server.listener.close()


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=WAIT, trust_env=False) as opened:
        yield opened


def in_thread(client: httpx.Client, url: str) -> tuple[threading.Thread, list[httpx.Response | httpx.HTTPError]]:
    answers: list[httpx.Response | httpx.HTTPError] = []

    def get() -> None:
        try:
            answers.append(client.get(url))
        except httpx.HTTPError as error:
            answers.append(error)

    thread = threading.Thread(target=get)
    thread.start()
    return thread, answers


def test_running_requests_finish_and_the_server_answers_meanwhile(client: httpx.Client) -> None:
    with served() as server:
        thread, answers = in_thread(client, server.url + "/plain")
        assert server.entered.wait(WAIT)
        server.stop()
        assert client.get(server.url + "/ready").status_code == 503, "told to new requests, instead of a closed port"
        assert server.thread.is_alive()
        server.release()
        thread.join(WAIT)
        server.join()
    assert answers[0].json() == {"done": True}
    with pytest.raises(httpx.ConnectError):
        client.get(server.url + "/ready")


def test_what_does_not_finish_in_time_is_told_so(client: httpx.Client) -> None:
    with served(shutdown_seconds=0.2) as server:
        thread, answers = in_thread(client, server.url + "/plain")
        assert server.entered.wait(WAIT)
        server.stop()
        thread.join(WAIT)
        server.join()
    assert server.cancelled.is_set()
    assert answers[0].status_code == 503
    assert answers[0].headers["retry-after"] == "5"
    assert answers[0].json()["error"]["code"] == "stopping"


def test_a_stream_that_does_not_finish_in_time_ends_with_an_error(client: httpx.Client) -> None:
    with served(shutdown_seconds=0.2) as server:
        thread, answers = in_thread(client, server.url + "/stream")
        assert server.entered.wait(WAIT)
        server.stop()
        thread.join(WAIT)
        server.join()
    first, last = (event.removeprefix("data: ") for event in answers[0].text.split("\n\n")[:-1])
    assert first == "1"
    assert json.loads(last)["error"]["code"] == "stopping"


def test_a_download_that_does_not_finish_in_time_is_seen_to_be_cut_off(client: httpx.Client) -> None:
    with served(shutdown_seconds=0.2) as server:
        thread, answers = in_thread(client, server.url + "/stream?kind=text/plain")
        assert server.entered.wait(WAIT)
        server.stop()
        thread.join(WAIT)
        server.join()
    assert isinstance(answers[0], httpx.RemoteProtocolError)


def test_ready_is_said_once_the_models_are_loaded(client: httpx.Client) -> None:
    with served() as server:
        assert client.get(server.url + "/ready").status_code == 503
        assert not server.ready.is_set()
        server.state.is_loaded = True
        assert server.ready.wait(WAIT)
        assert client.get(server.url + "/ready").status_code == 200


def test_the_server_ends_when_the_models_cannot_be_loaded() -> None:
    with served() as server:
        server.state.loading_error = ModelLoadError("no such model")
        server.join()
    assert not server.ready.is_set()


def test_a_replacement_listens_when_its_models_are_loaded(client: httpx.Client) -> None:
    with served(is_replacement=True) as server:
        thread, answers = in_thread(client, server.url + "/ready")  # waits in the socket's queue
        assert not server.server.started
        server.state.is_loaded = True
        thread.join(WAIT)
    assert answers[0].status_code == 200


def test_a_replacement_can_be_stopped_before_it_is_loaded() -> None:
    with served(is_replacement=True) as server:
        server.stop()
        server.join()


def test_nobody_waits_for_models_that_are_not_needed_any_more() -> None:
    with served() as server:
        server.stop()
        server.join()
    assert server.left == [0]


def test_a_second_interrupt_ends_the_process(client: httpx.Client) -> None:
    with served() as server:
        server.state.is_loaded = True
        thread, _ = in_thread(client, server.url + "/plain")
        assert server.entered.wait(WAIT)
        server.stop(signal.SIGINT)
        server.stop(signal.SIGTERM)
        assert server.left == [], "a terminal's interrupt, and then the parent's signal"
        server.stop(signal.SIGINT)
        assert server.left == [128 + signal.SIGINT]
        server.release()
        thread.join(WAIT)
        server.join()
    assert len(server.left) == 1


def test_a_head_without_end_is_refused() -> None:
    with served() as server, socket.create_connection(server.listener.getsockname(), timeout=WAIT) as connection:
        connection.sendall(b"GET /ready HTTP/1.1\r\nhost: x\r\n")
        sent = 0
        with pytest.raises(OSError):  # closed by the server
            while sent < 64 * run._HEAD_BYTES:
                connection.sendall(b"x-filler: " + b"a" * 1000 + b"\r\n")
                sent += 1012


def test_a_large_body_is_not_taken_for_a_head() -> None:
    size = 4 * run._HEAD_BYTES
    first = b"GET /ready HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % size + b"x" * size
    with served() as server, socket.create_connection(server.listener.getsockname(), timeout=WAIT) as connection:
        connection.sendall(first + b"GET /ready HTTP/1.1\r\nhost: x\r\n")
        connection.sendall(b"connection: close\r\n\r\n")
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert received.count(b"HTTP/1.1 503") == 2


def test_a_plan_travels_whole() -> None:
    plan = Plan("pool", Settings(k=5, encoder="e"), ServerSettings(adapter_root=Path("a"), cors_origins=("*",)))
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_an_application_that_does_not_start_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    @asynccontextmanager
    async def start(app: FastAPI) -> AsyncIterator[None]:
        raise RuntimeError("broken")
        yield

    @contextmanager
    def broken(plan: Plan) -> Iterator[FastAPI]:
        app = FastAPI(lifespan=start)
        app.state.server = SimpleNamespace(is_loaded=False, loading_error=None, is_stopping=False)
        yield app

    plan = Plan("pool", Settings(), ServerSettings())
    with (
        caplog.at_level(logging.ERROR),
        listen("127.0.0.1", 0) as listener,
        pytest.raises(LoraRetrieverError, match="could not start"),
    ):
        run.serve_here(plan, listener, lambda: None, broken)
    assert "broken" in caplog.text
