"""The sparse view of a text: its words, word pairs and punctuation, weighted by how rare they are (TF-IDF).

Terms are hashed, so there is no vocabulary to keep, and a term's number is the same in every process.
"""

from __future__ import annotations

import re
import threading
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

BUCKETS = 1 << 20
_WORD = re.compile(r"\w+|[^\w\s]|\n")
_HALF = 500  # characters read at either end of a long text: task instructions stand at its beginning or end

Rows = Any  # scipy.sparse.csr_array of shape (rows, BUCKETS), float32


def terms(text: str) -> list[str]:
    """Words in lower case, punctuation marks and line breaks, and all pairs of neighbours."""
    if len(text) > 2 * _HALF:
        text = f"{text[:_HALF]} {text[-_HALF:]}"
    words = _WORD.findall(text.lower())
    return words + [f"{first} {second}" for first, second in zip(words, words[1:], strict=False)]


def bucket(term: str) -> int:
    """The term's number, below `BUCKETS`."""
    return zlib.crc32(term.encode("utf-8", "surrogatepass")) % BUCKETS


def count_terms(texts: Sequence[str]) -> Rows:
    """Semantics: 1 + ln(count) for each term of each text. Shape: (len(texts), BUCKETS)."""
    columns: list[int] = []
    counts: list[int] = []
    ends = [0]
    for text in texts:
        found = Counter(map(bucket, terms(text)))
        columns += found.keys()
        counts += found.values()
        ends.append(len(columns))
    values = 1 + np.log(np.array(counts, dtype=np.float32))
    shape = (len(texts), BUCKETS)
    return sparse.csr_array((values, np.array(columns, dtype=np.int32), np.array(ends, dtype=np.int32)), shape)


def equal(one: Rows, other: Rows) -> bool:
    """Whether two of what `count_terms` gave are of the same texts, as far as terms tell."""
    return all(np.array_equal(getattr(one, part), getattr(other, part)) for part in ("indptr", "indices", "data"))


def stack(rows: Iterable[Rows]) -> Rows:
    """The rows of all, below one another."""
    return sparse.csr_array(sparse.vstack(list(rows), format="csr"))


@dataclass(frozen=True, slots=True, eq=False)
class TermVector:
    """One text's weighted terms, of length 1: their buckets and their values. Shape: (terms,) each."""

    buckets: NDArray[np.int32]
    values: NDArray[np.float32]

    def times_columns(self, by_term: Rows) -> NDArray[np.float32]:
        """Inner products with rows that are given by term. Shape: by_term (BUCKETS, n) -> (n,)."""
        starts, ends = by_term.indptr[self.buckets], by_term.indptr[self.buckets + 1]
        places = _ranges(starts, ends)
        values = by_term.data[places] * np.repeat(self.values, ends - starts)
        found = np.bincount(by_term.indices[places], values, minlength=by_term.shape[1])
        return found.astype(np.float32)

    def times_rows(self, rows: Rows, chosen: NDArray[np.int64]) -> NDArray[np.float32]:
        """Inner products with some of many rows. Shape: rows (n, BUCKETS), chosen (c,) -> (c,)."""
        columns, values = rows.indices, rows.data
        table = _table()
        table[self.buckets] = self.values
        found = np.empty(len(chosen), dtype=np.float32)
        for place, (start, end) in enumerate(zip(rows.indptr[chosen], rows.indptr[chosen + 1], strict=True)):
            found[place] = table.take(columns[start:end]) @ values[start:end]
        table[self.buckets] = 0
        return found


def _ranges(starts: NDArray[Any], ends: NDArray[Any]) -> NDArray[Any]:
    """The numbers from each start up to its end, one range after the other."""
    counts = ends - starts
    return np.repeat(ends - np.cumsum(counts), counts) + np.arange(counts.sum())


_local = threading.local()


def _table() -> NDArray[np.float32]:
    """This thread's zeros, a place for each bucket; whoever writes into them cleans up."""
    if not hasattr(_local, "table"):
        _local.table = np.zeros(BUCKETS, dtype=np.float32)
    table: NDArray[np.float32] = _local.table
    return table


class TermWeights:
    """How much each term counts: ln((1 + texts) / (1 + texts with it)) + 1, as scikit-learn's `smooth_idf`."""

    def __init__(self, counted: Rows) -> None:
        """From the terms of all samples."""
        frequencies = np.bincount(counted.indices, minlength=BUCKETS)
        self._idf = (np.log((1 + counted.shape[0]) / (1 + frequencies)) + 1).astype(np.float32)

    def read(self, text: str) -> TermVector:
        """A text's weighted terms."""
        found = Counter(map(bucket, terms(text)))
        buckets = np.fromiter(found.keys(), np.int32, len(found))
        values = (1 + np.log(np.fromiter(found.values(), np.float32, len(found)))) * self._idf[buckets]
        return TermVector(buckets, values / max(float(np.sqrt(values @ values)), 1e-12))

    def __call__(self, counted: Rows) -> Rows:
        """Weighted rows of length 1."""
        rows = sparse.csr_array(
            (counted.data * self._idf[counted.indices], counted.indices, counted.indptr), counted.shape
        )
        return _scaled(rows, 1 / lengths(rows))


def lengths(rows: Rows) -> NDArray[np.float32]:
    """The Euclidean length of each row; 1 for rows of zeros."""
    squares = np.asarray(rows.multiply(rows).sum(axis=1), dtype=np.float32)
    return np.where(squares > 0, np.sqrt(squares), np.float32(1)).astype(np.float32)


def centroids(rows: Rows, owners: NDArray[np.int64], count: int) -> Rows:
    """The sum of each owner's rows, of length 1. Shape: rows (n, BUCKETS), owners (n,) -> (count, BUCKETS)."""
    sums = sparse.csr_array(membership(owners, count) @ rows)
    return _scaled(sums, 1 / lengths(sums))


def membership(owners: NDArray[np.int64], count: int) -> Any:
    """A sparse matrix that adds up each owner's rows. Shape: (n,) -> (count, n)."""
    ones = np.ones(len(owners), dtype=np.float32)
    return sparse.csr_array((ones, (owners, np.arange(len(owners)))), (count, len(owners)))


def products(queries: Rows, rows_by_term: Rows) -> NDArray[np.float32]:
    """All inner products. Shape: queries (q, BUCKETS), rows transposed (BUCKETS, n) -> (q, n)."""
    return np.asarray((queries @ rows_by_term).toarray(), dtype=np.float32)


def heaviest(rows: Rows, most: int) -> Rows:
    """The rows with at most this many terms each, those of the greatest weight; of length 1 again."""
    kept = []
    for start, end in pairwise(rows.indptr):
        order = np.argsort(-rows.data[start:end], kind="stable")[:most]
        kept.append(start + np.sort(order))
    places = np.concatenate(kept)
    ends = np.cumsum([0, *map(len, kept)]).astype(np.int32)
    short = sparse.csr_array((rows.data[places], rows.indices[places], ends), rows.shape)
    return _scaled(short, 1 / lengths(short))


def _scaled(rows: Rows, factors: NDArray[Any]) -> Rows:
    values = rows.data * np.repeat(factors.astype(np.float32), np.diff(rows.indptr))
    return sparse.csr_array((values, rows.indices, rows.indptr), rows.shape)
