"""From a request to the sequences that the engine runs: tokens, checks, and the revisions of its adapters."""

from __future__ import annotations

import time

from loraretriever.engine.adapters import Adapters
from loraretriever.engine.prompts import PromptReader, check_length
from loraretriever.engine.runner import ModelRunner
from loraretriever.engine.sampler import check_sampling
from loraretriever.engine.sequence import Sequence, Sink
from loraretriever.models import BaseModel
from loraretriever.types import Request


class Intake(PromptReader):
    """Looks at what comes in, without the engine's lock. For any thread."""

    def __init__(self, base: BaseModel, runner: ModelRunner, adapters: Adapters) -> None:
        known_ids = int(base.model.get_input_embeddings().weight.shape[0])
        super().__init__(base.tokenizer, known_ids, runner.max_length)
        self._adapters = adapters
        self._vocabulary = int(base.model.get_output_embeddings().weight.shape[0])
        self.max_length = min(runner.max_length, runner.table.longest)

    def make(self, request: Request, position: int, sink: Sink) -> list[Sequence]:
        """The sequences of a request, the first of which computes the prompt for all.

        Raises:
            InvalidInputError: the model cannot run it.
            AdapterNotFoundError: an adapter is not in the pool.
        """
        sampling = request.sampling
        ids = self.tokenize(request, position)
        check_length(len(ids), sampling.max_tokens, self._longest, position)
        check_sampling(sampling, self._vocabulary)
        route, now = self._adapters.route(request.composition), time.monotonic()
        made: list[Sequence] = []
        for index in range(sampling.n):
            leader = made[0] if made else None
            made.append(Sequence(request, index, ids, route, self.tokenizer, sink, now, leader))
        return made
