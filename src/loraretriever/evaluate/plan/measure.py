"""What the local engine's steps take on this machine: batches of known work are timed, and the costs fitted to them.

How many steps a batch takes and what each of them does, the simulation knows: it plans as the engine does.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from scipy.optimize import nnls

from loraretriever.engine.local import LocalEngine
from loraretriever.engine.runner import check_model
from loraretriever.errors import InvalidInputError
from loraretriever.evaluate.engine_adapters import make_pool
from loraretriever.evaluate.engine_contenders import request_of
from loraretriever.evaluate.engine_workloads import Job, make_prompt
from loraretriever.evaluate.environment import Environment, environment
from loraretriever.evaluate.plan.costs import Footprint, Machine, StepCosts
from loraretriever.evaluate.plan.fleet import Deployment, simulate
from loraretriever.evaluate.plan.replica import ReplicaSizes
from loraretriever.evaluate.plan.workload import Call
from loraretriever.models import BaseModel, load_base_model
from loraretriever.pool import Pool

ADAPTERS = 24
_MIB = 1 << 20
_LOAD_SLOTS = 2
_WARM_PROMPT = 4  # tokens
_LEAST_STEP = 1e-9  # seconds: a step takes some time, whatever noise there was
_FITTED = (
    "step", "tokens_2", "tokens_4", "tokens_8", "tokens_16",
    "row", "prompt", "chunk", "side", "pair", "adapted", "adapter", "use",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """A batch of requests, all there at the start, each with k adapters; `adapters` different ones in all.

    They are equal and run at once; or `running` of them at a time, of different lengths up to those given, so that
    prompts come in while others decode.
    """

    rows: int
    prompt: int
    answer: int
    k: int = 0
    adapters: int = 0
    running: int | None = None

    def calls(self) -> list[Call]:
        """Its requests; the adapters are taken in turn."""
        return [
            Call(
                0.0,
                tuple((self.k * row + i) % self.adapters for i in range(self.k)),
                self._length(self.prompt, 3 * row),
                self._length(self.answer, 5 * row),
            )
            for row in range(self.rows)
        ]

    def _length(self, most: int, place: int) -> int:
        """All eighths of the length in turn."""
        return most if self.running is None else max(1, most * (1 + place % 8) // 8)


CASES = (
    Case(1, 16, 32),
    Case(2, 16, 32),
    Case(3, 16, 32),
    Case(4, 16, 32),
    Case(6, 16, 32),
    Case(10, 16, 32),
    Case(16, 16, 32),
    Case(32, 16, 32),
    Case(1, 256, 2),
    Case(8, 128, 2),
    Case(4, 448, 2),
    Case(8, 448, 24),
    Case(1, 16, 32, 1, 1),
    Case(1, 16, 32, 3, 3),
    Case(2, 16, 32, 3, 6),
    Case(3, 16, 32, 3, 9),
    Case(8, 16, 32, 1, 8),
    Case(32, 16, 24, 1, 24),
    Case(8, 16, 32, 3, 24),
    Case(32, 16, 24, 3, 8),
    Case(32, 16, 24, 3, 24),
    Case(8, 128, 4, 1, 8),
    Case(8, 128, 4, 3, 24),
    Case(8, 128, 32, running=2),
    Case(8, 128, 32, 1, 8, running=2),
    Case(8, 128, 32, 3, 24, running=2),
    Case(9, 128, 32, 3, 24, running=3),
    Case(12, 128, 32, running=4),
    Case(12, 128, 32, 1, 12, running=4),
    Case(12, 128, 32, 3, 12, running=4),
    Case(24, 128, 32, 1, 24, running=8),
    Case(10, 128, 48, running=10),
    Case(16, 128, 48, 1, 16, running=16),
    Case(6, 128, 48, 3, 18, running=6),
)


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure with; `base_model` None: the pool's; `threads` None: torch's choice."""

    pool: str | Path
    base_model: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    rounds: int = 5
    threads: int | None = None
    seed: int = 0
    cases: tuple[Case, ...] = CASES


