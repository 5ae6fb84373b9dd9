"""The local engine: static batches on a transformers model, each row under its own composition.

Requests are sorted by length and put into batches whose adapters fit the slots together. A later engine with
batches made anew at every step has the same interface.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from collections.abc import Sequence as Ordered
from typing import Any, Protocol

from loraretriever.batch import AdapterRef, LoraLayers, RowRoute
from loraretriever.engine.runner import BatchRunner
from loraretriever.engine.sequence import Sequence
from loraretriever.errors import InvalidInputError
from loraretriever.models import BaseModel
from loraretriever.types import Adapter, AdapterWeights, Composition, Generation, Request

# Finished rows leave the batch once this share of it is done: dropping a row copies the cache of the others.
_DROP_SHARE = 0.25


class AdapterSource(Protocol):
    """Where adapters come from; `Pool` is one."""

    def get(self, name: str) -> Adapter:
        """The current revision of an adapter."""
        ...

    def weights(self, name: str, digest: str | None = None) -> AdapterWeights:
        """The factors of the revision with that digest, even if it is no longer the current one."""
        ...


class LocalEngine:
    """Runs requests on one model in this process. Not safe for several threads."""

    def __init__(self, base: BaseModel, source: AdapterSource, slots: int = 32, batch_size: int = 32) -> None:
        """Prepare the model.

        Args:
            base: its linear modules get adapters while a batch runs; it is the plain base model otherwise.
            source: looked up at every call; a call keeps the revisions that it started with.
            slots: adapters in memory at once; bounds the distinct adapters of one batch.
            batch_size: rows of one batch at most.
        """
        self._base = base
        self._source = source
        self._batch_size = batch_size
        self._layers = LoraLayers(base.model, slots, lambda ref: source.weights(ref.name, ref.digest))
        self._end_ids = _end_ids(base)
        config = base.model.config.get_text_config()
        self._max_length = int(getattr(config, "max_position_embeddings", sys.maxsize))

    def run(self, requests: Ordered[Request]) -> Iterator[tuple[int, Generation]]:
        """Yield (position in `requests`, result) in the order of completion.

        Raises:
            InvalidInputError: a prompt is empty or too long, or a request uses more adapters than there are slots.
            AdapterNotFoundError: an adapter is not in the pool.
        """
        start = time.perf_counter()
        sequences = [
            Sequence(position, request, self._base.tokenizer, self._max_length)
            for position, request in enumerate(requests)
        ]
        routes = self._routes([request.composition for request in requests])
        for batch in self._make_batches(sequences, routes):
            yield from self._run_batch(batch, routes, start)

    def _routes(self, compositions: Ordered[Composition]) -> list[RowRoute]:
        names = {name for composition in compositions for name in composition.adapters}
        refs = {name: AdapterRef(name, self._source.get(name).digest) for name in sorted(names)}
        routes = [RowRoute(tuple(refs[name] for name in c.adapters), c.weights, c.mixer) for c in compositions]
        most = max((len(set(route.adapters)) for route in routes), default=0)
        if most > self._layers.slots:
            raise InvalidInputError(
                f"a request uses {most} adapters, but there are {self._layers.slots} slots; "
                "raise the number of slots or ask for fewer adapters."
            )
        return routes

    def _make_batches(self, sequences: list[Sequence], routes: list[RowRoute]) -> list[list[Sequence]]:
        """First fit, in the order of length, so that rows of a batch need little padding."""
        batches: list[tuple[list[Sequence], set[AdapterRef]]] = []
        for sequence in sorted(sequences, key=lambda s: len(s.prompt_ids)):
            adapters = set(routes[sequence.position].adapters)
            for rows, used in batches:
                if len(rows) < self._batch_size and len(used | adapters) <= self._layers.slots:
                    break
            else:
                rows, used = [], set()
                batches.append((rows, used))
            rows.append(sequence)
            used |= adapters
        return [rows for rows, _ in batches]

    def _run_batch(
        self, rows: list[Sequence], routes: list[RowRoute], start: float
    ) -> Iterator[tuple[int, Generation]]:
        runner = BatchRunner(self._base.model, rows, self._base.tokenizer.pad_token_id)
        while True:
            with self._layers.use(self._layers.route([routes[row.position] for row in rows])):
                tokens = runner.step()
            for row, token in zip(rows, tokens, strict=True):
                if row.finish_reason is None:
                    row.append(token, self._end_ids)
                    if row.finish_reason is not None:
                        yield row.position, row.result(time.perf_counter() - start)
            running = [place for place, row in enumerate(rows) if row.finish_reason is None]
            if not running:
                return
            if len(running) <= (1 - _DROP_SHARE) * len(rows):
                runner.keep(running)
                rows = [rows[place] for place in running]


def _end_ids(base: BaseModel) -> frozenset[int]:
    """Tokens that end an answer: those of the model's generation settings and the tokenizer's."""
    configured: Any = base.model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*listed, base.tokenizer.eos_token_id) if token is not None)
