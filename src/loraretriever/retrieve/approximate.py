"""Nearest neighbours among a million rows: rows in lists around centroids, of which a search reads the nearest.

Plain NumPy on purpose. Beside Faiss on the same lists (`bench_index.py --faiss`, a million rows of 384) it takes
1.1 ms, Faiss with 8-bit codes 1.4 to 2.0 ms for the same recall, because reading stops by distance and not after a
fixed number of lists. Faiss would bring 66 MB, and a second OpenMP and OpenBLAS next to PyTorch's. Here the rows stay
exact, a file is mapped as it is, and damage cannot crash a process.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from loraretriever.errors import InvalidInputError
from loraretriever.retrieve.nearest import (
    DENSE,
    QUERIES,
    ROUNDING,
    Allowed,
    Floats,
    Ints,
    Mask,
    best,
    candidates,
    check_allowed,
    check_queries,
    check_vectors,
    distances,
    no_results,
    products,
)

# A search reads the lists whose centroid is at most RATIO times as far (squared) as the nearest centroid, but at
# least LEAST rows, and PER_RESULT for each that is wanted, and not many more than MOST.
RATIO = 2.0
LEAST = 4096
PER_RESULT = 256
MOST = 32_768

_LISTS = 4.0  # times the root of the number of rows
_ROUNDS = 8  # of k-means
_SAMPLE = 40  # rows per centroid that k-means looks at


class ApproximateIndex:
    """An inverted file: each row is in the list of its nearest centroid; distances are exact, what is read is not all.

    Immutable, and a search changes nothing, so that any number of threads may search at once.
    """

    kind: Literal["approximate"] = "approximate"

    def __init__(self, vectors: Floats, squares: Floats, rows: Ints, centroids: Floats, starts: Ints) -> None:
        """Use `build`, or `restore`.

        Args:
            vectors: shape (n, d), in the order of the lists.
            squares: shape (n,), their squared lengths.
            rows: shape (n,), the caller's row number of each.
            centroids: shape (lists, d).
            starts: shape (lists + 1,), where each list begins in `vectors`, and n.
        """
        self._vectors, self._halves, self._numbers = vectors, squares / 2, rows
        self._centroids, self._starts = centroids, starts
        self._centroid_squares = np.vecdot(centroids, centroids)
        self._sizes = np.diff(starts)
        self._list_of = np.repeat(np.arange(len(centroids), dtype=np.int32), self._sizes)
        self._position_of = np.empty_like(rows)
        self._position_of[rows] = np.arange(len(rows))
        self._largest = float(squares.max(initial=0.0))

    @classmethod
    def build(cls, vectors: NDArray[Any], seed: int = 0) -> ApproximateIndex:
        """Sort the rows into lists by k-means; a million rows of 384 take minutes. The vectors are copied.

        Raises:
            InvalidInputError: the shape does not fit, or a number is not finite.
        """
        kept, squares = check_vectors(vectors)
        count = min(len(kept), round(_LISTS * len(kept) ** 0.5))
        centroids = _centroids(kept, count, np.random.default_rng(seed))
        label = _nearest_centroids(kept, centroids)
        rows = np.argsort(label, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(label, minlength=count))]).astype(np.int64)
        return cls(kept[rows], squares[rows], rows, centroids, starts)

    @property
    def rows(self) -> int:
        """How many vectors it holds."""
        return len(self._vectors)

    @property
    def dimension(self) -> int:
        """Their length."""
        return int(self._vectors.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays; after `load` the vectors' part is mapped, and shared among processes."""
        derived = (self._centroid_squares, self._sizes, self._list_of, self._position_of)
        return sum(array.nbytes for array in (*self.arrays().values(), *derived))

    def search(self, queries: NDArray[Any], k: int, allowed: NDArray[Any] | None = None) -> tuple[Ints, Floats]:
        """See `VectorIndex.search`. Approximate, but complete: k results wherever k rows are allowed.

        Up to LEAST allowed rows, or PER_RESULT times k, are all compared: then the result is exact.

        Raises:
            InvalidInputError: a shape does not fit, or a number is not finite.
        """
        queries = check_queries(queries, self.dimension, k)
        some = check_allowed(allowed, self.rows)
        found_rows, found = no_results(len(queries), k)
        if not self.rows:
            return found_rows, found
        if some is not None and some.count < DENSE * self.rows:
            positions = np.sort(self._position_of[some.rows()])
            near_of = [self._among(query, k, positions) for query in queries]
        else:
            mask = None if some is None or some.count == self.rows else some.mask()
            near_of = [self._in_lists(query, k, some, mask) for query in queries]
        for i, (query, near) in enumerate(zip(queries, near_of, strict=True)):
            rows, distance = best(self._numbers[near], distances(self._vectors, near, query), k)
            found_rows[i, : len(rows)], found[i, : len(rows)] = rows, distance
        return found_rows, found

    def _in_lists(self, query: Floats, k: int, some: Allowed | None, mask: Mask | None) -> Ints:
        """Positions of candidates, read from whole lists; `mask` hides rows in them.

        Semantics: |x|²/2 - x·q, half the squared distance less |q|²/2, which is the same for all rows.
        """
        part = 1.0 if mask is None or some is None else some.count / self.rows
        lists = self._choose(query, k, self._sizes * part if mask is not None else self._sizes)
        lists.sort()  # the file's order
        starts, sizes = self._starts[lists], self._sizes[lists]
        ends = np.cumsum(sizes)
        scores = np.empty(ends[-1], dtype=np.float32)
        for start, size, end in zip(starts.tolist(), sizes.tolist(), ends.tolist(), strict=True):
            here, there = slice(start, start + size), slice(end - size, end)
            np.vecdot(self._vectors[here], query, out=scores[there])
            np.subtract(self._halves[here], scores[there], out=scores[there])
            if mask is not None:
                scores[there][~mask[self._numbers[here]]] = np.inf
        offsets = candidates(scores, k, ROUNDING * (self._largest + float(query @ query)))
        # Masked rows are not spread evenly over lists: what was expected there need not be there.
        if some is not None and len(offsets) < min(k, some.count):
            return self._among(query, k, np.sort(self._position_of[some.rows()]))
        part_of = np.searchsorted(ends, offsets, side="right")
        positions: Ints = starts[part_of] + offsets - (ends - sizes)[part_of]
        return positions

    def _among(self, query: Floats, k: int, positions: Ints) -> Ints:
        """Positions of candidates among those given, which are ascending."""
        if len(positions) > max(LEAST, PER_RESULT * k):
            list_of = self._list_of[positions]
            counts = np.bincount(list_of, minlength=len(self._sizes))
            chosen = np.zeros(len(self._sizes), dtype=np.bool_)
            chosen[self._choose(query, k, counts)] = True
            positions = positions[chosen[list_of]]
        return positions

    def _choose(self, query: Floats, k: int, counts: NDArray[Any]) -> Ints:
        """The lists to read, given how many rows of each are of use."""
        distance = np.vecdot(self._centroids, query)
        distance *= -2
        distance += self._centroid_squares
        distance += query @ query
        distance[counts == 0] = np.inf
        order = np.argsort(distance)
        ahead = np.cumsum(counts[order])
        near = np.searchsorted(distance[order], RATIO * max(float(distance[order[0]]), 0.0), side="right")
        wanted = max(LEAST, PER_RESULT * k)
        least, most = np.searchsorted(ahead, [wanted, max(wanted, MOST)]) + 1
        return order[: max(least, min(near, most))]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What is kept of it, and what `restore` reads."""
        return {
            "vectors": self._vectors,
            "squares": self._halves * 2,
            "rows": self._numbers,
            "centroids": self._centroids,
            "starts": self._starts,
        }

    @classmethod
    def restore(cls, arrays: dict[str, NDArray[Any]]) -> ApproximateIndex:
        """From what `arrays` gave.

        Raises:
            InvalidInputError: the arrays do not belong together.
        """
        vectors, squares, rows = arrays["vectors"], arrays["squares"], arrays["rows"]
        centroids, starts = arrays["centroids"], arrays["starts"]
        n = len(vectors)
        fits = (
            vectors.ndim == centroids.ndim == 2
            and vectors.shape[1] == centroids.shape[1]
            and squares.shape == rows.shape == (n,)
            and starts.shape == (len(centroids) + 1,)
            and "".join(array.dtype.kind for array in (vectors, squares, rows, centroids, starts)) == "ffifi"
            and starts[0] == 0
            and starts[-1] == n
            and bool((np.diff(starts) >= 0).all())
            and bool((np.bincount(np.clip(rows, 0, n), minlength=n)[:n] == 1).all())
        )
        if not fits:
            raise InvalidInputError("the arrays of an index do not belong together; build it again.")
        return cls(vectors, squares, rows, centroids, starts)


def _centroids(vectors: Floats, count: int, rng: np.random.Generator) -> Floats:
    """Centroids of `count` clusters of a sample of the rows, by k-means, shape (count, d)."""
    sample = vectors[np.sort(rng.choice(len(vectors), min(len(vectors), _SAMPLE * count), replace=False))]
    centroids = sample[rng.choice(len(sample), count, replace=False)]
    for _ in range(_ROUNDS if count > 1 else 0):
        label = _nearest_centroids(sample, centroids)
        sizes = np.bincount(label, minlength=count)
        filled = np.flatnonzero(sizes)
        firsts = np.cumsum(sizes)[filled] - sizes[filled]
        ordered = sample[np.argsort(label, kind="stable")]
        centroids[filled] = np.add.reduceat(ordered, firsts, axis=0) / sizes[filled, None].astype(np.float32)
        empty = np.flatnonzero(sizes == 0)
        centroids[empty] = sample[rng.choice(len(sample), len(empty), replace=False)]
    return centroids


def _nearest_centroids(vectors: Floats, centroids: Floats) -> Ints:
    """The number of each row's nearest centroid, shape (n,)."""
    halves = np.vecdot(centroids, centroids)[:, None] / 2
    label = np.empty(len(vectors), dtype=np.int64)
    for start in range(0, len(vectors), QUERIES):
        scores = products(centroids, vectors[start : start + QUERIES])
        scores -= halves
        label[start : start + QUERIES] = scores.argmax(axis=0)
    return label
