"""Ways to choose and compose adapters, as the experiment compares them: those that need no training."""

from __future__ import annotations

import functools
import json
import random
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loraretriever.compose import cover, get_strategy, weigh
from loraretriever.evaluate.experiment.answers import Answer
from loraretriever.evaluate.experiment.results import SETTINGS, MethodInfo, TestPrompt
from loraretriever.evaluate.experiment.setup import DEEPEST, WHOLE, Setup
from loraretriever.evaluate.metrics import score
from loraretriever.types import BASE_COMPOSITION, Composition, Hit, Route


@dataclass(eq=False)
class Method(ABC):
    """One method. `settings` are those that it is run under."""

    info: MethodInfo
    settings: tuple[str, ...] = SETTINGS

    def prepare(self, setup: Setup) -> bool:
        """Train or fit what it needs, before the engine is made; False: it cannot be had with this pool and data."""
        return True

    @abstractmethod
    def compose(self, setup: Setup, prompts: Sequence[TestPrompt], setting: str) -> list[Composition]:
        """The composition for each prompt."""

    def answer(
        self, setup: Setup, title: str, prompts: Sequence[TestPrompt], compositions: Sequence[Composition]
    ) -> list[Answer]:
        """The answers under these compositions, from the engine unless a method has its own way."""
        return setup.answer(title, prompts, compositions)

    def timed(self, setup: Setup, prompts: Sequence[TestPrompt], compositions: Sequence[Composition]) -> int | None:
        """Generate for the clock; the number of tokens, or None where no comparable time can be taken."""
        return setup.timed(prompts, compositions)


class Base(Method):
    """The base model alone: the floor."""

    def compose(self, setup: Setup, prompts: Sequence[TestPrompt], setting: str) -> list[Composition]:
        """See `Method`."""
        return [BASE_COMPOSITION] * len(prompts)


class Oracle(Method):
    """Perfect selection: the task's own adapter; of several the one that answers its validation examples best."""

    def compose(self, setup: Setup, prompts: Sequence[TestPrompt], setting: str) -> list[Composition]:
        """See `Method`."""
        tasks = sorted({prompt.task for prompt in prompts})
        candidates = {task: setup.catalogue.adapters_of(task) for task in tasks}
        means = _validation_means(
            setup, [(a, task) for task in tasks if len(candidates[task]) > 1 for a in candidates[task]]
        )
        own = {task: max(candidates[task], key=lambda name: means.get((name, task), 0.0)) for task in tasks}
        return [_alone(own[prompt.task]) for prompt in prompts]


class BestSingle(Method):
    """The one adapter that answers the validation examples of all tasks best, for every prompt that may use it."""

    def compose(self, setup: Setup, prompts: Sequence[TestPrompt], setting: str) -> list[Composition]:
        """See `Method`."""
        order = self._order(setup)
        return [_alone(setup.allowed(prompt, setting, order)[0]) for prompt in prompts]

    def prepare(self, setup: Setup) -> bool:
        """See `Method`."""
        return bool(setup.validation)

    @functools.cache  # noqa: B019 - a method lives as long as its run
    def _order(self, setup: Setup) -> list[str]:
        """Adapters, the best first."""
        file = setup.folder / "best_single.json"
        tasks = sorted({prompt.task for prompt in setup.prompts})
        means = _validation_means(setup, [(name, task) for name in setup.adapters for task in tasks], most=3)
        overall = {name: float(np.mean([means[name, task] for task in tasks])) for name in setup.adapters}
        file.write_text(json.dumps(overall, indent=1) + "\n", encoding="utf-8")
        return sorted(overall, key=lambda name: -overall[name])


def _alone(adapter: str) -> Composition:
    return Composition("selection", (adapter,), (1.0,))


def _validation_means(
    setup: Setup, pairs: Sequence[tuple[str, str]], most: int = WHOLE
) -> dict[tuple[str, str], float]:
    """Mean score of adapters on the validation examples of tasks, `most` of each at most."""
    prompts = defaultdict(list)
    for prompt in setup.validation_prompts(min(most, setup.options.validation)):
        prompts[prompt.task].append(prompt)
    rows = [(adapter, prompt) for adapter, task in pairs for prompt in prompts[task]]
    answers = setup.answer("validation", [prompt for _, prompt in rows], [_alone(adapter) for adapter, _ in rows])
    scores = defaultdict(list)
    for (adapter, prompt), answer in zip(rows, answers, strict=True):
        scores[adapter, prompt.task].append(score(prompt.metric, answer.text, prompt.targets))
    return {pair: float(np.mean(values)) for pair, values in scores.items()}


