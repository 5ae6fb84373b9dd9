"""`loraretriever bench`: measurements on one's own data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraretriever import console
from loraretriever.cli.options import BaseModelOption, DeviceOption, EncoderOption, JsonOption, check_writable
from loraretriever.config import load_settings
from loraretriever.errors import InvalidInputError

if TYPE_CHECKING:
    from loraretriever.evaluate.retrieval_data import TaskSamples
    from loraretriever.evaluate.retrieval_methods import Method

bench_app = typer.Typer(help="Measure on your own data.", no_args_is_help=True)


@bench_app.callback()
def _bench() -> None:
    pass


@bench_app.command("retrieval")
def bench_retrieval(
    test: Annotated[
        list[Path],
        typer.Option(help="JSONL file or folder of them: `inputs` and `task`, the right adapter (repeatable)."),
    ],
    samples: Annotated[
        list[Path] | None,
        typer.Option(help="JSONL file or folder of them: `inputs` and `adapter` (repeatable)."),
    ] = None,
    pool: Annotated[str | None, typer.Option(help="Take the samples of this pool instead.", metavar="DIR")] = None,
    per_adapter: Annotated[
        int | None, typer.Option(min=1, help="Samples per adapter at most.", show_default="20; of a pool all")
    ] = None,
    off_topic: Annotated[
        list[Path] | None, typer.Option(help="JSONL file with prompts that no adapter is meant for (repeatable).")
    ] = None,
    methods: Annotated[
        list[str] | None, typer.Option(help="Measure only this method (repeatable).", metavar="NAME")
    ] = None,
    trained: Annotated[
        list[str] | None, typer.Option(help="Also measure a trained encoder (repeatable).", metavar="NAME=FOLDER")
    ] = None,
    encoder: EncoderOption = None,
    device: DeviceOption = None,
    latency_prompts: Annotated[int, typer.Option(min=0, help="Test prompts to take the time of; 0: none.")] = 300,
    repeat: Annotated[int, typer.Option(min=1, help="How often to time each.")] = 1,
    robustness: Annotated[
        bool, typer.Option("--robustness", help="Also misspelt and long prompts, few samples, adapters one by one.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure how well, how fast and how surely prompts find their adapters, by several methods."""
    from loraretriever.evaluate import retrieval
    from loraretriever.evaluate.retrieval_data import read_data

    adapters, pool_encoder = _read_samples(samples, pool, per_adapter)
    settings = load_settings(encoder=encoder, device=device)
    data = read_data(adapters, test, off_topic or ())
    chosen = _choose(methods, trained, settings.encoder or pool_encoder)
    options = retrieval.Options(latency_prompts, repeat, robustness)
    steps = retrieval.count_steps(data, chosen, options)
    with console.progress("measuring", steps, enabled=not as_json) as advance:
        report = retrieval.bench_retrieval(data, chosen, settings, options, advance)
    if as_json:
        console.print_json(report)
    else:
        console.print_retrieval(report)


