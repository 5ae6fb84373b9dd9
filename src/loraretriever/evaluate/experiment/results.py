"""What the experiment measured, in memory: what the statistics, the tables and the plots are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Which adapters a prompt may use: all; all but that of its own task; all but those of its task's whole domain.
SETTINGS = ("iid", "ood", "strict_ood")
# Scores of one answer, each between 0 and 1; a task's own metric is one of em, rougeL and bleu.
METRICS = ("em", "rouge1", "rouge2", "rougeL", "bleu")
PRIMARY = {"em": "em", "rouge": "rougeL", "bleu": "bleu"}  # metric of the task files -> name in METRICS


@dataclass(frozen=True, slots=True)
class TestPrompt:
    """One prompt of the stream. `own` is the adapter trained for its task, None where the pool has none."""

    __test__ = False  # pytest: not a test

    id: str  # "snli/17": task and place in its file
    inputs: str
    targets: str
    task: str
    domain: str
    metric: str  # "em", "rouge" or "bleu"
    own: str | None


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """A method as the report names it, and what it cost.

    `tokens_per_second` counts generated tokens over the whole time of the timed batch, retrieval and composition
    included; `relative_speed` is that over the base model's in the same run. `compose_seconds` is the time per prompt
    from the text to the composition. None: not measured.
    """

    name: str  # as in summary.json: "mixture_score"
    title: str  # as in tables: "mixture, by score"
    group: str  # "bounds", "ours", "paper" (its baselines) or "after" (what came after)
    note: str = ""  # one line on how it was set up here
    trained: bool = False  # needs training or fitting on examples
    train_seconds: float | None = None
    adapters_per_prompt: float | None = None  # mean, in the IID setting
    compose_seconds: float | None = None
    tokens_per_second: float | None = None
    relative_speed: float | None = None


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Mean score of a strategy with uniform weights at one k."""

    strategy: str  # "mixture" or "fusion"
    setting: str
    k: int
    mean: float  # between 0 and 100
    prompts: int


@dataclass(frozen=True, slots=True, eq=False)
class Similarity:
    """Cosines between the adapters' mean sample embeddings and between their updates B A, each (adapters, adapters)."""

    adapters: tuple[str, ...]
    samples: NDArray[np.float64]
    weights: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Results:
    """One run.

    `scores[method, setting]` has shape (prompts, len(METRICS)), rows in the order of `prompts`. The base model and the
    oracle appear with the setting "iid" only: no exclusion concerns them. A method may lack a setting.
    `rankings[retriever]` gives the names that each prompt found in the IID setting, best first, ten at most.
    """

    name: str  # of the pool or preset
    prompts: tuple[TestPrompt, ...]
    methods: Mapping[str, MethodInfo]  # in the order of the tables; "base" and "oracle" among them
    scores: Mapping[tuple[str, str], NDArray[np.float64]]
    default: str  # the product's default among the methods
    rankings: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    curve: tuple[CurvePoint, ...] = ()
    similarity: Similarity | None = None
    # Facts for the report's head: command, seed, environment, seconds, prompts per task, k ...
    about: Mapping[str, Any] = field(default_factory=dict)
    # Published figures to print beside the measured ones: (method, setting, task or domain, metric) -> 0 to 100.
    published: Mapping[tuple[str, str, str, str], float] = field(default_factory=dict)
