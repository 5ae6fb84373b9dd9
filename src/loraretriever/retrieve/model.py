"""What the hybrid retriever learns from all adapters together: weights of terms, covariance, head, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import special

from loraretriever.retrieve import sparse
from loraretriever.retrieve.calibration import Calibration, calibrate
from loraretriever.retrieve.dense import DenseModel, Moments, gram_matrix, halves
from loraretriever.retrieve.encoder import Vectors
from loraretriever.retrieve.head import MAX_SAMPLES, RidgeHead
from loraretriever.types import PoolEntry

Floats = NDArray[np.float64]

# A logit is DENSE times the log-likelihood plus SPARSE times the head's value, or the cosine where there is no head.
# Chosen on the samples of the paper's 48 tasks, each left out (docs/architecture.md); at work in every pool, because
# where all samples look alike anything separates them, and words would win that do not occur in new phrasings.
DENSE, SPARSE = 0.06, 10.0
_SPLIT_GAIN = 0.1  # nats per sample that a second mean must bring


@dataclass(frozen=True, slots=True)
class Parts:
    """Which parts of the hybrid are at work; at least one of the first two."""

    dense: bool = True
    sparse: bool = True
    head: bool = True
    clusters: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """An adapter as the retriever keeps it. Shape: vectors (samples, d) in half precision, terms (samples, buckets)."""

    name: str
    tags: frozenset[str]
    tenant: str | None
    base_model: str
    vectors: NDArray[np.float16]
    terms: sparse.Rows
    counter_vectors: NDArray[np.float16]
    counter_terms: sparse.Rows

    @classmethod
    def of(cls, entry: PoolEntry) -> Member:
        """From an entry whose samples are all embedded."""
        assert entry.vectors is not None and entry.counter_vectors is not None
        return cls(
            entry.name,
            frozenset(entry.tags),
            entry.tenant,
            entry.base_model,
            entry.vectors.astype(np.float16),
            sparse.count_terms(entry.texts),
            entry.counter_vectors.astype(np.float16),
            sparse.count_terms(entry.counter_texts),
        )

    def equals(self, other: Member | None) -> bool:
        """Whether nothing differs: then nothing else can be learnt from it."""
        return other is self or (
            other is not None
            and (self.name, self.tags, self.tenant, self.base_model)
            == (other.name, other.tags, other.tenant, other.base_model)
            and np.array_equal(self.vectors, other.vectors)
            and np.array_equal(self.counter_vectors, other.counter_vectors)
            and sparse.equal(self.terms, other.terms)
            and sparse.equal(self.counter_terms, other.counter_terms)
        )


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """Learnt once from a set of members; members that come later are described in its terms until it is learnt anew.

    `head` knows the members of `names` only. `halved`: the members with two means.
    """

    parts: Parts
    names: tuple[str, ...]
    dense: DenseModel
    weights: sparse.TermWeights
    head: RidgeHead | None = None
    halved: frozenset[str] = frozenset()
    calibration: Calibration = field(default_factory=Calibration)

    def labels(self, member: Member) -> NDArray[np.int64]:
        """Which of the member's means each of its samples belongs to, from 0."""
        if member.name in self.halved:
            return halves(member.vectors.astype(np.float32))
        return np.zeros(len(member.vectors), dtype=np.int64)


def learn(members: Sequence[Member], parts: Parts) -> Model:
    """Learn from at least one member."""
    counted = sparse.stack(member.terms for member in members)
    weights = sparse.TermWeights(counted)
    owners = np.repeat(np.arange(len(members)), [len(member.vectors) for member in members])
    names = tuple(member.name for member in members)
    if len(owners) > MAX_SAMPLES:
        dense = _many(members)
        calibration = _calibrate_sample(members, dense, weights, parts)
        return Model(parts, names, dense, weights, calibration=calibration)
    rows = weights(counted)
    vectors = np.concatenate([member.vectors for member in members]).astype(np.float32)
    dense, labels, halved = _choose_means(members, vectors, owners, parts)
    head = RidgeHead(rows, owners, len(members)) if parts.sparse and parts.head else None
    left_out = head.leave_one_out if head else _left_out_cosines(rows, owners, len(members))
    scores = _logits(dense, vectors, labels, owners, left_out, parts)
    calibration = calibrate(*_repeated(owners, scores, left_out_cosines(vectors, owners, len(members))))
    return Model(parts, names, dense, weights, head, halved, calibration)


def _many(members: Sequence[Member]) -> DenseModel:
    """One mean each, without a copy of all vectors in one piece."""
    sums = np.stack([member.vectors.sum(axis=0, dtype=np.float64) for member in members])
    counts = np.array([len(member.vectors) for member in members], dtype=np.float64)
    pieces = (np.concatenate([m.vectors for m in members[i : i + 100]]) for i in range(0, len(members), 100))
    return DenseModel(Moments(sums, counts, gram_matrix(pieces)))


def _choose_means(
    members: Sequence[Member], vectors: Vectors, owners: NDArray[np.int64], parts: Parts
) -> tuple[DenseModel, NDArray[np.int64], frozenset[str]]:
    """One mean for each member, two where the samples, each left out, are found better that way.

    Returns: the model, each sample's mean, and the names of the members with two.
    """
    gram = gram_matrix([vectors])
    single = DenseModel(Moments.of(vectors, owners, gram))
    if not (parts.dense and parts.clusters) or len(members) < 2:
        return single, owners, frozenset()
    second = np.concatenate([halves(member.vectors.astype(np.float32)) for member in members])
    can = np.array([second[owners == row].any() for row in range(len(members))])
    if not can.any():
        return single, owners, frozenset()
    labels = _means(owners, second)
    double = DenseModel(Moments.of(vectors, labels, gram))
    gain = _loss(single, vectors, owners, owners) - _loss(double, vectors, labels, owners)
    better = can & (np.bincount(owners, gain) > _SPLIT_GAIN * np.bincount(owners))
    labels = _means(owners, np.where(better[owners], second, 0))
    dense = DenseModel(Moments.of(vectors, labels, gram))
    return dense, labels, frozenset(member.name for member, is_better in zip(members, better, strict=True) if is_better)


