"""`loraretriever plan`: what a deployment would do, simulated."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraretriever import console
from loraretriever.cli.options import BaseModelOption, DeviceOption, JsonOption, check_writable
from loraretriever.cli.plan_tables import print_plan
from loraretriever.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraretriever.evaluate.plan.costs import Machine
    from loraretriever.evaluate.plan.measure import Options
    from loraretriever.evaluate.plan.trace import Trace
    from loraretriever.evaluate.plan.workload import Lengths

_MIB = 1 << 20


def plan(
    costs: Annotated[
        Path | None, typer.Option(help="JSON file with what steps take, as --measure writes it.", metavar="FILE")
    ] = None,
    measure: Annotated[
        Path | None, typer.Option(help="Measure this machine, write the costs here, and use them.", metavar="FILE")
    ] = None,
    arrival_rate: Annotated[
        float | None, typer.Option(help="Requests a second.", show_default="1; of a trace its own")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="How many to simulate.")] = 10_000,
    adapters: Annotated[int, typer.Option(min=1, help="Size of the pool.")] = 1000,
    zipf: Annotated[float, typer.Option(help="Exponent of the adapters' popularity; 0: all alike.")] = 1.0,
    k: Annotated[int, typer.Option("--k", min=0, help="Adapters of each request; 0: the base model.")] = 1,
    prompt_tokens: Annotated[str, typer.Option(help="A number, or a range.", metavar="LEAST-MOST")] = "16-512",
    answer_tokens: Annotated[str, typer.Option(help="A number, or a range.", metavar="LEAST-MOST")] = "8-128",
    trace: Annotated[
        Path | None,
        typer.Option(help="Requests from this JSONL file, such as the server's log, in place of drawn ones."),
    ] = None,
    strategy: Annotated[
        str, typer.Option(help="selection, mixture, fusion, arrow, spectral, ramole, moe, or merge (any of them).")
    ] = "mixture",
    weighting: Annotated[
        str, typer.Option(help="score or uniform: merges of the same adapters are the same only then.")
    ] = "score",
    replicas: Annotated[int, typer.Option(min=1, help="Engines.")] = 1,
    policy: Annotated[
        str, typer.Option(help="Which replica: random, least-loaded, affinity or composition.")
    ] = "affinity",
    slots: Annotated[int, typer.Option(min=1, help="Adapters on the device.")] = 32,
    host_mib: Annotated[int, typer.Option(min=0, help="Memory for adapters outside the slots.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences that run at once.")] = 32,
    step_tokens: Annotated[int, typer.Option(min=1, help="Tokens of prompts in a step.")] = 256,
    cache_mib: Annotated[int, typer.Option(min=1, help="Memory for keys and values.")] = 2048,
    queue: Annotated[int, typer.Option(min=1, help="Sequences that may wait at a replica.")] = 1024,
    route_ms: Annotated[float, typer.Option(min=0, help="Retrieval and network before the engine.")] = 10.0,
    target_p95: Annotated[
        float | None, typer.Option(help="Recommend what answers 95 % of the requests in so many seconds.")
    ] = None,
    warm_up: Annotated[float, typer.Option(help="Share of the requests that fill the caches and do not count.")] = 0.1,
    plot: Annotated[
        Path | None, typer.Option(help="PNG or SVG file: latency against rate, hit rates against slots.")
    ] = None,
    pool: Annotated[
        str | None, typer.Option(help="To measure: this pool's adapters.", metavar="DIR", show_default="the demo's")
    ] = None,
    base_model: BaseModelOption = None,
    device: DeviceOption = None,
    dtype: Annotated[str, typer.Option(help="To measure: float32, bfloat16, float16 or auto.")] = "float32",
    threads: Annotated[int | None, typer.Option(min=1, help="To measure.", show_default="torch's choice")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="To measure: how often each batch is timed.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of arrivals, lengths and adapters.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Simulate a deployment: latency, hit rates, how busy it is, and what it takes to meet a target."""
    from loraretriever.evaluate.plan.fleet import Deployment
    from loraretriever.evaluate.plan.measure import Options
    from loraretriever.evaluate.plan.plots import draw_plan
    from loraretriever.evaluate.plan.replica import ReplicaSizes
    from loraretriever.evaluate.plan.report import Question, make_plan
    from loraretriever.evaluate.plan.workload import Workload

    if weighting not in ("score", "uniform"):
        raise InvalidInputError(f"--weighting is {weighting!r}; expected score or uniform.")
    if target_p95 is not None and target_p95 <= 0:
        raise InvalidInputError(f"--target-p95 is {target_p95}; expected seconds above 0.")
    ranges = _range("--prompt-tokens", prompt_tokens), _range("--answer-tokens", answer_tokens)
    recorded = _read_trace(trace, arrival_rate)
    if recorded is None:
        workload = Workload(1.0 if arrival_rate is None else arrival_rate, requests, adapters, zipf, k, *ranges, seed)
    options = Options(_pool(pool), base_model, dtype, device or "cpu", rounds, threads, seed)
    machine = _machine(costs, measure, options, as_json)
    footprint = machine.footprint
    sizes = ReplicaSizes(
        slots=slots,
        host=host_mib * _MIB // max(1, footprint.adapter),
        batch_size=batch_size,
        step_tokens=step_tokens,
        cache_tokens=cache_mib * _MIB // max(1, footprint.token),
        queue=queue,
    )
    question = Question(
        deployment=Deployment(replicas, sizes, strategy, weighting == "uniform", policy, route_ms / 1000),
        machine=machine,
        calls=workload.calls() if recorded is None else recorded.calls,
        rate=workload.rate if recorded is None else recorded.rate,
        warm_up=warm_up,
        target_p95=target_p95,
        sweeps=plot is not None,
    )
    if plot is not None:
        check_writable("--plot", plot)
    with _waiting("simulating", as_json) as advance:
        report = make_plan(question, advance)
    if plot is not None:
        draw_plan(report, plot)
    if as_json:
        console.print_json(report)
    else:
        print_plan(report)


