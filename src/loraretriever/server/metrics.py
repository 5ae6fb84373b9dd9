"""What the server counts. `docs/metrics.md` explains each metric; names follow those of vLLM."""

from __future__ import annotations

import bisect
import logging
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

import loraretriever
from loraretriever.server.series import Family, Figures, Kind, Series, to_metrics
from loraretriever.server.shared_figures import SharedFigures
from loraretriever.types import Adapter, EngineStats, Generation, Route

_log = logging.getLogger(__name__)
PREFIX = "loraretriever:"
MOST_ADAPTERS = 2000  # with series of their own; what comes later is counted together
OTHER_ADAPTERS = "(other)"  # no adapter can have this name
OTHER_METHODS = "other"
_SLOW_SECONDS = 0.05  # a pool that takes longer to read is read
_RARELY = 20.0  # after so many times as long at the earliest
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
JobState = Literal["queued", "running", "succeeded", "failed"]
Reason = Literal["rate_limit", "overloaded", "too_large", "loading", "stopping"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_SHORT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_BATCHES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)


def _counter(name: str, explanation: str, *labels: str) -> Family:
    return Family(Kind.COUNTER, PREFIX + name, explanation, labels)


def _gauge(name: str, explanation: str, *labels: str, largest: bool = False) -> Family:
    return Family(Kind.GAUGE, PREFIX + name, explanation, labels, largest=largest)


def _histogram(name: str, explanation: str, bounds: tuple[float, ...], *labels: str) -> Family:
    return Family(Kind.HISTOGRAM, PREFIX + name, explanation, labels, bounds)


REQUESTS = _counter("http_requests_total", "HTTP requests that have been answered.", "endpoint", "method", "status")
REQUEST_SECONDS = _histogram(
    "http_request_duration_seconds", "From a request's headers to the end of its answer.", _SECONDS, "endpoint"
)
REQUESTS_OPEN = _gauge("http_requests_open", "HTTP requests that are being answered.")
REJECTED = _counter("requests_rejected_total", "Requests that were turned away.", "reason")

ROUTED = _counter("routed_prompts_total", "Prompts for which adapters were looked for.")
FALLBACKS = _counter("fallbacks_total", "Routed prompts that no adapter fits, so that the base model answers.")
RETRIEVAL_SECONDS = _histogram("retrieval_seconds", "From a prompt to its hits.", _SHORT_SECONDS)
ADAPTER_USED = _counter("adapter_used_total", "Prompts whose composition has the adapter.", "adapter", "tenant")

SUCCESSES = _counter("request_success_total", "Answers, by what ended them.", "finished_reason")
QUEUE_SECONDS = _histogram("request_queue_time_seconds", "From submission to the first step.", _SECONDS)
FIRST_TOKEN_SECONDS = _histogram("time_to_first_token_seconds", "From a prompt to its answer's first token.", _SECONDS)
TOKEN_SECONDS = _histogram(
    "request_time_per_output_token_seconds", "Mean time per token after the first one, per answer.", _SHORT_SECONDS
)
ANSWER_SECONDS = _histogram("e2e_request_latency_seconds", "From a prompt to its answer's last token.", _SECONDS)
ANSWER_TOKENS = _histogram(
    "request_generation_tokens",
    "Generated tokens per answer.",
    (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000),
)

RUNNING = _gauge("num_requests_running", "Sequences in the engine's steps.")
WAITING = _gauge("num_requests_waiting", "Sequences in the engine's queue.")
STEPS = _counter("engine_steps_total", "Forward passes of the base model.")
BATCH_SIZE = _histogram("engine_step_sequences", "Sequences per step.", _BATCHES)
PROMPT_TOKENS = _counter("prompt_tokens_total", "Tokens of prompts, with those from the cache.")
CACHED_TOKENS = _counter("prompt_tokens_cached_total", "Tokens of prompts that did not have to be computed.")
GENERATED_TOKENS = _counter("generation_tokens_total", "Generated tokens.")
PREEMPTIONS = _counter("num_preemptions_total", "Sequences that gave their memory up and were computed again.")
CACHE = _gauge("kv_cache_tokens", "Tokens that the memory of keys and values has room for.")
CACHE_USED = _gauge("kv_cache_tokens_used", "Tokens whose room in it is taken.")
SLOTS = _gauge("adapter_slots", "Places for adapters in the batch.")
SLOTS_USED = _gauge("adapter_slots_used", "Places that hold an adapter.")
ADAPTER_HITS = _counter("adapter_hits_total", "Adapters of sequences that began to run, found in their slots.")
SLOT_LOADS = _counter("adapter_slot_loads_total", "Those that had to be copied into a slot from host memory.")
ADAPTER_LOADS = _counter("adapter_loads_total", "Adapters read from disk, or merged, into host memory.")
ADAPTER_EVICTIONS = _counter("adapter_evictions_total", "Adapters that left host memory for others.")
HOST_BYTES = _gauge("adapter_host_bytes", "Host memory that adapters take.")