@dataclass(frozen=True, slots=True)
class Fit:
    """How far the fitted costs are from each case's median time: relative, measured against computed."""

    seconds: tuple[float, ...]
    relative_errors: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class MeasuredMachine:
    """What `plan --measure` writes; see `costs.read_machine`."""

    costs: StepCosts
    footprint: Footprint
    fit: Fit
    environment: Environment
    base_model: str
    dtype: str
    rounds: int

    @property
    def machine(self) -> Machine:
        """What a simulation needs of it."""
        return Machine(self.costs, self.footprint)


def count_steps(options: Options) -> int:
    """How often `measure` advances."""
    return (options.rounds + 1) * len(options.cases) + 1


def measure(options: Options, advance: Callable[[], None] = lambda: None) -> MeasuredMachine:
    """Time all cases in turn, as often as there are rounds, and loads; fit the costs. Advances `count_steps` times.

    Raises:
        InvalidInputError: the base model is too small for the cases.
        PoolError: the pool cannot be opened, or has no adapter.
        ModelLoadError: the base model cannot be loaded.
    """
    with opened(options, ADAPTERS) as bench:
        seconds = _time_rounds(bench, options, advance)
        write, load, adapter = time_loads(bench, options)
        advance()
    costs, errors = fit_costs(options.cases, seconds)
    return MeasuredMachine(
        costs=replace(costs, write=write, load=load),
        footprint=Footprint(bench.weights, adapter, bench.token),
        fit=Fit(tuple(seconds), errors),
        environment=environment(),
        base_model=bench.base.name,
        dtype=options.dtype,
        rounds=options.rounds,
    )


