"""The benchmark of engines: contenders take turns at the same workloads, and the ratios are those of the same round.

A machine has its ups and downs; two contenders that run one right after the other share them. So a ratio is taken
within each round, and the report gives the median and the spread over the rounds.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from loraretriever.errors import InvalidInputError
from loraretriever.evaluate.engine_contenders import Contender
from loraretriever.evaluate.engine_makers import CONTENDERS, Maker, Workshop, adapter_names
from loraretriever.evaluate.engine_report import (
    EngineReport,
    Run,
    Runs,
    SetUp,
    find_agreement,
    find_figures,
    find_ratios,
)
from loraretriever.evaluate.engine_vllm import find_python
from loraretriever.evaluate.engine_workloads import (
    REALISTIC,
    UNIFORM,
    Job,
    Sizes,
    Workloads,
)
from loraretriever.evaluate.environment import environment
from loraretriever.models import load_base_model
from loraretriever.pool import Pool

Turn = tuple[str, str]  # contender, workload

WORKLOADS = (UNIFORM, REALISTIC)
ROUNDS, QUICK_ROUNDS = 5, 3
SIZES, QUICK_SIZES = Sizes(), Sizes(uniform_prompt=16, requests=8, output=(8, 64))
# The realistic workload's requests arrive somewhat faster than our base model answers them when all are there at
# once. Slower, and each contender's throughput would be the rate of arrival; much faster, and nothing would ever
# arrive while a batch runs. So the queue grows, slowly, and first tokens wait for their turn in it.
_OVERLOAD = 1.25


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure, and how.

    `base_model` None: the pool's. `only`: contenders' names, none of them for all; `vllm`: the interpreter of an
    environment that has it. `quick` leaves the realistic workload to some contenders. `threads` None: torch's choice.
    """

    pool: str | Path
    base_model: str | None = None
    dtype: str = "float32"
    rounds: int = ROUNDS
    threads: int | None = None
    seed: int = 0
    quick: bool = False
    sizes: Sizes = SIZES
    only: tuple[str, ...] = ()
    workloads: tuple[str, ...] = WORKLOADS
    vllm: str | None = None


def choose(options: Options) -> tuple[dict[str, Maker], dict[str, str]]:
    """The contenders that take part, and why others cannot, by name.

    Raises:
        InvalidInputError: an unknown contender or workload, one that was asked for and cannot take part, or no
            interpreter of vLLM's.
    """
    for kind, names, known in (("contender", options.only, CONTENDERS), ("workload", options.workloads, WORKLOADS)):
        for name in names:
            if name not in known:
                raise InvalidInputError(f"unknown {kind} {name!r}; expected one of {', '.join(known)}.")
    lacking = {}
    if importlib.util.find_spec("peft") is None:
        lacking["peft_k1"] = "PEFT is not installed; install it with: pip install 'loraretriever[train]'"
    if options.vllm is None:
        lacking["vllm_k1"] = "no environment with vLLM is given; name its interpreter with --vllm"
    else:
        find_python(options.vllm)  # now, not after minutes of measuring
    for name in options.only:
        if name in lacking:
            raise InvalidInputError(f"the contender {name!r} was asked for, but {lacking[name]}.")
    planned = {
        name: maker.planned(options.workloads, options.quick)
        for name, maker in CONTENDERS.items()
        if name in (options.only or CONTENDERS) and name not in lacking
    }
    makers = {name: maker for name, maker in planned.items() if maker.workloads}
    if not makers:
        raise InvalidInputError(
            f"none of the contenders {', '.join(planned)} gets the workload {', '.join(options.workloads)} here; "
            "expected some that do. Leave --quick or --workload out."
        )
    return makers, {} if options.only else lacking


def count_steps(options: Options) -> int:
    """How often `bench_engine` advances."""
    makers, _ = choose(options)
    return len(makers) + options.rounds * len(_turns(makers, options.workloads))


