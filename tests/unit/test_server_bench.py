"""The benchmark and the soak test of the server, in short, on tiny models; and that both can fail."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from loraretriever.console import print_server, to_json
from loraretriever.errors import LoraRetrieverError, PoolError
from loraretriever.evaluate import server_bench
from loraretriever.evaluate.server_drivers import Driver, Job, Served, Turn, load_generator
from loraretriever.evaluate.server_report import (
    ALONE,
    SERVER,
    Sizes,
    find_agreement,
    find_figures,
    find_own_time,
    find_ratios,
)
from loraretriever.evaluate.server_soak import Options, SoakReport, initial_contents, make_references, soak
from loraretriever.evaluate.server_soak_answers import Answer, History, Mix, References
from loraretriever.evaluate.server_soak_changes import Content, MemoryWatch
from loraretriever.evaluate.server_soak_clients import find_fault
from loraretriever.pipeline import LoraRetriever
from loraretriever.pool import Pool
from loraretriever.types import TokenLogprob
from tiny import TINY_SPEC, write_peft_folder
from tiny_text import write_base_model, write_encoder
from unit.server.conftest import serving

TOPICS = ("queries of tables", "German for bread", "sums of numbers", "names of birds", "scripts of shells")
PROMPTS = [f"Tell me something about {topic}." for topic in TOPICS]
MAX_TOKENS = 4
SETTINGS = {"precision": "float32", "batch_size": 8}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_base_model(folder / "base")
    write_encoder(folder, layers=3)
    return folder


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory, models: Path) -> list[Content]:
    """Adapters that change answers much, so that none is taken for another."""
    folder = tmp_path_factory.mktemp("contents")
    base = str(models / "base")
    return [
        Content(
            f"c{seed}",
            write_peft_folder(folder / f"c{seed}", seed=seed, alpha=128, base_model=base),
            tuple(f"{word} {topic}" for word in ("Speak of", "Write on", "Explain", "Give me", "List")),
        )
        for seed, topic in enumerate(TOPICS)
    ]


def make_pool(folder: Path, models: Path, contents: dict[str, Content]) -> Path:
    with Pool.create(folder, str(models / "base"), spec=TINY_SPEC) as pool:
        for name, content in contents.items():
            pool.add(content.folder, name=name, samples=content.samples)
    return folder


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory, models: Path, contents: list[Content]) -> References:
    folder = make_pool(tmp_path_factory.mktemp("pool") / "pool", models, {each.name: each for each in contents})
    with LoraRetriever.open(folder, encoder=str(models / "encoder"), **SETTINGS) as retriever:
        return make_references(retriever, contents, PROMPTS, MAX_TOKENS)


@pytest.fixture
def pool(tmp_path: Path, models: Path, contents: list[Content]) -> Path:
    return make_pool(tmp_path / "pool", models, initial_contents(contents))


# Soak


OPTIONS = Options(requests=250, clients=10, change_seconds=0, max_tokens=MAX_TOKENS, patience=60)


def run_soak(url: str, contents: list[Content], references: References, options: Options = OPTIONS) -> SoakReport:
    return asyncio.run(soak(url, contents, PROMPTS, references, options))


def test_references_can_be_told_apart(references: References) -> None:
    mixes = 1 + 5 + 10 + 2 * 4
    assert len(references) == len(PROMPTS) * mixes
    assert references.indistinct() < 0.01 * len(PROMPTS) * math.comb(mixes, 2)


def test_soak(pool: Path, models: Path, contents: list[Content], references: References) -> None:
    with serving(pool, models) as served:
        # So many that changes of every kind come while they run.
        report = run_soak(served.url, contents, references, replace(OPTIONS, requests=1000))
    assert report.is_well, report
    assert report.changes.keys() == {"update", "add", "delete"}
    assert {"adapter", "composition", "auto", "base", "gone", "bad"} <= report.requests.keys()
    for kind in ("adapter", "composition", "auto", "base"):
        assert report.requests[kind]["ok"] > 0
    assert report.calm["num_requests_running"] == report.calm["kv_cache_tokens_used"] == 0
    assert json.loads(to_json(report))["problems"] == {}


def test_soak_finds_weights_of_another_adapter(
    pool: Path, models: Path, contents: list[Content], references: References, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(pool, models) as served:
        right = served.retriever.pool.weights
        wrong = served.retriever.pool.get("a1").digest

        def weights(name: str, digest: str) -> Any:
            return replace(right("a1", wrong), name=name, digest=digest) if name == "a0" else right(name, digest)

        monkeypatch.setattr(served.retriever.pool, "weights", weights)
        report = run_soak(served.url, contents, references, replace(OPTIONS, requests=60))
    assert not report.is_well and report.problems["wrong"] > 0


def test_soak_finds_what_hangs(
    pool: Path, models: Path, contents: list[Content], references: References, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = threading.Event()
    with serving(pool, models) as served:
        prepare, metrics = served.retriever.prepare, served.app.state.server.metrics
        figures = metrics.figures
        monkeypatch.setattr(served.retriever, "prepare", lambda *args, **kw: (held.wait(), prepare(*args, **kw))[1])
        # What hangs goes on when the figures are asked for, at the end.
        monkeypatch.setattr(metrics, "figures", lambda: (held.set(), figures())[1])
        # Few requests: each that hangs has a thread of the server, and changes of adapters need some.
        report = run_soak(served.url, contents, references, replace(OPTIONS, requests=8, clients=2, patience=0.5))
    assert report.problems.keys() == {"hang"} and not report.unrest


def test_soak_finds_a_server_that_is_gone(contents: list[Content], references: References) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    report = run_soak(f"http://127.0.0.1:{port}", contents, references, replace(OPTIONS, requests=None))
    assert report.problems.keys() == {"connection"} and "does not say what it does" in report.unrest[0]


def response(status: int, body: Any, **headers: str) -> httpx.Response:
    return httpx.Response(status, json=body, headers={"x-request-id": "1", **headers})


GOOD = {"message": "No.", "type": "invalid_request_error", "param": None, "code": None}


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (response(400, {"error": GOOD}), None),
        (response(503, {"error": GOOD}, **{"retry-after": "1"}), None),
        (response(503, {"error": GOOD}), "Retry-After"),
        (response(400, {"detail": "No."}), "not an error object"),
        (response(400, {"error": GOOD, "more": 1}), "not an error object"),
        (response(400, {"error": GOOD | {"message": ""}}), "no message"),
        (response(400, {"error": GOOD | {"code": 7}}), "code is no text"),
        (response(200, {"error": GOOD}), "wrong status"),
        (httpx.Response(500, text="Internal Server Error", headers={"x-request-id": "1"}), "not JSON"),
        (httpx.Response(400, json={"error": GOOD}), "x-request-id"),
    ],
)
def test_faults_of_errors(answer: httpx.Response, fault: str | None) -> None:
    found = find_fault(answer)
    assert found is None if fault is None else found is not None and fault in found


def test_history_knows_what_a_name_may_have_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    history = History.of({"a": "x", "t": None})

    def change(name: str, content: str | None, begin: float, end: float, succeeds: bool = True) -> None:
        clock[0] = begin
        asked = history.change(name, content)
        clock[0] = end
        (asked.succeeded if succeeds else asked.failed)()

    change("a", "y", 10, 12)
    change("a", "z", 20, 21, succeeds=False)
    change("a", "x", 30, 32)
    assert history.contents("a", 5, 9) == {"x"}
    assert history.contents("a", 5, 11) == history.contents("a", 11, 40) == {"x", "y"}
    assert history.contents("a", 13, 29) == {"y"}
    assert history.contents("a", 33, 40) == {"x"}
    assert history.contents("t", 0, 9) == history.contents("unknown", 0, 9) == {None}
    mixes = history.mixes("mixture", [("a", 0.5), ("t", 0.5)], 5, 9)
    assert mixes == []
    change("t", "x", 50, 51)
    assert history.mixes("mixture", [("a", 0.5), ("t", 0.5)], 55, 56) == [Mix("", (("x", 1.0),))]
    assert set(history.mixes("fusion", [("a", 0.5), ("t", 0.5)], 29, 56)) == {
        Mix("", (("x", 1.0),)),
        Mix("fusion", (("x", 0.5), ("y", 0.5))),
    }


def tokens(*texts: str, logprob: float = -0.5, other: float = -3.0) -> tuple[TokenLogprob, ...]:
    best = [TokenLogprob(place, text, logprob) for place, text in enumerate(texts)]
    return tuple(replace(each, top=(each, TokenLogprob(99, "?", other))) for each in best)


@pytest.mark.parametrize(
    ("answer", "other", "outcome"),
    [
        (Answer("ab", "stop", tokens("a", "b")), -3.0, "ok"),
        (Answer("ab", "stop"), -3.0, "ok"),
        (Answer("ab", "stop", tokens("a", "b", logprob=-0.505)), -3.0, "ok"),
        (Answer("ab", "stop", tokens("a", "b", logprob=-0.52)), -3.0, "wrong"),
        (Answer("ab", "length", tokens("a", "b")), -3.0, "wrong"),
        (Answer("a", "stop", tokens("a")), -3.0, "wrong"),
        (Answer("a?", "stop", tokens("a", "?")), -3.0, "wrong"),
        (Answer("a?", "stop", tokens("a", "?")), -0.505, "rounding"),
        (Answer("a?", "stop", (*tokens("a"), *tokens("?", logprob=-0.6))), -0.505, "wrong"),
        (Answer("a?c", "length"), -0.505, "rounding"),
        (Answer("a?c", "length"), -3.0, "wrong"),
        (Answer("xb", "stop"), -0.505, "wrong"),
    ],
)
def test_answers_are_judged(answer: Answer, other: float, outcome: str) -> None:
    references = References()
    mix = Mix.of("mixture", [("x", 1.0)])
    references._answers[mix, "p"] = Answer("ab", "stop", tokens("a", "b", other=other))
    assert references.judge(answer, "p", [Mix.of("", ()), mix]) == outcome
    assert references.judge(answer, "p", []) == "wrong"


def test_memory_after_the_warm_up() -> None:
    watch = MemoryWatch(None, warm_up=10.0)
    watch.samples = [(float(second), 100.0 if second < 10 else 200.0 + second) for second in range(100)]
    memory = watch.memory()
    assert memory is not None and memory.slope == 60.0 and memory.samples == 90
    assert (memory.start, memory.end, memory.peak) == (214.5, 294.5, 299.0)
    assert MemoryWatch(None, 10.0).memory() is None


# Benchmark


@pytest.fixture(scope="module")
def bench_pool(tmp_path_factory: pytest.TempPathFactory, models: Path, contents: list[Content]) -> Path:
    return make_pool(tmp_path_factory.mktemp("bench") / "pool", models, {each.name: each for each in contents})


@pytest.mark.slow
def test_bench(bench_pool: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole of it: a server, locust and the engine alone in processes of their own."""
    sizes = Sizes(concurrencies=(1, 3), waves=2, least_requests=2, max_tokens=3, pairs=2)
    settings = {"encoder": str(models / "encoder"), **SETTINGS}
    options = server_bench.Options(bench_pool, rounds=2, threads=1, sizes=sizes, settings=settings)
    steps: list[None] = []
    report = server_bench.bench_server(options, lambda: steps.append(None))
    assert len(steps) == server_bench.count_steps(options)
    assert {"requests_per_second_c1", "requests_per_second_c3"} <= report.ratios.keys()
    assert report.agreement.compositions == report.agreement.texts == 1.0
    assert report.own_ms["whole"].values and report.own_ms["stream"].server_p50 > 0
    assert report.figures["server"]["c3"].first_token_seconds is not None
    assert report.set_up.adapters == 5 and "locust" in report.set_up.environment.versions
    assert json.loads(to_json(report))["set_up"]["sizes"]["pairs"] == 2
    print_server(report)
    printed = capsys.readouterr().out
    assert "own time, stream answer of one token" in printed and "load generator" in printed and "1 threads" in printed


