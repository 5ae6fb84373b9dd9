"""Means, confidence intervals and significance of what the experiment measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from loraretriever.evaluate.experiment.results import METRICS, PRIMARY, Results

DRAWS = 2000  # of the bootstrap, and of the permutation test
SEED = 0
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over tasks between 0 and 100, with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(eq=False)
class Statistics:
    """Figures of one run. Every task counts the same, however many prompts it has."""

    results: Results

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """Tasks, sorted by domain and name."""
        domains = {prompt.task: prompt.domain for prompt in self.results.prompts}
        return tuple(sorted(domains, key=lambda task: (domains[task], task)))

    @cached_property
    def domains(self) -> Mapping[str, tuple[str, ...]]:
        """The tasks of each domain."""
        of = {prompt.task: prompt.domain for prompt in self.results.prompts}
        names = dict.fromkeys(of[task] for task in self.tasks)
        return {domain: tuple(task for task in self.tasks if of[task] == domain) for domain in names}

    @cached_property
    def metrics(self) -> Mapping[str, str]:
        """The metric of each task, as in the task files."""
        return {prompt.task: prompt.metric for prompt in self.results.prompts}

    @cached_property
    def _places(self) -> Mapping[str, NDArray[np.int64]]:
        names = np.array([prompt.task for prompt in self.results.prompts])
        return {task: np.flatnonzero(names == task) for task in self.tasks}

    @cached_property
    def _weights(self) -> Floats:
        """What each prompt counts in the mean over tasks. Shape: (prompts,)."""
        weights = np.zeros(len(self.results.prompts))
        for places in self._places.values():
            weights[places] = 1 / len(places) / len(self.tasks)
        return weights

    @cached_property
    def _draws(self) -> Floats:
        """Weights of prompts drawn anew within each task, the same draws for all methods. Shape: (DRAWS, prompts)."""
        rng = np.random.default_rng(SEED)
        drawn = np.zeros((DRAWS, len(self.results.prompts)))
        for places in self._places.values():
            counts = rng.multinomial(len(places), np.full(len(places), 1 / len(places)), size=DRAWS)
            drawn[:, places] = counts / len(places) / len(self.tasks)
        return drawn

    @cached_property
    def _signs(self) -> Floats:
        rng = np.random.default_rng(SEED + 1)
        return rng.choice([-1.0, 1.0], size=(DRAWS, len(self.results.prompts)))

    def has(self, method: str, setting: str) -> bool:
        """Whether there is a figure."""
        return self._key(method, setting) in self.results.scores

    def _key(self, method: str, setting: str) -> tuple[str, str]:
        """Base model and oracle are the same in every setting."""
        return method, "iid" if method in ("base", "oracle") else setting

    def primary(self, method: str, setting: str) -> Floats:
        """Each prompt's score in its task's own metric, between 0 and 1. Shape: (prompts,)."""
        scores = self.results.scores[self._key(method, setting)]
        columns = [METRICS.index(PRIMARY[prompt.metric]) for prompt in self.results.prompts]
        return np.asarray(scores[np.arange(len(columns)), columns])

    def estimate(self, method: str, setting: str) -> Estimate | None:
        """The mean over tasks with a bootstrap interval (prompts drawn within tasks); None: no figure."""
        if not self.has(method, setting):
            return None
        scores = self.primary(method, setting)
        low, high = np.percentile(self._draws @ scores, [2.5, 97.5])
        return Estimate(float(100 * self._weights @ scores), float(100 * low), float(100 * high))

    def share_of_oracle(self, method: str, setting: str = "iid") -> Estimate | None:
        """A method's mean in percent of the oracle's, with a paired bootstrap interval."""
        if not self.has(method, setting) or not self.has("oracle", "iid"):
            return None
        own, oracle = self.primary(method, setting), self.primary("oracle", "iid")
        best = self._weights @ oracle
        if best == 0:
            return None
        drawn = (self._draws @ own) / np.maximum(self._draws @ oracle, 1e-12)
        low, high = np.percentile(drawn, [2.5, 97.5])
        return Estimate(float(100 * self._weights @ own / best), float(100 * low), float(100 * high))

    def p_value(self, method: str, other: str, setting: str) -> float:
        """That two methods are alike: a permutation test on the same prompts, two-sided.

        Semantics: D = Σ_i w_i (a_i - b_i), p = (1 + #{random signs: |Σ_i ± w_i (a_i - b_i)| >= |D|}) / (1 + DRAWS)
        """
        differences = self._weights * (self.primary(method, setting) - self.primary(other, setting))
        observed = abs(differences.sum())
        extreme = int((np.abs(self._signs @ differences) >= observed - 1e-12).sum())
        return (1 + extreme) / (1 + DRAWS)

    def against_default(self, setting: str) -> Mapping[str, float]:
        """For each method the p value of its difference from the default, corrected by Holm for their number."""
        default = self.results.default
        if not self.has(default, setting):
            return {}
        others = [name for name in self.results.methods if name != default and self.has(name, setting)]
        return dict(zip(others, holm([self.p_value(name, default, setting) for name in others]), strict=True))

    def task_mean(self, method: str, setting: str, task: str, metric: str | None = None) -> float | None:
        """Mean of a task between 0 and 100, in a metric of `METRICS` or in its own; None: no figure."""
        if not self.has(method, setting):
            return None
        column = METRICS.index(metric or PRIMARY[self.metrics[task]])
        return float(100 * self.results.scores[self._key(method, setting)][self._places[task], column].mean())

    def domain_mean(self, method: str, setting: str, domain: str, metric: str | None = None) -> float | None:
        """Mean over a domain's tasks (with `metric`, over those of which it is a metric)."""
        tasks = [task for task in self.domains[domain] if metric is None or metric in shown_metrics(self.metrics[task])]
        found = [self.task_mean(method, setting, task, metric) for task in tasks]
        values = [value for value in found if value is not None]
        return float(np.mean(values)) if values else None

    def retrieval(self, retriever: str) -> Mapping[int, float]:
        """Percent of prompts whose own adapter is among the first 1, 3 and 5, each prompt counting the same."""
        rows = list(zip(self.results.prompts, self.results.rankings[retriever], strict=True))
        return {k: 100 * float(np.mean([prompt.own in names[:k] for prompt, names in rows])) for k in (1, 3, 5)}

    def task_retrieval(self, retriever: str, task: str) -> float:
        """Percent of a task's prompts whose own adapter is the first."""
        places = self._places[task]
        ranked, prompts = self.results.rankings[retriever], self.results.prompts
        return 100 * float(np.mean([ranked[i][:1] == (prompts[i].own,) for i in places]))

    def confusion(self, retriever: str) -> tuple[tuple[str, ...], Floats]:
        """The adapters that are found first for a task's prompts. Returns their names, and shares (tasks, adapters)."""
        ranked = self.results.rankings[retriever]
        own = {prompt.task: prompt.own for prompt in self.results.prompts}
        first = {names[0] for names in ranked if names}
        order = [name for task in self.tasks if (name := own[task]) is not None]
        columns = tuple(dict.fromkeys([*order, *sorted(first)]))
        matrix = np.zeros((len(self.tasks), len(columns)))
        for row, task in enumerate(self.tasks):
            for place in self._places[task]:
                if ranked[place]:
                    matrix[row, columns.index(ranked[place][0])] += 1 / len(self._places[task])
        return columns, matrix


def shown_metrics(metric: str) -> tuple[str, ...]:
    """What the tables show of a task with this metric: the paper has three rows for ROUGE."""
    return ("rouge1", "rouge2", "rougeL") if metric == "rouge" else (PRIMARY[metric],)


def holm(values: Sequence[float]) -> list[float]:
    """Corrected p values for their number (Holm, 1979)."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    corrected, greatest = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        greatest = max(greatest, min(1.0, (len(values) - rank) * values[i]))
        corrected[i] = greatest
    return corrected
