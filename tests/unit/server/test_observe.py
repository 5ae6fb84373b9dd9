from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send

from loraretriever.server import errors, logs, observe
from loraretriever.server.auth import Caller
from loraretriever.server.metrics import Metrics
from loraretriever.types import Generation

GENERATION = Generation("the answer", "stop", 10, 5, 1.0, first_token_seconds=0.5, cached_tokens=4)
router = APIRouter(prefix="/v1")


@router.get("/adapters/{name:path}")
async def adapter(name: str) -> dict[str, str]:
    return {"id": observe.current().id}


@router.get("/health")
async def health() -> None:
    logging.getLogger("loraretriever.server").info("inside")


@router.post("/answer")
async def answer(request: Request, stream: bool = False) -> object:
    request.scope["loraretriever.caller"] = Caller(frozenset({"generate"}), "acme")
    record = observe.current()
    record.asked("chat", "auto", stream=stream)

    def complete() -> None:
        record.composed("mixture(a=0.7,b=0.3)", fallback=False, prompt="a secret prompt")
        record.answered(GENERATION, 0)
        record.answered(
            Generation("another", "length", 10, 7, 1.0, index=1, first_token_seconds=0.25, cached_tokens=4), 0
        )

    async def pieces() -> AsyncIterator[str]:
        yield "a"
        complete()
        yield "b"

    if stream:
        return StreamingResponse(pieces())
    await asyncio.to_thread(complete)
    return {}


@router.get("/broken")
async def broken() -> None:
    raise ValueError("unforeseen")


@router.get("/broken-stream")
async def broken_stream() -> StreamingResponse:
    async def pieces() -> AsyncIterator[str]:
        yield "a"
        raise ValueError("unforeseen")

    return StreamingResponse(pieces())


