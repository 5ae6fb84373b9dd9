"""How long retrievers take for a prompt, the methods taking turns so that they share the machine's ups and downs."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loraretriever.retrieve import Retriever

BATCH = 32
_WARM_UP = 8


@dataclass(frozen=True, slots=True)
class Timed:
    """One method, prepared: over the encoder with an empty cache, and over vectors that are known."""

    cold: Retriever
    forget: Callable[[], None]
    recorded: Retriever


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds per prompt: one at a time, in batches, and without encoding."""

    ms_p50: float
    ms_p99: float
    ms_batch32: float
    search_ms_p50: float


def measure(
    methods: Mapping[str, Timed], prompts: Sequence[str], k: int, repeat: int, advance: Callable[[], None]
) -> dict[str, Latency]:
    """Time `rank` for distinct prompts, none of which an encoder's cache has seen. Advances `rounds` times."""
    single: dict[str, list[float]] = defaultdict(list)
    search: dict[str, list[float]] = defaultdict(list)
    batched: dict[str, list[float]] = defaultdict(list)
    batches = [prompts[start : start + BATCH] for start in range(0, len(prompts), BATCH)]
    whole = [batch for batch in batches if len(batch) == BATCH] or batches
    _warm_up(methods, prompts, k)
    for _ in range(repeat):
        _forget(methods)
        for prompt in prompts:
            for name, timed in methods.items():
                single[name].append(_seconds(timed.cold, [prompt], k))
            for name, timed in methods.items():
                search[name].append(_seconds(timed.recorded, [prompt], k))
            advance()
        _forget(methods)
        for batch in whole:
            for name, timed in methods.items():
                batched[name].append(_seconds(timed.cold, batch, k) / len(batch))
            advance()
    return {
        name: Latency(
            _milliseconds(single[name], 0.5),
            _milliseconds(single[name], 0.99),
            _milliseconds(batched[name], 0.5),
            _milliseconds(search[name], 0.5),
        )
        for name in methods
    }


def rounds(prompts: int, repeat: int) -> int:
    """How often `measure` advances."""
    return repeat * (prompts + (max(1, prompts // BATCH) if prompts else 0))


def _warm_up(methods: Mapping[str, Timed], prompts: Sequence[str], k: int) -> None:
    """What is loaded or compiled at first calls, of one prompt and of many."""
    for timed in methods.values():
        timed.recorded.rank(prompts, k)
        for prompt in prompts[:_WARM_UP]:
            timed.cold.rank([prompt], k)
        timed.forget()
        timed.cold.rank(prompts[:BATCH], k)


def _forget(methods: Mapping[str, Timed]) -> None:
    for timed in methods.values():
        timed.forget()


def _seconds(retriever: Retriever, prompts: Sequence[str], k: int) -> float:
    start = time.perf_counter()
    retriever.rank(prompts, k)
    return time.perf_counter() - start


def _milliseconds(seconds: Sequence[float], quantile: float) -> float:
    return round(1e3 * float(np.quantile(seconds, quantile)), 3)