def _waiting(description: str, as_json: bool, steps: int | None = None) -> AbstractContextManager[Callable[[], None]]:
    return console.progress(description, steps, enabled=not as_json)


def _range(option: str, text: str) -> Lengths:
    from loraretriever.evaluate.plan.workload import Lengths

    least, _, most = text.partition("-")
    try:
        return Lengths(int(least), int(most or least))
    except ValueError:
        raise InvalidInputError(f"{option} is {text!r}; expected a number such as 64, or a range: 16-512.") from None


def _read_trace(path: Path | None, rate: float | None) -> Trace | None:
    from loraretriever.evaluate.plan.trace import read_trace

    if path is None:
        return None
    trace = read_trace(path)
    return trace if rate is None else trace.at(rate)


def _pool(given: str | None) -> str | Path:
    from loraretriever.evaluate.demo import demo_folder

    return given or demo_folder() / "pool"


def _machine(costs: Path | None, output: Path | None, options: Options, as_json: bool) -> Machine:
    from loraretriever.engine.memory import keep_freed_memory
    from loraretriever.evaluate.plan.costs import read_machine
    from loraretriever.evaluate.plan.measure import count_steps, measure

    if (costs is None) == (output is None):
        given = "both --costs and --measure are" if costs is not None else "neither --costs nor --measure is"
        raise InvalidInputError(f"{given} given; expected one of them.")
    if costs is not None:
        return read_machine(costs)
    assert output is not None
    check_writable("--measure", output)
    keep_freed_memory()
    with _waiting("measuring", as_json, count_steps(options)) as advance:
        measured = measure(options, advance)
    output.write_text(console.to_json(measured) + "\n", encoding="utf-8")
    return measured.machine
