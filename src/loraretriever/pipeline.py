"""The product on one page: retrieve -> compose -> generate."""

from __future__ import annotations

import inspect
import math
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any, Self

from loraretriever.compose import PROBING, compose_explicit, cover, get_strategy, is_gate, round_weights, weigh
from loraretriever.config import DEFAULT_ENCODER, Settings, cache_folder, load_settings
from loraretriever.engine import Answers, Engine
from loraretriever.errors import AdapterNotFoundError, InvalidInputError, require_extra
from loraretriever.pool import Pool
from loraretriever.retrieve import Explanation, PoolMap, Reader, Retriever, Views
from loraretriever.retrieve.encoder import Vectors
from loraretriever.tracing import span
from loraretriever.types import (
    BASE_COMPOSITION,
    AdapterFilter,
    Completion,
    Composition,
    Generation,
    Message,
    Ranking,
    Request,
    Route,
    Sampling,
)

_MERGED_BYTES = 1 << 30  # of merged adapters on disk
_VLLM_STEP = 0.05
_ATTEMPTS = 4  # to submit a prompt whose adapters are removed meanwhile


@dataclass(frozen=True, slots=True, eq=False)
class Submission:
    """A prompt that is being answered: iterate over `answers` for the pieces of text."""

    route: Route
    composition: Composition
    answers: Answers
    retrieval_seconds: float  # to find and to compose its adapters


