"""Members of a pool made of random clusters, and the plain formulas that rankings are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from loraretriever.retrieve import sparse
from loraretriever.retrieve.model import Member
from loraretriever.types import PoolEntry

COMMON = ["please", "now", "the", "answer", "this", "text"]


def unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), dtype=np.float32)


def cluster(rng: np.random.Generator, samples: int, dimension: int, spread: float = 0.3) -> np.ndarray:
    """Unit vectors around a random one."""
    return unit(unit(rng.normal(size=dimension)) + spread * unit(rng.normal(size=(samples, dimension))))


def texts_of(rng: np.random.Generator, own: Sequence[str], count: int) -> list[str]:
    return [" ".join([*rng.choice(own, 2), *rng.choice(COMMON, 3)]) for _ in range(count)]


def member(
    name: str,
    vectors: np.ndarray,
    texts: Sequence[str] | None = None,
    counter_vectors: np.ndarray | None = None,
    counter_texts: Sequence[str] = (),
    **place: Any,
) -> Member:
    """A member as the retriever reads it from the pool; `place`: tags, tenant, base_model."""
    entry = PoolEntry(
        name,
        tuple(place.get("tags", ())),
        place.get("tenant"),
        place.get("base_model", "base"),
        tuple(texts if texts is not None else [f"{name} {i}" for i in range(len(vectors))]),
        ("given",) * len(vectors),
        tuple(counter_texts),
        vectors,
        np.empty((0, vectors.shape[1]), np.float32) if counter_vectors is None else counter_vectors,
    )
    return Member.of(entry)


def random_members(
    count: int, dimension: int = 24, samples: int = 6, seed: int = 0, spread: float = 0.6, prefix: str = "m"
) -> list[Member]:
    """Members with two words of their own each."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        name = f"{prefix}{i:03}"
        vectors = cluster(rng, samples, dimension, spread)
        made.append(member(name, vectors, texts_of(rng, [f"{name}first", f"{name}second"], samples)))
    return made


def replaced(old: Member, **changes: Any) -> Member:
    """The member with other fields."""
    fields = {name: getattr(old, name) for name in Member.__dataclass_fields__}
    return Member(**(fields | changes))


def tfidf(samples: Sequence[str], queries: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """By scikit-learn. Shape: (samples, terms), (queries, terms)."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer=sparse.terms, sublinear_tf=True, smooth_idf=True)
    rows = vectorizer.fit_transform(samples)
    return rows.toarray(), vectorizer.transform(queries).toarray()