JOBS = _counter("jobs_total", "Jobs that came into a state.", "kind", "state")
ADAPTERS = _gauge("pool_adapters", "Adapters in the pool.", "enabled", largest=True)
BUILD = _gauge("build_info", "1; what runs is in the labels.", "version", "python", "base_model", largest=True)

FAMILIES = tuple(each for each in list(globals().values()) if isinstance(each, Family))
_ENGINE_COUNTERS = {
    "steps": STEPS,
    "prompt_tokens": PROMPT_TOKENS,
    "cached_tokens": CACHED_TOKENS,
    "generated_tokens": GENERATED_TOKENS,
    "preemptions": PREEMPTIONS,
    "adapter_hits": ADAPTER_HITS,
    "slot_loads": SLOT_LOADS,
    "adapter_loads": ADAPTER_LOADS,
    "adapter_evictions": ADAPTER_EVICTIONS,
}
_ENGINE_GAUGES = {
    "running": RUNNING,
    "waiting": WAITING,
    "cache_tokens": CACHE,
    "cache_tokens_used": CACHE_USED,
    "slots": SLOTS,
    "slots_used": SLOTS_USED,
    "host_bytes": HOST_BYTES,
}


class WatchedPool(Protocol):
    """What is read of a pool."""

    @property
    def change(self) -> int:
        """A number that each change raises."""
        ...

    def list(self) -> Sequence[Adapter]:
        """All adapters."""
        ...


