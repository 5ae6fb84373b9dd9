"""The benchmark of the server: what it costs beside the engine alone, both answering the same requests in turns.

Both are processes of their own over the same pool with the same settings. The load is a closed loop: so many requests
are in flight, and each that is answered is followed by the next. A ratio is taken within a round, as in
`engine_bench.py`.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from loraretriever.errors import LoraRetrieverError, PoolError
from loraretriever.evaluate.environment import environment
from loraretriever.evaluate.server_drivers import (
    Driver,
    Job,
    Served,
    Turn,
    check_extra,
    engine_alone,
    load_generator,
    server,
)
from loraretriever.evaluate.server_report import (
    ALONE,
    SERVER,
    OwnTime,
    ServerReport,
    SetUp,
    Sizes,
    find_agreement,
    find_figures,
    find_own_time,
    find_ratios,
)
from loraretriever.pool import Pool

ROUNDS, QUICK_ROUNDS = 5, 3
SIZES = Sizes()
QUICK_SIZES = Sizes(concurrencies=(1, 32), waves=2, least_requests=6, pairs=20)
KINDS = {"whole": False, "stream": True}  # how the server sends answers of one token
_WORDS = 60  # of a sample, at most
_FEW_WORDS = 8  # where the model's own time is only in the way
_TOKENS_TO_WARM_UP = 4
_PACKAGES = ("fastapi", "locust", "starlette", "uvicorn")


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure, and how.

    `base_model` None: the pool's. `threads` None: torch's choice; it is that of the server and of the engine alone,
    and fewer than there are processors leave room for the load generator. `settings`: further fields of `Settings`.
    """

    pool: str | Path
    base_model: str | None = None
    dtype: str = "float32"
    rounds: int = ROUNDS
    threads: int | None = None
    seed: int = 0
    quick: bool = False
    sizes: Sizes = SIZES
    settings: Mapping[str, str | int] | None = None


def count_steps(options: Options) -> int:
    """How often `bench_server` advances."""
    return 2 + options.rounds * len(options.sizes.concurrencies) + options.sizes.pairs * len(KINDS)


def bench_server(options: Options, advance: Callable[[], None] = lambda: None) -> ServerReport:
    """Start both, warm them up, and let them take turns. Advances `count_steps` times.

    Raises:
        PoolError: the pool cannot be opened, or has no adapter.
        MissingExtraError: what sends the load is not installed.
        LoraRetrieverError: a request failed, or a process ended.
    """
    check_extra()
    start, load = time.perf_counter(), os.getloadavg()[0]
    sizes = options.sizes
    prompts = Prompts(options.pool, options.seed)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="loraretriever-bench-")))
        drivers = _start(options, folder, stack, advance)
        for concurrency in sizes.concurrencies:
            jobs = prompts.jobs(sizes.requests(concurrency), _TOKENS_TO_WARM_UP)
            _take_turns(drivers, jobs, concurrency)
        turns: dict[tuple[str, int], list[Turn]] = {
            (name, concurrency): [] for name in drivers for concurrency in sizes.concurrencies
        }
        for _ in range(options.rounds):
            for concurrency in sizes.concurrencies:
                jobs = prompts.jobs(sizes.requests(concurrency), sizes.max_tokens)
                for name, turn in _take_turns(drivers, jobs, concurrency).items():
                    turns[name, concurrency].append(turn)
                advance()
        own = _measure_own_time(drivers, prompts, sizes.pairs, advance)
    here = environment()
    set_up = SetUp(
        environment=replace(
            here,
            versions=here.versions | {name: version(name) for name in _PACKAGES},
            threads=options.threads or here.threads,
        ),
        base_model=options.base_model or prompts.base_model,
        dtype=options.dtype,
        pool=str(options.pool),
        adapters=prompts.adapters,
        seed=options.seed,
        rounds=options.rounds,
        quick=options.quick,
        sizes=sizes,
        load_average_before=load,
        load_average_after=os.getloadavg()[0],
        seconds=round(time.perf_counter() - start, 1),
    )
    return ServerReport(set_up, find_ratios(turns), own, find_figures(turns), find_agreement(turns))


