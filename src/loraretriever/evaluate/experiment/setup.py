"""What all methods of the experiment share: the pool, its retrievers, the engine, and the answers known so far."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loraretriever.config import Settings
from loraretriever.engine import Engine
from loraretriever.evaluate.experiment.answers import Answer, AnswerStore, composition_key
from loraretriever.evaluate.experiment.results import TestPrompt
from loraretriever.evaluate.experiment.stream import Catalogue
from loraretriever.evaluate.tasks import Example
from loraretriever.models import BaseModel, load_base_model, load_tokenizer, render_prompt
from loraretriever.pipeline import LoraRetriever
from loraretriever.types import Composition, Request, Route, Sampling

DEEPEST = 10  # hits that are kept of a prompt; methods that look at fewer take the first of them
WHOLE = 1_000_000  # more than any pool has
_KEEP_EVERY = 32  # answers between two writes to the disk

# Opens a stage of so many steps; what the block gets is called after each.
Stage = Callable[[str, int], AbstractContextManager[Callable[[], None]]]


def silent(title: str, steps: int) -> AbstractContextManager[Callable[[], None]]:
    """A stage that nobody watches."""
    return nullcontext(lambda: None)


@dataclass(frozen=True, slots=True)
class Options:
    """How the experiment is run.

    `k` adapters are retrieved. `examples` of each task's training examples train what needs training, `validation` of
    its validation examples choose what is chosen (the best single adapter, an adapter for each task). `max_tokens` new
    tokens at most; None: for each task 8 more than its longest reference has, for a longer answer is wrong anyway.
    `render` puts a prompt into the model's template; None: its chat template. `seed` is of the stream, of all random
    choices, and of training.
    """

    k: int = 3
    seed: int = 0
    examples: int = 20
    validation: int = 10
    max_tokens: int | None = None
    render: Callable[[str], str] | None = None
    timed_prompts: int = 32
    timed_tokens: int = 32
    timed_rounds: int = 2
    curve_ks: tuple[int, ...] = (1, 2, 3, 5, 8)
    curve_prompts: int = 10  # of each task
    router_epochs: int | None = None  # None: the training's own
    hub_budget: int = 40  # compositions that LoRAHub tries

    def quick(self) -> Options:
        """For a first look: shorter trainings, one short timed round, fewer points of the curve."""
        return replace(
            self,
            examples=4,
            validation=2,
            timed_rounds=1,
            timed_prompts=16,
            timed_tokens=16,
            curve_ks=(1, 3, 8),
            curve_prompts=2,
            router_epochs=1,
            hub_budget=10,
        )


@dataclass(slots=True, eq=False)
class Setup:
    """One run of the experiment.

    `lr` has the product's retriever, `paper` the paper's formula; `open_engine` makes an engine that knows these
    trained routers. `train` and `validation` are the examples of each task of the stream.
    """

    lr: LoraRetriever
    paper: LoraRetriever
    prompts: tuple[TestPrompt, ...]
    catalogue: Catalogue
    options: Options
    folder: Path
    store: AnswerStore
    open_engine: Callable[[Sequence[Path]], Engine]
    train: Mapping[str, Sequence[Example]] = field(default_factory=dict)
    validation: Mapping[str, Sequence[Example]] = field(default_factory=dict)
    stage: Stage = silent
    routers: list[Path] = field(default_factory=list)  # trained ones, that the engine is to know
    # Digests of trained routers by strategy and top k: answers under another router are other answers.
    router_digests: dict[tuple[str, int | None], str] = field(default_factory=dict)
    _tokenizer: Any = None
    _timed: int = 0  # batches so far
    _engine: Engine | None = None
    _base: BaseModel | None = None
    _routes: dict[tuple[str, str], dict[str, Route]] = field(default_factory=lambda: defaultdict(dict))
    _limits: dict[str, int] = field(default_factory=dict)

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters, sorted."""
        return sorted(adapter.name for adapter in self.lr.pool.list() if adapter.enabled)

    @property
    def settings(self) -> Settings:
        """Of the pool's LoraRetriever."""
        return self.lr.settings

    @property
    def base_name(self) -> str:
        """The name of the base model."""
        return self.settings.base_model or self.lr.pool.base_model

    def load_base(self) -> BaseModel:
        """The base model once more, in the dtype of the engine's."""
        return load_base_model(self.base_name, self.settings.dtype, self.settings.device)

    @property
    def engine(self) -> Engine:
        """The engine, made when it is first needed: the routers must be there by then."""
        if self._engine is None:
            self.release_base()
            self._engine = self.open_engine(self.routers)
        return self._engine

    @property
    def base(self) -> BaseModel:
        """The base model in float32, for what is fitted or trained; let go when the engine is made."""
        if self._base is None:
            self._base = load_base_model(self.base_name, "float32", self.settings.device)
        return self._base

    def release_base(self) -> None:
        """Let the base model for training go."""
        self._base = None

    def close_engine(self) -> None:
        """Stop the engine."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def excluded(self, prompt: TestPrompt, setting: str) -> frozenset[str]:
        """The adapters that the prompt may not use."""
        return self.catalogue.excluded(prompt.task, setting)

    def allowed(self, prompt: TestPrompt, setting: str, of: Collection[str]) -> tuple[str, ...]:
        """Those of some adapters that the prompt may use, in their order."""
        excluded = self.excluded(prompt, setting)
        return tuple(adapter for adapter in of if adapter not in excluded)

    def routes(
        self, prompts: Sequence[TestPrompt], setting: str, retriever: str = "hybrid", depth: int = DEEPEST
    ) -> list[Route]:
        """What retrieval finds for prompts, best first, `depth` hits each. What was found before is kept."""
        lr = self.paper if retriever == "paper" else self.lr
        known = self._routes[f"{retriever} {depth}", setting]
        alike: dict[frozenset[str], list[TestPrompt]] = defaultdict(list)
        for prompt in prompts:
            if prompt.id not in known:
                alike[self.excluded(prompt, setting)].append(prompt)
        for excluded, group in alike.items():
            found = lr.route([prompt.inputs for prompt in group], k=depth, exclude=excluded)
            known.update({prompt.id: route for prompt, route in zip(group, found, strict=True)})
        return [known[prompt.id] for prompt in prompts]

    def forget(self, prompts: Sequence[TestPrompt]) -> None:
        """Let what retrieval found for prompts go, so that it takes its time again."""
        for known in self._routes.values():
            for prompt in prompts:
                known.pop(prompt.id, None)

    def max_tokens(self, prompt: TestPrompt) -> int:
        """New tokens at most; see `Options`."""
        if self.options.max_tokens is not None:
            return self.options.max_tokens
        if prompt.task not in self._limits:
            references = [each.targets for each in self.prompts if each.task == prompt.task]
            longest = max((len(self.tokenizer(text).input_ids) for text in references), default=42)
            self._limits[prompt.task] = 8 + longest
        return self._limits[prompt.task]

    @property
    def tokenizer(self) -> Any:
        """The base model's."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.base_name)
        return self._tokenizer

    def rendered(self, prompt: TestPrompt) -> str:
        """The text that the model reads."""
        if self.options.render is not None:
            return self.options.render(prompt.inputs)
        return render_prompt(self.tokenizer, prompt.inputs)

    def key(self, composition: Composition) -> str:
        """What stands for a composition in the files: its text, with the digest of the router that it needs."""
        gate = composition.gate
        digest = self.router_digests.get((composition.strategy, gate.top_k if gate else None))
        return composition_key(composition) + (f"@{digest[:12]}" if digest else "")

    def request(self, prompt: TestPrompt, composition: Composition, sampling: Sampling | None = None) -> Request:
        """The request to the engine for a prompt under a composition."""
        render = self.options.render
        return Request(
            prompt.inputs if render is None else render(prompt.inputs),
            composition,
            sampling or Sampling(max_tokens=self.max_tokens(prompt)),
            chat=render is None,
        )

    def answer(self, title: str, prompts: Sequence[TestPrompt], compositions: Sequence[Composition]) -> list[Answer]:
        """The answers to prompts, each under its composition; only those that are not known are made."""
        keys = [self.key(composition) for composition in compositions]
        missing = {
            (prompt.id, key): self.request(prompt, composition)
            for prompt, key, composition in zip(prompts, keys, compositions, strict=True)
            if self.store.get(prompt.id, key) is None
        }
        if missing:
            with self.stage(title, len(missing)) as advance:
                self._keep(self._run(missing), advance)
        return [self.known(prompt.id, key) for prompt, key in zip(prompts, keys, strict=True)]

    def timed(self, prompts: Sequence[TestPrompt], compositions: Sequence[Composition]) -> int:
        """Generate as many tokens for every prompt, for the clock; returns their number.

        No prompt's beginning is known from before, and the spaces of `timed_copies` are not read by the model.
        """
        sampling = Sampling(max_tokens=self.options.timed_tokens, ignore_end=True)
        self._timed += 1
        requests = [
            replace(
                self.request(replace(prompt, inputs=prompt.inputs.rstrip()), composition, sampling),
                namespace=f"timed {self._timed}",
            )
            for prompt, composition in zip(prompts, compositions, strict=True)
        ]
        return sum(generation.completion_tokens for _, generation in self.engine.run(requests))

    def _run(self, missing: Mapping[tuple[str, str], Request]) -> Iterator[Answer]:
        places = list(missing)
        for place, generation in self.engine.run(list(missing.values())):
            prompt, key = places[place]
            yield Answer(prompt, key, generation.text.strip(), generation.completion_tokens)

    def keep(self, title: str, count: int, answers: Iterator[Answer]) -> None:
        """Store answers that something else than the engine makes."""
        with self.stage(title, count) as advance:
            self._keep(answers, advance)

    def _keep(self, answers: Iterator[Answer], advance: Callable[[], None]) -> None:
        fresh: list[Answer] = []
        try:
            for answer in answers:
                fresh.append(answer)
                advance()
                if len(fresh) >= _KEEP_EVERY:
                    self.store.add(fresh)
                    fresh = []
        finally:
            self.store.add(fresh)

    def known(self, prompt: str, key: str) -> Answer:
        """An answer that is known."""
        found = self.store.get(prompt, key)
        assert found is not None
        return found

    def validation_prompts(self, per_task: int) -> list[TestPrompt]:
        """The first validation examples of each task, as prompts."""
        return [
            TestPrompt(f"validation:{task}/{i}", each.inputs, each.targets, task, each.domain, each.metric, None)
            for task, examples in sorted(self.validation.items())
            for i, each in enumerate(examples[:per_task])
        ]

    def training_examples(self) -> list[Example]:
        """The first training examples of each task."""
        return [each for _, examples in sorted(self.train.items()) for each in examples[: self.options.examples]]


def facts_of(lr: LoraRetriever, options: Options, prompts: Sequence[TestPrompt]) -> dict[str, str]:
    """What answers depend on besides prompt and composition; see `AnswerStore`."""
    adapters = sorted((adapter.name, adapter.digest) for adapter in lr.pool.list())
    texts = sorted((each.id, each.inputs, each.targets) for each in prompts)
    return {
        "base_model": lr.settings.base_model or lr.pool.base_model,
        "dtype": lr.settings.dtype,
        "pool": _digest(adapters),
        "prompts": _digest(texts),
        "options": _digest(
            (options.max_tokens, options.render is None, options.seed, options.examples, options.validation)
        ),
    }


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def timed_copies(prompts: Sequence[TestPrompt], turn: int) -> list[TestPrompt]:
    """The prompts with spaces at their end, so that no retriever remembers them: for taking the time."""
    return [replace(each, id=f"timed:{turn}:{each.id}", inputs=each.inputs + " " * turn) for each in prompts]
