"""Members compiled for search under one model: immutable arrays, and the candidates they give for a prompt."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loraretriever.retrieve import sparse
from loraretriever.retrieve.encoder import Vectors
from loraretriever.retrieve.model import DENSE, SPARSE, Member, Model
from loraretriever.retrieve.vectors import VectorIndex, build_or_load
from loraretriever.types import AdapterFilter

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

# Up to this many members all are scored; of more, those whose means are nearest.
SCORE_ALL = 1000
CANDIDATES = 64
MAX_TERMS = 256  # of each of many members


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """One prompt. Shape: vector (d,), point (reduced + 1,)."""

    vector: Vectors
    point: Vectors
    terms: sparse.TermVector


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Of some members of a block for one prompt. Shape: (members,) each."""

    members: Ints
    dense: Floats  # DENSE times the log-likelihood
    sparse: Floats  # SPARSE times the head's value or the cosine
    cosines: Floats  # with the nearest of the member's means
    penalty: Floats | float = 0.0  # from counter samples

    @property
    def logits(self) -> Floats:
        """All parts together."""
        return np.asarray(self.dense + self.sparse - self.penalty)


class Block:
    """The means, term centroids and counter samples of some members."""

    def __init__(self, members: Sequence[Member], model: Model, index_folder: Path | None = None) -> None:
        """Compile; at least one member. The index over many is kept in the folder."""
        self.members = tuple(members)
        self.row = {member.name: row for row, member in enumerate(members)}
        self._model = model
        self._means = _Means(members, model, index_folder)
        self._knows_head = model.head is not None and tuple(self.row) == model.names
        self._term_rows: sparse.Rows = None
        self._terms_by_term: sparse.Rows = None
        if model.parts.sparse and not self._knows_head:
            owners = np.repeat(np.arange(len(members)), [len(member.vectors) for member in members])
            weighted = model.weights(sparse.stack(member.terms for member in members))
            self._term_rows = sparse.centroids(weighted, owners, len(members))
            if len(members) <= SCORE_ALL:
                self._terms_by_term = self._term_rows.T.tocsr()
            else:
                self._term_rows = sparse.heaviest(self._term_rows, MAX_TERMS)
        self._counters = _Counters(members, model)
        self._places = _Places(members)

    def allowed(self, wanted: AdapterFilter) -> Ints | None:
        """The members that may be found, ascending; None for all."""
        return self._places.find(wanted, self.row)

    def score(self, query: Query, allowed: Ints | None) -> Scores:
        """Score the members that matter: all of few, of many those nearest in the dense space."""
        members, squares, cosines = self._means.nearest(query, allowed)
        dense = -np.float32(DENSE / 2) * squares if self._model.parts.dense else np.zeros_like(squares)
        scores = Scores(members, dense, self._sparse(query, members), cosines)
        return self._counters.apply(query, scores)

    def _sparse(self, query: Query, members: Ints) -> Floats:
        if not self._model.parts.sparse:
            return np.zeros(len(members), dtype=np.float32)
        if self._knows_head and self._model.head is not None:
            values = self._model.head(query.terms)[members]
        elif self._terms_by_term is not None:
            values = query.terms.times_columns(self._terms_by_term)[members]
        else:
            values = query.terms.times_rows(self._term_rows, members)
        return np.asarray(np.float32(SPARSE) * values)

    def term_parts(self, query: Query, member: int) -> Floats:
        """What each of the query's terms, in the order of its indices, adds to the sparse part."""
        values, columns = query.terms.values, query.terms.buckets
        if not self._model.parts.sparse:
            return np.zeros(len(columns), dtype=np.float32)
        if self._knows_head and self._model.head is not None:
            column = self._model.head.rows_by_term[columns] @ self._model.head.coefficients[:, member]
        else:
            column = self._term_rows[[member]].T.tocsr()[columns].toarray()[:, 0]
        return np.asarray(np.float32(SPARSE) * values * column)


class _Means:
    """Every member's means, in the space that is searched and as directions in the encoder's."""

    def __init__(self, members: Sequence[Member], model: Model, index_folder: Path | None) -> None:
        found, sizes = zip(*(_means_of(member, model) for member in members), strict=True)
        stacked = np.concatenate(found)
        self._counts = np.array([len(means) for means in found])
        self._owners = np.repeat(np.arange(len(members)), self._counts)
        self._starts = np.cumsum(self._counts) - self._counts
        self._directions = (stacked / np.linalg.norm(stacked, axis=1, keepdims=True).clip(min=1e-12)).astype(np.float32)
        self._points = model.dense.place(stacked, np.concatenate(sizes))
        many = len(members) > SCORE_ALL
        self._index: VectorIndex | None = build_or_load(self._points, index_folder) if many else None

    def nearest(self, query: Query, allowed: Ints | None) -> tuple[Ints, Floats, Floats]:
        """Members, squared distances to their nearest means, greatest cosines."""
        if self._index is None:
            gaps = self._points - query.point
            squares = np.minimum.reduceat(np.vecdot(gaps, gaps), self._starts)
            cosines = np.maximum.reduceat(np.vecdot(self._directions, query.vector), self._starts)
            every = np.arange(len(squares))
            return (every, squares, cosines) if allowed is None else (allowed, squares[allowed], cosines[allowed])
        rows, distances = self._index.search(query.point[None], CANDIDATES, self._rows(allowed))
        rows, distances = rows[0][rows[0] >= 0], distances[0][rows[0] >= 0]
        members, first, place = np.unique(self._owners[rows], return_index=True, return_inverse=True)
        cosines = np.full(len(members), -1, dtype=np.float32)
        np.maximum.at(cosines, place, np.vecdot(self._directions[rows], query.vector))
        return members, distances[first], cosines  # the first row of a member is its nearest

    def _rows(self, members: Ints | None) -> Ints | None:
        if members is None or len(self._owners) == len(self._counts):
            return members
        counts = self._counts[members]
        ends = np.cumsum(counts)
        within = np.arange(counts.sum()) - np.repeat(ends - counts, counts)
        return np.asarray(np.repeat(self._starts[members], counts) + within)