@pytest.fixture
def load(pool: Path, models: Path, tmp_path: Path) -> Iterator[Driver]:
    with serving(pool, models) as served, load_generator(served.url, tmp_path) as driver:
        yield driver


def test_a_failed_request_ends_the_benchmark(load: Driver) -> None:
    assert [each.tokens for each in load.run([Job("Hello", 2), Job("Hello", 3, stream=False)], 2).served] == [2, 3]
    with pytest.raises(LoraRetrieverError, match=r"1 of 2 requests failed: BadAnswerError: status 400"):
        load.run([Job("Hello", 2), Job("Hello", 10**6)], 2)


def test_a_process_that_ends_says_why(tmp_path: Path) -> None:
    script = "import sys; print('{}', flush=True); sys.stdin.readline(); sys.exit('no more')"
    with (
        Driver("engine alone", [sys.executable, "-c", script], tmp_path) as driver,
        pytest.raises(LoraRetrieverError, match=r"(?s)the engine alone ended with exit status 1.*no more"),
    ):
        driver.run([Job("Hello", 1)], 1)
    with pytest.raises(LoraRetrieverError, match="failed: out of order"):
        Driver("x", [sys.executable, "-c", """print('{"error": "out of order"}')"""], tmp_path)


def test_prompts_are_never_the_same(bench_pool: Path) -> None:
    prompts = server_bench.Prompts(bench_pool, seed=1)
    jobs = [*prompts.jobs(300, 4), *prompts.jobs(300, 1, stream=False)]
    assert len({job.prompt.partition(" ")[0] for job in jobs}) == 600
    assert prompts.jobs(5, 1) != server_bench.Prompts(bench_pool, seed=2).jobs(5, 1)