class LoraRetriever:
    """A pool, retrievers and an engine. Retrievers and engine are loaded when they are first needed.

    A `tenant` is a view of the pool. What a view gets is found, scored and explained from the adapters that it may
    see, and from nothing else: a tenant's name shows its own adapters and those of no tenant, the empty string only
    the latter, None all.
    """

    def __init__(
        self,
        pool: Pool,
        settings: Settings,
        load_retriever: Callable[[Reader, Settings], Retriever],
        load_engine: Callable[[Pool, Settings], Engine],
    ) -> None:
        """Use `open`, unless you bring a retriever or an engine of your own.

        Args:
            pool: the adapters.
            settings: how to work.
            load_retriever: makes a retriever for a view of the pool; see `Views`.
            load_engine: makes the engine.
        """
        self.pool = pool
        self.settings = settings
        self._views = Views(pool, lambda reader: load_retriever(reader, settings))
        self._load_engine = load_engine
        self._loading = threading.RLock()

    @classmethod
    def open(cls, pool: str | Path, **settings: Any) -> Self:
        """Open a pool: one made by `Pool.create`, or a plain folder with one PEFT folder per adapter.

        Args:
            pool: the pool's folder, or the URL of its database.
            settings: fields of `Settings`, such as `base_model`, `encoder`, `threshold` or `device`.

        Raises:
            PoolError: there is no pool at that place.
            InvalidInputError: a setting is unknown or out of range.
        """
        checked = load_settings(**settings)
        opened = Pool.open(pool, disk_bytes=checked.disk_mib << 20)
        opened.watch()
        return cls(opened, checked, _load_retriever, load_engine)

    @property
    def retriever(self) -> Retriever:
        """The retriever that sees the whole pool."""
        return self._views.of(None)

    @property
    def engine(self) -> Engine:
        """The engine with the base model."""
        with self._loading:
            return self._engine

    @cached_property
    def _engine(self) -> Engine:
        return self._load_engine(self.pool, self.settings)

    def route(
        self,
        prompts: Sequence[str],
        *,
        k: int | None = None,
        threshold: float | None = None,
        exclude: Collection[str] = (),
        only: Collection[str] | None = None,
        tags: Collection[str] = (),
        tenant: str | None = None,
    ) -> list[Route]:
        """Rank the adapters for each prompt.

        Args:
            k: how many hits each prompt gets at most.
            threshold: `fallback` is set where the fit is below it. None: the setting, or else the retriever's own.
            exclude: names never to be found; the paper's out-of-distribution test excludes the prompt's own adapter.
            only: when given, the only names that may be found.
            tags: the adapters that may be found have all of these.
            tenant: when given, only its adapters and those of no tenant may be found, and only they count.
        """
        wanted = _filter(exclude, only, tags)
        ranked = self._views.of(tenant).rank(prompts, self.settings.k if k is None else k, wanted)
        return [self._route(prompt, ranking, threshold) for prompt, ranking in zip(prompts, ranked, strict=True)]

    def explain(
        self,
        prompts: Sequence[str],
        *,
        k: int | None = None,
        exclude: Collection[str] = (),
        only: Collection[str] | None = None,
        tags: Collection[str] = (),
        tenant: str | None = None,
    ) -> list[Explanation]:
        """Why each prompt's adapters were found: nearest samples, terms that counted, parts of the score.

        Raises:
            InvalidInputError: as in `route`, or the retriever cannot explain (the paper's formula cannot).
        """
        explain = self._method("explain", "explain what it finds", tenant)
        wanted = _filter(exclude, only, tags)
        explanations: list[Explanation] = explain(prompts, self.settings.k if k is None else k, wanted)
        return explanations

    def follow(self, tenant: str | None = None) -> None:
        """Let a view's retriever read now what changed in the pool, samples embedded, so that no request waits."""
        self._views.of(tenant).rank([], 1)

    def encode(self, texts: Sequence[str], tenant: str | None = None) -> Vectors:
        """The texts' vectors, as the retriever reads prompts. Shape: (len(texts), dimension), rows of length 1.

        Raises:
            InvalidInputError: a text is empty, or the retriever has no encoder.
        """
        vectors: Vectors = self._method("encode", "encode texts", tenant)(texts)
        return vectors

    def count_tokens(self, texts: Sequence[str]) -> int:
        """How many tokens `encode` reads of the texts together: of long ones not all."""
        return int(self._method("count_tokens", "count tokens", "")(texts))

    @property
    def embedding_model(self) -> str:
        """The name of the encoder that `encode` uses; of a folder the last part."""
        name = self.settings.encoder or self.pool.encoder or DEFAULT_ENCODER
        return PurePath(name).name if PurePath(name).is_absolute() else name

    def map(self, tenant: str | None = None, prompts: Sequence[str] = ()) -> PoolMap:
        """The adapters that a view may see, some of their samples, and prompts, in two dimensions.

        Raises:
            InvalidInputError: a prompt is empty, or the retriever cannot draw maps (the paper's formula cannot).
        """
        drawn: PoolMap = self._method("map", "draw a map", tenant)(prompts)
        return drawn

    def _method(self, name: str, purpose: str, tenant: str | None) -> Callable[..., Any]:
        """What not every retriever can do."""
        method: Callable[..., Any] | None = getattr(self._views.of(tenant), name, None)
        if method is None:
            raise InvalidInputError(f"the retriever {self.settings.retriever!r} cannot {purpose}; expected the hybrid.")
        return method

    def _route(self, prompt: str, ranking: Ranking, threshold: float | None) -> Route:
        least = self.settings.threshold if threshold is None else threshold
        if least is None:
            least = ranking.threshold
        if math.isnan(least):
            raise InvalidInputError("the threshold is NaN; expected a number.")
        fallback = not ranking.hits or ranking.fit < least
        return Route(prompt, ranking.hits, fallback, ranking.fit, least)

    def compose(
        self,
        route: Route,
        *,
        strategy: str | None = None,
        weighting: str | None = None,
    ) -> Composition:
        """The composition for a routed prompt: of the hits that carry the weight; where none fits, the fallback's.

        A gate weighs the adapters itself, so that it gets all hits, with equal weights. Where vLLM has to reduce a
        mixture (`vllm_reduce`), it is what vLLM runs then.
        """
        name, weighting = strategy or self.settings.strategy, weighting or self.settings.weighting
        chosen, is_gated = get_strategy(name), is_gate(name)
        if not route.hits or (route.fallback and self.settings.fallback == "base"):
            return BASE_COMPOSITION
        if route.fallback or is_gated:
            weighting = "uniform"
        with span("compose", hits=len(route.hits)):
            is_probed = weighting not in PROBING or route.hits[0].effect is not None
            hits = route.hits if is_probed else self._probe([route])[0].hits
            weights = weigh(hits, weighting, self.settings.weighting_temperature)
            if is_gated:
                return chosen(hits, weights)
            return self._reduced(
                chosen(*round_weights(*cover(hits, weights, self.settings.coverage), self._weight_step))
            )

    def _reduced(self, composition: Composition) -> Composition:
        """What the engine runs, as answers name it. The engine is asked only where it may reduce something."""
        rank = self.engine.reduces_to if self.settings.vllm_reduce else None
        if rank is None:
            return composition
        from loraretriever.compose.folders import reduced

        return reduced(self.pool, composition, rank)

    @property
    def _weight_step(self) -> float:
        """What weights are multiples of, so that an engine that makes an adapter of a composition can use it again."""
        settings = self.settings
        if settings.weight_step is not None:
            return settings.weight_step
        return _VLLM_STEP if settings.engine == "vllm" and not settings.vllm_lanes else 0.0

    def _probe(self, routes: Sequence[Route]) -> list[Route]:
        """The routes with the effects of their hits on their prompts, for weightings that need them."""
        requests = [Request(route.prompt) for route in routes]
        effects = self.engine.effects(requests, [[hit.adapter for hit in route.hits] for route in routes])
        return [
            replace(route, hits=tuple(replace(hit, effect=each) for hit, each in zip(route.hits, found, strict=True)))
            for route, found in zip(routes, effects, strict=True)
        ]

    def stream(
        self,
        prompts: Sequence[str],
        *,
        k: int | None = None,
        strategy: str | None = None,
        weighting: str | None = None,
        threshold: float | None = None,
        exclude: Collection[str] = (),
        only: Collection[str] | None = None,
        tags: Collection[str] = (),
        tenant: str | None = None,
        adapters: Mapping[str, float] | None = None,
        sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008 - frozen
        chat: bool = True,
    ) -> Iterator[tuple[int, Completion]]:
        """Answer prompts; yield (position, completion) in the order of completion, `n` for each prompt.

        Args:
            adapters: names and weights to use for every prompt in place of retrieval; an empty mapping asks
                for the base model.
            sampling: one for all prompts, or one per prompt.
            chat: put each prompt into the model's chat template as a user's turn.
            k, threshold, exclude, only, tags, tenant: as in `route`. strategy, weighting: as in `compose`.

        Raises:
            InvalidInputError: an argument cannot be used; nothing has been generated then.
            AdapterNotFoundError: a named adapter is not in the pool.
            LoraRetrieverError: a prompt failed on its way (its adapter was removed, say); the others are aborted.
        """
        samplings = _one_per_prompt(sampling, len(prompts))
        start = time.perf_counter()
        if adapters is None:
            routes = self.route(prompts, k=k, threshold=threshold, exclude=exclude, only=only, tags=tags, tenant=tenant)
            if (weighting or self.settings.weighting) in PROBING:
                routes = self._probe(routes)
            compositions = [self.compose(route, strategy=strategy, weighting=weighting) for route in routes]
        else:
            routes = [Route(prompt, (), fallback=False) for prompt in prompts]
            compositions = [self._compose_named(adapters, strategy, tenant)] * len(prompts)
        retrieval_seconds = time.perf_counter() - start
        requests = [Request(*each, chat=chat) for each in zip(prompts, compositions, samplings, strict=True)]
        for position, generation in self.engine.run(requests):
            yield position, _completion(routes[position], compositions[position], generation, retrieval_seconds)

    def generate(self, prompts: Sequence[str], **options: Any) -> list[Completion]:
        """Answer prompts, in their order, the n answers to one side by side. The options are those of `stream`."""
        completions = sorted(self.stream(prompts, **options), key=lambda each: (each[0], each[1].index))
        return [completion for _, completion in completions]

    def prepare(
        self,
        prompt: str,
        *,
        strategy: str | None = None,
        weighting: str | None = None,
        adapters: Mapping[str, float] | None = None,
        tenant: str | None = None,
        **options: Any,
    ) -> tuple[Route, Composition]:
        """What `submit` would answer a prompt with. The arguments are those of `submit`.

        Raises:
            InvalidInputError, AdapterNotFoundError: as in `stream`.
        """
        unknown = options.keys() - _ROUTE_OPTIONS
        if unknown:
            raise TypeError(f"submit() and prepare() take no keyword argument {min(unknown)!r}")
        if adapters is not None:
            return Route(prompt, (), fallback=False), self._compose_named(adapters, strategy, tenant)
        (route,) = self.route([prompt], tenant=tenant, **options)
        return route, self.compose(route, strategy=strategy, weighting=weighting)

    def submit(
        self,
        prompt: str,
        *,
        query: str | None = None,
        messages: Sequence[Message] = (),
        tokens: Sequence[int] = (),
        adapters: Mapping[str, float] | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        chat: bool = True,
        priority: int = 0,
        timeout: float | None = None,
        namespace: str = "",
        **options: Any,
    ) -> Submission:
        """Start to answer one prompt beside all others that run; the text comes piece by piece.

        Where an adapter is removed between its retrieval and the submission, retrieval is asked again.

        Args:
            query: what adapters are retrieved for; None: the prompt.
            messages, tokens, priority, timeout, namespace: as in `Request`. The options are those of `route`, and
                `strategy` and `weighting`; the others as in `stream`.

        Raises:
            InvalidInputError, AdapterNotFoundError: as in `stream`.
            OverloadedError: too many prompts wait already; try again later.
        """
        start = time.perf_counter()
        for attempt in range(1, _ATTEMPTS + 1):
            route, composition = self.prepare(prompt if query is None else query, adapters=adapters, **options)
            seconds = time.perf_counter() - start
            request = Request(
                prompt, composition, sampling, chat, priority, timeout, tuple(messages), tuple(tokens), namespace
            )
            try:
                return Submission(route, composition, self.engine.submit(request), seconds)
            except AdapterNotFoundError:
                if adapters is not None or attempt == _ATTEMPTS:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _compose_named(self, adapters: Mapping[str, float], strategy: str | None, tenant: str | None) -> Composition:
        if not adapters:
            return BASE_COMPOSITION
        reader = self.pool.view(tenant)
        for name in adapters:
            if not reader.get(name).enabled:
                raise InvalidInputError(
                    f"adapter {name!r} is disabled; enable it with: loraretriever pool enable {name}"
                )
        return self._reduced(compose_explicit(strategy or self.settings.strategy, adapters))

    def close(self) -> None:
        """Stop the engine, if it was needed, and close the pool."""
        try:
            if "_engine" in vars(self):
                self._engine.close()
        finally:
            self.pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_ROUTE_OPTIONS = frozenset(inspect.signature(LoraRetriever.route).parameters) - {"self", "prompts"}


