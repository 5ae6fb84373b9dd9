"""The engine over vLLM's servers, against a server that plays a script. tests/vllm has the same with real ones."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from loraretriever.compose import compose_explicit, format_composition
from loraretriever.compose.folders import AdapterFolders
from loraretriever.config import load_settings
from loraretriever.engine.vllm import remote
from loraretriever.engine.vllm.engine import VllmEngine
from loraretriever.engine.vllm.remote import RemoteBackend
from loraretriever.errors import (
    AdapterNotFoundError,
    EngineError,
    InvalidInputError,
    LoraRetrieverError,
    ModelLoadError,
    OverloadedError,
)
from loraretriever.pipeline import LoraRetriever
from loraretriever.pool import Pool
from loraretriever.retrieve import PaperRetriever
from loraretriever.retrieve.loading import load_retriever
from loraretriever.types import Composition, Piece, Request, Sampling
from tiny import TINY_BASE, TINY_SPEC, write_peft_folder
from tiny_text import WordEncoder, tiny_tokenizer
from unit.server.conftest import serving_app

INFO = {
    "version": "0",
    "model": "m",
    "max_length": 64,
    "pool": True,
    "max_rank": 8,
    "slots": 4,
    "base": "base",
    "lanes": False,
}
TEXT = "an answer"
MIXTURE = compose_explicit("mixture", {"sql": 0.5, "german": 0.5})


class FakeVllm:
    """A vLLM server that answers each request by the next step of its script; at the end, well."""

    def __init__(self) -> None:
        self.script: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.connections: list[int] = []  # the client's port, for each request
        self.aborted = threading.Event()
        self.go_on = threading.Event()
        self.info: Any = INFO
        self.health = 200
        self.asked, self.asked_again = threading.Event(), threading.Event()
        routes = [
            Route("/health", self._live),
            Route("/loraretriever", self._tell),
            Route("/v1/completions", self._complete, methods=["POST"]),
        ]
        self.app = Starlette(routes=routes)
        self.url = ""

    async def _tell(self, request: HttpRequest) -> Response:
        return Response(status_code=404) if self.info is None else JSONResponse(self.info)

    async def _live(self, request: HttpRequest) -> Response:
        (self.asked_again if self.asked.is_set() else self.asked).set()
        return Response(status_code=self.health)

    async def _complete(self, request: HttpRequest) -> Response:
        body = await request.json()
        self.bodies.append(body)
        assert request.client is not None
        self.connections.append(request.client.port)
        step = self.script.pop(0) if self.script else "answer"
        if step.isdecimal():
            return JSONResponse({"error": {"message": f"said {step}", "code": int(step)}}, int(step))
        return StreamingResponse(self._events(step, body), media_type="text/event-stream")

    async def _events(self, step: str, body: dict[str, Any]) -> AsyncIterator[str]:
        import asyncio

        if step == "cut before":
            raise ConnectionError
        try:
            for index in range(body["n"]):
                ids = tiny_tokenizer()(TEXT).input_ids
                for place, token in enumerate(ids):
                    if step == "cut" and place == 2:
                        raise ConnectionError
                    while step == "hang" and place == 2:
                        await asyncio.sleep(0.01)
                        if self.go_on.is_set():
                            return
                    if step == "error" and place == 2:
                        yield event({"error": {"message": "broken inside"}})
                        return
                    reason = "stop" if place == len(ids) - 1 else None
                    yield event({"choices": [choice(index, token, reason, body["logprobs"])]})
            yield event({"choices": [], "usage": {"prompt_tokens_details": {"cached_tokens": 5}}})
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.aborted.set()
            raise


def event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def choice(index: int, token: int, reason: str | None, logprobs: int | None) -> dict[str, Any]:
    told = None
    if logprobs is not None:
        told = {"token_logprobs": [-0.5], "top_logprobs": [{f"token_id:{token}": -0.5, "token_id:9": -1.5}]}
    return {"index": index, "token_ids": [token], "finish_reason": reason, "logprobs": told}


@contextmanager
def running(fake: FakeVllm) -> Iterator[FakeVllm]:
    server = uvicorn.Server(uvicorn.Config(fake.app, port=0, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    pause = threading.Event()
    while not server.started:
        assert thread.is_alive()
        pause.wait(0.01)
    fake.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield fake
    finally:
        fake.go_on.set()
        server.should_exit = True
        thread.join()


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
    with running(FakeVllm()) as server:
        yield server


@pytest.fixture
def other() -> Iterator[FakeVllm]:
    with running(FakeVllm()) as server:
        yield server


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    folder = tmp_path_factory.mktemp("pools")
    with Pool.create(folder / "pool", TINY_BASE, spec=TINY_SPEC) as opened:
        for seed, name in enumerate(("sql", "german", "math")):
            opened.add(write_peft_folder(folder / name, seed=seed), samples=[name])
        yield opened


@contextmanager
def engine_over(
    pool: Pool, folder: Path, *servers: FakeVllm, timeout: float = 20.0, **options: Any
) -> Iterator[VllmEngine]:
    backend = RemoteBackend([server.url for server in servers], "secret", timeout)
    folders = AdapterFolders(pool, folder, 1 << 20)
    engine = VllmEngine(backend, folders, tiny_tokenizer(), 100, [2], **options)
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture
def engine(pool: Pool, tmp_path: Path, fake: FakeVllm) -> Iterator[VllmEngine]:
    with engine_over(pool, tmp_path, fake) as made:
        yield made


def ask(engine: VllmEngine, **sampling: Any) -> Request:
    return Request("What?", MIXTURE, Sampling(**{"max_tokens": 16, **sampling}), namespace="acme")


def of(composition: Composition) -> Request:
    return Request("What?", composition, Sampling(max_tokens=16))


def test_a_composition_travels_by_its_name_and_a_prompt_by_its_tokens(
    engine: VllmEngine, fake: FakeVllm, pool: Pool
) -> None:
    pieces = list(engine.submit(ask(engine)))
    assert "".join(piece.text for piece in pieces) == TEXT
    assert [piece.finish_reason for piece in pieces[-2:]] == [None, "stop"]
    (body,) = fake.bodies
    digests = [pool.get(name).digest[:12] for name in ("german", "sql")]
    assert body["model"] == f"mixture(german@{digests[0]}=0.5,sql@{digests[1]}=0.5)"
    assert body["prompt"] == tiny_tokenizer()("<What?>=").input_ids
    assert (body["cache_salt"], body["temperature"]) == ("acme", 0.0)


def test_an_answer_as_a_whole(engine: VllmEngine) -> None:
    (answer,) = engine.submit(ask(engine, logprobs=1)).result()
    assert (answer.text, answer.finish_reason, answer.completion_tokens) == (TEXT, "stop", len(TEXT))
    assert (answer.prompt_tokens, answer.cached_tokens) == (len("<What?>="), 5)
    assert answer.first_token_seconds is not None and answer.queue_seconds is not None
    assert answer.logprobs[0].logprob == -0.5
    assert [top.token for top in answer.logprobs[0].top] == [answer.logprobs[0].token, 9]
    stats = engine.stats()
    assert (stats.running, stats.generated_tokens, stats.prompt_tokens) == (0, len(TEXT), len("<What?>="))


def test_stop_strings_are_found_here_and_end_the_request_there(engine: VllmEngine, fake: FakeVllm) -> None:
    fake.script = ["hang"]
    (answer,) = engine.submit(ask(engine, stop=("n",))).result()
    assert (answer.text, answer.finish_reason) == ("a", "stop")
    assert fake.aborted.wait(10)


def test_base_model_and_several_answers(engine: VllmEngine, fake: FakeVllm) -> None:
    for temperature, asked in ((1.0, 3), (0.0, 1)):  # vLLM does not make several greedy answers
        sampling = Sampling(n=3, max_tokens=16, temperature=temperature)
        answers = engine.submit(Request("What?", sampling=sampling)).result()
        assert [(answer.index, answer.text) for answer in answers] == [(0, TEXT), (1, TEXT), (2, TEXT)]
        body = fake.bodies.pop()
        assert (body["model"], body["n"]) == ("base", asked)


def test_a_connection_is_used_again(engine: VllmEngine, fake: FakeVllm) -> None:
    for _ in range(5):
        engine.submit(ask(engine)).result()
    assert len(fake.connections) == 5 and len(set(fake.connections)) == 1


def test_run_yields_all(engine: VllmEngine, fake: FakeVllm) -> None:
    found = dict(engine.run([ask(engine)] * 5))
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert {answer.text for answer in found.values()} == {TEXT}


def test_run_waits_where_too_much_is_under_way(pool: Pool, tmp_path: Path, fake: FakeVllm) -> None:
    with engine_over(pool, tmp_path, fake, queue=2) as engine:
        assert len(dict(engine.run([ask(engine)] * 7))) == 7
        fake.script = ["hang", "hang"]
        streams = [engine.submit(ask(engine)) for _ in range(2)]
        with pytest.raises(OverloadedError, match="2 answers are under way, and 1 more"):
            engine.submit(ask(engine))
        for stream in streams:
            assert next(iter(stream)).text == "a"
            stream.abort()
        assert streams[0].result()[0].finish_reason == "aborted"
        assert engine.submit(ask(engine)).result()[0].text == TEXT


def test_abort_and_timeout_end_the_request_there(engine: VllmEngine, fake: FakeVllm) -> None:
    fake.script = ["hang"]
    stream = engine.submit(ask(engine))
    pieces = iter(stream)
    assert next(pieces).text == "a"
    stream.abort()
    (answer,) = stream.result()
    assert answer.finish_reason == "aborted" and answer.text.startswith("a")
    assert fake.aborted.wait(10)
    fake.script = ["hang"]
    late = Request("What?", MIXTURE, Sampling(max_tokens=16), timeout=0.2)
    assert engine.submit(late).result()[0].finish_reason == "timeout"


def test_closing_ends_what_runs(pool: Pool, tmp_path: Path, fake: FakeVllm) -> None:
    fake.script = ["hang"]
    with engine_over(pool, tmp_path, fake) as engine:
        stream = engine.submit(ask(engine))
        assert isinstance(next(iter(stream)), Piece)
    assert stream.result()[0].finish_reason == "aborted"
    with pytest.raises(OverloadedError, match="is stopping"):
        engine.submit(ask(engine))


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [
        ("400", InvalidInputError, "vLLM refuses the request: said 400"),
        ("404", AdapterNotFoundError, "does not find 'mixture("),
        ("401", EngineError, "refuses the key"),
    ],
)
def test_what_vllm_refuses_is_our_error(
    engine: VllmEngine, fake: FakeVllm, status: str, error: type[LoraRetrieverError], said: str
) -> None:
    fake.script = [status]
    with pytest.raises(error, match=re.escape(said)):
        engine.submit(ask(engine)).result()
    assert len(fake.bodies) == 1, "it would be refused again"


@pytest.mark.parametrize("trouble", ["500", "503", "429", "cut before"])
def test_what_has_not_begun_is_asked_again(engine: VllmEngine, fake: FakeVllm, trouble: str) -> None:
    fake.script = [trouble, trouble]
    assert engine.submit(ask(engine)).result()[0].text == TEXT
    assert len(fake.bodies) == 3


@pytest.mark.parametrize(("trouble", "error"), [("500", EngineError), ("503", OverloadedError)])
def test_after_some_attempts_it_is_given_up(
    engine: VllmEngine, fake: FakeVllm, trouble: str, error: type[LoraRetrieverError]
) -> None:
    fake.script = [trouble] * 3
    with pytest.raises(error, match=f"said {trouble}"):
        engine.submit(ask(engine)).result()
    assert len(fake.bodies) == 3


@pytest.mark.parametrize(("trouble", "said"), [("cut", "failed: ClientPayloadError"), ("error", "broken inside")])
def test_what_breaks_in_the_middle_is_an_error_and_not_said_twice(
    engine: VllmEngine, fake: FakeVllm, trouble: str, said: str
) -> None:
    fake.script = [trouble]
    stream = engine.submit(ask(engine))
    pieces = []
    with pytest.raises(EngineError, match=said):
        for piece in stream:
            pieces.append(piece.text)
    assert "".join(pieces) == "an"
    assert len(fake.bodies) == 1
    assert engine.submit(ask(engine)).result()[0].text == TEXT


def test_a_silent_server_is_asked_whether_it_lives(pool: Pool, tmp_path: Path, fake: FakeVllm) -> None:
    with engine_over(pool, tmp_path, fake, timeout=0.1) as engine:
        fake.script = ["hang"]
        stream = engine.submit(ask(engine))
        assert next(iter(stream)).text == "a"
        assert fake.asked.wait(10) and fake.asked_again.wait(10)
        fake.health = 503
        with pytest.raises(EngineError, match="it says of itself that it is not well: 503"):
            stream.result()


def test_a_server_that_is_gone_is_replaced_by_the_other(
    pool: Pool, tmp_path: Path, fake: FakeVllm, other: FakeVllm
) -> None:
    with engine_over(pool, tmp_path, fake, other) as engine:
        own, rest = (fake, other) if engine.submit(ask(engine)).result() and fake.bodies else (other, fake)
        assert len(own.bodies) == 1
        own.script = ["cut before"]
        assert engine.submit(ask(engine)).result()[0].text == TEXT
        assert (len(own.bodies), len(rest.bodies)) == (2, 1)
        engine.submit(ask(engine)).result()
        assert (len(own.bodies), len(rest.bodies)) == (2, 2), "it rests"


def test_each_composition_has_a_server_of_its_own(pool: Pool, tmp_path: Path, fake: FakeVllm, other: FakeVllm) -> None:
    with engine_over(pool, tmp_path, fake, other) as engine:
        requests = [of(compose_explicit("mixture", {"sql": i / 10, "german": 0.5})) for i in range(1, 20)]
        for request in requests * 2:
            engine.submit(request).result()
    models = [{body["model"] for body in server.bodies} for server in (fake, other)]
    assert all(models) and not models[0] & models[1]


def test_a_popular_composition_does_not_stay_at_one_server(
    pool: Pool, tmp_path: Path, fake: FakeVllm, other: FakeVllm
) -> None:
    fake.script = other.script = ["hang"] * 8
    with engine_over(pool, tmp_path, fake, other) as engine:
        for _ in range(8):
            assert next(iter(engine.submit(ask(engine)))).text == "a"
        assert sorted(len(server.bodies) for server in (fake, other)) == [3, 5]
        fake.go_on.set()
        other.go_on.set()


def test_requests_that_can_never_run(engine: VllmEngine, fake: FakeVllm, pool: Pool) -> None:
    with pytest.raises(InvalidInputError, match="the model takes 64 in all"):
        engine.submit(ask(engine, max_tokens=60))
    with pytest.raises(InvalidInputError, match="weighs its adapters anew for every token"):
        engine.submit(of(compose_explicit("arrow", {"sql": 0.5, "german": 0.5})))
    three = compose_explicit("mixture", {"sql": 1, "german": 1, "math": 1})
    with pytest.raises(InvalidInputError, match="rank 12 as one adapter, and the engine takes 8"):
        engine.submit(of(three))
    with pytest.raises(AdapterNotFoundError, match="no adapter 'sqll'"):
        engine.submit(of(compose_explicit("selection", {"sqll": 1})))
    with pytest.raises(InvalidInputError, match="probes the model, which vLLM does not allow"):
        engine.effects([], [])
    assert not fake.bodies


def test_mixtures_are_reduced_where_that_is_asked_for(pool: Pool, tmp_path: Path, fake: FakeVllm) -> None:
    three = compose_explicit("mixture", {"sql": 1, "german": 1, "math": 1})
    with engine_over(pool, tmp_path, fake, reduce=True) as engine:
        engine.submit(Request("What?", three, Sampling(max_tokens=4))).result()
        assert engine.reduces_to == 8
    assert re.fullmatch(r"svd\(.*;rank=8\)", fake.bodies[0]["model"])
    with engine_over(pool, tmp_path, fake) as engine:
        assert engine.reduces_to is None
    fake.info = INFO | {"lanes": True}
    with engine_over(pool, tmp_path, fake, reduce=True) as engine:
        assert engine.reduces_to is None, "lanes take mixtures of any rank"


def test_the_answer_says_that_a_mixture_was_reduced(pool: Pool, tmp_path: Path, fake: FakeVllm) -> None:
    def ask(reduce: bool, **adapters: float) -> str:
        settings = load_settings(engine="vllm", vllm_reduce=reduce)
        with engine_over(pool, tmp_path, fake, reduce=reduce) as engine:
            retriever = LoraRetriever(pool, settings, load_retriever, lambda pool, settings: engine)
            running = retriever.submit("What?", adapters=adapters, sampling=Sampling(max_tokens=4))
            running.answers.result()
            return format_composition(running.composition)

    assert re.fullmatch(r"svd\(.*;rank=8\)", ask(True, sql=0.5, german=0.25, math=0.25))
    assert ask(True, sql=0.5, german=0.5) == "mixture(sql=0.5,german=0.5)"
    with pytest.raises(InvalidInputError, match="takes 8 at most"):
        ask(False, sql=0.5, german=0.25, math=0.25)


def test_all_that_the_server_says_of_a_reduced_mixture(pool: Pool, tmp_path: Path, fake: FakeVllm) -> None:
    """In their fields, in headers, and in the library. Asked for by that name, it is the same."""
    with engine_over(pool, tmp_path, fake, reduce=True) as engine:
        settings = load_settings(engine="vllm", vllm_reduce=True)
        retriever = LoraRetriever(
            pool, settings, lambda reader, _: PaperRetriever(reader, WordEncoder()), lambda pool, _: engine
        )
        asked = {"sql": 0.5, "german": 0.3, "math": 0.2}
        (completion,) = retriever.generate(["What?"], adapters=asked, sampling=Sampling(max_tokens=4))
        with serving_app(retriever) as served, served.client() as client:
            body = {"messages": [{"role": "user", "content": "sql"}], "model": "auto", "max_tokens": 4}
            named = client.post("/v1/chat/completions", json=body | {"lora": {"adapters": asked}})
            again = client.post("/v1/chat/completions", json=body | {"model": named.json()["model"]})
            options = {"k": 3, "weighting": "uniform", "threshold": -1}
            found = client.post("/v1/chat/completions", json=body | {"lora": options})
            small = client.post("/v1/chat/completions", json=body | {"lora": options | {"k": 2}})
            (row,) = client.post("/v1/route", json={"input": "sql"} | options).json()["data"]
            gated = client.post("/v1/route", json={"input": "sql", "strategy": "arrow"} | options).json()["data"]
    reduced = "svd(sql=0.5,german=0.3,math=0.2;rank=8)"
    assert format_composition(completion.composition) == reduced
    for response in (named, again):
        told = response.json()
        assert told["model"] == told["lora"]["composition"] == response.headers["x-lora-composition"] == reduced
        assert told["lora"]["strategy"] == "svd"
        assert told["lora"]["adapters"][0] == {"name": "sql", "weight": 0.5}
    told = found.json()["lora"]
    assert re.fullmatch(r"svd\(.*;rank=8\)", told["composition"]) and len(told["adapters"]) == 3
    assert (row["composition"], row["strategy"]) == (told["composition"], "svd")
    assert small.json()["lora"]["strategy"] == "mixture", "two of rank 4 are small enough"
    assert gated[0]["strategy"] == "arrow", "what vLLM refuses stays as it is"
    asked_for = [each["model"] for each in fake.bodies if each["model"] != "base"]  # by the server when it starts
    names = [re.sub(r"@[0-9a-f]+", "", each) for each in asked_for]
    assert names[:3] == ["svd(german=0.3,math=0.2,sql=0.5;rank=8)"] * 3
    assert [name.partition("(")[0] for name in names[3:]] == ["svd", "mixture"]


def test_servers_that_cannot_be_used(
    pool: Pool, tmp_path: Path, fake: FakeVllm, other: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*servers: FakeVllm) -> None:
        with engine_over(pool, tmp_path, *servers, timeout=0.3):
            raise AssertionError

    monkeypatch.setattr(remote, "_POLL", 0.05)
    fake.info = None
    with pytest.raises(ModelLoadError, match="has no plug-in of LoraRetriever"):
        start(fake)
    fake.info = INFO | {"pool": False}
    with pytest.raises(ModelLoadError, match="does not know the pool"):
        start(fake)
    fake.info, other.info = INFO | {"base": "x"}, INFO
    with pytest.raises(ModelLoadError, match="expected the same model of all"):
        start(fake, other)
    nowhere = FakeVllm()
    nowhere.url = "http://127.0.0.1:9"
    with pytest.raises(ModelLoadError, match="there is no vLLM server at"):
        start(nowhere)


def test_of_several_servers_the_least_counts(pool: Pool, tmp_path: Path, fake: FakeVllm, other: FakeVllm) -> None:
    other.info = INFO | {"max_length": 32}
    with engine_over(pool, tmp_path, fake, other) as engine:
        assert engine.max_length == 32
        assert engine.count_tokens(Request("What?")) == 8
        assert engine.detokenize(tiny_tokenizer()("text").input_ids) == "text"
