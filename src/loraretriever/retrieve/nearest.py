"""What exact and approximate search share: checks, masks, distances, and the choice of the best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraretriever.errors import InvalidInputError

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

# Two values of |x|²/2 - x·q in float32 are together wrong by less than this part of the largest |x|², plus |q|².
ROUNDING = 2e-6
# With this part of the rows allowed, reading on past the others is faster than gathering the allowed ones.
DENSE = 1 / 8
QUERIES = 32  # that `products` takes at a time
_ONE_THREAD = 200_000  # multiplications that OpenBLAS does not split; it does from 262,144
_GROUP = 32  # scores of which the lowest is taken first
_BLOCK = 128  # rows whose differences to a query are held at a time: they stay in the processor's cache


@dataclass(frozen=True, slots=True)
class Allowed:
    """The rows that a search may return: given as a mask or as row numbers, and turned into the other when needed."""

    total: int
    count: int
    given: NDArray[Any]

    def rows(self) -> Ints:
        """Their numbers, ascending."""
        return np.flatnonzero(self.given) if self.given.dtype == np.bool_ else self.given

    def mask(self) -> Mask:
        """Shape: (total,)."""
        if self.given.dtype == np.bool_:
            return self.given
        mask = np.zeros(self.total, dtype=np.bool_)
        mask[self.given] = True
        return mask


def check_vectors(vectors: NDArray[Any]) -> tuple[Floats, Floats]:
    """The vectors as a read-only float32 array, not copied where they are one, and their squared lengths.

    Raises:
        InvalidInputError: they are not a matrix, have no columns, or hold what is not finite.
    """
    found = np.asarray(vectors)
    if found.ndim != 2 or not found.shape[1] or found.dtype.kind not in "fiu":
        raise InvalidInputError(
            f"vectors have the shape {found.shape} and the type {found.dtype}; "
            "expected numbers of shape (n, d), d >= 1."
        )
    with np.errstate(over="ignore", invalid="ignore"):
        kept = np.ascontiguousarray(found, dtype=np.float32).view()
        squares = np.vecdot(kept, kept)
    if not np.isfinite(squares).all():
        row = int(np.flatnonzero(~np.isfinite(squares))[0])
        raise InvalidInputError(
            f"vector {row} holds NaN, infinity or numbers too large to square; expected finite ones."
        )
    kept.flags.writeable = False
    return kept, squares


def check_queries(queries: NDArray[Any], dimension: int, k: int) -> Floats:
    """The queries as a contiguous float32 array.

    Raises:
        InvalidInputError: their shape does not fit, they hold what is not finite, or k is not positive.
    """
    if k < 1:
        raise InvalidInputError(f"k is {k}; expected a whole number of at least 1.")
    found = np.asarray(queries)
    if found.ndim != 2 or found.shape[1] != dimension or found.dtype.kind not in "fiu":
        raise InvalidInputError(
            f"queries have the shape {found.shape} and the type {found.dtype}; "
            f"expected numbers of shape (queries, {dimension})."
        )
    with np.errstate(over="ignore", invalid="ignore"):
        kept = np.ascontiguousarray(found, dtype=np.float32)
        if not np.isfinite(np.vecdot(kept, kept)).all():
            raise InvalidInputError("a query holds NaN, infinity or numbers too large to square; expected finite ones.")
    return kept


def check_allowed(allowed: NDArray[Any] | None, total: int) -> Allowed | None:
    """What a search may return; None: everything.

    Raises:
        InvalidInputError: neither a mask of all rows nor ascending row numbers.
    """
    if allowed is None:
        return None
    given = np.asarray(allowed)
    if given.dtype == np.bool_ and given.shape == (total,):
        return Allowed(total, int(np.count_nonzero(given)), given)
    if given.dtype.kind in "iu" and given.ndim == 1:
        rows = given.astype(np.int64, copy=False)
        if not rows.size or (rows[0] >= 0 and rows[-1] < total and bool((rows[1:] > rows[:-1]).all())):
            return Allowed(total, rows.size, rows)
    raise InvalidInputError(
        f"allowed has the shape {given.shape} and the type {given.dtype}; expected a mask of shape ({total},) "
        f"or row numbers from 0 to {total - 1}, ascending, none twice."
    )


def no_results(queries: int, k: int) -> tuple[Ints, Floats]:
    """Results of which every place is still empty: -1 and infinity."""
    return np.full((queries, k), -1, dtype=np.int64), np.full((queries, k), np.inf, dtype=np.float32)


def products(vectors: Floats, queries: Floats) -> Floats:
    """All scalar products, shape (n, d), (q, d) -> (n, q), computed on the calling thread alone.

    OpenBLAS would split each product among threads that wait for each other: with 10,000 rows of 384, 0.1 ms where the
    cores are free, 12 ms where others use them. It leaves products of few numbers to the caller's thread, so the rows
    go through it in small blocks: 32 queries take 3.5 ms and as much processor time; split they took 3.0 ms where the
    cores were free, 30 ms where not, and 11 ms of processor time.

    Semantics: y[i, j] = Σ_d vectors[i, d] queries[j, d]
    """
    if len(queries) == 1:
        one: Floats = np.vecdot(vectors, queries[0])
        return one[:, None]
    result = np.empty((len(vectors), len(queries)), dtype=np.float32)
    for start in range(0, len(queries), QUERIES):
        some = queries[start : start + QUERIES]
        block = max(1, _ONE_THREAD // some.size)
        whole = len(vectors) - len(vectors) % block
        stacked = np.matmul(vectors[:whole].reshape(-1, block, vectors.shape[1]), some.T)
        result[:whole, start : start + QUERIES] = stacked.reshape(whole, len(some))
        result[whole:, start : start + QUERIES] = np.vecdot(vectors[whole:, None], some)
    return result


def distances(vectors: Floats, positions: Ints, query: Floats) -> Floats:
    """Squared distances of some rows to a query, shape (positions,), from the differences: no cancellation.

    Semantics: y[i] = Σ_j (vectors[positions[i], j] - query[j])²
    """
    result = np.empty(len(positions), dtype=np.float32)
    block = np.empty((min(_BLOCK, len(positions)), vectors.shape[1]), dtype=np.float32)
    for start in range(0, len(positions), _BLOCK):
        here = positions[start : start + _BLOCK]
        difference = np.take(vectors, here, axis=0, out=block[: len(here)], mode="clip")  # "raise" would copy once more
        difference -= query
        np.vecdot(difference, difference, out=result[start : start + _BLOCK])
    return result


def candidates(scores: Floats, k: int, margin: float) -> Ints:
    """Positions of the k lowest scores, and of all that lie within the margin of the worst of them, ascending.

    Infinite scores are left out.
    """
    if k >= len(scores):
        return np.flatnonzero(np.isfinite(scores))
    cut = np.partition(_lowest(scores, k), k - 1)[k - 1]
    return np.flatnonzero(scores <= cut + np.float32(margin) if np.isfinite(cut) else np.isfinite(scores))


def _lowest(scores: Floats, k: int) -> Floats:
    """Some of the scores, the k lowest among them: the rest need not be partitioned, which takes most of the time."""
    groups = len(scores) // _GROUP
    if groups < 4 * k:
        return scores
    least = scores[: groups * _GROUP].reshape(_GROUP, groups).min(axis=0)
    lowest: Floats = scores[scores <= np.partition(least, k - 1)[k - 1]]  # k groups hold one such score each, or more
    return lowest


def best(rows: Ints, found: Floats, k: int) -> tuple[Ints, Floats]:
    """The k nearest, best first; equal distances in the order of row numbers."""
    if k < len(found):
        kept = np.flatnonzero(found <= np.partition(found, k - 1)[k - 1])
        rows, found = rows[kept], found[kept]
    order = np.lexsort((rows, found))[:k]
    return rows[order], found[order]
