"""What the engine asks of vLLM, wherever it runs."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Protocol

from loraretriever.engine.sampler import Sampled
from loraretriever.types import Sampling


@dataclass(frozen=True, slots=True)
class Limits:
    """What a vLLM takes: tokens of prompt and answer together, the rank of an adapter, adapters in a batch.

    `base`: the name of the base model. `lanes`: it composes adapters itself, and none are made for compositions.
    """

    max_length: int
    max_rank: int
    slots: int
    base: str
    lanes: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt, as tokens, for a model by its name. What was computed of it serves the same `namespace` only."""

    model: str
    tokens: tuple[int, ...]
    sampling: Sampling
    namespace: str


@dataclass(frozen=True, slots=True)
class Part:
    """The next tokens of one of the answers. `finish_reason` "stop" or "length" is that of its last part.

    `cached`: tokens of the prompt that were not computed, where it is known.
    """

    index: int
    tokens: tuple[Sampled, ...]
    finish_reason: str | None = None
    cached: int | None = None


class Backend(Protocol):
    """A vLLM. Its coroutines run in one event loop."""

    async def limits(self) -> Limits:
        """What it takes; waits until it runs.

        Raises:
            ModelLoadError: it does not run, or cannot be used.
        """
        ...

    def generate(self, job: Job, on_start: Callable[[], None]) -> AsyncGenerator[Part]:
        """The answers' parts as they come; `on_start` is called when the job is accepted.

        Raises:
            InvalidInputError, AdapterNotFoundError, OverloadedError: vLLM refuses it.
            EngineError: vLLM failed.
        """
        ...

    async def close(self) -> None:
        """Let go of it."""
        ...