def _filter(exclude: Collection[str], only: Collection[str] | None, tags: Collection[str]) -> AdapterFilter:
    return AdapterFilter(frozenset(exclude), None if only is None else frozenset(only), frozenset(tags))


def _load_retriever(pool: Reader, settings: Settings) -> Retriever:
    from loraretriever.retrieve.loading import load_retriever

    return load_retriever(pool, settings)


def load_engine(pool: Pool, settings: Settings) -> Engine:
    """The engine of these settings, over a pool's adapters."""
    if settings.engine == "vllm":
        with require_extra("vllm"):
            from loraretriever.engine.vllm.loading import load_vllm_engine

            return load_vllm_engine(pool, settings)
    from loraretriever.compose.merged import MergedStore
    from loraretriever.engine.loading import load_local_engine

    return load_local_engine(pool, settings, MergedStore(cache_folder() / "merged", _MERGED_BYTES), settings.routers)


def _one_per_prompt(sampling: Sampling | Sequence[Sampling], prompts: int) -> Sequence[Sampling]:
    samplings = [sampling] * prompts if isinstance(sampling, Sampling) else sampling
    if len(samplings) != prompts:
        raise InvalidInputError(f"{len(samplings)} sampling settings for {prompts} prompts; expected one per prompt.")
    return samplings


def _completion(route: Route, composition: Composition, generation: Generation, retrieval_seconds: float) -> Completion:
    return Completion(
        prompt=route.prompt,
        text=generation.text,
        hits=route.hits,
        fallback=route.fallback,
        composition=composition,
        finish_reason=generation.finish_reason,
        prompt_tokens=generation.prompt_tokens,
        completion_tokens=generation.completion_tokens,
        retrieval_seconds=retrieval_seconds,
        generation_seconds=generation.seconds,
        fit=route.fit,
        threshold=route.threshold,
        index=generation.index,
        first_token_seconds=generation.first_token_seconds,
        cached_tokens=generation.cached_tokens,
        logprobs=generation.logprobs,
    )