@dataclass(frozen=True, slots=True)
class Bench:
    """A base model, and a pool of as many adapters as are wanted, named by number."""

    base: BaseModel
    pool: Pool
    names: tuple[str, ...]

    @property
    def weights(self) -> int:
        """Bytes of the base model's weights."""
        return sum(parameter.nbytes for parameter in self.base.model.parameters())

    @property
    def token(self) -> int:
        """Bytes of the keys and values of one token."""
        shapes = check_model(self.base.model)
        size: int = self.base.model.dtype.itemsize
        return size * sum(shape.heads * (shape.key + shape.value) for shape in shapes)

    def engine(self, sizes: ReplicaSizes, host_bytes: int) -> LocalEngine:
        """A new engine; there may be one at a time. It reuses no prompt's beginning."""
        return LocalEngine(
            self.base,
            self.pool,
            slots=sizes.slots,
            batch_size=sizes.batch_size,
            step_tokens=sizes.step_tokens,
            cache_mib=-(-sizes.cache_tokens * self.token // _MIB),
            prefix_mib=0,
            host_mib=host_bytes // _MIB,
            queue=sizes.queue,
        )

    def answer(self, engine: LocalEngine, calls: Sequence[Call], seed: Sequence[int]) -> float:
        """Seconds until all requests, which are there at once, have been answered."""
        requests = [request_of(job) for job in self.jobs(calls, seed)]
        return max(generation.seconds for _, generation in engine.run(requests))

    def jobs(self, calls: Sequence[Call], seed: Sequence[int]) -> list[Job]:
        """The requests with prompts of random words."""
        rng = np.random.default_rng(seed)
        return [
            Job(
                make_prompt(self.base.tokenizer, call.prompt, rng),
                call.answer,
                call.arrival,
                tuple(self.names[adapter] for adapter in call.adapters),
            )
            for call in calls
        ]


@contextmanager
def opened(options: Options, adapters: int) -> Iterator[Bench]:
    """A bench with copies of the pool's adapters, and with varied ones where it has fewer than are wanted."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="loraretriever-plan-")))
        names = tuple(f"a{number}" for number in range(adapters))
        with Pool.open(options.pool) as source:
            make_pool(folder / "pool", source.list(enabled_only=True), names, options.seed)
            base = load_base_model(options.base_model or source.base_model, options.dtype, options.device)
        longest = max((case.prompt + case.answer for case in options.cases), default=0)
        available = int(base.model.config.get_text_config().max_position_embeddings)
        if available < longest:
            raise InvalidInputError(
                f"the base model takes {available} tokens; expected {longest} at least. Name another base model."
            )
        yield Bench(base, stack.enter_context(Pool.open(folder / "pool")), names)


def time_cases(bench: Bench, cases: Sequence[Case], seed: Sequence[int]) -> Iterator[float]:
    """The seconds of each case, its adapters loaded. Cases that run alike stand side by side, for one engine."""
    for running, alike in itertools.groupby(enumerate(cases), key=lambda item: item[1].running):
        with closing(bench.engine(sizes_for(cases, running), 1024 * _MIB)) as engine:
            adapters = [Call(0.0, (adapter,), _WARM_PROMPT, 1) for adapter in range(ADAPTERS)]
            bench.answer(engine, adapters, seed)
            for place, case in alike:
                yield bench.answer(engine, case.calls(), (*seed, place))


def _time_rounds(bench: Bench, options: Options, advance: Callable[[], None]) -> list[float]:
    """The median seconds of each case, after a round that warms up."""
    rounds = []
    for round_ in range(options.rounds + 1):
        seconds = []
        for taken in time_cases(bench, options.cases, (options.seed, round_)):
            seconds.append(taken)
            advance()
        rounds.append(seconds)
    return [statistics.median(times) for times in zip(*rounds[1:], strict=True)]


def time_loads(bench: Bench, options: Options) -> tuple[float, float, int]:
    """Seconds to copy an adapter into a slot, and to load it from disk before that; its bytes in host memory.

    From requests of one token, one at a time: the same adapter again and again, others that are in host memory, and
    others that are not.
    """
    sizes = replace(sizes_for(options.cases), slots=_LOAD_SLOTS)
    same = [0] * len(bench.names)
    others = list(range(len(bench.names)))
    with closing(bench.engine(sizes, 1024 * _MIB)) as engine:
        _times_alone(bench, engine, others, options.seed)
        resident = _times_alone(bench, engine, same, options.seed)
        held = _times_alone(bench, engine, others, options.seed)
        size = engine.stats().host_bytes // len(others)
    with closing(bench.engine(sizes, 0)) as engine:
        _times_alone(bench, engine, others, options.seed)
        cold = _times_alone(bench, engine, others, options.seed)
    write = max(0.0, statistics.median(held) - statistics.median(resident))
    return write, max(0.0, statistics.median(cold) - statistics.median(held)), size


def _times_alone(bench: Bench, engine: LocalEngine, adapters: Sequence[int], seed: int) -> list[float]:
    return [bench.answer(engine, [Call(0.0, (adapter,), 16, 1)], (seed, adapter)) for adapter in adapters]


def sizes_for(cases: Sequence[Case], running: int | None = None) -> ReplicaSizes:
    """Those of an engine in which no adapter and no memory is waited for; `running`: sequences at once; None: all."""
    rows = max(case.rows for case in cases)
    longest = max(case.prompt + case.answer for case in cases)
    return ReplicaSizes(slots=ADAPTERS, host=ADAPTERS, batch_size=running or rows, cache_tokens=2 * rows * longest)


def fit_costs(cases: Sequence[Case], seconds: Sequence[float]) -> tuple[StepCosts, tuple[float, ...]]:
    """The costs of steps that come closest to the times of the cases, and the relative errors that are left.

    Semantics: minimises Σ_i (Σ_j cost_j count_ij / seconds_i - 1)² over costs of 0 or more.
    """
    counts = np.array([_counts(case, sizes_for(cases, case.running)) for case in cases])
    relative = counts / np.array(seconds)[:, None]
    scale = relative.max(axis=0)
    scale[scale == 0] = 1.0
    found, _ = nnls(relative / scale, np.ones(len(cases)))
    costs = found / scale
    costs[0] = max(costs[0], _LEAST_STEP)
    errors = tuple(round(float(error), 4) for error in relative @ costs - 1)
    return StepCosts(**{name: float(cost) for name, cost in zip(_FITTED, costs, strict=True)}), errors


def _counts(case: Case, sizes: ReplicaSizes) -> list[float]:
    """What the case's steps do, summed up, in the order of `_FITTED`.

    By simulations in which steps take a second each, or a second and one more for each of what is counted.
    """
    calls, nothing = case.calls(), StepCosts(step=1.0, row=0.0, prompt=0.0)
    priced = [nothing, *(replace(nothing, **{name: 1.0}) for name in _FITTED[1:])]
    steps, *others = (simulate(Deployment(sizes=sizes), costs, calls).totals.busy for costs in priced)
    return [steps, *(busy - steps for busy in others)]
