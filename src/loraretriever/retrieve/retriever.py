"""Retrievers: from prompts to ranked hits over a pool that may change between two calls."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import Protocol

from loraretriever.errors import PoolAwayError
from loraretriever.retrieve.encoder import Encoder, Vectors, count_tokens
from loraretriever.retrieve.explain import Explanation
from loraretriever.retrieve.following import check_names, check_request, check_texts, embed_missing
from loraretriever.retrieve.index import MeanIndex
from loraretriever.retrieve.reader import Reader
from loraretriever.tracing import span
from loraretriever.types import AdapterFilter, Hit, PoolEntry, Ranking

ALL = AdapterFilter()
PAPER_THRESHOLD = 0.5  # a cosine, for the default encoder with the paper's instruction
PAPER_TEMPERATURE = 0.05  # of the softmax over cosines


class Retriever(Protocol):
    """Anything that ranks the pool's adapters for prompts."""

    def rank(self, prompts: Sequence[str], k: int, wanted: AdapterFilter = ALL) -> list[Ranking]:
        """For each prompt its k best adapters, best first; fewer when fewer are enabled and allowed."""
        ...


class ExplainingRetriever(Retriever, Protocol):
    """A retriever that can say why."""

    def explain(self, prompts: Sequence[str], k: int, wanted: AdapterFilter = ALL) -> list[Explanation]:
        """Why each prompt's k best adapters were found."""
        ...


class PaperRetriever:
    """The paper's formula: cosine of the prompt's embedding with the mean of each adapter's samples' embeddings.

    Follows the pool: each call first looks whether the pool changed, embeds samples that have no embedding of
    this encoder yet, stores those in the pool, and builds a new index.
    """

    def __init__(self, pool: Reader, encoder: Encoder) -> None:
        self._pool = pool
        self._encoder = encoder
        self._lock = threading.Lock()
        self._index = MeanIndex({})
        self._entries: dict[str, PoolEntry] = {}
        self._change: int | None = None

    def rank(self, prompts: Sequence[str], k: int, wanted: AdapterFilter = ALL) -> list[Ranking]:
        """For each prompt its k best adapters, best first (LoraRetriever, section 3.2). Scores are cosines.

        Raises:
            InvalidInputError: k is not positive, or a prompt is empty.
            AdapterNotFoundError: the filter names an adapter that is not in the pool.
        """
        check_request(prompts, k)
        index, entries = self._current()
        check_names(self._pool, {*wanted.exclude, *(wanted.only or ())}, index.names)
        if not prompts:
            return []
        only = wanted.only
        if wanted.tags or wanted.tenant is not None or wanted.base_model is not None:
            only = frozenset(name for name in wanted.only or entries if _passes(entries.get(name), wanted))
        with span("encode", texts=len(prompts)):
            vectors = self._encoder.encode(prompts)
        with span("search", prompts=len(prompts), adapters=len(entries)):
            found = index.search(vectors, k, wanted.exclude, only)
        return [
            Ranking(
                tuple(Hit(hit.adapter, hit.score, hit.score / PAPER_TEMPERATURE, _chord(hit.score)) for hit in hits),
                fit=hits[0].score if hits else -1.0,
                threshold=PAPER_THRESHOLD,
            )
            for hits in found
        ]

    def for_view(self, pool: Reader) -> PaperRetriever:
        """One with the same encoder for a view of the pool."""
        return PaperRetriever(pool, self._encoder)

    def encode(self, texts: Sequence[str]) -> Vectors:
        """The texts' vectors, as prompts are read. Shape: (len(texts), dimension), rows of length 1.

        Raises:
            InvalidInputError: a text is empty.
        """
        check_texts(texts)
        return self._encoder.encode(texts)

    def count_tokens(self, texts: Sequence[str]) -> int:
        """How many tokens `encode` reads of the texts together."""
        return count_tokens(self._encoder, texts)

    def _current(self) -> tuple[MeanIndex, dict[str, PoolEntry]]:
        with self._lock:
            # While a shared pool's database is away, what is known stays in force.
            with nullcontext() if self._change is None else suppress(PoolAwayError):
                change = self._pool.change
                if change != self._change:
                    embed_missing(self._pool, self._encoder)
                    _, entries = self._pool.entries(self._encoder.tag)
                    whole = {name: entry.vectors for name, entry in entries.items() if entry.vectors is not None}
                    self._index, self._entries, self._change = MeanIndex(whole), entries, change
            return self._index, self._entries


def _chord(cosine: float) -> float:
    """The distance of two unit vectors. Semantics: ‖u - v‖ = √(2 - 2 u·v)."""
    return math.sqrt(max(0.0, 2 - 2 * cosine))


def _passes(entry: PoolEntry | None, wanted: AdapterFilter) -> bool:
    return (
        entry is not None
        and wanted.tags <= set(entry.tags)
        and (wanted.tenant is None or entry.tenant in (None, wanted.tenant))
        and wanted.base_model in (None, entry.base_model)
    )
