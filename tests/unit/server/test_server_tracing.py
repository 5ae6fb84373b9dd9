from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from loraretriever.server import errors, observe, tracing
from loraretriever.server.metrics import Metrics
from loraretriever.tracing import span
from loraretriever.types import Generation, Sampling

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
QUEUE, FIRST, WHOLE = 1e-6, 3e-6, 4e-6  # seconds, shorter than what follows the submission really takes


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    """Keeps the spans of this process; OpenTelemetry takes a provider only once."""
    kept = InMemorySpanExporter()
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        provider = TracerProvider(shutdown_on_exit=False)
        trace.set_tracer_provider(provider)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    return kept


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Iterator[InMemorySpanExporter]:
    exporter.clear()
    yield exporter


def answer_in_threads(fails: bool = False) -> Generation:
    """What an endpoint does in a thread: retrieval, submission, and an answer that comes later."""
    with span("encode", texts=1):
        pass
    with span("search"):
        pass
    with span("compose"):
        pass
    return Generation(
        "the answer", "stop", 10, 5, WHOLE, first_token_seconds=FIRST, queue_seconds=QUEUE, cached_tokens=4
    )


def make_app(log_prompts: bool = False) -> FastAPI:
    app = FastAPI(telemetry={"tracing": False})  # FastAPI's own span would stand beside ours

    @app.post("/v1/chat/{kind}")
    async def chat(kind: str) -> dict[str, str]:
        record = observe.current()
        record.asked("chat", "auto", Sampling(max_tokens=7, temperature=0.5, seed=3), stream=False)
        if kind == "broken":
            raise ValueError("unforeseen")
        generation = await asyncio.to_thread(answer_in_threads)
        submitted_ns = time.time_ns()
        record.composed("sql", fallback=False, prompt="a secret prompt")
        # An engine's thread calls back without the request's context.
        with ThreadPoolExecutor(1) as engine:
            engine.submit(record.answered, generation, submitted_ns).result()
        return {}

    errors.install(app)
    app.add_middleware(observe.ObserveMiddleware, metrics=Metrics(), log_prompts=log_prompts)
    return app


def call(app: FastAPI, path: str, method: str = "POST", **headers: str) -> httpx.Response:
    async def once() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://testserver") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(once())


