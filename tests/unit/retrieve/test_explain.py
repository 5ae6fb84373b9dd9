from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_hybrid import SAMPLES

from loraretriever.pool import Pool
from loraretriever.retrieve import HybridRetriever, Parts, sparse
from loraretriever.retrieve.follower import Follower
from loraretriever.types import AdapterFilter
from tiny import TINY_BASE, TINY_SPEC, write_peft_folder
from tiny_text import WordEncoder

PROMPTS = ["write a query for the sum", "please, in german\nor a poem", "unheard syllables"]
ALL_PARTS = [Parts(), Parts(head=False), Parts(dense=False), Parts(sparse=False)]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    folder: Path = tmp_path_factory.mktemp("explained")
    with Pool.create(folder / "pool", TINY_BASE, spec=TINY_SPEC) as pool:
        for seed, (name, samples) in enumerate(SAMPLES.items()):
            pool.add(write_peft_folder(folder / name, seed=seed), samples=samples)
        pool.add_samples("math", ["write a query for the sum"], counter=True)
        yield pool


@pytest.mark.parametrize("parts", ALL_PARTS, ids=str)
def test_parts_add_up_to_the_logits_differences(pool: Pool, parts: Parts) -> None:
    retriever = HybridRetriever(pool, lambda name: WordEncoder(), parts)
    rankings, reasons = retriever.rank(PROMPTS, 3), retriever.explain(PROMPTS, 3)
    for prompt, ranking, reason in zip(PROMPTS, rankings, reasons, strict=True):
        assert reason.prompt == prompt and (reason.fit, reason.threshold) == (ranking.fit, ranking.threshold)
        assert reason.margin == pytest.approx(ranking.fit - ranking.threshold)
        assert [(hit.adapter, hit.probability) for hit in reason.hits] == [(h.adapter, h.score) for h in ranking.hits]
        totals = [hit.dense + hit.sparse - hit.penalty for hit in reason.hits]
        for total, hit in zip(totals, ranking.hits, strict=True):
            assert total - totals[0] == pytest.approx(hit.logit - ranking.hits[0].logit, abs=1e-4)
        assert reason.hits[0].dense == 0
        if not parts.dense:
            assert {hit.dense for hit in reason.hits} == {0}
        if not parts.sparse:
            assert {hit.sparse for hit in reason.hits} == {0} and not any(hit.terms for hit in reason.hits)


@pytest.mark.parametrize("parts", ALL_PARTS[:3], ids=str)
def test_terms_add_up_to_the_sparse_part(pool: Pool, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of centroids exactly; of the head but for 1/C, which all adapters have in common."""
    monkeypatch.setattr("loraretriever.retrieve.explain._TERMS", 1000)
    for reason in HybridRetriever(pool, lambda name: WordEncoder(), parts).explain(PROMPTS, 4):
        rests = []
        for hit in reason.hits:
            assert len({term.term for term in hit.terms}) == len(hit.terms)
            rests.append(hit.sparse - sum(term.part for term in hit.terms))
        assert rests == pytest.approx([rests[0]] * 4, abs=1e-4)
        assert rests[0] > 0.1 if parts.head else rests[0] == pytest.approx(0, abs=1e-4)


def test_the_terms_that_count_most(pool: Pool) -> None:
    (reason,) = HybridRetriever(pool, lambda name: WordEncoder()).explain(["say german german of the query"], 4)
    for hit in reason.hits:
        sizes = [abs(term.part) for term in hit.terms]
        assert sizes == sorted(sizes, reverse=True) and 0 < len(sizes) <= 8 and min(sizes) > 0
        assert {term.term for term in hit.terms} <= set(sparse.terms(reason.prompt))
    (german,) = [hit for hit in reason.hits if hit.adapter == "german"]
    assert german.terms[0].term == "german" and german.terms[0].part > 0
    assert next(term for term in german.terms if term.term == "query").part < 0


def test_the_nearest_samples(pool: Pool) -> None:
    encoder = WordEncoder()
    (reason,) = HybridRetriever(pool, lambda name: encoder).explain(["write a query"], 4)
    assert reason.hits[0].samples[0].text == "write a query"
    for hit in reason.hits:
        texts = [sample.text for sample in pool.samples(hit.adapter)]
        cosines = dict(zip(texts, encoder.encode(texts) @ encoder.encode(["write a query"])[0], strict=True))
        assert [near.cosine for near in hit.samples] == pytest.approx(
            sorted(cosines.values(), reverse=True)[:3], abs=1e-6
        )
        assert [cosines[near.text] for near in hit.samples] == pytest.approx([near.cosine for near in hit.samples])


def test_a_counter_sample_shows_as_a_penalty(pool: Pool) -> None:
    (reason,) = HybridRetriever(pool, lambda name: WordEncoder()).explain(["write a query for the sum"], 4)
    penalties = {hit.adapter: hit.penalty for hit in reason.hits}
    assert penalties.pop("math") > 1 and set(penalties.values()) == {0}


def test_filters_and_a_pool_with_nothing(pool: Pool, tmp_path: Path) -> None:
    retriever = HybridRetriever(pool, lambda name: WordEncoder())
    (reason,) = retriever.explain(["a query"], 9, AdapterFilter(exclude=frozenset({"sql"})))
    assert {hit.adapter for hit in reason.hits} == {"german", "math", "poem"}
    with Pool.create(tmp_path / "empty", TINY_BASE, spec=TINY_SPEC) as empty:
        (reason,) = HybridRetriever(empty, lambda name: WordEncoder()).explain(["a query"], 9)
        assert reason.hits == () and reason.fit == 0


def test_what_was_added_since_is_explained(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Follower, "_begin_learning", lambda self: None)
    with Pool.create(tmp_path / "pool", TINY_BASE, spec=TINY_SPEC) as growing:
        retriever = HybridRetriever(growing, lambda name: WordEncoder())
        for seed, (name, samples) in enumerate(SAMPLES.items()):
            growing.add(write_peft_folder(tmp_path / name, seed=seed), samples=samples)
            retriever.rank(["hello"], 1)
        (ranking,), (reason,) = retriever.rank(["a poem"], 9), retriever.explain(["a poem"], 9)
    assert reason.hits[0].adapter == "poem" and reason.hits[0].terms[0].term in {"poem", "a poem"}
    totals = np.array([hit.dense + hit.sparse - hit.penalty for hit in reason.hits])
    logits = np.array([hit.logit for hit in ranking.hits])
    assert totals - totals[0] == pytest.approx(logits - logits[0], abs=1e-4)
