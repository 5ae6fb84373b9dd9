"""Workloads for engines: prompts of exact lengths, their arrivals, how many tokens each asks for, and of whom.

All is drawn from a seed, and drawn anew for each round: an engine that keeps what it computed for a prompt must not
meet the same prompt twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from loraretriever.errors import InvalidInputError

UNIFORM, REALISTIC = "uniform", "realistic"
# Common words, drawn at random: no two prompts share a beginning, and the text is the same for every pool.
_TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city name team minute idea kid body back parent face level office"
)
_WORDS = _TEXT.split()
_TRIES = 100


@dataclass(frozen=True, slots=True)
class Job:
    """One request of a workload. `arrival` is in seconds from the workload's start; no adapters: the base model."""

    prompt: str
    max_tokens: int
    arrival: float = 0.0
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large workloads are; lengths in tokens, ranges with both ends.

    Uniform: `batch` prompts of `uniform_prompt` tokens at once, `uniform_output` tokens for each. Realistic:
    `requests` prompts one by one, lengths log-uniform in `prompt` and `output`.
    """

    batch: int = 32
    uniform_prompt: int = 64
    uniform_output: int = 32
    requests: int = 96
    prompt: tuple[int, int] = (16, 512)
    output: tuple[int, int] = (8, 128)

    @property
    def longest_uniform(self) -> int:
        """Tokens of prompt and answer together."""
        return self.uniform_prompt + self.uniform_output

    @property
    def longest(self) -> int:
        """Tokens of prompt and answer together, at most, in any workload."""
        return max(self.longest_uniform, self.prompt[1] + self.output[1])

    def fitted(self, max_length: int) -> Sizes:
        """These sizes for a model that takes `max_length` tokens of prompt and answer: prompts are shorter there.

        Raises:
            InvalidInputError: the shortest prompts do not fit either.
        """
        longest = min(self.prompt[1], max_length - self.output[1])
        if longest < self.prompt[0] or max_length < self.longest_uniform:
            raise InvalidInputError(
                f"the base model takes {max_length} tokens; expected {self.prompt[0] + self.output[1]} and "
                f"{self.longest_uniform} at least. Name another base model."
            )
        return replace(self, prompt=(self.prompt[0], longest))


def uniform(tokenizer: Any, sizes: Sizes, seed: Sequence[int]) -> list[Job]:
    """All requests alike, all there at the start."""
    rng = np.random.default_rng(seed)
    return [Job(make_prompt(tokenizer, sizes.uniform_prompt, rng), sizes.uniform_output) for _ in range(sizes.batch)]


def realistic(tokenizer: Any, sizes: Sizes, seed: Sequence[int], rate: float = math.inf) -> list[Job]:
    """Requests of very different lengths that arrive one by one, `rate` of them a second on average (Poisson).

    The first arrives at 0; with an infinite rate all do.
    """
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(size=sizes.requests))
    arrivals = (arrivals - arrivals[0]) / rate
    lengths = _log_uniform(rng, sizes.prompt, sizes.requests)
    outputs = _log_uniform(rng, sizes.output, sizes.requests)
    return [
        Job(make_prompt(tokenizer, length, rng), output, float(arrival))
        for arrival, length, output in zip(arrivals, lengths, outputs, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Workloads:
    """Draws the jobs of any workload and round. `rate`: requests a second of the realistic one."""

    tokenizer: Any
    sizes: Sizes
    seed: int
    rate: float = math.inf

    def jobs(self, workload: str, round_: int, adapters: Sequence[str], k: int) -> list[Job]:
        """Those of one round, k adapters for each: the same prompts whatever the adapters."""
        seed = (self.seed, round_)
        if workload == UNIFORM:
            return in_turn(uniform(self.tokenizer, self.sizes, seed), adapters, k)
        return by_zipf(realistic(self.tokenizer, self.sizes, seed, self.rate), adapters, k, (*seed, 1))


def in_turn(jobs: Sequence[Job], adapters: Sequence[str], k: int) -> list[Job]:
    """The jobs with k adapters each, taken in turn, so that all adapters are asked for equally often."""
    return [
        replace(job, adapters=tuple(adapters[(k * place + i) % len(adapters)] for i in range(k)))
        for place, job in enumerate(jobs)
    ]


def by_zipf(jobs: Sequence[Job], adapters: Sequence[str], k: int, seed: Sequence[int]) -> list[Job]:
    """The jobs with k distinct adapters each, drawn by Zipf's law.

    Semantics: P(adapters[r]) = (1 / (r + 1)) / Σ_s 1 / s at the first draw.
    """
    if k == 0:
        return list(jobs)
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, len(adapters) + 1)
    shares /= shares.sum()
    drawn = (rng.choice(len(adapters), size=k, replace=False, p=shares) for _ in jobs)
    return [replace(job, adapters=tuple(adapters[i] for i in places)) for job, places in zip(jobs, drawn, strict=True)]


def make_prompt(tokenizer: Any, length: int, rng: np.random.Generator) -> str:
    """Random words that are `length` tokens, those included that the tokenizer adds to any text.

    Raises:
        InvalidInputError: no text of that length was found.
    """
    added = len(tokenizer("").input_ids)
    for _ in range(_TRIES):
        words = " ".join(_WORDS[i] for i in rng.integers(len(_WORDS), size=length))
        ids = tokenizer(words, add_special_tokens=False).input_ids[: length - added]
        text = str(tokenizer.decode(ids))
        if len(tokenizer(text).input_ids) == length:
            return text
    raise InvalidInputError(
        f"no prompt of {length} tokens was found in {_TRIES} tries with the base model's tokenizer; expected one that "
        "gives back the tokens of what it decodes. Name another base model."
    )


def _log_uniform(rng: np.random.Generator, ends: tuple[int, int], size: int) -> list[int]:
    low, high = ends
    return [round(math.exp(x)) for x in rng.uniform(math.log(low), math.log(high), size)]
