from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from loraretriever.errors import InvalidInputError
from loraretriever.pool import Pool
from loraretriever.pool.embeddings import MAX_ENCODERS, Vectors
from loraretriever.types import Sample
from tiny import TINY_BASE, write_peft_folder


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
    assert filled.missing_embeddings("e") == {"a": [Sample("yyyy")]}, "the other one is still the same"
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


def test_one_new_sample_needs_one_new_vector(filled: Pool) -> None:
    for tag in ("e", "other"):
        embed_missing(filled, tag)
    filled.add_samples("a", ["eight"])
    filled.add_samples("a", ["no"], counter=True)
    filled.remove_samples("a", [0])
    assert filled.missing_embeddings("e") == {"a": [Sample("eight"), Sample("no", counter=True)]}
    for tag in ("e", "other"):
        embed_missing(filled, tag)
        assert filled.embeddings(tag)["a"][:, 0].tolist() == [3, 5], "counter samples aside"
        assert filled.missing_embeddings(tag) == {}


def test_samples_that_are_still_there_get_the_vectors_meant_for_them(filled: Pool) -> None:
    missing = filled.missing_embeddings("e")
    with Pool.open(filled.location) as other:
        other.remove_samples("b", [1])
        other.add_samples("b", ["seven77"])
    filled.store_embeddings("e", {name: vectors(samples) for name, samples in missing.items()})
    assert filled.missing_embeddings("e") == {"b": [Sample("seven77")]}
    embed_missing(filled, "e")
    assert filled.embeddings("e")["b"][:, 0].tolist() == [1, 2, 7]


def test_vectors_may_be_stored_unasked(filled: Pool) -> None:
    filled.add_samples("a", ["no"], counter=True)
    filled.missing_embeddings("e", ["b"])
    filled.store_embeddings("e", {"a": np.array([[1.0], [2], [3]], np.float32), "gone": np.zeros((7, 1), np.float32)})
    _, entries = filled.entries("e")
    assert entries["a"].vectors is not None and entries["a"].counter_vectors is not None
    assert (entries["a"].vectors.tolist(), entries["a"].counter_vectors.tolist()) == ([[1], [2]], [[3]])
    with pytest.raises(InvalidInputError, match="2 vectors for adapter 'a'; expected one per sample: 3"):
        filled.store_embeddings("e", {"a": np.zeros((2, 1), np.float32)})


def test_stored_vectors_are_replaced(filled: Pool) -> None:
    for value in (1.0, 2.0):
        filled.store_embeddings("e", {"a": np.full((2, 3), value, np.float32)})
    assert filled.embeddings("e")["a"].tolist() == [[2.0] * 3] * 2


def test_names_narrow_what_is_read(filled: Pool) -> None:
    assert filled.missing_embeddings("e", ["b", "nosuch"]).keys() == {"b"}
    embed_missing(filled, "e")
    assert filled.embeddings("e", {"a"}).keys() == {"a"}
    assert filled.embeddings("e", []) == filled.missing_embeddings("e", []) == {}
    names = [f"n{number}" for number in range(2000)]
    assert filled.embeddings("e", [*names, "a", "a"]).keys() == {"a"}, "more names than fit into a query"


def test_entries(filled: Pool, tmp_path: Path) -> None:
    filled.add(tmp_path / "a", tags=["t", "u"], tenant="acme")
    filled.add_samples("a", ["not me"], counter=True)
    embed_missing(filled, "e")
    filled.add_samples("b", ["later"], source="feedback")
    change, entries = filled.entries("e")
    assert (change, list(entries)) == (filled.change, ["a", "b"])
    a, b = entries["a"], entries["b"]
    assert (a.name, a.tags, a.tenant, a.base_model) == ("a", ("t", "u"), "acme", TINY_BASE)
    assert (a.texts, a.sources, a.counter_texts) == (("x", "yyy"), ("given", "given"), ("not me",))
    assert a.vectors is not None and a.counter_vectors is not None
    assert (a.vectors.shape, a.vectors.dtype, a.vectors[:, 0].tolist()) == ((2, 4), np.float32, [1, 3])
    assert a.counter_vectors[:, 0].tolist() == [6]
    assert a.vectors.flags.writeable, "torch warns of others"
    assert (b.tenant, b.vectors, b.counter_vectors, b.sources[-1]) == (None, None, None, "feedback")
    embed_missing(filled, "e")
    _, entries = filled.entries("e", ["b"])
    assert list(entries) == ["b"]
    assert entries["b"].counter_vectors is not None
    assert entries["b"].counter_vectors.shape == (0, 4)
    filled.add_samples("b", ["not me"], counter=True)
    b = filled.entries("e", ["b"])[1]["b"]
    assert b.vectors is not None and b.counter_vectors is None
    filled.set_enabled("b", False)
    assert filled.entries("e", ["b", "nosuch"]) == (filled.change, {})
    assert filled.entries("nosuch")[1]["a"].vectors is None


def test_entries_are_of_one_state(filled: Pool) -> None:
    """A writer that changes two adapters at once is never seen in between."""
    done = threading.Event()

    def write() -> None:
        with Pool.open(filled.location) as pool:
            for number in range(15):
                given = pool.give_feedback(f"prompt {number}", right="a", wrong="b")
                pool.approve_feedback([given.id])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while True:
        is_last = done.is_set()
        change, entries = filled.entries("e")
        assert len(entries["a"].texts) - 2 == len(entries["b"].counter_texts)
        assert change - 2 == len(entries["b"].counter_texts)
        seen.add(change)
        if is_last:
            break
    writer.join()
    assert max(seen) == 17
