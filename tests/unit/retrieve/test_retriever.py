from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loraretriever.errors import AdapterNotFoundError, InvalidInputError
from loraretriever.pool import Pool
from loraretriever.retrieve import PaperRetriever
from loraretriever.types import AdapterFilter
from tiny import TINY_BASE, TINY_SPEC, write_peft_folder
from tiny_text import WordEncoder


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with Pool.create(tmp_path / "pool", TINY_BASE, spec=TINY_SPEC) as pool:
        for seed, (name, samples) in enumerate(
            {
                "sql": ["write a query", "query the table"],
                "german": ["translate to german", "say it in german"],
                "math": ["add the numbers", "compute the sum"],
            }.items()
        ):
            pool.add(write_peft_folder(tmp_path / name, seed=seed), samples=samples)
        yield pool


def names(retriever: PaperRetriever, prompt: str, k: int = 3) -> list[str]:
    return [hit.adapter for hit in retriever.rank([prompt], k)[0].hits]


def test_ranks_the_adapter_with_like_samples_first(pool: Pool) -> None:
    retriever = PaperRetriever(pool, WordEncoder())
    assert names(retriever, "a query over the table", 1) == ["sql"]
    assert names(retriever, "in german please", 1) == ["german"]


def test_follows_the_pool(pool: Pool, tmp_path: Path) -> None:
    encoder = WordEncoder()
    retriever = PaperRetriever(pool, encoder)
    names(retriever, "hello")
    encoded = len(encoder.encoded)
    pool.add(write_peft_folder(tmp_path / "hello", seed=9), samples=["hello there"])
    assert names(retriever, "hello", 1) == ["hello"]
    assert encoder.encoded[encoded:] == ["hello there", "hello"], "only the new sample and the prompt are encoded"
    pool.set_enabled("hello", False)
    assert "hello" not in names(retriever, "hello")
    pool.set_enabled("hello", True)
    pool.remove("german")
    assert sorted(names(retriever, "hello", 9)) == ["hello", "math", "sql"]


def test_embeddings_are_stored_and_remade_for_another_encoder(pool: Pool) -> None:
    names(PaperRetriever(pool, WordEncoder()), "hello")
    again = WordEncoder()
    names(PaperRetriever(pool, again), "hello")
    assert again.encoded == ["hello"], "samples were embedded before"
    other = WordEncoder("other")
    assert names(PaperRetriever(pool, other), "say it in german", 1) == ["german"]
    assert len(other.encoded) == 7, "six samples and one prompt"


def test_names_in_filters_must_exist_but_may_be_disabled(pool: Pool) -> None:
    retriever = PaperRetriever(pool, WordEncoder())
    pool.set_enabled("math", False)
    (ranking,) = retriever.rank(["hello"], 3, AdapterFilter(only=frozenset({"math"})))
    assert ranking.hits == () and ranking.fit < ranking.threshold
    with pytest.raises(AdapterNotFoundError, match="mth"):
        retriever.rank(["hello"], 3, AdapterFilter(exclude=frozenset({"mth"})))


@pytest.mark.parametrize(("prompts", "k"), [(["hello", " \n"], 3), (["hello"], 0)])
def test_bad_requests(pool: Pool, prompts: list[str], k: int) -> None:
    with pytest.raises(InvalidInputError, match="expected"):
        PaperRetriever(pool, WordEncoder()).rank(prompts, k)


def test_no_prompts_and_lone_surrogates(pool: Pool) -> None:
    retriever = PaperRetriever(pool, WordEncoder())
    assert retriever.rank([], 3) == []
    assert len(retriever.rank(["query \ud800 table"], 3)[0].hits) == 3


def test_scores_are_cosines_and_so_are_fit_and_threshold(pool: Pool) -> None:
    encoder = WordEncoder()
    (ranking,) = PaperRetriever(pool, encoder).rank(["query the sum"], 3)
    (prompt,) = encoder.encode(["query the sum"])
    for hit in ranking.hits:
        mean = encoder.encode([sample.text for sample in pool.samples(hit.adapter)]).mean(axis=0)
        assert hit.score == pytest.approx(prompt @ mean / np.linalg.norm(mean), abs=1e-6)
        assert hit.logit == pytest.approx(hit.score / 0.05)
    assert ranking.fit == ranking.hits[0].score and ranking.threshold == 0.5


def test_tags_tenants_and_base_models_are_filtered(pool: Pool, tmp_path: Path) -> None:
    for seed, (name, tags, tenant) in enumerate(
        [("own", ["a", "b"], "us"), ("foreign", ["a"], "them"), ("shared", ["a", "b"], None)], start=9
    ):
        pool.add(write_peft_folder(tmp_path / name, seed=seed), samples=[f"{name} words"], tags=tags, tenant=tenant)
    retriever = PaperRetriever(pool, WordEncoder())

    def found(**wanted: Any) -> set[str]:
        return {hit.adapter for hit in retriever.rank(["words"], 9, AdapterFilter(**wanted))[0].hits}

    everything = {"own", "foreign", "shared", "sql", "german", "math"}
    assert found() == everything
    assert found(tags=frozenset({"a"})) == {"own", "foreign", "shared"}
    assert found(tags=frozenset({"a", "b"})) == {"own", "shared"}
    assert found(tags=frozenset({"c"})) == set()
    assert found(tenant="us") == everything - {"foreign"}
    assert found(tenant="nobody") == everything - {"foreign", "own"}
    assert found(tenant="us", tags=frozenset({"b"}), exclude=frozenset({"shared"})) == {"own"}
    assert found(tenant="us", only=frozenset({"foreign", "sql"})) == {"sql"}
    assert found(base_model=TINY_BASE) == everything
    assert found(base_model="another") == set()


def test_distances_are_those_of_the_unit_vectors(pool: Pool) -> None:
    encoder = WordEncoder()
    (ranking,) = PaperRetriever(pool, encoder).rank(["write a query"], 2)
    (prompt,) = encoder.encode(["write a query"])
    for hit in ranking.hits:
        mean = encoder.encode([sample.text for sample in pool.samples(hit.adapter)]).mean(axis=0)
        assert hit.distance == pytest.approx(np.linalg.norm(prompt - mean / np.linalg.norm(mean)), abs=1e-5)
