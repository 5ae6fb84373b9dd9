from __future__ import annotations

import numpy as np
import pytest

from loraretriever.retrieve import MeanIndex
from loraretriever.retrieve.encoder import Vectors


def unit(rng: np.random.Generator, *shape: int) -> Vectors:
    vectors = rng.normal(size=shape)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), dtype=np.float32)


def plain_formula(embeddings: dict[str, Vectors], query: Vectors, name: str) -> float:
    """cos(E(x), mean of E(x_i)), written out."""
    mean = sum(embeddings[name]) / len(embeddings[name])
    return float(np.dot(query, mean) / (np.linalg.norm(query) * np.linalg.norm(mean)))


def test_scores_are_the_papers_formula() -> None:
    rng = np.random.default_rng(0)
    embeddings = {f"a{i}": unit(rng, 1 + i, 16) for i in range(9)}
    queries = unit(rng, 5, 16)
    for query, hits in zip(queries, MeanIndex(embeddings).search(queries, k=9), strict=True):
        expected = sorted(((plain_formula(embeddings, query, name), name) for name in embeddings), reverse=True)
        assert [hit.adapter for hit in hits] == [name for _, name in expected]
        assert [hit.score for hit in hits] == pytest.approx([score for score, _ in expected], abs=1e-6)


def test_exclude_and_only_apply_before_the_cut() -> None:
    rng = np.random.default_rng(1)
    embeddings = {name: unit(rng, 3, 8) for name in "abcdef"}
    index, query = MeanIndex(embeddings), unit(rng, 1, 8)
    ranked = [hit.adapter for hit in index.search(query, k=6)[0]]
    assert [hit.adapter for hit in index.search(query, 2, exclude={ranked[0]})[0]] == ranked[1:3]
    assert [hit.adapter for hit in index.search(query, 2, only=set(ranked[3:]))[0]] == ranked[3:5]
    assert index.search(query, 2, only=set()) == [()]


def test_equal_scores_keep_the_order_of_names() -> None:
    vector = np.array([[1.0, 0.0]], dtype=np.float32)
    index = MeanIndex({"b": vector, "a": vector, "c": vector})
    assert [hit.adapter for hit in index.search(vector, 3)[0]] == ["a", "b", "c"]


def test_opposite_samples_do_not_divide_by_zero() -> None:
    index = MeanIndex({"a": np.array([[1.0, 0.0], [-1.0, 0.0]], dtype=np.float32)})
    assert index.search(np.array([[0.0, 1.0]], dtype=np.float32), 1)[0][0].score == 0.0


def test_empty_pool() -> None:
    assert MeanIndex({}).search(np.zeros((2, 4), dtype=np.float32), 3) == [(), ()]
