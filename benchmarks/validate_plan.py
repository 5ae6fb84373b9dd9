"""The simulation of `loraretriever plan` beside the local engine: the same requests, at several loads.

    python benchmarks/validate_plan.py --threads 1 --rounds 2

Each round times the batches from which `plan --measure` fits what steps take, and then answers each load's requests
as they arrive, with empty caches. The simulation gets the costs of all rounds' medians, and no number of the loads'
own runs. One JSON line per load: figures measured in each round, figures simulated, and how far the simulated ones
are from the mean of the rounds (relative; of hit rates the difference), beside how far the rounds are apart.

The clock `cpu` lets the engine, and the arrivals, live in processor time: that of all the process's threads but the one
that sends requests, and when the engine has nothing to do the clock moves on to the next arrival. Use it with
--threads 1 while other work uses the machine; loads then take their time from steps, which they do not on a free core.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import SEED, Output
from loraretriever.engine.memory import keep_freed_memory
from loraretriever.evaluate.demo import demo_folder
from loraretriever.evaluate.engine_contenders import request_of
from loraretriever.evaluate.plan.costs import StepCosts
from loraretriever.evaluate.plan.figures import evaluate, times
from loraretriever.evaluate.plan.fleet import Deployment
from loraretriever.evaluate.plan.measure import (
    CASES,
    Bench,
    Options,
    fit_costs,
    opened,
    time_cases,
    time_loads,
)
from loraretriever.evaluate.plan.replica import ReplicaSizes
from loraretriever.evaluate.plan.workload import Lengths, Workload

POOL = 64
RATES = ("slot_hit_rate", "host_hit_rate")
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Load:
    """Requests, and the sizes of the engine that answers them."""

    workload: Workload
    sizes: ReplicaSizes


def loads(requests: int) -> dict[str, Load]:
    """Light, medium and heavy traffic, three adapters a request, few slots, and more than can be answered."""
    base = Workload(
        rate=2.0, requests=requests, pool=POOL, k=1, prompt=Lengths(16, 128), answer=Lengths(8, 48), seed=SEED
    )
    sizes = ReplicaSizes(slots=8, host=24, batch_size=16, cache_tokens=16384)
    few = replace(sizes, slots=4, host=12)
    return {
        "light": Load(replace(base, rate=1.0), sizes),
        "medium": Load(base, sizes),
        "heavy": Load(replace(base, rate=3.0), sizes),
        "three adapters": Load(replace(base, rate=1.0, k=3), sizes),
        "three adapters, heavy": Load(replace(base, k=3), sizes),
        "four slots": Load(base, few),
        "four slots, all alike": Load(replace(base, zipf=0.0), few),
        "overload": Load(replace(base, rate=6.0), few),
    }


class ProcessorClock:
    """Seconds that all threads but the one that made the clock have used, and those that were skipped."""

    def __init__(self) -> None:
        self._own = time.pthread_getcpuclockid(threading.get_ident())
        self._skipped = 0.0
        self._last = 0.0

    def now(self) -> float:
        """For any thread; never goes back."""
        own = time.clock_gettime(self._own)
        self._last = max(self._last, time.process_time() - own + self._skipped)
        return self._last

    def wait(self, until: float, is_idle: Callable[[], bool]) -> None:
        """Let time pass, all of it at once where nothing else is to be done."""
        while (left := until - self.now()) > 0:
            if is_idle():
                self._skipped += left
            else:
                _sleep(_POLL)


def wait(until: float, is_idle: Callable[[], bool]) -> None:
    """Let time pass."""
    _sleep(max(0.0, until - time.monotonic()))


_sleep, _POLL = time.sleep, 0.0005


def run(bench: Bench, load: Load, adapter: int, wait: Callable[[float, Callable[[], bool]], None]) -> dict[str, float]:
    """What the engine does with a load's requests."""
    jobs = bench.jobs(load.workload.calls(), (SEED, 7))
    host_mib = -(-load.sizes.host * adapter // MIB)
    with closing(bench.engine(load.sizes, host_mib * MIB)) as engine:
        start = time.monotonic()
        streams, delays = [], []
        for job in jobs:
            wait(start + job.arrival, lambda: not (engine.stats().running or engine.stats().waiting))
            delays.append(time.monotonic() - start - job.arrival)
            streams.append(engine.submit(request_of(job)))
        done = [stream.result()[0] for stream in streams]
        stats = engine.stats()
    whole = [one.seconds + delay for one, delay in zip(done, delays, strict=True)]
    seconds = times(whole)
    end = max(job.arrival + taken for job, taken in zip(jobs, whole, strict=True))
    return {
        "requests_per_second": len(jobs) / (end - jobs[0].arrival),
        "seconds_mean": seconds.mean,
        "seconds_p50": seconds.p50,
        "seconds_p95": seconds.p95,
        "first_token_mean": statistics.mean((one.first_token_seconds or 0.0) for one in done) + statistics.mean(delays),
        "slot_hit_rate": stats.adapter_hits / (stats.adapter_hits + stats.slot_loads),
        "host_hit_rate": max(0.0, 1 - stats.adapter_loads / stats.slot_loads),
        "rows": stats.step_sequences / stats.steps,
    }


def simulated(load: Load, costs: StepCosts) -> dict[str, float]:
    """What the simulation says of them."""
    found = evaluate(Deployment(sizes=load.sizes), costs, load.workload.calls(), warm_up=0.0)
    assert found.seconds is not None and found.first_token_seconds is not None
    return {
        "requests_per_second": found.requests_per_second,
        "seconds_mean": found.seconds.mean,
        "seconds_p50": found.seconds.p50,
        "seconds_p95": found.seconds.p95,
        "first_token_mean": found.first_token_seconds.mean,
        "slot_hit_rate": found.slot_hit_rate or 0.0,
        "host_hit_rate": found.host_hit_rate or 0.0,
        "rows": found.rows,
    }


def compare(measured: Sequence[Mapping[str, float]], computed: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """How far the simulation is from the rounds' mean, and the rounds from each other."""
    errors, spread = {}, {}
    for name, value in computed.items():
        values = [one[name] for one in measured]
        mean = statistics.mean(values)
        unit = 1.0 if name in RATES else mean
        errors[name] = round((value - mean) / unit, 4)
        spread[name] = round((max(values) - min(values)) / unit, 4)
    return {"errors": errors, "spread": spread}


def bench_all(args: argparse.Namespace, output: Output) -> None:
    """All rounds, then all lines."""
    pause = wait
    if args.clock == "cpu":
        clock = ProcessorClock()
        time.monotonic, pause = clock.now, clock.wait
    options = Options(demo_folder() / "pool", threads=args.threads or None, seed=SEED)
    chosen = {name: load for name, load in loads(args.requests).items() if not args.only or name in args.only}
    cases: list[list[float]] = []
    parts: list[tuple[float, float, int]] = []
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    with opened(options, POOL) as bench:
        for round_ in range(args.rounds):
            if not round_:
                list(time_cases(bench, CASES, (SEED, 0)))  # warms up
            cases.append(list(time_cases(bench, CASES, (SEED, 1 + round_))))
            parts.append(time_loads(bench, options))
            for name, load in chosen.items():
                measured[name].append(run(bench, load, parts[0][2], pause))
                print(f"round {round_ + 1}, {name}: {measured[name][-1]}", file=sys.stderr)
    seconds = [statistics.median(taken) for taken in zip(*cases, strict=True)]
    drift = [round(max(taken) / min(taken) - 1, 3) for taken in zip(*cases, strict=True)]
    costs, residuals = fit_costs(CASES, seconds)
    write, load_seconds = (statistics.median(part[i] for part in parts) for i in range(2))
    costs = replace(costs, write=write, load=load_seconds)
    setup = {"pool": POOL, "clock": args.clock, "rounds": args.rounds, "requests": args.requests, "seed": SEED}
    output.write({"benchmark": "plan", "setup": setup, "costs": dataclasses.asdict(costs), "residuals": residuals,
                  "case_seconds": [round(taken, 3) for taken in seconds], "case_spread": drift})  # fmt: skip
    for name, load in chosen.items():
        output.write(line(name, load, measured[name], simulated(load, costs), setup))


def line(
    name: str, load: Load, measured: Sequence[Mapping[str, float]], computed: Mapping[str, float], setup: Any
) -> dict[str, Any]:
    """What is written for a load."""
    return {
        "benchmark": "plan",
        "setup": setup,
        "traffic": name,
        "workload": dataclasses.asdict(load.workload),
        "sizes": dataclasses.asdict(load.sizes),
        "measured": [{key: round(value, 4) for key, value in one.items()} for one in measured],
        "simulated": {key: round(value, 4) for key, value in computed.items()},
        **compare(measured, computed),
    }


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--requests", type=int, default=80, help="of each load")
    parser.add_argument("--only", nargs="*", help="these loads alone")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"))
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's own choice")
    parser.add_argument("--output", type=Path, help="append the lines to this file too")
    args = parser.parse_args()
    keep_freed_memory()
    bench_all(args, Output(args.output))


if __name__ == "__main__":
    main()
