"""Methods that are trained or fitted on examples of the tasks, as their papers do; what was fitted is kept on disk."""

from __future__ import annotations

import json
import random
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraretriever.compose import get_strategy
from loraretriever.compose.routers import read_router
from loraretriever.evaluate.experiment.answers import Answer
from loraretriever.evaluate.experiment.methods import Method, Retrieved, draw_experts
from loraretriever.evaluate.experiment.results import TestPrompt
from loraretriever.evaluate.experiment.setup import Setup
from loraretriever.evaluate.tasks import Example
from loraretriever.train.progress import in_parts
from loraretriever.train.steps import StepsResult
from loraretriever.train.tasks import TaskIndex, rank_adapters, unit_mean
from loraretriever.types import BASE_COMPOSITION, Composition, Hit, Mixer

_HUB_ADAPTERS = _HUB_EXAMPLES = 20  # LoRAHub's own numbers


def _uniform(strategy: str, names: Sequence[str]) -> Composition:
    if not names:
        return BASE_COMPOSITION
    return get_strategy(strategy)([Hit(name, 0.0) for name in names], [1 / len(names)] * len(names))


@dataclass(eq=False)
class LoraHub(Method):
    """LoRAHub: one set of weights for 20 random adapters, found without gradients on 20 examples of the stream's tasks.

    The weights of adapters that a prompt may not use are left out.
    """

    weights: dict[str, float] | None = None

    def prepare(self, setup: Setup) -> bool:
        """See `Method`."""
        file = setup.folder / "lorahub.json"
        if not setup.train:
            return False
        if not file.is_file():
            from loraretriever.train.lorahub import LoraHubSettings, fit_lorahub

            draw = random.Random(setup.options.seed)
            names = setup.adapters
            names = sorted(draw.sample(names, min(len(names), _HUB_ADAPTERS)))
            examples = setup.training_examples()
            chosen = draw.sample(examples, min(len(examples), _HUB_EXAMPLES))
            with setup.stage("fitting LoRAHub", 1) as advance:
                adapters = {name: setup.lr.pool.weights(name) for name in names}
                settings = LoraHubSettings(seed=setup.options.seed, budget=setup.options.hub_budget)
                result = fit_lorahub(setup.load_base(), adapters, chosen, settings)
                advance()
            _write(file, {"weights": result.weights, "seconds": result.seconds})
        record = json.loads(file.read_text(encoding="utf-8"))
        self.weights = record["weights"]
        self.info = replace(self.info, train_seconds=record["seconds"])
        return True

    def compose(self, setup: Setup, prompts: Sequence[TestPrompt], setting: str) -> list[Composition]:
        """See `Method`."""
        assert self.weights is not None
        found = []
        for prompt in prompts:
            names = [name for name in setup.allowed(prompt, setting, sorted(self.weights)) if self.weights[name]]
            weights = tuple(self.weights[name] for name in names)
            found.append(Composition("fusion", tuple(names), weights, Mixer.PARAMETERS) if names else BASE_COMPOSITION)
        return found


class _Routed(Method):
    """What methods with a trained router share."""

    kind = ""  # of the router, and the strategy's name
    folder_name = ""
    top_k: int | None = None

    def prepare(self, setup: Setup) -> bool:
        """See `Method`."""
        if not setup.train:
            return False
        folder = setup.folder / "routers" / self.folder_name
        record = folder / "training.json"
        if not record.is_file():
            examples = setup.training_examples()
            result = self.fit(setup, examples, folder)
            _write(record, {"seconds": result.seconds, "first_loss": result.first_loss, "last_loss": result.last_loss})
        seconds = json.loads(record.read_text(encoding="utf-8"))["seconds"]
        self.info = replace(self.info, train_seconds=seconds)
        setup.router_digests[self.kind, self.top_k] = read_router(folder).digest
        self.register(setup, folder)
        return True

    def register(self, setup: Setup, folder: Path) -> None:
        """Tell the engine of the router."""
        setup.routers.append(folder)

    @abstractmethod
    def fit(self, setup: Setup, examples: Sequence[Example], folder: Path) -> StepsResult:
        """Train the router into a folder."""

    def candidates(self, setup: Setup) -> tuple[str, ...]:
        """The adapters that it is trained over."""
        return tuple(setup.adapters)

    def train(
        self,
        setup: Setup,
        examples: Sequence[Example],
        folder: Path,
        candidates: Sequence[tuple[str, ...]] | None,
        **options: Any,
    ) -> StepsResult:
        """Train a router of the method's kind, with progress."""
        from loraretriever.train.routers import RouterSettings, train_router

        settings = RouterSettings(seed=setup.options.seed, **options)
        if setup.options.router_epochs is not None:
            settings = replace(settings, epochs=setup.options.router_epochs)
        adapters = {name: setup.lr.pool.weights(name) for name in self.candidates(setup)}
        with setup.stage(f"training {self.info.title}", 100) as advance:
            on_step = in_parts(advance, 100)
            return train_router(self.kind, setup.base, adapters, examples, candidates, folder, settings, on_step)


def _write(file: Path, value: dict[str, Any]) -> None:
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(file)


@dataclass(eq=False)
class MixtureOfExperts(_Routed):
    """A linear router in every module over one random adapter of each domain (LoraRetriever, section 4).

    `top_k` adapters act on a token; None: all, softly. A prompt's router looks at those that it may use only.
    """

    top_k: int | None = None
    kind = "moe"

    def __post_init__(self) -> None:
        self.folder_name = self.info.name

    def candidates(self, setup: Setup) -> tuple[str, ...]:
        """See `_Routed`."""
        return draw_experts(setup)

    def fit(self, setup: Setup, examples: Sequence[Example], folder: Path) -> StepsResult:
        """See `_Routed`."""
        return self.train(setup, examples, folder, None, top_k=self.top_k)

    def compose(self, setup: Setup, prompts: Sequence[TestPrompt], setting: str) -> list[Composition]:
        """See `Method`."""
        experts = draw_experts(setup)
        strategy = f"moe;top_k={self.top_k or 'all'}"
        return [_uniform(strategy, setup.allowed(prompt, setting, experts)) for prompt in prompts]


