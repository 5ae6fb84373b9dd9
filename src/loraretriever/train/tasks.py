"""LORAUTER (arXiv 2601.21795): tasks, not adapters, are the index.

A task is a small set of examples. It is embedded by the mean of its prompts, and the adapter that serves it best is
found by successive halving. A prompt's adapters are those of the tasks nearest to it, their outputs weighted by the
similarities. What is chosen here: examples are compared by the likelihood of their answers (the paper uses the task's
metric), and a task keeps the whole ranking of its adapters, so that others can stand in for those that may not be used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from loraretriever.errors import InvalidInputError
from loraretriever.evaluate.tasks import Example
from loraretriever.models import BaseModel
from loraretriever.retrieve.encoder import Vectors
from loraretriever.train.adapters import tokenize_example
from loraretriever.train.likelihood import Likelihood
from loraretriever.types import BASE_COMPOSITION, AdapterWeights, Composition

FIRST_EXAMPLES = 2  # of each task, in the first round of halving
TEMPERATURE = 0.1  # of the softmax over the similarities of the tasks; chosen here


@dataclass(frozen=True, slots=True)
class TaskIndex:
    """Tasks with their mean embeddings, and for each the adapters, best first."""

    tasks: tuple[str, ...]
    means: tuple[tuple[float, ...], ...]  # unit vectors
    rankings: tuple[tuple[str, ...], ...]
    seconds: float = 0.0

    def compose(
        self,
        vectors: Vectors,
        excluded: Sequence[Collection[str]],
        k: int,
        temperature: float = TEMPERATURE,
        unseen: Sequence[Collection[str]] | None = None,
    ) -> list[Composition]:
        """The composition of each prompt: a mixture of the adapters of its k nearest tasks.

        Tasks with the same adapter add up. Where a task's adapter is excluded, its next best stands in.

        Args:
            vectors: of the prompts, of length 1. Shape: (prompts, dimension).
            excluded: for each prompt the adapters that it may not use.
            k: tasks.
            temperature: of the softmax.
            unseen: for each prompt the tasks that the index is to do without; None: none.

        Semantics: w_t = exp(cos(x, t) / τ) / Σ_{u in top k} exp(cos(x, u) / τ), y += Σ_t w_t s B A x of t's adapter
        """
        cosines = np.asarray(vectors, dtype=np.float64) @ np.asarray(self.means).T
        if unseen is not None:
            for row, tasks in zip(cosines, unseen, strict=True):
                row[[self.tasks.index(task) for task in tasks if task in self.tasks]] = -math.inf
        return [self._compose(row, out, k, temperature) for row, out in zip(cosines, excluded, strict=True)]

    def _compose(self, cosines: Sequence[float], excluded: Collection[str], k: int, temperature: float) -> Composition:
        seen = [task for task in range(len(cosines)) if cosines[task] > -math.inf]
        nearest = sorted(seen, key=lambda task: -cosines[task])[:k]
        powers = [math.exp((cosines[task] - cosines[nearest[0]]) / temperature) for task in nearest]
        weights: dict[str, float] = {}
        for task, power in zip(nearest, powers, strict=True):
            adapter = next((name for name in self.rankings[task] if name not in excluded), None)
            if adapter is not None:
                weights[adapter] = weights.get(adapter, 0.0) + power
        if not weights:
            return BASE_COMPOSITION
        total = sum(weights.values())
        return Composition("mixture", tuple(weights), tuple(weight / total for weight in weights.values()))

    def save(self, file: Path) -> None:
        """Write it as JSON, whole or not at all."""
        unfinished = file.with_suffix(".tmp")
        unfinished.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
        unfinished.replace(file)

    @classmethod
    def load(cls, file: Path) -> TaskIndex:
        """Read what `save` wrote.

        Raises:
            InvalidInputError: it is no such file.
        """
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            means = tuple(tuple(map(float, mean)) for mean in values["means"])
            return cls(tuple(values["tasks"]), means, tuple(map(tuple, values["rankings"])), float(values["seconds"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidInputError(f"{file} is no index of tasks ({error!r}); make it with rank_adapters.") from error


def unit_mean(vectors: Vectors) -> tuple[float, ...]:
    """The mean of vectors, scaled to length 1. Shape: vectors (n, dimension)."""
    mean = np.asarray(vectors, dtype=np.float64).mean(axis=0)
    return tuple((mean / max(float(np.linalg.norm(mean)), 1e-12)).tolist())


Loss = Callable[[Sequence[tuple[str, Example]]], Sequence[float]]


def halve(adapters: Sequence[str], examples: Sequence[Example], loss: Loss, first: int = FIRST_EXAMPLES) -> list[str]:
    """Adapters by their mean loss on a task's examples, the best first, by successive halving.

    Each round looks at twice as many examples as the one before, and leaves the better half in the race; what drops out
    is ranked behind it by what is known. The race ends with one adapter, or when a round had all examples.

    Args:
        adapters: at least one.
        examples: of the task, at least one.
        loss: of answers under adapters, for pairs of them.
        first: examples in the first round.
    """
    racing, behind = list(adapters), list[str]()
    known: dict[str, list[float]] = {name: [] for name in adapters}
    count = 0
    while len(racing) > 1:
        last, count = count, min(len(examples), first if count == 0 else 2 * count)
        pairs = [(name, example) for name in racing for example in examples[last:count]]
        for (name, _), value in zip(pairs, loss(pairs), strict=True):
            known[name].append(value)
        racing.sort(key=lambda name: float(np.mean(known[name])))
        if count == len(examples):
            break
        kept = (len(racing) + 1) // 2
        racing, behind = racing[:kept], racing[kept:] + behind
    return racing + behind


def rank_adapters(
    base: BaseModel,
    adapters: Mapping[str, AdapterWeights],
    tasks: Mapping[str, Sequence[Example]],
    on_task: Callable[[], None] = lambda: None,
) -> dict[str, list[str]]:
    """For each task the adapters, best first; see `halve`. The base model is left as it was."""
    likelihood = Likelihood(base, adapters)

    def loss(pairs: Sequence[tuple[str, Example]]) -> list[float]:
        rows = [(likelihood.route({name: 1.0}), tokenize_example(base.tokenizer, example)) for name, example in pairs]
        return likelihood.losses(rows)

    found = {}
    try:
        for task, examples in tasks.items():
            found[task] = halve(sorted(adapters), examples, loss)
            on_task()
    finally:
        likelihood.close()
    return found