@bench_app.command("engine")
def bench_engine(
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer rounds and requests; some contenders at one workload only.")
    ] = False,
    pool: Annotated[
        str | None, typer.Option(help="Take this pool's adapters.", metavar="DIR", show_default="the demo's")
    ] = None,
    base_model: BaseModelOption = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Measure only this contender (repeatable).", metavar="NAME")
    ] = None,
    workload: Annotated[
        list[str] | None, typer.Option(help="Only this workload: uniform or realistic.", metavar="NAME")
    ] = None,
    vllm: Annotated[
        str | None, typer.Option(help="Also measure vLLM: the Python of an environment that has it.", metavar="PYTHON")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto (as stored).")] = "float32",
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Turns that each contender gets.", show_default="5; quick 3")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the processor.", show_default="torch's choice")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts, lengths, arrivals and adapters.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON object to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how fast mixed batches are answered: by this engine, transformers, PEFT and vLLM, taking turns."""
    from loraretriever.engine.memory import keep_freed_memory
    from loraretriever.evaluate import engine_bench
    from loraretriever.evaluate.demo import demo_folder

    keep_freed_memory()
    options = engine_bench.Options(
        pool=pool or demo_folder() / "pool",
        base_model=base_model,
        dtype=dtype,
        rounds=rounds or (engine_bench.QUICK_ROUNDS if quick else engine_bench.ROUNDS),
        threads=threads,
        seed=seed,
        quick=quick,
        sizes=engine_bench.QUICK_SIZES if quick else engine_bench.SIZES,
        only=tuple(only or ()),
        workloads=tuple(workload or engine_bench.WORKLOADS),
        vllm=vllm,
    )
    if output is not None:
        check_writable("--output", output)
    with console.progress("measuring", engine_bench.count_steps(options), enabled=not as_json) as advance:
        report = engine_bench.bench_engine(options, advance)
    if output is not None:
        output.write_text(console.to_json(report) + "\n", encoding="utf-8")
    if as_json:
        console.print_json(report)
    else:
        console.print_engine(report)


@bench_app.command("server")
def bench_server(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds and requests; 1 and 32 at a time.")] = False,
    pool: Annotated[str | None, typer.Option(help="Serve this pool.", metavar="DIR", show_default="the demo's")] = None,
    base_model: BaseModelOption = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto (as stored).")] = "float32",
    rounds: Annotated[int | None, typer.Option(min=1, help="Turns that each gets.", show_default="5; quick 3")] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of the processor, for the models. One fewer than there are leaves one to the load generator.",
            show_default="torch's choice",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the prompts.")] = 0,
    vllm_url: Annotated[
        str | None,
        typer.Option(help="Measure before this vLLM server instead: what the gateway adds, what compositions cost."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON object to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what the server costs: requests through it and locust, and by the engine alone, taking turns."""
    if vllm_url is not None:
        _bench_vllm(vllm_url, pool, seed, quick, output, as_json)
        return
    from loraretriever.evaluate import server_bench
    from loraretriever.evaluate.demo import demo_folder

    options = server_bench.Options(
        pool=pool or demo_folder() / "pool",
        base_model=base_model,
        dtype=dtype,
        rounds=rounds or (server_bench.QUICK_ROUNDS if quick else server_bench.ROUNDS),
        threads=threads,
        seed=seed,
        quick=quick,
        sizes=server_bench.QUICK_SIZES if quick else server_bench.SIZES,
    )
    if output is not None:
        check_writable("--output", output)
    with console.progress("measuring", server_bench.count_steps(options), enabled=not as_json) as advance:
        report = server_bench.bench_server(options, advance)
    if output is not None:
        output.write_text(console.to_json(report) + "\n", encoding="utf-8")
    if as_json:
        console.print_json(report)
    else:
        console.print_server(report)


def _bench_vllm(url: str, pool: str | None, seed: int, quick: bool, output: Path | None, as_json: bool) -> None:
    from loraretriever.evaluate import vllm_bench
    from loraretriever.evaluate.demo import demo_folder

    sizes = {"pairs": 20, "requests": 32} if quick else {}
    options = vllm_bench.Options(pool or demo_folder() / "pool", url.rstrip("/").removesuffix("/v1"), seed, **sizes)
    if output is not None:
        check_writable("--output", output)
    with console.progress("measuring", vllm_bench.count_steps(options), enabled=not as_json) as advance:
        report = vllm_bench.bench_vllm(options, advance)
    if output is not None:
        output.write_text(console.to_json(report) + "\n", encoding="utf-8")
    if as_json:
        console.print_json(report)
    else:
        console.print_vllm(report)


def _read_samples(
    files: list[Path] | None, pool: str | None, per_adapter: int | None
) -> tuple[dict[str, TaskSamples], str | None]:
    """The adapters' samples, and the encoder that the pool is read with."""
    from loraretriever.evaluate.retrieval_data import PER_ADAPTER, pool_samples, read_samples
    from loraretriever.pool import Pool

    if files and pool is None:
        return read_samples(files, per_adapter or PER_ADAPTER), None
    if pool is None or files:
        given = "both --pool and --samples are" if pool is not None else "neither --pool nor --samples is"
        raise InvalidInputError(f"{given} given; expected one of them.")
    with Pool.open(pool) as opened:
        console.print_problems(opened.problems)
        return pool_samples(opened, per_adapter), opened.encoder


def _choose(names: list[str] | None, trained: list[str] | None, encoder: str | None) -> list[Method]:
    from loraretriever.evaluate.retrieval_methods import known_methods

    folders = {}
    for text in trained or ():
        name, _, folder = text.partition("=")
        if not name or not Path(folder).is_dir() or not folder:
            raise InvalidInputError(f"--trained has {text!r}; expected NAME=FOLDER, the folder of an encoder.")
        folders[name] = Path(folder)
    known = known_methods(encoder, folders)
    for name in names or ():
        if name not in known:
            raise InvalidInputError(f"unknown method {name!r}; expected one of {', '.join(known)}.")
    return [method for name, method in known.items() if not names or name in names]
