"""What a benchmark of engines reports: figures of each contender, and ratios of those that ran side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loraretriever.evaluate.engine_contenders import Served
from loraretriever.evaluate.engine_workloads import REALISTIC, UNIFORM, Job, Sizes
from loraretriever.evaluate.environment import Environment

# name -> (contender, the one that it is compared with, workload)
_COMPARED = {
    "mixture_k3_n8_vs_base": ("mixture_k3_n8", "base", UNIFORM),
    "mixture_k3_n48_vs_base": ("mixture_k3_n48", "base", UNIFORM),
    "selection_k1_n8_vs_base": ("selection_k1_n8", "base", UNIFORM),
    "base_vs_transformers_uniform": ("base", "transformers", UNIFORM),
    "base_vs_transformers_realistic": ("base", "transformers", REALISTIC),
    "mixture_k3_n8_vs_peft_k1": ("mixture_k3_n8", "peft_k1", UNIFORM),
    "mixture_k3_n8_vs_peft_k1_realistic": ("mixture_k3_n8", "peft_k1", REALISTIC),
    "mixture_k3_n8_vs_vllm_k1": ("mixture_k3_n8", "vllm_k1", UNIFORM),
    "mixture_k3_n8_vs_vllm_k1_realistic": ("mixture_k3_n8", "vllm_k1", REALISTIC),
    "registered_1000_vs_10": ("registered_1000", "registered_10", UNIFORM),
}
# Pairs that compute the same, and so should say the same.
_ALIKE = {
    "base_vs_transformers": ("base", "transformers"),
    "selection_k1_n8_vs_peft_k1": ("selection_k1_n8", "peft_k1"),
    "selection_k1_n8_vs_vllm_k1": ("selection_k1_n8", "vllm_k1"),
}
_DIGITS = 4


@dataclass(frozen=True, slots=True)
class Run:
    """One contender's turn at a workload."""

    jobs: Sequence[Job]
    served: Sequence[Served]

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens by the time from the first arrival to the last answer's end."""
        end = max(job.arrival + served.seconds for job, served in zip(self.jobs, self.served, strict=True))
        return sum(served.tokens for served in self.served) / end


# (contender, workload) -> its runs, one per round
Runs = Mapping[tuple[str, str], Sequence[Run]]


@dataclass(frozen=True, slots=True)
class Spread:
    """One value per round, and their median, least and greatest."""

    median: float
    min: float
    max: float
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of all requests of all rounds."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class Figures:
    """One contender at one workload.

    `tokens_per_second` counts generated tokens. `first_token_seconds` is from a request's arrival, waiting included;
    `token_seconds` the time per token after the first. They are None where nobody knows when tokens came.
    """

    tokens_per_second: Spread
    first_token_seconds: Percentiles | None
    token_seconds: Percentiles | None


@dataclass(frozen=True, slots=True)
class SetUp:
    """What was measured, where and how.

    `adapters` of the pool there are; where a contender has more, those beyond are made from them. The realistic
    workload's requests arrive at `rate` a second: `overload` times what `rate_of` answers when all are there at once.
    `left_out`: contenders that could not take part, and why. Load averages are of one minute.
    """

    environment: Environment
    base_model: str
    dtype: str
    pool: str
    adapters: int
    seed: int
    rounds: int
    quick: bool
    sizes: Sizes
    rate: float | None
    rate_of: str | None
    overload: float
    left_out: Mapping[str, str]
    load_average_before: float
    load_average_after: float
    seconds: float


@dataclass(frozen=True, slots=True)
class EngineReport:
    """`ratios` of tokens per second, each of two contenders in the same round; `figures` by contender and workload.

    `agreement`: the share of tokens that two contenders that compute the same generated alike, place by place. They
    part where two tokens are equally probable up to rounding, and stay apart from there on.
    """

    set_up: SetUp
    ratios: Mapping[str, Spread]
    figures: Mapping[str, Mapping[str, Figures]]
    agreement: Mapping[str, float]


def spread(values: Sequence[float]) -> Spread:
    """Of the values of all rounds."""
    rounded = tuple(round(value, _DIGITS) for value in values)
    return Spread(round(float(np.median(values)), _DIGITS), min(rounded), max(rounded), rounded)


def find_figures(runs: Runs) -> dict[str, dict[str, Figures]]:
    """By contender and workload."""
    figures: dict[str, dict[str, Figures]] = {}
    for (contender, workload), own in runs.items():
        served = [each for run in own for each in run.served]
        first = [each.first_token_seconds for each in served]
        later = [
            (each.seconds - each.first_token_seconds) / (each.tokens - 1)
            for each in served
            if each.first_token_seconds is not None and each.tokens > 1
        ]
        figures.setdefault(contender, {})[workload] = Figures(
            spread([run.tokens_per_second for run in own]),
            _percentiles([seconds for seconds in first if seconds is not None]),
            _percentiles(later),
        )
    return figures


def _percentiles(values: Sequence[float]) -> Percentiles | None:
    if not values:
        return None
    return Percentiles(*(round(float(np.percentile(values, q)), _DIGITS) for q in (50, 95, 99)))


def find_ratios(runs: Runs) -> dict[str, Spread]:
    """Of all pairs that ran.

    Semantics: values[r] = tokens per second of the one in round r / tokens per second of the other in round r.
    """
    return {
        name: spread(
            [a.tokens_per_second / b.tokens_per_second for a, b in zip(runs[one, on], runs[other, on], strict=True)]
        )
        for name, (one, other, on) in _COMPARED.items()
        if (one, on) in runs and (other, on) in runs
    }


def find_agreement(runs: Runs, tokenizer: Any) -> dict[str, float]:
    """Of all pairs that should say the same, at the uniform workload."""
    return {
        name: round(_share(runs[one, UNIFORM], runs[other, UNIFORM], tokenizer), _DIGITS)
        for name, (one, other) in _ALIKE.items()
        if (one, UNIFORM) in runs and (other, UNIFORM) in runs
    }


def _share(ones: Sequence[Run], others: Sequence[Run], tokenizer: Any) -> float:
    equal = total = 0
    for run, other_run in zip(ones, others, strict=True):
        for served, other in zip(run.served, other_run.served, strict=True):
            tokens = tokenizer(served.text, add_special_tokens=False).input_ids
            other_tokens = tokenizer(other.text, add_special_tokens=False).input_ids
            equal += sum(a == b for a, b in zip(tokens, other_tokens, strict=False))
            total += max(len(tokens), len(other_tokens))
    return equal / total if total else 1.0