def make_app(metrics: Metrics, log_prompts: bool = False) -> FastAPI:
    app = FastAPI()
    app.include_router(router)
    app.mount("/static", StaticFiles(packages=[("starlette", ".")], check_dir=False), name="static")
    errors.install(app)
    app.add_middleware(observe.ObserveMiddleware, metrics=metrics, log_prompts=log_prompts)
    return app


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def call(app: FastAPI, method: str, path: str, root_path: str = "", **options: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(app, root_path=root_path)
        async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
            return await client.request(method, path, **options)

    return asyncio.run(once())


def requests(metrics: Metrics) -> list[tuple[str, ...]]:
    """(endpoint, method, status) of all requests that were counted."""
    return sorted(metrics.figures().values["loraretriever:http_requests_total"])


def access_line(caplog: pytest.LogCaptureFixture) -> dict[str, Any]:
    """The only line of the access log, as JSON shows it."""
    (record,) = [each for each in caplog.records if each.name == "loraretriever.access"]
    found: dict[str, Any] = json.loads(logs.JsonFormatter().format(record))
    return found


@pytest.fixture(autouse=True)
def listening(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "loraretriever")


@pytest.mark.parametrize(
    ("method", "path", "endpoint", "status"),
    [
        ("GET", "/v1/adapters/acme/a%20b", "/v1/adapters/{name:path}", "200"),
        ("GET", "/v1/answer", "/v1/answer", "405"),
        ("GET", "/nothing/here", "unknown", "404"),
        ("GET", "/static/nothing.js", "/static/*", "404"),
        ("BREW", "/coffee", "unknown", "404"),
    ],
)
def test_requests_are_counted_by_their_route_s_template(
    metrics: Metrics, method: str, path: str, endpoint: str, status: str
) -> None:
    call(make_app(metrics), method, path)
    assert requests(metrics) == [(endpoint, "other" if method == "BREW" else method, status)]


def test_a_proxy_s_path_is_no_part_of_the_template(metrics: Metrics) -> None:
    for path in ("/static/nothing.js", "/v1/adapters/a"):
        call(make_app(metrics), "GET", "/models" + path, root_path="/models")
    assert [endpoint for endpoint, *_ in requests(metrics)] == ["/static/*", "/v1/adapters/{name:path}"]


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [
        ("r-1:abc", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("", False),
        ("a b", False),
        ("a\tb", False),
        ("caf\u00e9", False),
    ],
)
def test_request_ids(metrics: Metrics, given: str, is_kept: bool) -> None:
    response = call(make_app(metrics), "GET", "/v1/adapters/a", headers={"x-request-id": given.encode("latin-1")})
    identity = response.headers["x-request-id"]
    assert response.json()["id"] == identity
    assert (identity == given) == is_kept
    assert is_kept or len(identity) == 32


def test_each_request_has_an_id_of_its_own(metrics: Metrics) -> None:
    app = make_app(metrics)
    assert len({call(app, "GET", "/nothing").headers["x-request-id"] for _ in range(3)}) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_the_line_of_an_answer(metrics: Metrics, stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    response = call(make_app(metrics), "POST", f"/v1/answer?stream={stream}", headers={"x-request-id": "r1"})
    assert response.status_code == 200
    line = access_line(caplog)
    assert line.pop("seconds") >= 0
    assert line.pop("time")
    expected = {
        "level": "info",
        "logger": "loraretriever.access",
        "message": "POST /v1/answer 200",
        "method": "POST",
        "route": "/v1/answer",
        "status": 200,
        "model": "auto",
        "composition": "mixture(a=0.7,b=0.3)",
        "fallback": False,
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "completion_tokens": 12,
        "first_token_seconds": 0.25,
        "key": None,
        "tenant": "acme",
        "finish_reason": "stop,length",
    }
    assert line == expected | ({"stream": True} if stream else {})


def test_prompts_and_answers_are_logged_only_on_demand(metrics: Metrics, caplog: pytest.LogCaptureFixture) -> None:
    call(make_app(metrics), "POST", "/v1/answer")
    line = access_line(caplog)
    assert "secret" not in json.dumps(line) and "the answer" not in json.dumps(line)
    caplog.clear()
    call(make_app(metrics, log_prompts=True), "POST", "/v1/answer")
    line = access_line(caplog)
    assert line["prompts"] == ["a secret prompt"]
    assert line["answers"] == ["the answer", "another"]


def test_logs_of_a_request_have_its_id_and_others_none(
    metrics: Metrics, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.handler.setFormatter(logs.JsonFormatter())
    seen = []
    monkeypatch.setattr(caplog.handler, "emit", lambda record: seen.append(json.loads(caplog.handler.format(record))))
    call(make_app(metrics), "GET", "/v1/health", headers={"x-request-id": "r1"})
    logging.getLogger("loraretriever.server").info("outside")
    assert {line["message"]: line.get("request_id") for line in seen} == {
        "inside": "r1",
        "GET /v1/health 200": "r1",
        "outside": None,
    }


@pytest.mark.parametrize(("status", "is_logged"), [(200, False), (503, False), (500, True), (403, True)])
def test_the_usual_answers_to_probes_are_not_logged(
    metrics: Metrics, caplog: pytest.LogCaptureFixture, status: int, is_logged: bool
) -> None:
    app = make_app(metrics)

    @app.get("/ready", status_code=status)
    async def ready() -> None:
        pass

    call(app, "GET", "/ready")
    assert bool(caplog.records) == is_logged
    assert requests(metrics) == [("/ready", "GET", str(status))]


def test_an_unforeseen_error_is_answered_and_logged_once(metrics: Metrics, caplog: pytest.LogCaptureFixture) -> None:
    response = call(make_app(metrics), "GET", "/v1/broken")
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "unforeseen" not in response.text
    assert response.headers["x-request-id"]
    assert requests(metrics) == [("/v1/broken", "GET", "500")]
    assert len([record for record in caplog.records if record.exc_info]) == 1
    assert access_line(caplog)["status"] == 500


def test_an_answer_that_breaks_off_is_logged_as_it_began(metrics: Metrics, caplog: pytest.LogCaptureFixture) -> None:
    messages = [{"type": "http.request", "body": b"", "more_body": False}]
    sent = serve_by_hand(make_app(metrics), messages, "/v1/broken-stream")
    assert [message.get("more_body") for message in sent] == [None, True]  # it never ends: the server closes it
    assert len([record for record in caplog.records if record.exc_info]) == 1
    line = access_line(caplog)
    assert line["status"] == 200
    assert line["broken"] is True


def serve_by_hand(app: Any, messages: list[Message], path: str = "/") -> list[Message]:
    """Call an application with the messages of a server; what it sends."""
    sent: list[Message] = []

    async def receive() -> Message:
        return messages.pop(0) if messages else await asyncio.Future()  # type: ignore[no-any-return]

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "asgi": {"spec_version": "2.3"}, "method": "GET", "path": path, "headers": []}
    asyncio.run(app(scope | {"client": None, "server": None, "query_string": b""}, receive, send))
    return sent


def test_a_client_that_does_not_wait(metrics: Metrics, caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "http.disconnect"

    assert serve_by_hand(observe.ObserveMiddleware(app, metrics), [{"type": "http.disconnect"}]) == []
    assert requests(metrics) == [("unknown", "GET", "499")]
    assert access_line(caplog)["client_gone"] is True


def test_a_client_that_goes_during_the_answer(metrics: Metrics, caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await receive()

    serve_by_hand(observe.ObserveMiddleware(app, metrics), [{"type": "http.disconnect"}])
    line = access_line(caplog)
    assert (line["status"], line["client_gone"]) == (200, True)


def test_a_client_that_goes_after_the_answer_is_nothing_special(
    metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"a"})
        await receive()

    serve_by_hand(observe.ObserveMiddleware(app, metrics), [{"type": "http.disconnect"}])
    assert "client_gone" not in access_line(caplog)
    assert "broken" not in access_line(caplog)


def test_a_task_that_is_cancelled_stays_so_and_is_counted(metrics: Metrics) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        serve_by_hand(observe.ObserveMiddleware(app, metrics), [])
    assert requests(metrics) == [("unknown", "GET", "503")]
    assert metrics.figures().values["loraretriever:http_requests_open"] == {(): [0]}


def test_other_connections_pass(metrics: Metrics) -> None:
    passed = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        passed.append(scope["type"])

    async def never() -> Message:
        raise AssertionError

    async def ignore(message: Message) -> None:
        raise AssertionError

    asyncio.run(observe.ObserveMiddleware(app, metrics)({"type": "lifespan"}, never, ignore))
    assert passed == ["lifespan"]
    assert requests(metrics) == []


def test_outside_of_a_request_nothing_is_kept() -> None:
    observe.current().asked("chat", "auto")
    assert observe.current().fields == {}


def test_several_prompts_in_one_request() -> None:
    record = observe.Record("r1")
    record.composed("sql", fallback=False)
    record.composed("base", fallback=True)
    record.composed("sql", fallback=False)
    for _ in range(2):
        record.answered(GENERATION, 0)
    fields = record.finish()
    assert fields["composition"] == "several"
    assert fields["fallback"] is True
    assert fields["prompt_tokens"] == 20
    assert fields["finish_reason"] == "stop"