class Metrics:
    """The figures of one server process. Any thread may call any method.

    With `multiprocess_dir`, an empty folder that the worker processes of one server share and that lives as long as
    the server, each process writes its figures there every second, and any of them shows the sum of all. Nothing
    depends on the environment, and several servers may live in one process.
    """

    def __init__(self, multiprocess_dir: Path | None = None) -> None:
        """`follow` says what is watched beside requests, `start` begins to write for the other processes."""
        self._series = Series(FAMILIES)
        self._shared = None if multiprocess_dir is None else SharedFigures(multiprocess_dir, self.own_figures)
        self._engine: Callable[[], EngineStats | None] = lambda: None
        self._pool: WatchedPool | None = None
        self._syncing = threading.Lock()  # guards what follows
        self._before: EngineStats | None = None
        self._change = -1
        self._next_look = 0.0
        self._tenants: Mapping[str, str | None] | None = None  # of the pool's adapters, by pool name
        self._used_lock = threading.Lock()
        self._used: dict[str, int] = {}  # prompts by pool name
        self.registry = CollectorRegistry()
        self.registry.register(_Collector(self))
        if multiprocess_dir is None:  # of one process among many these would mislead
            for collector in (ProcessCollector, PlatformCollector, GCCollector):
                collector(registry=self.registry)

    def follow(
        self, engine: Callable[[], EngineStats | None], pool: WatchedPool | None = None, base_model: str = ""
    ) -> None:
        """Show the figures of this engine and this pool, too. `engine` gives None as long as there is none."""
        with self._syncing:
            self._engine, self._pool = engine, pool
        self._series.replace(BUILD, {(loraretriever.__version__, platform.python_version(), base_model): 1.0})

    def start(self) -> None:
        """Begin to write for the other processes, if there are any."""
        if self._shared is not None:
            self._shared.start()

    def close(self) -> None:
        """Write for the last time; this process's gauges count no more."""
        if self._shared is not None:
            self._shared.close()

    def request_started(self) -> None:
        """A request has come in."""
        self._series.add(REQUESTS_OPEN)

    def request_done(self, endpoint: str, method: str, status: int, seconds: float) -> None:
        """A request's answer is complete. `endpoint` is the route's template, never a path that a client made up."""
        self._series.add(REQUESTS_OPEN, -1)
        self._series.add(REQUESTS, 1, (endpoint, method if method in METHODS else OTHER_METHODS, str(status)))
        self._series.observe(REQUEST_SECONDS, seconds, (endpoint,))

    def rejected(self, reason: Reason) -> None:
        """A request was turned away."""
        self._series.add(REJECTED, 1, (reason,))

    def routed(self, route: Route, seconds: float) -> None:
        """The retriever has answered for one prompt, after that many seconds."""
        self._series.add(ROUTED)
        self._series.add(FALLBACKS, float(route.fallback))
        self._series.observe(RETRIEVAL_SECONDS, seconds)

    def adapter_used(self, name: str) -> None:
        """A prompt is answered by a composition with this adapter; `name` is its name in the pool."""
        with self._used_lock:
            known = name in self._used or len(self._used) < MOST_ADAPTERS
            label = name if known else OTHER_ADAPTERS
            self._used[label] = self._used.get(label, 0) + 1

    def answered(self, generation: Generation, retrieval_seconds: float = 0.0) -> None:
        """An answer is complete; `retrieval_seconds` passed before the submission of its prompt."""
        add, observe = self._series.add, self._series.observe
        add(SUCCESSES, 1, (generation.finish_reason,))
        observe(ANSWER_SECONDS, retrieval_seconds + generation.seconds)
        observe(ANSWER_TOKENS, generation.completion_tokens)
        if generation.queue_seconds is not None:
            observe(QUEUE_SECONDS, generation.queue_seconds)
        if generation.first_token_seconds is not None:
            observe(FIRST_TOKEN_SECONDS, retrieval_seconds + generation.first_token_seconds)
            if generation.completion_tokens > 1:
                after = generation.seconds - generation.first_token_seconds
                observe(TOKEN_SECONDS, after / (generation.completion_tokens - 1))

    def job(self, kind: str, state: JobState) -> None:
        """A job has come into a state."""
        self._series.add(JOBS, 1, (kind, state))

    def own_figures(self) -> Figures:
        """The figures of this process, after a look at the engine and the pool; may wait for the pool's database."""
        with self._syncing:
            self._follow_engine()
            try:
                self._follow_pool()
            except Exception:
                _log.warning("the pool cannot be read; the metrics show what it held before", exc_info=True)
            self._show_used()
            return self._series.figures()

    def figures(self) -> Figures:
        """The figures of all processes; may wait for files and the pool's database."""
        own = self.own_figures()
        return own if self._shared is None else self._shared.merge(own, FAMILIES)

    def text(self, accept: str) -> tuple[bytes, str]:
        """What Prometheus reads, and its content type: the format that the header `Accept` asks for."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def _follow_engine(self) -> None:
        now = self._engine()
        if now is None:
            return
        before = self._before
        if before is None or now.steps < before.steps:  # another engine, which began at zero
            before = replace(now, step_sequences=0, batch_sizes=(), **dict.fromkeys(_ENGINE_COUNTERS, 0))
        for name, family in _ENGINE_COUNTERS.items():
            self._series.add(family, getattr(now, name) - getattr(before, name))
        for name, family in _ENGINE_GAUGES.items():
            self._series.set(family, getattr(now, name))
        earlier = dict(before.batch_sizes)
        counts = [0.0] * (len(BATCH_SIZE.bounds) + 1)
        for bound, steps in now.batch_sizes:
            counts[bisect.bisect_left(BATCH_SIZE.bounds, bound)] += steps - earlier.get(bound, 0)
        counts[-1] += now.steps - before.steps - sum(counts)  # larger than all of the engine's bounds
        self._series.add_buckets(BATCH_SIZE, counts, now.step_sequences - before.step_sequences)
        self._before = now

    def _follow_pool(self) -> None:
        if self._pool is None:
            return
        change = self._pool.change
        if change == self._change or time.monotonic() < self._next_look:
            return
        start = time.thread_time()
        with self._used_lock:
            used = set(self._used)
        adapters = self._pool.list()
        self._tenants = {each.name: each.tenant for each in adapters}
        self._change = change
        took = time.thread_time() - start
        if took > _SLOW_SECONDS:  # a large pool that changes all the time must not keep us busy with reading it
            self._next_look = time.monotonic() + _RARELY * took
        with self._used_lock:
            for name in used - self._tenants.keys() - {OTHER_ADAPTERS}:
                del self._used[name]
        enabled = sum(each.enabled for each in adapters)
        self._series.replace(ADAPTERS, {("true",): enabled, ("false",): len(adapters) - enabled})

    def _show_used(self) -> None:
        """Let each adapter that is used and in the pool have its series."""
        with self._used_lock:
            used = dict(self._used)
        shown = used.keys() if self._tenants is None else used.keys() & {*self._tenants, OTHER_ADAPTERS}
        tenants = self._tenants or {}
        self._series.replace(ADAPTER_USED, {(name, tenants.get(name) or ""): used[name] for name in shown})


class _Collector(Collector):
    """Hands the figures to prometheus_client's registry."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return to_metrics(self._metrics.figures(), FAMILIES)
