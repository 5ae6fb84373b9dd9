from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loraretriever.config import DEFAULT_ENCODER, Settings
from loraretriever.errors import AdapterNotFoundError, InvalidInputError
from loraretriever.pipeline import LoraRetriever
from loraretriever.pool import Pool
from loraretriever.retrieve import HybridRetriever, PaperRetriever
from loraretriever.types import (
    BASE_COMPOSITION,
    AdapterFilter,
    Composition,
    Generation,
    Hit,
    Merge,
    Message,
    Mixer,
    Ranking,
    Request,
    Sampling,
)
from tiny import TINY_BASE, TINY_SPEC, write_peft_folder
from tiny_text import WordEncoder


class FakeEngine:
    """Answers with the request's composition, last request first. `submit` fails for adapters that are `gone`."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.gone: set[str] = set()
        self.refused = lambda: None
        self.reduces_to: int | None

    def submit(self, request: Request) -> Any:
        self.requests.append(request)
        if self.gone & set(request.composition.adapters):
            self.refused()
            raise AdapterNotFoundError("it is gone")
        return "the answers"

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Generation]]:
        self.requests += requests
        for position in reversed(range(len(requests))):
            text = "+".join(requests[position].composition.adapters) or "base"
            yield position, Generation(text, "stop", 3, 4, 0.5)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def retriever(tmp_path: Path, engine: FakeEngine) -> Iterator[LoraRetriever]:
    samples = {"sql": ["write a query"], "german": ["translate to german"], "math": ["add the numbers"]}
    with Pool.create(tmp_path / "pool", TINY_BASE, spec=TINY_SPEC) as pool:
        for seed, name in enumerate(samples):
            pool.add(write_peft_folder(tmp_path / name, seed=seed), samples=samples[name])
        yield LoraRetriever(
            pool, Settings(), lambda pool, settings: PaperRetriever(pool, WordEncoder()), lambda pool, settings: engine
        )


class ScriptedRetriever:
    """Finds the same for every prompt, and notes what it was asked."""

    def __init__(self, ranking: Ranking) -> None:
        self.ranking = ranking
        self.asked: list[tuple[int, AdapterFilter]] = []

    def rank(self, prompts: Sequence[str], k: int, wanted: AdapterFilter = AdapterFilter()) -> list[Ranking]:  # noqa: B008
        self.asked.append((k, wanted))
        return [self.ranking] * len(prompts)


Scripted = Callable[..., LoraRetriever]


@pytest.fixture
def scripted(retriever: LoraRetriever, engine: FakeEngine) -> Scripted:
    def make(ranking: Ranking, **settings: Any) -> LoraRetriever:
        found = ScriptedRetriever(ranking)
        return LoraRetriever(retriever.pool, Settings(**settings), lambda pool, s: found, lambda pool, s: engine)

    return make


def test_the_composition_is_what_an_engine_that_reduces_mixtures_runs(
    retriever: LoraRetriever, engine: FakeEngine, scripted: Scripted
) -> None:
    """However it comes about; and a removed adapter is no reason to fail before the engine has been asked."""
    hits = (Hit("sql", 0.5, 0.0), Hit("german", 0.3, 0.0), Hit("gone", 0.2, 0.0))
    for number, fits in ((2, False), (3, True)):
        reducing = scripted(Ranking(hits[:number], 1.0, 0.5), vllm_reduce=True, weighting="uniform")
        for rank, strategy in ((4, "svd"), (8, "mixture"), (None, "mixture")):
            engine.reduces_to = rank
            strategy = "mixture" if fits else strategy
            (completion,) = reducing.generate(["x"])
            submitted = reducing.submit("x")
            assert completion.composition == submitted.composition == reducing.compose(reducing.route(["x"])[0])
            assert [each.composition for each in engine.requests[-2:]] == [submitted.composition] * 2
            assert submitted.composition.strategy == strategy and len(submitted.composition.adapters) == number
    engine.reduces_to = 4
    named = {"sql": 0.7, "german": 0.3}
    assert reducing.prepare("x", adapters=named)[1].merge == Merge("svd", rank=4)
    assert reducing.prepare("x", adapters={})[1] == BASE_COMPOSITION
    del engine.reduces_to  # nobody asks
    assert retriever.prepare("x", adapters=named)[1].strategy == "mixture"


def test_completions_come_in_the_prompts_order_with_all_that_led_to_them(retriever: LoraRetriever) -> None:
    prompts = ["translate the query", "add numbers"]
    completions = retriever.generate(prompts, k=2, strategy="fusion", weighting="uniform", threshold=-1)
    assert [c.prompt for c in completions] == prompts
    for completion in completions:
        assert len(completion.hits) == 2
        assert completion.hits[0].score >= completion.hits[1].score
        names = tuple(hit.adapter for hit in completion.hits)
        assert completion.composition == Composition("fusion", names, (0.5, 0.5), Mixer.PARAMETERS)
        assert completion.text == "+".join(names)
        assert (completion.finish_reason, completion.prompt_tokens, completion.completion_tokens) == ("stop", 3, 4)
        assert not completion.fallback


def test_the_default_weights_follow_the_logits(retriever: LoraRetriever) -> None:
    (completion,) = retriever.generate(["add numbers write query"])
    composition = completion.composition
    powers = [math.exp(hit.score / 0.05) for hit in completion.hits[:2]]
    assert composition.strategy == "mixture" and set(composition.adapters) == {"math", "sql"}
    assert composition.weights == pytest.approx([power / sum(powers) for power in powers])
    assert sum(composition.weights) == pytest.approx(1)
    assert list(composition.weights) == sorted(composition.weights, reverse=True)


def test_where_none_fits_hits_are_shown_but_not_used(retriever: LoraRetriever) -> None:
    (completion,) = retriever.generate(["add the numbers"], threshold=0.9)
    assert len(completion.hits) == 3
    assert completion.composition.adapters == ("math",) and not completion.fallback
    assert completion.fit == pytest.approx(1, abs=1e-5) and completion.threshold == 0.9
    (completion,) = retriever.generate(["entirely something else"], threshold=0.9)
    assert len(completion.hits) == 3
    assert completion.composition == BASE_COMPOSITION and completion.fallback and completion.text == "base"


def test_the_threshold_of_the_call_of_the_settings_and_of_the_retriever(scripted: Scripted) -> None:
    for fit, setting, asked, fallback in [
        (0.3, None, None, False),
        (0.29, None, None, True),
        (0.3, 0.5, None, True),
        (0.5, 0.5, None, False),
        (0.5, 0.5, 0.6, True),
        (0.1, 0.5, 0.0, False),
        (-1.0, None, -1.0, False),
    ]:
        hits = (Hit("sql", 0.2, 0.0),)
        retriever = scripted(Ranking(hits, fit, 0.3), threshold=setting)
        (route,) = retriever.route(["a"], threshold=asked)
        assert route.fallback == fallback and route.fit == fit
        assert route.threshold == (asked if asked is not None else setting if setting is not None else 0.3)
        assert retriever.compose(route).adapters == (() if fallback else ("sql",))


def test_no_hits_are_a_fallback_whatever_the_threshold(scripted: Scripted) -> None:
    (route,) = scripted(Ranking((), 0.0, -1.0)).route(["a"], threshold=-5)
    assert route.fallback


@pytest.mark.parametrize("strategy", ["arrow", "ramole", "moe;top_k=1"])
def test_a_gate_gets_all_hits_with_equal_weights(scripted: Scripted, strategy: str) -> None:
    hits = (Hit("sql", 0.98, logit=4.0), Hit("german", 0.02, logit=0.0))
    retriever = scripted(Ranking(hits, 1.0, 0.0), coverage=0.5)
    (route,) = retriever.route(["a prompt"])
    found = retriever.compose(route, strategy=strategy)
    assert found.adapters == ("sql", "german") and found.weights == (0.5, 0.5)
    assert found.gate is not None


@pytest.mark.parametrize(
    ("coverage", "used"), [(0.95, ("sql", "german")), (1.0, ("sql", "german", "math")), (0.5, ("sql",))]
)
def test_of_the_hits_those_are_used_that_carry_the_weight(
    scripted: Scripted, coverage: float, used: tuple[str, ...]
) -> None:
    """Weights 0.7, 0.27, 0.03."""
    hits = tuple(Hit(name, 0.1, math.log(w)) for name, w in [("sql", 0.7), ("german", 0.27), ("math", 0.03)])
    retriever = scripted(Ranking(hits, 1.0, 0.0), coverage=coverage)
    (route,) = retriever.route(["a"])
    composition = retriever.compose(route)
    assert route.hits == hits and composition.adapters == used
    weights = [0.7, 0.27, 0.03][: len(used)]
    assert composition.weights == pytest.approx([weight / sum(weights) for weight in weights])
    assert retriever.compose(route, weighting="uniform").adapters == ("sql", "german", "math"), "equal weights stay"
    assert retriever.compose(route, strategy="selection").adapters == ("sql",)


@pytest.mark.parametrize(
    ("settings", "rounded"),
    [
        ({}, False),
        ({"weight_step": 0.05}, True),
        ({"engine": "vllm"}, True),
        ({"engine": "vllm", "weight_step": 0.0}, False),
        ({"engine": "vllm", "vllm_lanes": True}, False),  # which makes no adapters
    ],
)
def test_weights_are_rounded_where_adapters_are_made_of_compositions(
    scripted: Scripted, settings: dict[str, Any], rounded: bool
) -> None:
    hits = (Hit("sql", 0.6, logit=2.0), Hit("german", 0.4, logit=1.0))
    retriever = scripted(Ranking(hits, 1.0, 0.0), **settings)
    (route,) = retriever.route(["x"])
    exact = 1 / (1 + math.exp(-1))
    expected = (0.75, 0.25) if rounded else (exact, 1 - exact)
    assert retriever.compose(route).weights == pytest.approx(expected)
    named = retriever.prepare("x", adapters={"sql": 0.61, "german": 0.39})[1]
    assert named.weights == (0.61, 0.39), "what a user names is as named"


def test_filters_reach_the_retriever(scripted: Scripted) -> None:
    retriever = scripted(Ranking((), 0.0, 0.0))
    retriever.route(["a"], k=7, exclude=["x"], only=["y", "y"], tags=["t"], tenant="us")
    retriever.generate(["a"], tags=["t"], tenant="us")
    retriever.route(["a"])
    assert retriever.retriever.asked == [  # type: ignore[attr-defined]
        (7, AdapterFilter(frozenset({"x"}), frozenset({"y"}), frozenset({"t"}))),
        (3, AdapterFilter(tags=frozenset({"t"}))),
        (3, AdapterFilter()),
    ]


def test_explain_asks_the_hybrid_and_refuses_for_the_papers(retriever: LoraRetriever) -> None:
    with pytest.raises(InvalidInputError, match="cannot explain"):
        retriever.explain(["a"])
    hybrid = LoraRetriever(
        retriever.pool,
        Settings(),
        lambda pool, settings: HybridRetriever(pool, lambda name: WordEncoder()),
        lambda pool, settings: pytest.fail("no engine is needed"),
    )
    (reason,) = hybrid.explain(["add the numbers"], k=2, exclude=["sql"])
    (route,) = hybrid.route(["add the numbers"], k=2, exclude=["sql"])
    assert [hit.adapter for hit in reason.hits] == ["math", "german"] == [hit.adapter for hit in route.hits]
    assert (reason.fit, reason.threshold) == (route.fit, route.threshold)


def test_excluded_adapters_are_not_used(retriever: LoraRetriever) -> None:
    (completion,) = retriever.generate(["add the numbers"], exclude=["math"], threshold=-1)
    assert "math" not in {hit.adapter for hit in completion.hits}
    (completion,) = retriever.generate(["add the numbers"], only=["sql"], threshold=-1)
    assert completion.composition.adapters == ("sql",)
    (completion,) = retriever.generate(["add the numbers"], only=[])
    assert completion.fallback and completion.composition == BASE_COMPOSITION


def test_named_adapters_replace_retrieval(retriever: LoraRetriever) -> None:
    (completion,) = retriever.generate(["add the numbers"], adapters={"sql": 0.7, "german": 0.3})
    assert completion.composition == Composition("mixture", ("sql", "german"), (0.7, 0.3))
    assert completion.hits == () and not completion.fallback
    assert retriever.generate(["add"], adapters={})[0].composition == BASE_COMPOSITION


def test_a_sampling_for_each_prompt(retriever: LoraRetriever, engine: FakeEngine) -> None:
    samplings = [Sampling(max_tokens=1), Sampling(max_tokens=2)]
    retriever.generate(["a", "b"], sampling=samplings, chat=False)
    assert [request.sampling for request in engine.requests] == samplings
    assert not any(request.chat for request in engine.requests)
    with pytest.raises(InvalidInputError, match="2 sampling settings for 1 prompts"):
        retriever.generate(["a"], sampling=samplings)


def test_wrong_names_are_errors_before_anything_runs(retriever: LoraRetriever, engine: FakeEngine) -> None:
    with pytest.raises(AdapterNotFoundError, match="sqll"):
        retriever.generate(["a"], adapters={"sqll": 1.0})
    with pytest.raises(InvalidInputError, match="strategy 'blend'"):
        retriever.generate(["a"], strategy="blend")
    retriever.pool.set_enabled("sql", False)
    with pytest.raises(InvalidInputError, match="disabled"):
        retriever.generate(["a"], adapters={"sql": 1.0})
    assert engine.requests == []


def test_no_prompts(retriever: LoraRetriever) -> None:
    assert retriever.generate([]) == []
    assert retriever.route([]) == []


def test_an_empty_pool_falls_back_to_the_base_model(tmp_path: Path, engine: FakeEngine) -> None:
    with Pool.create(tmp_path / "pool", TINY_BASE, spec=TINY_SPEC) as pool:
        retriever = LoraRetriever(
            pool, Settings(), lambda pool, settings: PaperRetriever(pool, WordEncoder()), lambda pool, settings: engine
        )
        (completion,) = retriever.generate(["hello"])
        assert completion.fallback and completion.text == "base"


def test_a_threshold_that_is_no_number(retriever: LoraRetriever) -> None:
    with pytest.raises(InvalidInputError, match="NaN"):
        retriever.generate(["a"], threshold=float("nan"))


# Submission


@pytest.fixture
def hybrid(retriever: LoraRetriever, engine: FakeEngine) -> LoraRetriever:
    encoder = WordEncoder()
    return LoraRetriever(
        retriever.pool,
        Settings(threshold=-1),
        lambda reader, settings: HybridRetriever(reader, lambda name: encoder),
        lambda pool, settings: engine,
    )


def test_a_prompt_is_submitted_with_all_that_the_engine_is_to_know(hybrid: LoraRetriever, engine: FakeEngine) -> None:
    messages = [Message("user", "2 and 2?")]
    submission = hybrid.submit(
        "2 and 2?",
        query="add the numbers",
        messages=messages,
        sampling=Sampling(max_tokens=3),
        chat=False,
        priority=2,
        timeout=9.0,
        namespace="tenant us",
        strategy="selection",
        k=2,
    )
    route, composition = hybrid.prepare("add the numbers", strategy="selection", k=2)
    assert submission.route == route and submission.composition == composition and submission.answers == "the answers"
    assert composition.adapters == ("math",) and len(route.hits) == 2
    assert submission.retrieval_seconds > 0
    assert engine.requests == [
        Request("2 and 2?", composition, Sampling(max_tokens=3), False, 2, 9.0, tuple(messages), (), "tenant us")
    ]
    hybrid.submit("2 and 2?", tokens=[1, 2])
    assert engine.requests[1].tokens == (1, 2)
    for call in (hybrid.submit, hybrid.prepare):
        with pytest.raises(TypeError, match="'thresold'"):
            call("a", thresold=1)


def test_where_an_adapter_is_removed_meanwhile_retrieval_is_asked_again(
    hybrid: LoraRetriever, engine: FakeEngine
) -> None:
    engine.gone = {"math"}
    engine.refused = lambda: hybrid.pool.remove("math")
    submission = hybrid.submit("add the numbers", k=1)
    assert submission.answers == "the answers" and submission.composition.adapters != ("math",)
    assert [request.composition.adapters == ("math",) for request in engine.requests] == [True, False]


def test_retrieval_is_not_asked_for_ever(hybrid: LoraRetriever, engine: FakeEngine) -> None:
    engine.gone = {"math", "sql", "german"}
    with pytest.raises(AdapterNotFoundError):
        hybrid.submit("add the numbers")
    assert len(engine.requests) == 4
    engine.requests.clear()
    with pytest.raises(AdapterNotFoundError):
        hybrid.submit("add the numbers", adapters={"math": 1.0})
    assert len(engine.requests) == 1, "the caller named it"


# Views


def test_a_tenant_gets_its_own_and_the_shared_adapters(hybrid: LoraRetriever, tmp_path: Path) -> None:
    samples = ["translate to french", "in french please"]
    for tenant in ("us", "them"):
        folder = write_peft_folder(tmp_path / tenant, seed=7)
        hybrid.pool.add(folder, name=f"{tenant}:french", samples=samples, tenant=tenant)
    for tenant, own in (("us", {"us:french"}), ("", set()), ("others", set()), (None, {"us:french", "them:french"})):
        (route,) = hybrid.route(["a text in french"], k=9, tenant=tenant)
        assert {hit.adapter for hit in route.hits} == {"sql", "german", "math"} | own
        (reason,) = hybrid.explain(["a text in french"], k=9, tenant=tenant)
        assert [hit.adapter for hit in reason.hits] == [hit.adapter for hit in route.hits]
        assert set(hybrid.map(tenant).adapters) == {hit.adapter for hit in route.hits}
    assert hybrid.submit("in french", adapters={"us:french": 1.0}, tenant="us").composition.adapters == ("us:french",)
    for tenant in ("them", ""):
        with pytest.raises(AdapterNotFoundError, match="'us:french'"):
            hybrid.submit("in french", adapters={"us:french": 1.0}, tenant=tenant)
        with pytest.raises(AdapterNotFoundError, match="'us:french'"):
            hybrid.generate(["in french"], adapters={"us:french": 1.0}, tenant=tenant)


def test_following_embeds_what_is_new(hybrid: LoraRetriever, tmp_path: Path) -> None:
    hybrid.pool.add(write_peft_folder(tmp_path / "french", seed=7), samples=["in french"], name="us:f", tenant="us")
    hybrid.follow("")
    tag = WordEncoder().tag
    assert hybrid.pool.missing_embeddings(tag).keys() == {"us:f"}
    hybrid.follow("us")
    assert not hybrid.pool.missing_embeddings(tag)


# Embeddings and maps


def test_embeddings_are_those_of_the_retriever(hybrid: LoraRetriever, retriever: LoraRetriever) -> None:
    texts = ["add the numbers", "write"]
    for each in (hybrid, retriever):
        assert each.encode(texts, "us").tolist() == WordEncoder().encode(texts).tolist()
        assert each.count_tokens(texts) == 4
        with pytest.raises(InvalidInputError, match="prompt 2 of 2 is empty"):
            each.encode(["a", " "])


def test_the_name_of_the_encoder(retriever: LoraRetriever, scripted: Scripted, tmp_path: Path) -> None:
    assert retriever.embedding_model == DEFAULT_ENCODER
    retriever.pool.set_encoder("owner/encoder")
    assert retriever.embedding_model == "owner/encoder"
    retriever.pool.set_encoder(str(tmp_path / "mine"))
    assert retriever.embedding_model == "mine", "where it lies is nobody's business"
    assert scripted(Ranking((), 0.0, 0.0), encoder="owner/other").embedding_model == "owner/other"


def test_what_a_retriever_cannot_do_is_told(retriever: LoraRetriever, scripted: Scripted) -> None:
    with pytest.raises(InvalidInputError, match="cannot draw a map; expected the hybrid"):
        retriever.map()
    for ask in (scripted(Ranking((), 0.0, 0.0)).encode, scripted(Ranking((), 0.0, 0.0)).count_tokens):
        with pytest.raises(InvalidInputError, match="cannot (encode|count)"):
            ask(["a"])


def test_weights_by_effect_ask_the_engine(retriever: LoraRetriever, engine: FakeEngine) -> None:
    asked = []

    def effects(requests: Sequence[Request], adapters: Sequence[Sequence[str]]) -> list[tuple[float, ...]]:
        asked.append(([request.prompt for request in requests], list(adapters)))
        return [tuple(float(len(name)) for name in row) for row in adapters]

    engine.effects = effects  # type: ignore[attr-defined]
    prompts = ["write a query", "add the numbers"]
    found = retriever.generate(prompts, k=2, strategy="mixture", weighting="effect", threshold=-1.0)
    for completion in found:
        total = sum(len(name) for name in completion.composition.adapters)
        weights = dict(zip(completion.composition.adapters, completion.composition.weights, strict=True))
        assert weights == pytest.approx({name: len(name) / total for name in weights})
    assert [rows for rows, _ in asked] == [prompts]  # once, for all
    (route,) = retriever.route(prompts[:1], k=2, threshold=-1.0)
    assert retriever.compose(route, weighting="effect") == found[0].composition
    before = len(asked)
    retriever.generate(prompts, weighting="score", threshold=-1.0)
    assert len(asked) == before


def test_where_none_fits_the_base_model_answers_or_all_hits_alike(retriever: LoraRetriever) -> None:
    (route,) = retriever.route(["nothing of the sort"], k=3)
    assert route.fallback and len(route.hits) == 3
    assert retriever.compose(route) == BASE_COMPOSITION
    retriever.settings = replace(retriever.settings, fallback="mixture")
    found = retriever.compose(route)
    assert found.weights == pytest.approx((1 / 3,) * 3) and found.mixer is Mixer.OUTPUTS
    assert retriever.compose(replace(route, hits=())) == BASE_COMPOSITION
    fits = replace(route, fallback=False)
    assert retriever.compose(fits).weights != found.weights