def by_name(spans: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {each.name: each for each in spans.get_finished_spans()}


def identity(each: ReadableSpan) -> tuple[int, int]:
    return each.context.trace_id, each.context.span_id


def test_the_spans_of_a_request(spans: InMemorySpanExporter) -> None:
    call(make_app(), "/v1/chat/completions", traceparent=f"00-{TRACE}-{PARENT}-01")
    found = by_name(spans)
    server = found.pop("POST /v1/chat/{kind}")
    assert server.kind is trace.SpanKind.SERVER
    assert trace.format_trace_id(server.context.trace_id) == TRACE
    assert server.parent is not None and trace.format_span_id(server.parent.span_id) == PARENT
    order = [f"loraretriever.{stage}" for stage in ("encode", "search", "compose", "queue", "prefill", "decode")]
    assert sorted(found, key=lambda name: found[name].start_time or 0) == order
    before = server.start_time or 0
    for name in order:
        child = found[name]
        assert child.parent is not None
        assert (child.parent.trace_id, child.parent.span_id) == identity(server)
        assert child.start_time is not None and child.end_time is not None and server.end_time is not None
        assert before <= child.start_time <= child.end_time <= server.end_time
        before = child.end_time
    lengths = {name: (found[f"loraretriever.{name}"].end_time or 0) - (found[f"loraretriever.{name}"].start_time or 0)
               for name in ("queue", "prefill", "decode")}  # fmt: skip
    assert lengths == {"queue": 1000, "prefill": 2000, "decode": 1000}


def test_attributes_by_the_conventions(spans: InMemorySpanExporter) -> None:
    headers = {"x-request-id": "r1", "user-agent": "curl"}
    call(make_app(), "/v1/chat/completions", **headers)
    server = by_name(spans)["POST /v1/chat/{kind}"]
    assert dict(server.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/{kind}",
        "http.response.status_code": 200,
        "url.path": "/v1/chat/completions",
        "url.scheme": "http",
        "network.protocol.version": "1.1",
        "server.address": "testserver",
        "client.address": "127.0.0.1",
        "user_agent.original": "curl",
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "loraretriever",
        "gen_ai.request.model": "auto",
        "gen_ai.request.stream": False,
        "gen_ai.request.max_tokens": 7,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.seed": 3,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.response.time_to_first_chunk": FIRST,
        "gen_ai.usage.input_tokens": 10,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.usage.output_tokens": 5,
        "loraretriever.request_id": "r1",
        "loraretriever.composition": "sql",
        "loraretriever.fallback": False,
    }
    assert server.status.status_code is trace.StatusCode.UNSET


def test_attribute_names_are_those_of_the_conventions() -> None:
    from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
    from opentelemetry.semconv.attributes import http_attributes, url_attributes

    known = {
        value
        for module in (gen_ai_attributes, http_attributes, url_attributes)
        for value in vars(module).values()
        if isinstance(value, str)
    }
    folder = Path(tracing.__file__).parent
    text = "".join((folder / name).read_text(encoding="utf-8") for name in ("spans.py", "observe.py"))
    used = set(re.findall(r'"((?:gen_ai|http|url)\.[a-z_.]+)"', text)) - {"http.disconnect", "http.response.start"}
    assert len(used) > 20
    assert used <= known


def texts_of(spans: InMemorySpanExporter) -> str:
    return " ".join(each.to_json() for each in spans.get_finished_spans())


def test_prompts_are_in_no_span_unless_asked_for(spans: InMemorySpanExporter) -> None:
    call(make_app(), "/v1/chat/completions")
    assert "secret" not in texts_of(spans) and "the answer" not in texts_of(spans)
    spans.clear()
    call(make_app(log_prompts=True), "/v1/chat/completions")
    attributes = by_name(spans)["POST /v1/chat/{kind}"].attributes or {}
    messages = [json.loads(str(attributes[f"gen_ai.{side}.messages"])) for side in ("input", "output")]
    assert messages == [
        [{"role": "user", "parts": [{"type": "text", "content": "a secret prompt"}]}],
        [{"role": "assistant", "parts": [{"type": "text", "content": "the answer"}]}],
    ]


def test_an_unforeseen_error_is_in_the_span(spans: InMemorySpanExporter) -> None:
    call(make_app(), "/v1/chat/broken")
    server = by_name(spans)["POST /v1/chat/{kind}"]
    assert server.status.status_code is trace.StatusCode.ERROR
    assert (server.attributes or {})["error.type"] == "ValueError"
    assert [event.name for event in server.events] == ["exception"]


def test_what_no_route_takes_has_the_method_alone_for_a_name(spans: InMemorySpanExporter) -> None:
    call(make_app(), "/nothing/here", "GET")
    call(make_app(), "/nothing/here", "BREW")
    found = by_name(spans)
    assert set(found) == {"GET", "HTTP"}
    assert "http.route" not in (found["GET"].attributes or {})
    assert found["GET"].status.status_code is trace.StatusCode.UNSET  # 404 is no error of the server's
    assert (found["HTTP"].attributes or {})["http.request.method_original"] == "BREW"


@pytest.mark.parametrize("header", ["", "nonsense", f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{PARENT}"])
def test_a_bad_parent_begins_a_new_trace(spans: InMemorySpanExporter, header: str) -> None:
    call(make_app(), "/nothing", traceparent=header)
    server = by_name(spans)["POST"]
    assert server.parent is None


def test_a_trace_that_its_caller_does_not_record_is_not_recorded(spans: InMemorySpanExporter) -> None:
    call(make_app(), "/v1/chat/completions", traceparent=f"00-{TRACE}-{PARENT}-00")
    assert spans.get_finished_spans() == ()


def test_stages_that_an_answer_never_came_to(spans: InMemorySpanExporter) -> None:
    scope: dict[str, Any] = {"type": "http", "method": "GET", "path": "/", "headers": []}
    request = tracing.start_request(scope, {})
    assert request is not None
    request.record_generation(Generation("", "timeout", 3, 0, 2.0), 1_000)
    request.record_generation(Generation("", "aborted", 3, 0, 2.0, queue_seconds=0.5), 1_000)
    request.end(None, 200, None)
    stages = [each for each in spans.get_finished_spans() if each.name.startswith("loraretriever.")]
    assert [(each.name, each.start_time, each.end_time) for each in stages] == [
        ("loraretriever.queue", 1_000, 2_000_001_000),
        ("loraretriever.queue", 1_000, 500_001_000),
        ("loraretriever.prefill", 500_001_000, 2_000_001_000),
    ]


def test_requests_that_run_at_once_keep_their_spans_apart(spans: InMemorySpanExporter) -> None:
    app = make_app()

    async def all_at_once() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://testserver") as client:
            await asyncio.gather(*(client.post("/v1/chat/completions") for _ in range(8)))

    asyncio.run(all_at_once())
    finished = spans.get_finished_spans()
    servers = {identity(each) for each in finished if each.kind is trace.SpanKind.SERVER}
    assert len(servers) == 8
    children: dict[tuple[int, int], int] = {}
    for each in finished:
        if each.parent is not None:
            assert each.parent.trace_id == each.context.trace_id
            place = each.parent.trace_id, each.parent.span_id
            children[place] = children.get(place, 0) + 1
    assert children == dict.fromkeys(servers, 6)


@pytest.mark.parametrize(
    ("endpoint", "address"),
    [
        ("http://host:4318", "http://host:4318/v1/traces"),
        ("http://host:4318/", "http://host:4318/v1/traces"),
        ("http://host/otel", "http://host/otel/v1/traces"),
        ("http://host:4318/v1/traces", "http://host:4318/v1/traces"),
    ],
)
def test_where_traces_go(endpoint: str, address: str) -> None:
    assert tracing.traces_address(endpoint) == address


def test_a_collector_receives_the_spans_and_the_service_s_name() -> None:
    received: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.path == "/v1/traces":
                received.append(body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    program = (
        "import sys; from loraretriever.server import tracing\n"
        "close = tracing.configure(sys.argv[1])\n"
        "scope = {'type': 'http', 'method': 'GET', 'path': '/', 'headers': []}\n"
        "tracing.start_request(scope, {}).end('/', 200, None)\n"
        "close(); close()\n"
    )
    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
        subprocess.run([sys.executable, "-c", program, address], check=True, env=environment)
        server.shutdown()
        thread.join()
    (sent,) = ExportTraceServiceRequest.FromString(b"".join(received)).resource_spans
    resource = {each.key: each.value.string_value for each in sent.resource.attributes}
    assert resource["service.name"] == "loraretriever"
    assert [each.name for each in sent.scope_spans[0].spans] == ["GET /"]


def test_without_a_collector_there_are_no_spans() -> None:
    program = (
        "import sys; from loraretriever.server import observe, tracing\n"
        "tracing.configure(None)()\n"
        "assert tracing.start_request({'type': 'http'}, {}) is None\n"
        "import opentelemetry.trace\n"
        "assert tracing.start_request({'type': 'http'}, {}) is None\n"
        "assert 'opentelemetry.sdk.trace' not in sys.modules\n"
        "assert 'loraretriever.server.spans' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_the_extra_the_error_names_it() -> None:
    program = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from loraretriever.server import tracing\n"
        "tracing.configure('http://host:4318')\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "pip install 'loraretriever[otel]'" in ended.stderr


@pytest.mark.parametrize("stream", [False, True])
def test_the_whole_server_traces_each_stage(
    spans: InMemorySpanExporter, serve: Callable[..., Any], stream: bool
) -> None:
    body = {"messages": [{"role": "user", "content": "Write a query."}], "max_tokens": 4, "stream": stream}
    with serve() as served, served.client() as client:
        spans.clear()  # of the polls until it was ready
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        assert client.post("/v1/chat/completions", json=body, headers=headers).status_code == 200
    found = {each.name: each for each in spans.get_finished_spans() if f"{each.context.trace_id:032x}" == TRACE}
    stages = [f"loraretriever.{name}" for name in ("encode", "search", "compose", "queue", "prefill", "decode")]
    assert set(found) == {*stages, "POST /v1/chat/completions"}, "each once, and nobody else's"
    root = found["POST /v1/chat/completions"]
    assert all(found[name].parent.span_id == root.context.span_id for name in stages)
    starts = [found[name].start_time for name in stages]
    assert starts == sorted(starts)
    assert all(root.start_time <= found[name].start_time <= found[name].end_time <= root.end_time for name in stages)
    assert root.attributes["gen_ai.request.model"] == "auto"
    assert root.attributes["gen_ai.usage.output_tokens"] <= 4
    assert "query" not in json.dumps({key: str(value) for key, value in root.attributes.items()})
