from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loraretriever.config import PAPER_INSTRUCTION, Settings
from loraretriever.errors import InvalidInputError, ModelLoadError
from loraretriever.pool import Pool
from loraretriever.retrieve import HybridRetriever, PaperRetriever, Parts, SentenceEncoder, Views
from loraretriever.retrieve.loading import PARTS, hybrid_encoder, load_retriever, paper_encoder
from tiny import TINY_BASE, TINY_SPEC, write_peft_folder
from tiny_text import write_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"), layers=3)


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with Pool.create(tmp_path / "pool", TINY_BASE, spec=TINY_SPEC) as pool:
        for seed, name in enumerate(("sql", "math")):
            pool.add(write_peft_folder(tmp_path / name, seed=seed), samples=[f"a text on {name}"])
        yield pool


def trained(folder: Path, tmp_path: Path, record: Any) -> str:
    """The encoder with what `train-retriever` writes beside it."""
    copy = tmp_path / "trained"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).symlink_to(file)
    (copy / "loraretriever.json").write_text(record if isinstance(record, str) else json.dumps(record))
    return str(copy)


@pytest.mark.parametrize("name", PARTS)
def test_each_hybrid_ranks(pool: Pool, folder: Path, name: str) -> None:
    retriever = load_retriever(pool, Settings(retriever=name, encoder=str(folder)))
    assert isinstance(retriever, HybridRetriever)
    (ranking,) = retriever.rank(["a text on sql"], 3)
    assert len(ranking.hits) == 2 and ranking.hits[0].adapter == "sql"


@pytest.mark.parametrize("name", [*PARTS, "paper"])
def test_each_has_views(pool: Pool, folder: Path, tmp_path: Path, name: str) -> None:
    settings = Settings(retriever=name, encoder=str(folder))
    views = Views(pool, lambda reader: load_retriever(reader, settings))
    views.of("us").rank(["a text on sql"], 3)
    pool.add(write_peft_folder(tmp_path / "own", seed=9), name="us:own", samples=["a text on rain"], tenant="us")
    for view, found in (
        ("us", {"sql", "math", "us:own"}),
        ("them", {"sql", "math"}),
        (None, {"sql", "math", "us:own"}),
    ):
        (ranking,) = views.of(view).rank(["a text on rain"], 3)
        assert {hit.adapter for hit in ranking.hits} == found
        assert len(found) == 2 or ranking.hits[0].adapter == "us:own"


def test_the_parts_that_names_stand_for() -> None:
    assert PARTS["hybrid"] == Parts()
    assert all(parts.dense or parts.sparse for parts in PARTS.values())
    assert not PARTS["dense"].sparse and not PARTS["sparse"].dense and not PARTS["dense+sparse"].head


def test_the_papers(pool: Pool, folder: Path) -> None:
    retriever = load_retriever(pool, Settings(retriever="paper", encoder=str(folder)))
    assert isinstance(retriever, PaperRetriever)
    (ranking,) = retriever.rank(["a text on sql"], 3)
    assert ranking.threshold == 0.5 and len(ranking.hits) == 2


def test_an_unknown_name_is_told(pool: Pool) -> None:
    with pytest.raises(InvalidInputError, match="unknown retriever 'best'; expected one of hybrid, dense, .*paper"):
        load_retriever(pool, Settings(retriever="best"))


def test_the_hybrid_loads_its_encoder_at_the_first_call(pool: Pool) -> None:
    retriever = load_retriever(pool, Settings(encoder="/nowhere"))
    for _ in range(2):
        with pytest.raises(ModelLoadError, match="/nowhere"):
            retriever.rank(["a"], 1)
    with pytest.raises(ModelLoadError, match="/nowhere"):
        load_retriever(pool, Settings(encoder="/nowhere", retriever="paper"))


@pytest.mark.parametrize("name", ["hybrid", "paper"])
def test_the_settings_encoder_comes_before_the_pools(pool: Pool, folder: Path, name: str) -> None:
    pool.set_encoder("tests/nowhere")
    settings = Settings(encoder=str(folder), retriever=name)
    assert load_retriever(pool, settings).rank(["a text on sql"], 1)[0].hits
    pool.set_encoder(str(folder))
    assert load_retriever(pool, Settings(retriever=name)).rank(["a text on sql"], 1)[0].hits


def test_each_reads_with_its_own_instruction(folder: Path) -> None:
    assert hybrid_encoder(str(folder), Settings()).tag.endswith("#")
    assert paper_encoder(str(folder), Settings()).tag.endswith("#" + PAPER_INSTRUCTION)
    for make in (hybrid_encoder, paper_encoder):
        assert make(str(folder), Settings(instruction="Read: ")).tag.endswith("#Read: ")
        assert make(str(folder), Settings(instruction="")).tag.endswith("#")


@pytest.mark.parametrize("instruction", ["Find the task: ", ""])
def test_the_instruction_that_it_was_trained_with(folder: Path, tmp_path: Path, instruction: str) -> None:
    name = trained(folder, tmp_path, {"instruction": instruction})
    for make in (hybrid_encoder, paper_encoder):
        assert make(name, Settings()).tag.endswith("#" + instruction)
        assert make(name, Settings(instruction="Read: ")).tag.endswith("#Read: "), "what was asked for comes first"
    expected = SentenceEncoder(name, instruction, max_tokens=64, layers="thirds").encode(["a text"])
    assert hybrid_encoder(name, Settings(precision="float32")).encode(["a text"]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("record", ["not json", "[]", '{"instruction": 3}', "{}", '"text"'])
def test_a_record_that_says_nothing(folder: Path, tmp_path: Path, record: str) -> None:
    name = trained(folder, tmp_path, record)
    assert hybrid_encoder(name, Settings()).tag.endswith("#")
    assert paper_encoder(name, Settings()).tag.endswith("#" + PAPER_INSTRUCTION)


def test_the_hybrid_reads_the_thirds_of_as_many_tokens_as_are_set(folder: Path) -> None:
    vectors = hybrid_encoder(str(folder), Settings(max_tokens=8)).encode(["abcdefgh" * 9, "abcd" + "z" * 20 + "efgh"])
    assert vectors.shape == (2, 96)
    assert vectors[0] == pytest.approx(vectors[1], abs=1e-5), "the first four and the last four characters"
    assert np.linalg.norm(paper_encoder(str(folder), Settings()).encode(["a"])) == pytest.approx(1, abs=1e-5)
    tags = {hybrid_encoder(str(folder), Settings(precision=each)).tag for each in ("float32", "int8")}
    assert len(tags) == 2
