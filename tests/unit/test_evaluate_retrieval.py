"""Measuring retrieval: the data it reads, the pool it stands on, and the figures."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from loraretriever.config import Settings
from loraretriever.errors import AdapterNotFoundError, InvalidInputError
from loraretriever.evaluate import fallback, latency, retrieval, robustness
from loraretriever.evaluate.latency import Timed
from loraretriever.evaluate.retrieval_data import RetrievalData, TaskSamples, read_data, read_samples
from loraretriever.evaluate.retrieval_methods import ColdEncoder, MemoryPool, Workbench, known_methods
from loraretriever.pool import Pool
from loraretriever.retrieve import CachingEncoder, HybridRetriever, PaperRetriever, Retriever
from loraretriever.types import AdapterFilter, Hit, Ranking
from tiny import TINY_BASE, TINY_SPEC, write_peft_folder
from tiny_text import WordEncoder

TOPICS = {
    "sql": ("query", "table", "column", "join"),
    "german": ("translate", "german", "sentence", "say"),
    "math": ("add", "number", "sum", "divide"),
    "poem": ("rhyme", "verse", "poem", "stanza"),
    "code": ("python", "function", "loop", "class"),
}
FILLER = ("please", "now", "the", "a", "with", "quickly", "this")


def texts(topic: str, count: int, seed: int) -> tuple[str, ...]:
    rng = random.Random(f"{topic} {seed}")
    return tuple(" ".join(rng.sample(TOPICS[topic], 3) + rng.sample(FILLER, 2)) for _ in range(count))


@pytest.fixture
def data() -> RetrievalData:
    samples = {
        name: TaskSamples(texts(name, 6, 0), domain="words" if name in ("poem", "german") else "rest")
        for name in TOPICS
    }
    pairs = [(text, name) for name in TOPICS for text in texts(name, 4, 1)]
    off_topic = ("tell me about whales", "what is for dinner")
    return RetrievalData(samples, tuple(text for text, _ in pairs), tuple(name for _, name in pairs), off_topic)


def write_rows(file: Path, *rows: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_samples_from_files_and_folders(tmp_path: Path) -> None:
    file = write_rows(
        tmp_path / "samples.jsonl",
        {"adapter": "sql", "inputs": "one", "domain": "code"},
        {"adapter": "sql", "inputs": "one"},
        {"adapter": "sql", "inputs": "two"},
        {"adapter": "sql", "inputs": "three"},
    )
    write_rows(tmp_path / "more" / "math.jsonl", {"inputs": "add"})
    write_rows(tmp_path / "more" / "other.jsonl", {"inputs": "rhyme", "task": "poem"})
    found = read_samples([file, tmp_path / "more"], per_adapter=2)
    assert found == {
        "math": TaskSamples(("add",)),
        "poem": TaskSamples(("rhyme",)),
        "sql": TaskSamples(("one", "two"), domain="code"),
    }


def test_prompts_of_unknown_tasks_are_off_topic(tmp_path: Path) -> None:
    rows = [{"inputs": "one", "task": "sql"}, {"inputs": "x", "task": "chess"}, {"inputs": "y", "task": None}]
    test = write_rows(tmp_path / "test.jsonl", *rows)
    other = write_rows(tmp_path / "off.jsonl", {"inputs": "z"})
    found = read_data({"sql": TaskSamples(("one",))}, [test], [other])
    assert (found.prompts, found.tasks, found.off_topic) == (("one",), ("sql",), ("x", "y", "z"))
    assert found.repeated == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"task": "sql"}, r"test.jsonl:1 has 'None' in `inputs`; expected a prompt"),
        ({"inputs": " ", "task": "sql"}, r"test.jsonl:1 has ' ' in `inputs`"),
        ({"inputs": "x"}, r"test.jsonl:1 lacks 'task'"),
        ({"inputs": "x", "task": 3}, r"test.jsonl:1 has '3' in `task`; expected a name"),
        ({"inputs": "x", "task": "chess"}, r"no task in .*test.jsonl is among the 1 adapters \(sql ...\)"),
    ],
)
def test_bad_test_files(tmp_path: Path, row: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        read_data({"sql": TaskSamples(("one",))}, [write_rows(tmp_path / "test.jsonl", row)])


def test_bad_samples(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInputError, match="has no file"):
        read_samples([tmp_path / "empty"])
    with pytest.raises(InvalidInputError, match="cannot read"):
        read_samples([tmp_path / "nothing.jsonl"])
    with pytest.raises(InvalidInputError, match="no samples in"):
        read_samples([write_rows(tmp_path / "none.jsonl")])


def hits(retriever: Retriever, prompts: tuple[str, ...]) -> list[list[str]]:
    return [[hit.adapter for hit in ranking.hits] for ranking in retriever.rank(prompts, 3)]


@pytest.mark.parametrize("kind", ["paper", "hybrid"])
def test_the_memory_pool_ranks_as_a_pool(tmp_path: Path, data: RetrievalData, kind: str) -> None:
    def make(pool: Pool) -> Retriever:
        encoder = WordEncoder()
        return PaperRetriever(pool, encoder) if kind == "paper" else HybridRetriever(pool, lambda _: encoder)

    counter = ("translate this query",)
    samples = {**data.samples, "sql": TaskSamples(data.samples["sql"].texts, counter)}
    with Pool.create(tmp_path / "pool", TINY_BASE, spec=TINY_SPEC) as pool:
        for seed, (name, of) in enumerate(samples.items()):
            pool.add(write_peft_folder(tmp_path / name, seed=seed), samples=list(of.texts))
        pool.add_samples("sql", list(counter), counter=True)
        expected = make(pool).rank([*data.prompts, *counter], 3)
    found = make(MemoryPool(samples)).rank([*data.prompts, *counter], 3)  # type: ignore[arg-type]
    for one, other in zip(found, expected, strict=True):
        assert [hit.adapter for hit in one.hits] == [hit.adapter for hit in other.hits]
        assert one.fit == pytest.approx(other.fit, abs=1e-6) and one.threshold == pytest.approx(other.threshold)


def test_the_memory_pool_is_followed(data: RetrievalData) -> None:
    pool = MemoryPool({"sql": data.samples["sql"], "math": data.samples["math"]})
    encoder = WordEncoder()
    retriever = HybridRetriever(pool, lambda _: encoder)  # type: ignore[arg-type]
    assert hits(retriever, ("a poem with a verse",))[0][0] != "poem"
    pool.add("poem", data.samples["poem"])
    assert pool.changes_since(0) == {"poem"} and pool.change == 1
    assert hits(retriever, ("a poem with a verse",))[0][0] == "poem"
    retriever.settle()
    assert hits(retriever, ("a poem with a verse",))[0][0] == "poem"
    with pytest.raises(AdapterNotFoundError, match="chess"):
        retriever.rank(["x"], 1, AdapterFilter(only=frozenset({"chess"})))


def test_caching_and_cold_encoders() -> None:
    inner = WordEncoder()
    recorded = CachingEncoder(inner)
    rows = recorded.encode(["a", "b", "a"])
    assert inner.encoded == ["a", "b"] and recorded.tag == "words"
    np.testing.assert_array_equal(recorded.encode(["b", "a"]), rows[[1, 0]])
    assert inner.encoded == ["a", "b"]
    for is_caching, expected in ((True, ["x", "x"]), (False, ["x", "x", "x"])):
        inner = WordEncoder()
        cold = ColdEncoder(inner, is_caching)
        cold.encode(["x"])
        cold.encode(["x"])
        cold.forget()
        cold.encode(["x"])
        assert inner.encoded == expected


def test_methods_share_encoders() -> None:
    methods = known_methods(None, {"mine": Path("folder")})
    assert list(methods) == [
        "paper", "paper-no-instruction", "hybrid", "dense", "sparse", "sparse-centroid", "dense+sparse",
        "mine", "mine+hybrid",
    ]  # fmt: skip
    assert len({method.source for method in methods.values()}) == 5
    assert methods["hybrid"].source == methods["dense"].source != methods["paper"].source
    with pytest.raises(InvalidInputError, match="'dense', which a method has"):
        known_methods(None, {"dense": Path("folder")})


class Counting:
    """A retriever that counts what it is asked."""

    def __init__(self, log: list[tuple[str, int]], name: str) -> None:
        self.log, self.name = log, name

    def rank(self, prompts: tuple[str, ...], k: int, wanted: AdapterFilter = AdapterFilter()) -> list[Ranking]:  # noqa: B008
        self.log.append((self.name, len(prompts)))
        return []


def test_methods_are_timed_in_turns() -> None:
    log: list[tuple[str, int]] = []
    forgotten, steps = [], []
    timed = {
        name: Timed(Counting(log, name), lambda name=name: forgotten.append(name), Counting(log, f"{name} search"))
        for name in ("a", "b")
    }
    prompts = [f"prompt {i}" for i in range(70)]
    found = latency.measure(timed, prompts, 3, 2, lambda: steps.append(1))
    assert found.keys() == {"a", "b"} and all(figures.ms_p50 <= figures.ms_p99 for figures in found.values())
    assert len(steps) == latency.rounds(70, 2) == 2 * (70 + 2)
    turns = [("a", 1), ("b", 1), ("a search", 1), ("b search", 1)]
    start = log.index(("b search", 70)) + 8 + 2  # after the last of the warm-up
    assert log[start : start + 8] == turns * 2
    assert log[-4:] == [("a", 32), ("b", 32)] * 2
    assert forgotten.count("a") == 1 + 2 * 2


def test_calibration_error() -> None:
    # Two bins: 0.9 said of ten prompts and eight right; 0.1 said of ten and two right.
    said = np.array([0.9] * 10 + [0.1] * 10)
    is_right = np.array([True] * 8 + [False] * 2 + [True] * 2 + [False] * 8)
    assert fallback.calibration_error(said, is_right) == pytest.approx(0.1)
    assert fallback.calibration_error(np.array([1.0, 0.0]), np.array([True, False])) == 0
    assert fallback.auroc(np.array([0.9, 0.5]), np.array([0.1, 0.6])) == 0.75


def test_folds_leave_out_each_adapter_once(data: RetrievalData) -> None:
    folds = fallback.adapter_folds(data)
    assert len(folds) == 4 and sorted(name for fold in folds for name in fold) == sorted(data.samples)
    assert sorted(map(sorted, fallback.domain_folds(data))) == [["code", "math", "sql"], ["german", "poem"]]
    without = RetrievalData({name: TaskSamples(of.texts) for name, of in data.samples.items()}, (), ())
    assert fallback.domain_folds(without) == []


def test_left_out_prompts_are_off_topic(data: RetrievalData) -> None:
    seen: list[int] = []

    class Knowing:
        """Fits where the right adapter is in the pool, but for one prompt."""

        def __init__(self, pool: MemoryPool) -> None:
            self.names = {each.name for each in pool.list()}
            seen.append(len(self.names))

        def rank(self, prompts: tuple[str, ...], k: int, wanted: AdapterFilter | None = None) -> list[Ranking]:
            right = dict(zip(data.prompts, data.tasks, strict=True))
            fits = [0.9 if right.get(prompt) in self.names else 0.1 for prompt in prompts]
            return [Ranking((Hit("sql", fit),), fit, 0.5) for fit in fits]

    rankings = Knowing(MemoryPool(data.samples)).rank((*data.prompts, *data.off_topic), 8)
    found = fallback.measure(Knowing, data, rankings, True, lambda: None)
    assert seen[0] == 5 and sorted(seen[1:5]) == [3, 4, 4, 4] and sorted(seen[5:]) == [2, 3]
    assert found.fit_auroc == 1 and found.off_topic_to_base_default == 1 and found.false_fallback_default == 0
    left_out = found.leave_adapters_out
    assert left_out is not None and left_out.auroc == 1 and left_out.curve[0] == (0.0, 1.0)
    assert left_out.off_topic_to_base_at_5_percent_false_fallback == left_out.default_off_topic_to_base == 1
    assert left_out.off_topic == len(data.prompts) and left_out.in_pool == 3 * len(data.prompts)
    assert found.confidence == 0.9 and found.ece == pytest.approx(0.7)  # sql is right for a fifth
    assert found.confidence_given_fit == 1 and found.ece_given_fit == pytest.approx(0.8)


def test_typos_and_prose() -> None:
    text = " ".join(["wonderful"] * 1000)
    found = robustness.with_typos(text, random.Random(1)).split(" ")
    changed = [word for word in found if word != "wonderful"]
    assert len(found) == 1000 and 60 < len(changed) < 140  # a swap of two equal characters changes nothing
    assert {len(word) for word in changed} == {8, 9, 10}
    assert robustness.with_typos(text, random.Random(1)).split(" ") == found
    prose = robustness.neutral_prose(100, random.Random(0))
    assert 100 <= len(prose.split()) < 120 and prose != robustness.neutral_prose(100, random.Random(1))


@pytest.mark.parametrize("kind", ["paper", "hybrid"])
def test_robustness(data: RetrievalData, kind: str) -> None:
    encoder = CachingEncoder(WordEncoder())

    def make(pool: MemoryPool) -> Retriever:
        if kind == "paper":
            return PaperRetriever(pool, encoder)  # type: ignore[arg-type]
        return HybridRetriever(pool, lambda _: encoder)  # type: ignore[arg-type]

    steps: list[int] = []
    found = robustness.measure(make, data, lambda: steps.append(1))
    assert len(steps) == robustness.steps(data)
    assert found.plain.top1 > 90 and found.typos.top1 > 50
    assert list(found.samples_per_adapter) == [1, 3, 5]
    assert found.samples_per_adapter[5].top1 >= found.samples_per_adapter[1].top1
    if kind == "paper":
        assert found.incremental is None
    else:
        assert found.incremental is not None
        assert found.incremental.settled == found.incremental.at_once == found.plain
        assert found.incremental.delta.top1 > 80


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> list[WordEncoder]:
    """Word encoders instead of models; those that were made."""
    made: list[WordEncoder] = []

    def load(kind: str) -> Callable[[str | None, Settings], WordEncoder]:
        def encoder(name: str | None, settings: Settings) -> WordEncoder:
            made.append(WordEncoder(f"{kind} {name} {settings.instruction}"))
            return made[-1]

        return encoder

    for kind in ("hybrid", "paper"):
        monkeypatch.setattr(f"loraretriever.evaluate.retrieval_methods.{kind}_encoder", load(kind))
    return made


def test_the_report(data: RetrievalData, words: list[WordEncoder]) -> None:
    methods = list(known_methods("mine").values())
    options = retrieval.Options(latency_prompts=10, repeat=2, robustness=True)
    steps: list[int] = []
    settings = Settings(instruction=None)
    report = retrieval.bench_retrieval(data, methods, settings, options, lambda: steps.append(1))
    assert len(steps) == retrieval.count_steps(data, methods, options)
    assert [encoder.tag for encoder in words] == ["paper mine None", "paper mine ", "hybrid mine None"]
    assert sorted(report.methods) == sorted(method.name for method in methods)
    first = [figures.top1 for figures in report.methods.values()]
    assert first == sorted(first, reverse=True) and first[0] > 90
    for figures in report.methods.values():
        assert figures.top1 <= figures.top3 <= figures.top5 == figures.top8 == 100
        assert figures.ms_p50 is not None and figures.ms_p99 is not None and figures.ms_p50 <= figures.ms_p99
        assert figures.ms_batch32 and figures.search_ms_p50
    assert (report.adapters, report.samples) == (5, 30)
    assert (report.test_prompts, report.off_topic_prompts) == (20, 2)
    assert report.calibration is not None and report.paper_calibration is not None
    assert report.calibration.ece is not None and report.paper_calibration.ece is None
    assert report.calibration.leave_domains_out is not None
    assert report.robustness is not None and report.robustness.keys() == {"hybrid", "paper"}
    assert report.quoted is None and len(retrieval.PAPER_ADAPTERS) == 48
    assert report.setup.encoders == ("hybrid mine None", "paper mine ", "paper mine None")


def test_the_timed_retriever_encodes_each_prompt(data: RetrievalData, words: list[WordEncoder]) -> None:
    bench, methods = Workbench(Settings()), known_methods(None)
    pool = MemoryPool(data.samples)
    bench.recorded(methods["hybrid"], pool).rank(["query the table"], 1)
    one, _ = bench.cold(methods["hybrid"], pool)
    other, forget = bench.cold(methods["dense"], pool)
    for retriever in (one, other, other):
        retriever.rank(["query the table"], 1)
    forget()
    other.rank(["query the table"], 1)
    assert len(words) == 1
    assert words[0].encoded.count("query the table") == 4, "recorded, once each by two caches, once after emptying"


def test_quoted_only_for_the_papers_adapters(words: list[WordEncoder]) -> None:
    samples = {name: TaskSamples((f"about {name} only", f"more {name}")) for name in retrieval.PAPER_ADAPTERS}
    data = RetrievalData(samples, ("about rte",), ("rte",))
    methods = [known_methods(None)["dense"]]
    report = retrieval.bench_retrieval(data, methods, Settings(), retrieval.Options(latency_prompts=0))
    assert report.quoted is not None and report.quoted["trained on 40 %"].top1 == 63.2
    assert report.methods["dense"].ms_p50 is None and report.calibration is None and report.robustness is None


def test_bad_options(data: RetrievalData) -> None:
    with pytest.raises(InvalidInputError, match="no method"):
        retrieval.bench_retrieval(data, [], Settings())
    with pytest.raises(InvalidInputError, match="repeat is 0"):
        retrieval.bench_retrieval(data, list(known_methods(None).values()), Settings(), retrieval.Options(repeat=0))