@dataclass(eq=False)
class Smear(_Routed):
    """SMEAR (arXiv 2306.03745): the experts' parameters averaged by a router that sees the whole prompt.

    It is not a token router and runs in transformers' `generate`, not in the engine.
    """

    kind = folder_name = "smear"
    router: Path | None = None

    def candidates(self, setup: Setup) -> tuple[str, ...]:
        """See `_Routed`."""
        return draw_experts(setup)

    def register(self, setup: Setup, folder: Path) -> None:
        """The engine does not know it."""
        self.router = folder

    def fit(self, setup: Setup, examples: Sequence[Example], folder: Path) -> StepsResult:
        """See `_Routed`."""
        return self.train(setup, examples, folder, None)

    def compose(self, setup: Setup, prompts: Sequence[TestPrompt], setting: str) -> list[Composition]:
        """Which experts the prompt may use; their weights come from the router."""
        experts = draw_experts(setup)
        found = []
        for prompt in prompts:
            names = setup.allowed(prompt, setting, experts)
            found.append(Composition("smear", names, (1 / len(names),) * len(names), Mixer.PARAMETERS))
        return found

    def answer(
        self, setup: Setup, title: str, prompts: Sequence[TestPrompt], compositions: Sequence[Composition]
    ) -> list[Answer]:
        """See `Method`."""
        keys = [setup.key(each) for each in compositions]
        rows = list(zip(prompts, keys, compositions, strict=True))
        # By their keys: two settings may ask the same.
        missing = {row[:2]: row for row in rows if setup.store.get(row[0].id, row[1]) is None}
        if missing:
            setup.keep(title, len(missing), self._generate(setup, list(missing.values())))
        return [setup.known(prompt.id, key) for prompt, key, _ in rows]

    def _generate(self, setup: Setup, rows: Sequence[tuple[TestPrompt, str, Composition]]) -> Iterator[Answer]:
        from loraretriever.train.smear import SmearModel

        assert self.router is not None
        model = SmearModel(setup.load_base(), self._experts(setup), self.router)
        requests = [(setup.rendered(prompt), each.adapters, setup.max_tokens(prompt)) for prompt, _, each in rows]
        for place, text, tokens in model.generate(requests):
            prompt, key, _ = rows[place]
            yield Answer(prompt.id, key, text.strip(), tokens)

    def timed(self, setup: Setup, prompts: Sequence[TestPrompt], compositions: Sequence[Composition]) -> int | None:
        """None: it has no continuous batching, so that its time would say nothing of the method."""
        return None

    def _experts(self, setup: Setup) -> dict[str, Any]:
        return {name: setup.lr.pool.weights(name) for name in draw_experts(setup)}


@dataclass(eq=False)
class Ramole(_Routed):
    """RAMoLE (arXiv 2406.16989): a gate over the retrieved adapters, trained with adapters dropped at random."""

    kind = folder_name = "ramole"

    def fit(self, setup: Setup, examples: Sequence[Example], folder: Path) -> StepsResult:
        """See `_Routed`."""
        from loraretriever.train.routers import retrieved_candidates

        return self.train(setup, examples, folder, retrieved_candidates(setup.lr, examples, setup.options.k))

    def compose(self, setup: Setup, prompts: Sequence[TestPrompt], setting: str) -> list[Composition]:
        """See `Method`."""
        return Retrieved(self.info, strategy="ramole").compose(setup, prompts, setting)


@dataclass(eq=False)
class Lorauter(Method):
    """LORAUTER: the adapters of the tasks nearest to a prompt, each task's adapter found on its validation examples.

    `known`: the index keeps the tasks whose adapters a prompt may not use, with other adapters in their place; that is
    a task with examples and without an adapter. Else they are taken from the index too, as new tasks are.
    """

    known: bool = False
    index: TaskIndex | None = None

    def prepare(self, setup: Setup) -> bool:
        """See `Method`."""
        if not setup.validation:
            return False
        file = setup.folder / "lorauter.json"
        if not file.is_file():
            start = time.perf_counter()
            tasks = {task: rows[: setup.options.validation] for task, rows in sorted(setup.validation.items())}
            weights = {name: setup.lr.pool.weights(name) for name in setup.adapters}
            with setup.stage("an adapter for each task", len(tasks)) as advance:
                rankings = rank_adapters(setup.load_base(), weights, tasks, advance)
            means = [unit_mean(setup.paper.encode([each.inputs for each in rows])) for rows in tasks.values()]
            seconds = round(time.perf_counter() - start, 1)
            TaskIndex(tuple(tasks), tuple(means), tuple(tuple(rankings[task]) for task in tasks), seconds).save(file)
        self.index = TaskIndex.load(file)
        self.info = replace(self.info, train_seconds=self.index.seconds)
        return True

    def compose(self, setup: Setup, prompts: Sequence[TestPrompt], setting: str) -> list[Composition]:
        """See `Method`."""
        assert self.index is not None
        vectors = setup.paper.encode([prompt.inputs for prompt in prompts])
        excluded = [setup.excluded(prompt, setting) for prompt in prompts]
        unseen = None if self.known else [setup.catalogue.unseen(prompt.task, setting) for prompt in prompts]
        return self.index.compose(vectors, excluded, setup.options.k, unseen=unseen)