def _means_of(member: Member, model: Model) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Shape: (means, d), (means,): how many samples each is the mean of."""
    labels = model.labels(member)
    groups = [member.vectors[labels == each] for each in range(labels.max() + 1)]
    means = np.stack([group.mean(axis=0, dtype=np.float64) for group in groups])
    return means, np.array([len(group) for group in groups], dtype=np.float64)


class _Counters:
    """Counter samples: a member loses what a counter sample of it scores.

    Semantics: logit' = logit - ln(1 + exp(max_c logit_c - logit)), where a counter sample c scores as if it were an
    adapter with that one sample; and if the prompt is that sample, or nearly, logit' = logit - `_REFUSAL`.
    """

    _SAME, _REFUSAL = 0.98, 20.0  # a cosine; nats

    def __init__(self, members: Sequence[Member], model: Model) -> None:
        self._owners = np.repeat(np.arange(len(members)), [len(member.counter_vectors) for member in members])
        self._parts = model.parts
        if len(self._owners):
            vectors = np.concatenate([member.counter_vectors for member in members])
            self._directions = vectors.astype(np.float32)
            self._points = model.dense.place(self._directions, np.ones(len(self._directions)))
            self._by_term = model.weights(sparse.stack(member.counter_terms for member in members)).T.tocsr()

    def apply(self, query: Query, scores: Scores) -> Scores:
        """The scores with the penalty of those that have counter samples."""
        place = np.searchsorted(scores.members, self._owners)
        known = place < len(scores.members)
        known[known] = scores.members[place[known]] == self._owners[known]
        if not known.any():
            return scores
        gaps = self._points - query.point
        against = np.zeros(len(self._owners))
        if self._parts.dense:
            against -= DENSE / 2 * np.vecdot(gaps, gaps)
        if self._parts.sparse:
            against += SPARSE * query.terms.times_columns(self._by_term)
        worst = np.full(len(scores.members), -np.inf)
        np.maximum.at(worst, place[known], against[known])
        penalty = np.logaddexp(0, worst - scores.logits)
        same = known & (np.vecdot(self._directions, query.vector) >= self._SAME)
        penalty[place[same]] += self._REFUSAL
        return replace(scores, penalty=penalty.astype(np.float32))


class _Places:
    """Which members have a tag, belong to a tenant, or are for a base model."""

    _REMEMBERED = 64

    def __init__(self, members: Sequence[Member]) -> None:
        self._count = len(members)
        self._tenants = _grouped((member.tenant, row) for row, member in enumerate(members))
        self._models = _grouped((member.base_model, row) for row, member in enumerate(members))
        self._tags = _grouped((tag, row) for row, member in enumerate(members) for tag in member.tags)
        self._found: dict[AdapterFilter, Ints | None] = {}

    def find(self, wanted: AdapterFilter, row: dict[str, int]) -> Ints | None:
        """The members that a filter lets through, ascending; None for all."""
        remembered = self._found  # another thread may put an empty one in its place
        if wanted in remembered:
            return remembered[wanted]
        found = self._search(wanted, row)
        if len(remembered) >= self._REMEMBERED:
            self._found = remembered = {}
        remembered[wanted] = found
        return found

    def _search(self, wanted: AdapterFilter, row: dict[str, int]) -> Ints | None:
        none = np.zeros(0, dtype=np.int64)
        sets = [self._tags.get(tag, none) for tag in wanted.tags]
        if wanted.tenant is not None:
            sets.append(np.union1d(self._tenants.get(wanted.tenant, none), self._tenants.get(None, none)))
        if wanted.base_model is not None:
            sets.append(self._models.get(wanted.base_model, none))
        if wanted.only is not None:
            sets.append(np.array(sorted(row[name] for name in wanted.only if name in row), dtype=np.int64))
        out = np.array([row[name] for name in wanted.exclude if name in row], dtype=np.int64)
        if not sets and not len(out):
            return None
        found = min(sets, key=len) if sets else np.arange(self._count)
        for each in sets:
            found = np.intersect1d(found, each, assume_unique=True)
        return np.setdiff1d(found, out, assume_unique=True)


def _grouped(pairs: Iterable[tuple[str | None, int]]) -> dict[str | None, Ints]:
    groups: dict[str | None, list[int]] = defaultdict(list)
    for key, row in pairs:
        groups[key].append(row)
    return {key: np.array(rows, dtype=np.int64) for key, rows in groups.items()}
