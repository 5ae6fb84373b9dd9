from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from loraretriever.errors import InvalidInputError
from loraretriever.pool import Pool
from loraretriever.pool.embeddings import MAX_ENCODERS, Vectors
from loraretriever.types import Sample
from tiny import write_peft_folder


def vectors(samples: list[Sample], dimension: int = 4) -> Vectors:
    """A vector per sample that tells which it is."""
    return np.array([[float(len(sample.text))] * dimension for sample in samples], dtype=np.float32)


def embed_missing(pool: Pool, tag: str) -> None:
    missing = pool.missing_embeddings(tag)
    pool.store_embeddings(tag, {name: vectors(samples) for name, samples in missing.items()})


@pytest.fixture
def filled(pool: Pool, tmp_path: Path) -> Pool:
    for seed, name in enumerate(["a", "b"]):
        pool.add(write_peft_folder(tmp_path / name, seed=seed), samples=["x", "yyy", "zz"][: seed + 2])
    return pool


def test_round_trip(filled: Pool) -> None:
    assert filled.embeddings("e") == {}
    assert filled.missing_embeddings("e") == {name: filled.samples(name) for name in ("a", "b")}
    change = filled.change
    embed_missing(filled, "e")
    found = filled.embeddings("e")
    assert {name: rows[:, 0].tolist() for name, rows in found.items()} == {"a": [1, 3], "b": [1, 3, 2]}
    assert {rows.dtype for rows in found.values()} == {np.dtype("float32")}
    assert filled.missing_embeddings("e") == {}
    assert filled.change == change, "readers need not look again for what they can make themselves"


def test_disabled_adapters_are_left_out(filled: Pool) -> None:
    filled.set_enabled("a", False)
    assert filled.missing_embeddings("e").keys() == {"b"}
    embed_missing(filled, "e")
    filled.set_enabled("a", True)
    assert filled.embeddings("e").keys() == {"b"}
    assert filled.missing_embeddings("e").keys() == {"a"}


def test_encoders_have_vectors_of_their_own(filled: Pool, tmp_path: Path) -> None:
    for tag in ("one", "two"):
        embed_missing(filled, tag)
    filled.add(write_peft_folder(tmp_path / "c", seed=3), samples=["x"])
    embed_missing(filled, "two")
    assert filled.embeddings("one").keys() == {"a", "b"}
    assert filled.embeddings("two").keys() == {"a", "b", "c"}


def test_vectors_of_the_last_few_encoders_are_kept(filled: Pool, tmp_path: Path) -> None:
    for number in range(MAX_ENCODERS):
        embed_missing(filled, f"e{number}")
    filled.add(write_peft_folder(tmp_path / "c", seed=3), samples=["x"])
    embed_missing(filled, "e0")
    embed_missing(filled, "new")
    kept = {tag for tag in (*(f"e{number}" for number in range(MAX_ENCODERS)), "new") if filled.embeddings(tag)}
    assert kept == {"e0", "new", *(f"e{number}" for number in range(2, MAX_ENCODERS))}


def test_embeddings_go_with_their_samples(filled: Pool, tmp_path: Path) -> None:
    embed_missing(filled, "e")
    filled.add(tmp_path / "a", samples=["x", "yyyy"])
    assert filled.embeddings("e").keys() == {"b"}
    assert filled.missing_embeddings("e") == {"a": [Sample("x"), Sample("yyyy")]}
    filled.add(write_peft_folder(tmp_path / "b", seed=9))
    assert filled.embeddings("e") == {}, "a new revision has samples of its own"
    filled.remove("b")
    embed_missing(filled, "e")
    assert filled.embeddings("e").keys() == {"a"}


def test_vectors_of_samples_that_changed_meanwhile_are_passed_over(filled: Pool, tmp_path: Path) -> None:
    missing = filled.missing_embeddings("e")
    with Pool.open(filled.location) as other:
        other.add(tmp_path / "a", samples=["as", "many"])
        other.remove("b")
    filled.store_embeddings("e", {name: vectors(samples) for name, samples in missing.items()})
    assert filled.embeddings("e") == {}
    assert filled.missing_embeddings("e").keys() == {"a"}


@pytest.mark.parametrize("shape", [(1, 4), (3, 4), (2,), (2, 4, 1)])
def test_vectors_of_the_wrong_shape_are_refused(filled: Pool, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInputError, match="expected"):
        filled.store_embeddings("e", {"b": np.zeros((3, 4), np.float32), "a": np.zeros(shape, np.float32)})
    assert filled.embeddings("e") == {}, "all are stored in one transaction"


def test_nan_is_refused(filled: Pool) -> None:
    with pytest.raises(InvalidInputError, match="finite"):
        filled.store_embeddings("e", {"a": np.full((2, 4), np.nan, np.float32)})