def test_a_pool_without_adapters_cannot_be_measured(tmp_path: Path, models: Path) -> None:
    with pytest.raises(PoolError, match="has no enabled adapter"):
        server_bench.Prompts(make_pool(tmp_path / "empty", models, {}), 0)


def served(start: float, first: float | None, end: float, tokens: int = 5, text: str = "x") -> Served:
    return Served(start, first, end, tokens, 9, "base", text, "length")


def test_figures_and_ratios() -> None:
    turns = {
        (ALONE, 8): [Turn([served(0, 1, 3), served(0, 1, 5)], 5.0, {"engine alone": 2.0})],
        (SERVER, 8): [Turn([served(0, 2, 4), served(0, 4, 8, text="y")], 8.0, {"load generator": 1.0, "server": 3.0})],
    }
    ratios = find_ratios(turns)
    assert ratios["requests_per_second_c8"].values == (0.625,) and ratios["cpu_c8"].median == 1.5
    figures = find_figures(turns)["server"]["c8"]
    assert figures.requests_per_second.median == 0.25 and figures.tokens_per_second.median == 1.25
    assert figures.first_token_seconds is not None and figures.first_token_seconds.p50 == 3.0
    assert figures.token_seconds is not None and figures.token_seconds.p50 == 0.75
    assert figures.cpu_ms_per_request["server"].median == 1500.0
    assert figures.cpu_ms_per_token["load generator"].median == 100.0
    agreement = find_agreement(turns)
    assert agreement.compositions == 1.0 and agreement.texts == 0.5


def test_own_time_is_the_median_of_the_differences() -> None:
    own = find_own_time(
        [served(0, None, 0.010), served(1, None, 1.030), served(2, None, 2.022)],
        [served(0, None, 0.008), served(1, None, 1.020), served(2, None, 2.021)],
    )
    assert own.values == (2.0, 10.0, 1.0) and own.median == 2.0
    assert (own.server_p50, own.alone_p50) == (22.0, 20.0)