def _means(owners: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers of the means, in the order of their owners."""
    return np.asarray(np.unique(owners * 2 + second, return_inverse=True)[1], dtype=np.int64)


def _loss(dense: DenseModel, vectors: Vectors, labels: NDArray[np.int64], owners: NDArray[np.int64]) -> Floats:
    """Of each sample, left out: minus the logarithm of its own adapter's probability."""
    logits = -DENSE / 2 * _nearest(dense.leave_one_out(vectors, labels), labels, owners)
    return np.asarray(special.logsumexp(logits, axis=1) - logits[np.arange(len(owners)), owners])


def _nearest(squares: Floats, labels: NDArray[np.int64], owners: NDArray[np.int64]) -> Floats:
    """From distances to means to those to members. Shape: (n, means) -> (n, members)."""
    _, first = np.unique(labels, return_index=True)
    starts = np.flatnonzero(np.diff(owners[first], prepend=-1))
    return np.asarray(np.minimum.reduceat(squares, starts, axis=1))


def _logits(
    dense: DenseModel,
    vectors: Vectors,
    labels: NDArray[np.int64],
    owners: NDArray[np.int64],
    left_out: Floats,
    parts: Parts,
) -> Floats:
    """Of each sample, left out, for each member."""
    logits = SPARSE * left_out if parts.sparse else np.zeros_like(left_out)
    if parts.dense:
        logits = logits - DENSE / 2 * _nearest(dense.leave_one_out(vectors, labels), labels, owners)
    return logits


def left_out_cosines(vectors: Vectors, owners: NDArray[np.int64], count: int) -> Floats:
    """Each sample's cosine with each member's mean, the sample left out. Shape: (n, d), (n,) -> (n, members)."""
    sums = np.zeros((count, vectors.shape[1]))
    np.add.at(sums, owners, vectors.astype(np.float64))
    return _cosines(vectors @ sums.T, (sums * sums).sum(1), owners)


def _left_out_cosines(rows: sparse.Rows, owners: NDArray[np.int64], count: int) -> Floats:
    """The same of sparse rows."""
    membership = sparse.membership(owners, count)
    sums = membership @ rows
    return _cosines((rows @ sums.T).toarray(), np.asarray(sums.multiply(sums).sum(axis=1)), owners)


def _cosines(products: Floats, squares: Floats, owners: NDArray[np.int64]) -> Floats:
    """From rows of length 1: their products with the members' sums, and these sums' squared lengths."""
    own = np.arange(len(owners)), owners
    lengths = np.broadcast_to(squares, products.shape).astype(np.float64)
    lengths[own] += 1 - 2 * products[own]
    products = products.astype(np.float64)
    products[own] -= 1
    return np.asarray(np.clip(products / np.sqrt(np.maximum(lengths, 1e-12)), -1, 1))  # of half precision


def _repeated(owners: NDArray[np.int64], *scores: Floats) -> tuple[Floats, NDArray[np.int64], Floats]:
    """Only the samples of members that have several: the others' cannot be left out."""
    keep = np.bincount(owners)[owners] > 1
    return scores[0][keep], owners[keep], scores[1][keep]


def _calibrate_sample(
    members: Sequence[Member], dense: DenseModel, weights: sparse.TermWeights, parts: Parts
) -> Calibration:
    """For many members: samples of some of them, against all."""
    chosen: list[int] = []
    total = 0
    for row in np.random.default_rng(0).permutation(len(members)):
        if total + len(members[row].vectors) > MAX_SAMPLES // 2:
            break
        chosen.append(int(row))
        total += len(members[row].vectors)
    few = [members[row] for row in sorted(chosen)]
    if len(few) < 2:
        return Calibration()
    owners = np.repeat(np.sort(np.array(chosen)), [len(member.vectors) for member in few])
    vectors = np.concatenate([member.vectors for member in few]).astype(np.float32)
    own = np.arange(len(owners)), owners
    counts = np.array([len(member.vectors) for member in members])
    z, means = dense.project(vectors), dense.place(dense.means, counts.astype(np.float64))
    squares = ((z * z).sum(1)[:, None] + (means * means).sum(1) - 2 * z @ means.T).astype(np.float64)
    rest = np.maximum(counts[owners] - 1, 1)
    gaps = (z - means[owners])[:, :-1].astype(np.float64)
    squares[own] = (gaps * gaps).sum(1) * (counts[owners] / rest) ** 2 + dense.excess * (1 - 1 / rest)
    lengths = np.linalg.norm(dense.means, axis=1)
    cosines = vectors @ (dense.means / lengths[:, None]).T
    sums = counts[owners] * lengths[owners]
    cosines[own] = (cosines[own] * sums - 1) / np.sqrt(np.maximum(sums**2 + 1 - 2 * cosines[own] * sums, 1e-12))
    logits = -DENSE / 2 * squares if parts.dense else np.zeros_like(squares)
    if parts.sparse:
        rows = weights(sparse.stack(member.terms for member in few))
        local = np.repeat(np.arange(len(few)), [len(member.vectors) for member in few])
        logits[:, np.sort(np.array(chosen))] += SPARSE * _left_out_cosines(rows, local, len(few))
    return calibrate(*_repeated(owners, logits, cosines))
