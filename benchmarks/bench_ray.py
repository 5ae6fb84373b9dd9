"""What a cluster of replicas costs and brings beside one process, and what affinity saves.

    python benchmarks/bench_ray.py throughput   two replicas, two workers, one process: tokens/s
    python benchmarks/bench_ray.py affinity     adapters loaded per request, with affinity and without

One JSON line per measurement. The servers of `throughput` are all there at once and take turns; each process has one
thread for the model. `affinity` asks for one adapter per request, some often and most seldom (the n-th of them 1 / n
times as often as the first), of replicas whose host memory and slots hold only some of them.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

import httpx

from common import SEED, Output
from loraretriever.evaluate.server_bench import Prompts
from loraretriever.evaluate.server_drivers import Driver, load_generator, server
from loraretriever.pool import Pool

ONE = "one process"
CONTENDERS = {
    ONE: (),
    "two workers": ("--workers", "2"),
    "one replica": ("--cluster",),
    "two replicas": ("--cluster", "--replicas", "2"),
}
WARM_UP_TOKENS = 4
SETTLED_SECONDS = 3.0  # after which replicas have told their figures


def throughput(arguments: argparse.Namespace, output: Output) -> None:
    """Generated tokens per second of each server, and relative to one process, by turns."""
    prompts = Prompts(arguments.pool, SEED)
    count = arguments.waves * arguments.concurrency
    with ExitStack() as stack:
        drivers: dict[str, Driver] = {}
        for name, options in CONTENDERS.items():
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="loraretriever-bench-")))
            url = stack.enter_context(_serve(arguments, options, folder))
            drivers[name] = stack.enter_context(load_generator(url, folder))
        rates: dict[str, list[float]] = {name: [] for name in drivers}
        for driver in drivers.values():
            driver.run(prompts.jobs(arguments.concurrency, WARM_UP_TOKENS), arguments.concurrency)
        for _ in range(arguments.rounds):
            jobs = prompts.jobs(count, arguments.max_tokens)
            for name, driver in drivers.items():
                turn = driver.run(jobs, arguments.concurrency)
                rates[name].append(sum(each.tokens for each in turn.served) / turn.seconds)
    for name, rate in rates.items():
        ratios = [own / one for own, one in zip(rate, rates[ONE], strict=True)]
        output.write(
            {
                "benchmark": "ray throughput",
                "server": name,
                "pool": arguments.pool,
                "concurrency": arguments.concurrency,
                "requests": count,
                "max_tokens": arguments.max_tokens,
                "rounds": arguments.rounds,
                "tokens_per_second": round(median(rate), 1),
                "ratio_to_one_process": round(median(ratios), 3),
                "ratios": [round(ratio, 3) for ratio in ratios],
            }
        )


def affinity(arguments: argparse.Namespace, output: Output) -> None:
    """Loads of adapters from disk, and copies into slots, per request."""
    with Pool.open(arguments.pool) as pool:
        names = [adapter.name for adapter in pool.list(enabled_only=True)]
    chooser = random.Random(SEED)
    chooser.shuffle(names)
    weights = [1 / n for n in range(1, len(names) + 1)]
    chosen = chooser.choices(names, weights, k=arguments.requests)
    for has_affinity in (True, False):
        with TemporaryDirectory(prefix="loraretriever-bench-") as folder:
            more = {"AFFINITY": str(has_affinity), "HOST_MIB": str(arguments.host_mib), "SLOTS": str(arguments.slots)}
            with _serve(arguments, CONTENDERS["two replicas"], Path(folder), more) as url:
                before, after = _counted(url, chosen, arguments)
        output.write(
            {
                "benchmark": "ray affinity",
                "affinity": has_affinity,
                "pool": arguments.pool,
                "adapters": len(names),
                "requests": len(chosen),
                "concurrency": arguments.concurrency,
                "host_mib": arguments.host_mib,
                "slots": arguments.slots,
                **{f"{name}_per_request": round((after[name] - before[name]) / len(chosen), 4) for name in before},
            }
        )


def _counted(
    url: str, chosen: Sequence[str], arguments: argparse.Namespace
) -> tuple[dict[str, float], dict[str, float]]:
    """The counters before and after requests for these adapters."""

    def ask(adapter: str) -> None:
        body = {"model": adapter, "prompt": "What is this?", "max_tokens": arguments.max_tokens, "ignore_eos": True}
        client.post("/v1/completions", json=body).raise_for_status()

    with httpx.Client(base_url=url, timeout=600, trust_env=False) as client:
        before = _counters(client)
        with ThreadPoolExecutor(arguments.concurrency) as threads:
            list(threads.map(ask, chosen))
        return before, _counters(client)


def _counters(client: httpx.Client) -> dict[str, float]:
    Event().wait(SETTLED_SECONDS)
    counters: dict[str, Any] = client.get("/v1/stats").json()["counters"]
    return {name: counters[f"{name}_total"][0]["value"] for name in ("adapter_loads", "adapter_slot_loads")}


@contextmanager
def _serve(
    arguments: argparse.Namespace, options: Sequence[str], folder: Path, more: Mapping[str, str] = {}
) -> Iterator[str]:
    """The address of a server with these options, and with more settings."""
    settings = {"DTYPE": arguments.dtype, "BATCH_SIZE": str(arguments.batch_size), **more}
    environment = {"OMP_NUM_THREADS": "1"} | {f"LORARETRIEVER_{name}": value for name, value in settings.items()}
    options = ["--pool", arguments.pool, "--log-level", "warning", *options]
    with server(options, folder, environment) as (_, url):
        yield url


def main() -> None:
    """Read the arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("throughput", "affinity"))
    parser.add_argument("--pool", default="demo/pool")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--waves", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--host-mib", type=int, default=16)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    output = Output(arguments.output)
    {"throughput": throughput, "affinity": affinity}[arguments.what](arguments, output)


if __name__ == "__main__":
    main()