@dataclass(eq=False)
class Retrieved(Method):
    """A strategy over the adapters that retrieval finds.

    `k` None takes the experiment's; `whole`: all adapters of the pool are given to the strategy. `fallback` says what
    answers where none fits: the base model, the k hits with equal weights ("mixture"), or (None) the k hits as
    elsewhere, however badly they fit.
    """

    strategy: str = "mixture"
    weighting: str = "uniform"
    k: int | None = None
    whole: bool = False
    coverage: float = 1.0
    temperature: float = 1.0
    retriever: str = "hybrid"
    fallback: str | None = None

    def compose(self, setup: Setup, prompts: Sequence[TestPrompt], setting: str) -> list[Composition]:
        """See `Method`."""
        k = WHOLE if self.whole else self.k or setup.options.k
        depth = len(setup.adapters) if self.whole else max(k, DEEPEST)
        routes = setup.routes(prompts, setting, self.retriever, depth)
        return [self._compose(route, k) for route in routes]

    def _compose(self, route: Route, k: int) -> Composition:
        hits = route.hits[:k]
        if not hits or (route.fallback and self.fallback == "base"):
            return BASE_COMPOSITION
        weighting = "uniform" if route.fallback and self.fallback == "mixture" else self.weighting
        weights = weigh(hits, weighting, self.temperature)
        return get_strategy(self.strategy)(*cover(hits, weights, self.coverage))


class Soup(Method):
    """AdapterSoup: k adapters for the whole stream, those nearest to its prompts on average; parameters averaged."""

    def compose(self, setup: Setup, prompts: Sequence[TestPrompt], setting: str) -> list[Composition]:
        """See `Method`."""
        order = self._order(setup)
        chosen = [setup.allowed(prompt, setting, order)[: setup.options.k] for prompt in prompts]
        fuse = get_strategy("fusion")
        return [fuse([Hit(name, 0.0) for name in names], [1 / len(names)] * len(names)) for names in chosen]

    @functools.cache  # noqa: B019 - a method lives as long as its run
    def _order(self, setup: Setup) -> list[str]:
        """Adapters by their mean cosine with the prompts of the stream, the greatest first."""
        totals: dict[str, float] = dict.fromkeys(setup.adapters, 0.0)
        for route in setup.routes(setup.prompts, "iid", "paper", len(setup.adapters)):
            for hit in route.hits:
                totals[hit.adapter] += hit.score
        return sorted(totals, key=lambda name: -totals[name])


class LoGo(Method):
    """LoGo: of all adapters the k that would move the model most at the prompt's last token, weighted by how much."""

    def compose(self, setup: Setup, prompts: Sequence[TestPrompt], setting: str) -> list[Composition]:
        """See `Method`."""
        names = [setup.allowed(prompt, setting, setup.adapters) for prompt in prompts]
        found = setup.engine.effects([setup.request(prompt, BASE_COMPOSITION) for prompt in prompts], names)
        return [self._compose(*row, setup.options.k) for row in zip(names, found, strict=True)]

    def _compose(self, names: Sequence[str], effects: Sequence[float], k: int) -> Composition:
        best = sorted(zip(names, effects, strict=True), key=lambda pair: -pair[1])[:k]
        hits = [Hit(name, 0.0, effect=effect) for name, effect in best]
        return get_strategy("mixture")(hits, weigh(hits, "effect", 1.0))


def draw_experts(setup: Setup) -> tuple[str, ...]:
    """One random adapter of each domain, as the paper's mixtures of experts have (section 4)."""
    domains = defaultdict(list)
    for adapter in setup.adapters:
        task = setup.catalogue.tasks[adapter]
        domains[setup.catalogue.domains.get(task, task)].append(adapter)
    draw = random.Random(setup.options.seed)
    return tuple(draw.choice(names) for _, names in sorted(domains.items()))
