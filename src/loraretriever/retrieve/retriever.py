"""Retrievers: from prompts to ranked hits over a pool that may change between two calls."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np

from loraretriever.errors import InvalidInputError
from loraretriever.pool import Pool
from loraretriever.retrieve.encoder import Encoder
from loraretriever.retrieve.index import MeanIndex
from loraretriever.types import Hit


class Retriever(Protocol):
    """Anything that ranks the pool's adapters for prompts."""

    def rank(
        self, prompts: Sequence[str], k: int, exclude: Collection[str] = (), only: Collection[str] | None = None
    ) -> list[tuple[Hit, ...]]:
        """For each prompt its k best adapters, best first; fewer when fewer are enabled and allowed."""
        ...


class PaperRetriever:
    """The paper's formula: cosine of the prompt's embedding with the mean of each adapter's samples' embeddings.

    Follows the pool: each call first looks whether the pool changed, embeds samples that have no embedding of
    this encoder yet, stores those in the pool, and builds a new index.
    """

    def __init__(self, pool: Pool, encoder: Encoder) -> None:
        self._pool = pool
        self._encoder = encoder
        self._lock = threading.Lock()
        self._index = MeanIndex({})
        self._change: int | None = None

    def rank(
        self, prompts: Sequence[str], k: int, exclude: Collection[str] = (), only: Collection[str] | None = None
    ) -> list[tuple[Hit, ...]]:
        """For each prompt its k best adapters, best first (LoraRetriever, section 3.2).

        Raises:
            InvalidInputError: k is not positive, a prompt is empty, or a name in `exclude` or `only` is unknown.
        """
        index = self._current_index()
        _check_request(prompts, k)
        self._check_names({*exclude, *(only or ())}, index)
        if not prompts:
            return []
        return index.search(self._encoder.encode(prompts), k, exclude, only)

    def _check_names(self, names: set[str], index: MeanIndex) -> None:
        for name in sorted(names - set(index.names)):
            self._pool.get(name)  # a disabled adapter may be named; an unknown one is an error

    def _current_index(self) -> MeanIndex:
        with self._lock:
            change = self._pool.change
            if change != self._change:
                self._embed_missing()
                self._index = MeanIndex(self._pool.embeddings(self._encoder.tag))
                self._change = change
            return self._index

    def _embed_missing(self) -> None:
        missing = self._pool.missing_embeddings(self._encoder.tag)
        if not missing:
            return
        vectors = self._encoder.encode([sample.text for samples in missing.values() for sample in samples])
        ends = np.cumsum([len(samples) for samples in missing.values()])
        split = np.split(vectors, ends[:-1])
        self._pool.store_embeddings(self._encoder.tag, dict(zip(missing, split, strict=True)))


def _check_request(prompts: Sequence[str], k: int) -> None:
    if k < 1:
        raise InvalidInputError(f"k is {k}; expected a whole number of at least 1.")
    for position, prompt in enumerate(prompts):
        if not prompt.strip():
            raise InvalidInputError(f"prompt {position + 1} of {len(prompts)} is empty; expected some text.")
