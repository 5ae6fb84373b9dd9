from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from loraretriever.config import Settings
from loraretriever.errors import AdapterNotFoundError, InvalidInputError
from loraretriever.pipeline import LoraRetriever
from loraretriever.pool import Pool
from loraretriever.retrieve import PaperRetriever
from loraretriever.types import BASE_COMPOSITION, Composition, Generation, Mixer, Request, Sampling
from tiny import TINY_BASE, TINY_SPEC, write_peft_folder
from tiny_text import WordEncoder


class FakeEngine:
    """Answers with the request's composition, last request first."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

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


def test_the_default_weights_follow_the_scores(retriever: LoraRetriever) -> None:
    composition = retriever.generate(["add the numbers"])[0].composition
    assert composition.strategy == "mixture" and composition.adapters[0] == "math"
    assert sum(composition.weights) == pytest.approx(1)
    assert list(composition.weights) == sorted(composition.weights, reverse=True)


def test_hits_below_the_threshold_are_shown_but_not_used(retriever: LoraRetriever) -> None:
    (completion,) = retriever.generate(["add the numbers"], threshold=0.9)
    assert len(completion.hits) == 3
    assert completion.composition.adapters == ("math",) and not completion.fallback
    (completion,) = retriever.generate(["entirely something else"], threshold=0.9)
    assert len(completion.hits) == 3
    assert completion.composition == BASE_COMPOSITION and completion.fallback and completion.text == "base"


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
