from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loraretriever.errors import AdapterNotFoundError, InvalidInputError
from loraretriever.pool import Pool
from loraretriever.retrieve import PaperRetriever
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
    return [hit.adapter for hit in retriever.rank([prompt], k)[0]]


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
    assert retriever.rank(["hello"], 3, only={"math"}) == [()]
    with pytest.raises(AdapterNotFoundError, match="mth"):
        retriever.rank(["hello"], 3, exclude={"mth"})


@pytest.mark.parametrize(("prompts", "k"), [(["hello", " \n"], 3), (["hello"], 0)])
def test_bad_requests(pool: Pool, prompts: list[str], k: int) -> None:
    with pytest.raises(InvalidInputError, match="expected"):
        PaperRetriever(pool, WordEncoder()).rank(prompts, k)


def test_no_prompts_and_lone_surrogates(pool: Pool) -> None:
    retriever = PaperRetriever(pool, WordEncoder())
    assert retriever.rank([], 3) == []
    assert len(retriever.rank(["query \ud800 table"], 3)[0]) == 3