def bench_engine(options: Options, advance: Callable[[], None] = lambda: None) -> EngineReport:
    """Make all contenders, warm them up, and let them take turns. Advances `count_steps` times.

    Raises:
        InvalidInputError: an option cannot be used, or the base model is too small for the workloads.
        PoolError: the pool cannot be opened, or has no adapter.
        ModelLoadError: the base model, or vLLM, cannot be loaded.
    """
    start, load = time.perf_counter(), os.getloadavg()[0]
    makers, left_out = choose(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with Pool.open(options.pool) as pool:
        adapters = pool.list(enabled_only=True)
        base = load_base_model(options.base_model or pool.base_model, options.dtype)
    sizes = options.sizes.fitted(int(base.model.config.get_text_config().max_position_embeddings))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="loraretriever-bench-")))
        shop = Workshop(folder, base, options.dtype, adapters, sizes, options.seed, options.vllm)
        workloads = Workloads(base.tokenizer, sizes, options.seed)
        contenders = {}
        for name, maker in makers.items():
            contenders[name] = stack.enter_context(closing(maker.build(shop, maker)))
            contenders[name].run(_jobs(_warm_up(workloads), UNIFORM, 0, maker))
            advance()
        turns = _turns(makers, options.workloads)
        rate_of = next((name for name, workload in turns if workload == REALISTIC), None)
        if rate_of is not None:
            rate = _OVERLOAD * _capacity(contenders[rate_of], _jobs(workloads, REALISTIC, 0, makers[rate_of]))
            workloads = replace(workloads, rate=rate)
        runs = take_turns(
            contenders, turns, options.rounds, lambda n, on, i: _jobs(workloads, on, i, makers[n]), advance
        )
    here = environment()
    set_up = SetUp(
        environment=replace(here, versions=here.versions | shop.versions),
        base_model=base.name,
        dtype=options.dtype,
        pool=str(options.pool),
        adapters=len(adapters),
        seed=options.seed,
        rounds=options.rounds,
        quick=options.quick,
        sizes=sizes,
        rate=None if rate_of is None else round(workloads.rate, 4),
        rate_of=rate_of,
        overload=_OVERLOAD,
        left_out=left_out,
        load_average_before=load,
        load_average_after=os.getloadavg()[0],
        seconds=round(time.perf_counter() - start, 1),
    )
    return EngineReport(set_up, find_ratios(runs), find_figures(runs), find_agreement(runs, base.tokenizer))


def take_turns(
    contenders: Mapping[str, Contender],
    turns: Sequence[Turn],
    rounds: int,
    jobs: Callable[[str, str, int], Sequence[Job]],
    advance: Callable[[], None],
) -> Runs:
    """Run all turns, then all of them again, as often as there are rounds.

    `jobs` gives those of a contender, a workload and a round from 1.
    """
    runs: dict[Turn, list[Run]] = {turn: [] for turn in turns}
    for round_ in range(1, rounds + 1):
        for name, workload in turns:
            own = jobs(name, workload, round_)
            runs[name, workload].append(Run(own, contenders[name].run(own)))
            advance()
    return runs


def _turns(makers: Mapping[str, Maker], workloads: Sequence[str]) -> list[Turn]:
    return [(name, workload) for workload in workloads for name, maker in makers.items() if workload in maker.workloads]


def _jobs(workloads: Workloads, workload: str, round_: int, maker: Maker) -> list[Job]:
    return workloads.jobs(workload, round_, adapter_names(maker.adapters), maker.k)


def _warm_up(workloads: Workloads) -> Workloads:
    """Short ones for what is loaded or made at first calls: as many requests, and so the same adapters."""
    return replace(workloads, sizes=replace(workloads.sizes, uniform_prompt=16, uniform_output=4))


def _capacity(contender: Contender, jobs: Sequence[Job]) -> float:
    """Requests a second, all of them there at the start."""
    return len(jobs) / max(served.seconds for served in contender.run(jobs))