class Prompts:
    """Prompts as the pool's adapters are meant for: their samples, each with a number before it.

    No two are the same, and none begins as another does: neither encoder nor engine knows one from before.
    """

    def __init__(self, pool: str | Path, seed: int) -> None:
        """Read the samples.

        Raises:
            PoolError: the pool cannot be opened, or has no adapter.
        """
        with Pool.open(pool) as opened:
            adapters = opened.list(enabled_only=True)
            self._samples = [sample.text for adapter in adapters for sample in opened.samples(adapter.name)]
            self.base_model = opened.base_model
        if not adapters:
            raise PoolError(f"the pool {pool} has no enabled adapter; add one with: loraretriever pool add")
        self.adapters = len(adapters)
        self._rng = np.random.default_rng(seed)
        self._numbers: set[int] = set()

    def jobs(self, count: int, max_tokens: int, stream: bool = True, words: int = _WORDS) -> list[Job]:
        """New ones, each with so many words of a sample at most."""
        texts = (self._samples[i] for i in self._rng.integers(len(self._samples), size=count))
        return [Job(f"{self._number()}. {' '.join(text.split()[:words])}", max_tokens, stream) for text in texts]

    def _number(self) -> int:
        number = int(self._rng.integers(10_000, 10_000_000))
        if number in self._numbers:
            return self._number()
        self._numbers.add(number)
        return number


def _start(options: Options, folder: Path, stack: ExitStack, advance: Callable[[], None]) -> dict[str, Driver]:
    """The engine alone, and the load generator before a server; both with the same settings."""
    threads = {} if options.threads is None else {"OMP_NUM_THREADS": str(options.threads)}
    settings: dict[str, str | int] = {"dtype": options.dtype, **(options.settings or {})}
    if options.base_model is not None:
        settings["base_model"] = options.base_model
    alone = stack.enter_context(engine_alone(str(options.pool), settings, folder, threads))
    advance()
    variables = {f"LORARETRIEVER_{name.upper()}": str(value) for name, value in settings.items()}
    arguments = ["--pool", str(options.pool), "--log-level", "warning"]
    process, url = stack.enter_context(server(arguments, folder, {**threads, **variables}))
    load = stack.enter_context(load_generator(url, folder))
    load.watched.append(process)
    advance()
    return {ALONE: alone, SERVER: load}


def _take_turns(drivers: Mapping[str, Driver], jobs: Sequence[Job], concurrency: int) -> dict[str, Turn]:
    turns = {name: driver.run(jobs, concurrency) for name, driver in drivers.items()}
    for job, *served in zip(jobs, *(turn.served for turn in turns.values()), strict=True):
        if len({each.prompt_tokens for each in served}) > 1:
            raise LoraRetrieverError(
                f"the prompt {job.prompt!r:.80} has {' and '.join(str(each.prompt_tokens) for each in served)} tokens; "
                "expected the same number with the server and without it. This is a bug."
            )
    return turns


def _measure_own_time(
    drivers: Mapping[str, Driver], prompts: Prompts, pairs: int, advance: Callable[[], None]
) -> dict[str, OwnTime]:
    """Requests of one token, one at a time: by the one, by the other; then the other way round."""
    served: dict[str, dict[str, list[Served]]] = {kind: {name: [] for name in drivers} for kind in KINDS}
    orders = itertools.cycle((dict(drivers), dict(reversed(list(drivers.items())))))
    for order, _ in zip(orders, range(pairs), strict=False):
        for kind, stream in KINDS.items():
            for name, turn in _take_turns(order, prompts.jobs(1, 1, stream, _FEW_WORDS), 1).items():
                served[kind][name] += turn.served
            advance()
    return {kind: find_own_time(own[SERVER], own[ALONE]) for kind, own in served.items()}
