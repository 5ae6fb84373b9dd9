"""The default retriever: dense and sparse views of the samples, combined into calibrated probabilities."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from loraretriever.retrieve.caching import CachingEncoder
from loraretriever.retrieve.encoder import Encoder, Vectors, count_tokens
from loraretriever.retrieve.explain import Explanation, explain
from loraretriever.retrieve.follower import Follower, Shared, State
from loraretriever.retrieve.following import check_names, check_request, check_texts
from loraretriever.retrieve.map import Plane, PoolMap
from loraretriever.retrieve.model import Parts
from loraretriever.retrieve.reader import Reader
from loraretriever.retrieve.snapshot import Ranked
from loraretriever.tracing import span
from loraretriever.types import AdapterFilter, Hit, Ranking

_LONG, _ENDS = 3000, (160, 320)  # characters


class HybridRetriever:
    """Ranks adapters by whitened means of embeddings and by TF-IDF, and says how probable each is.

    Follows the pool: see `Follower`. Any number of threads may call it.
    """

    def __init__(
        self,
        pool: Reader,
        load_encoder: Callable[[str | None], Encoder],
        parts: Parts = Parts(),  # noqa: B008 - frozen
        false_fallback: float = 0.01,
        drift: float = 0.07,
        index_folder: Path | None = None,
        remembered: int = 0,
    ) -> None:
        """Nothing is loaded before the first call.

        Args:
            pool: whose enabled adapters are ranked.
            load_encoder: gives the encoder for the name in `Pool.encoder`, or the default one for None. When that
                name changes, the new encoder is loaded and embeds all samples while the old one serves.
            parts: which parts are at work.
            false_fallback: the share of prompts that have an adapter, which may be left to the base model.
            drift: how much lower the cosines of prompts in words of their own are than those of the samples.
            index_folder: where the index over many adapters is kept; None: it is built anew.
            remembered: of how many prompts, the most recent ones, the vectors are kept.
        """
        self._follower = Follower(pool, Shared(load_encoder), parts, index_folder)
        self._rates = false_fallback, drift
        self._remembered = remembered
        self._cache: CachingEncoder | None = None
        self._plane: tuple[State, Plane] | None = None

    def for_view(self, pool: Reader) -> Self:
        """One for a view of the pool that may see whatever this one sees; it learns from what that view sees only.

        The encoder is the same. Which prompts it was asked remains its own.
        """
        other = self.for_caller()
        other._follower = self._follower.for_view(pool)
        other._plane = None
        return other

    def for_caller(self) -> Self:
        """One that knows what this one knows of the pool, but remembers prompts of its own."""
        other = copy.copy(self)
        other._cache = None
        return other

    def rank(self, prompts: Sequence[str], k: int, wanted: AdapterFilter = AdapterFilter()) -> list[Ranking]:  # noqa: B008
        """For each prompt its k most probable adapters, best first.

        Raises:
            InvalidInputError: k is not positive, or a prompt is empty.
            AdapterNotFoundError: the filter names an adapter that is not in the pool.
        """
        state, found = self._rank(prompts, k, wanted)
        threshold = state.snapshot.threshold(*self._rates)
        return [Ranking(_hits(each, k), each.fit, threshold) for each in found]

    def explain(self, prompts: Sequence[str], k: int, wanted: AdapterFilter = AdapterFilter()) -> list[Explanation]:  # noqa: B008
        """Why each prompt's k best adapters were found."""
        state, found = self._rank(prompts, k, wanted)
        threshold = state.snapshot.threshold(*self._rates)
        vectors = self._encode(state, [each.text for each in found])
        return [
            explain(prompt, vector, each, k, threshold, state.snapshot, self._follower.pool, state.encoder.tag)
            for prompt, vector, each in zip(prompts, vectors, found, strict=True)
        ]

    def encode(self, texts: Sequence[str]) -> Vectors:
        """The texts' vectors, as prompts are read. Shape: (len(texts), dimension), rows of length 1.

        Raises:
            InvalidInputError: a text is empty.
        """
        check_texts(texts)
        return self._encode(self._follower.current(), texts)

    def count_tokens(self, texts: Sequence[str]) -> int:
        """How many tokens `encode` reads of the texts together."""
        return count_tokens(self._follower.current().encoder, texts)

    def map(self, prompts: Sequence[str] = ()) -> PoolMap:
        """Adapters, some of their samples and these prompts in two dimensions.

        Raises:
            InvalidInputError: a prompt is empty.
        """
        check_texts(prompts)
        state, kept = self._follower.current(), self._plane
        if kept is None or kept[0].snapshot is not state.snapshot:
            kept = self._plane = state, Plane(state.snapshot, state.members)
        return kept[1].map(self._encode(state, prompts) if prompts else None)

    def settle(self) -> None:
        """Wait until what is learnt is learnt from the pool as it is now.

        Raises:
            LoraRetrieverError: a new encoder cannot be used, or the pool cannot be read.
        """
        self._follower.settle()

    def _rank(self, prompts: Sequence[str], k: int, wanted: AdapterFilter) -> tuple[State, list[Ranked]]:
        check_request(prompts, k)
        state = self._follower.current()
        check_names(self._follower.pool, {*wanted.exclude, *(wanted.only or ())}, state.members.keys())
        if not prompts:
            return state, []
        pieces = [piece for prompt in prompts for piece in _pieces(prompt)]
        vectors = self._encode(state, pieces)
        with span("search", prompts=len(prompts), adapters=len(state.members)):
            found = iter(state.snapshot.rank(vectors, pieces, wanted))
            # Python's max keeps the first of equals: the whole prompt.
            best = [max((next(found) for _ in _pieces(prompt)), key=lambda each: each.fit) for prompt in prompts]
        return state, best

    def _encode(self, state: State, texts: Sequence[str]) -> Vectors:
        encoder = state.encoder
        if self._remembered:
            cache = self._cache
            if cache is None or cache.encoder is not encoder:  # the pool's encoder is another one now
                self._cache = cache = CachingEncoder(encoder, self._remembered)
            encoder = cache
        with span("encode", texts=len(texts)):
            return encoder.encode(texts)


def _pieces(prompt: str) -> tuple[str, ...]:
    """What is read of a prompt: all of it, and of a very long one pieces of its beginning and end by themselves too.

    Much of a long prompt may be a document, and the question stand before or after it.
    """
    if len(prompt) <= _LONG:
        return (prompt,)
    parts = [part for size in _ENDS for part in (prompt[:size], prompt[-size:])]
    return (prompt, *(part for part in parts if part.strip()))


def _hits(found: Ranked, k: int) -> tuple[Hit, ...]:
    rows = zip(found.names[:k], found.probabilities[:k], found.logits[:k], strict=True)
    return tuple(Hit(name, float(probability), float(logit)) for name, probability, logit in rows)
