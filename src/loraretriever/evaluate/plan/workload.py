"""Requests to simulate: drawn from distributions here, read from a file in `trace.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loraretriever.errors import InvalidInputError

_DISTINCT_TRIES = 64


@dataclass(frozen=True, slots=True)
class Call:
    """One request. `arrival` in seconds from the start; `adapters` by number, the most important first.

    Numbers are those of popularity where requests are drawn, and of first appearance where they are read.
    """

    arrival: float
    adapters: tuple[int, ...]
    prompt: int  # tokens, at least 1
    answer: int  # tokens, at least 1


@dataclass(frozen=True, slots=True)
class Lengths:
    """Log-uniform numbers of tokens from `least` to `most`, both included.

    Raises:
        InvalidInputError: not 1 <= least <= most.
    """

    least: int
    most: int

    def __post_init__(self) -> None:
        """Refuse a range without numbers."""
        if not 1 <= self.least <= self.most:
            raise InvalidInputError(
                f"a range of tokens is {self.least} to {self.most}; expected at least 1, the smaller number first."
            )

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        """So many lengths."""
        exponents = rng.uniform(math.log(self.least), math.log(self.most + 1), size=count)
        return [min(int(length), self.most) for length in np.exp(exponents)]

    @property
    def mean(self) -> float:
        """Of the continuous distribution."""
        if self.least == self.most:
            return float(self.least)
        return (self.most - self.least) / math.log(self.most / self.least)


@dataclass(frozen=True, slots=True)
class Workload:
    """Poisson arrivals, each with k distinct adapters of a pool by Zipf's law.

    Semantics: P(rank r) ∝ r^-zipf at the first draw, r from 1 to `pool`; k 0: the base model answers.

    Raises:
        InvalidInputError: a value is out of its range.
    """

    rate: float = 1.0  # requests a second
    requests: int = 10_000
    pool: int = 1000
    zipf: float = 1.0
    k: int = 1
    prompt: Lengths = Lengths(16, 512)
    answer: Lengths = Lengths(8, 128)
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        rules = (
            ("rate", self.rate, 0 < self.rate < math.inf, "a finite number above 0"),
            ("requests", self.requests, self.requests >= 1, "at least 1"),
            ("pool", self.pool, self.pool >= 1, "at least 1"),
            ("zipf", self.zipf, 0 <= self.zipf < 10, "from 0, below 10"),
            ("k", self.k, 0 <= self.k <= self.pool, f"from 0 to the pool's size ({self.pool})"),
        )
        for name, value, is_valid, expected in rules:
            if not is_valid:
                raise InvalidInputError(f"{name} is {value!r}; expected {expected}.")

    def calls(self) -> list[Call]:
        """The requests, by arrival. Those of another rate or of more adapters are otherwise the same."""
        arrivals, prompts, answers = (np.random.default_rng((self.seed, part)) for part in range(3))
        times = np.cumsum(arrivals.exponential(size=self.requests)) / self.rate
        drawn = _by_zipf(self, np.random.default_rng((self.seed, 3)))
        lengths = zip(self.prompt.draw(prompts, self.requests), self.answer.draw(answers, self.requests), strict=True)
        return [
            Call(float(time), adapters, prompt, answer)
            for time, adapters, (prompt, answer) in zip(times, drawn, lengths, strict=True)
        ]


def popularity(pool: int, zipf: float) -> NDArray[np.float64]:
    """The share of each adapter, the most popular first: (pool,), summing to 1."""
    shares: NDArray[np.float64] = np.arange(1, pool + 1, dtype=np.float64) ** -zipf
    shares /= shares.sum()
    return shares


def _by_zipf(workload: Workload, rng: np.random.Generator) -> Sequence[tuple[int, ...]]:
    cumulated = np.cumsum(popularity(workload.pool, workload.zipf))
    if workload.k == 0:
        return [()] * workload.requests
    drawn = np.searchsorted(cumulated, rng.random((workload.requests, workload.k)) * cumulated[-1], side="right")
    return [_distinct(row, workload, cumulated, rng) for row in drawn.tolist()]


def _distinct(
    row: list[int], workload: Workload, cumulated: NDArray[np.float64], rng: np.random.Generator
) -> tuple[int, ...]:
    """The row with what occurs twice drawn anew; if that takes long, filled up with the most popular others."""
    found = dict.fromkeys(row)
    for _ in range(_DISTINCT_TRIES):
        if len(found) == workload.k:
            return tuple(found)
        found[int(np.searchsorted(cumulated, rng.random() * cumulated[-1], side="right"))] = None
    for adapter in range(workload.pool):
        if len(found) == workload.k:
            break
        found[adapter] = None
    return tuple(found)
