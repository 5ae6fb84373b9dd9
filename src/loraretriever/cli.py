"""The command line. Every command is thin: it reads arguments, calls the library, prints."""

from __future__ import annotations

import io
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from loraretriever import __version__, console
from loraretriever.errors import InvalidInputError, LoraRetrieverError

app = typer.Typer(
    help="Retrieve the LoRA adapters that fit each prompt, compose them, answer mixed prompts in one batch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
pool_app = typer.Typer(help="Manage the adapters of a pool.", no_args_is_help=True)
app.add_typer(pool_app, name="pool")

PoolOption = Annotated[
    str, typer.Option("--pool", envvar="LORARETRIEVER_POOL", help="The pool's folder.", metavar="DIR", show_envvar=True)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Prompts = Annotated[list[str] | None, typer.Argument(help="Prompts.", show_default=False)]
InputOption = Annotated[
    Path | None,
    typer.Option("--input", help="JSONL file, a prompt in `inputs` per line; other fields pass through. `-`: stdin."),
]
KOption = Annotated[int | None, typer.Option("--k", help="Adapters per prompt at most.", show_default="3")]
ThresholdOption = Annotated[
    float | None, typer.Option(help="Hits with a lower score are not used; with none left the base model answers.")
]
ExcludeOption = Annotated[list[str] | None, typer.Option(help="Adapter never to be found (repeatable).")]
OnlyOption = Annotated[list[str] | None, typer.Option(help="The only adapters that may be found (repeatable).")]
EncoderOption = Annotated[str | None, typer.Option(help="Sentence encoder: a folder or a hub id.")]
BaseModelOption = Annotated[
    str | None, typer.Option(help="Base model: a folder or a hub id.", show_default="the pool's")
]
StrategyOption = Annotated[
    str | None, typer.Option(help="selection, mixture, fusion, or a plug-in's.", show_default="mixture")
]
WeightingOption = Annotated[str | None, typer.Option(help="uniform or score.", show_default="score")]
DeviceOption = Annotated[str | None, typer.Option(help="Torch device.", show_default="cpu")]
DtypeOption = Annotated[
    str | None, typer.Option(help="float32, bfloat16, float16 or auto (as stored).", show_default="auto")
]


def _print_version(asked: bool) -> None:
    if asked:
        console.print_plain(__version__)
        raise typer.Exit()


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    k: KOption = None,
    strategy: StrategyOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer one fresh prompt per adapter of the demo pool: routed, composed, beside the base model's answer."""
    from loraretriever.engine.memory import keep_freed_memory
    from loraretriever.evaluate.demo import demo_folder, run_demo
    from loraretriever.evaluate.tasks import read_examples
    from loraretriever.pipeline import LoraRetriever

    keep_freed_memory()
    folder = demo_folder()
    with LoraRetriever.open(folder / "pool", dtype=dtype) as retriever:
        known = {adapter.name for adapter in retriever.pool.list(enabled_only=True)}
        examples = [example for example in read_examples(folder / "prompts.jsonl") if example.task in known]
        with console.progress("answering", 2 * len(examples), enabled=not as_json) as advance:
            report = run_demo(retriever, examples, advance, k, strategy)
    if as_json:
        console.print_json(report)
    else:
        console.print_demo(report)


@app.command()
def route(
    pool: PoolOption,
    prompts: Prompts = None,
    input_file: InputOption = None,
    k: KOption = None,
    threshold: ThresholdOption = None,
    exclude: ExcludeOption = None,
    only: OnlyOption = None,
    encoder: EncoderOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show which adapters fit each prompt. Loads no base model."""
    from loraretriever.pipeline import LoraRetriever

    rows = _read_prompts(prompts, input_file)
    with LoraRetriever.open(pool, encoder=encoder) as retriever:
        _report_problems(retriever.pool.problems)
        routes = retriever.route(
            [row["inputs"] for row in rows], k=k, threshold=threshold, exclude=exclude or (), only=only
        )
    for row, found in zip(rows, routes, strict=True):
        if as_json:
            hits = [{"adapter": hit.adapter, "score": hit.score} for hit in found.hits]
            console.print_json({**row, "fallback": found.fallback, "hits": hits})
        else:
            fallback = " -> base model" if found.fallback else ""
            console.print_plain(f"{console.shorten(found.prompt)}\n  {console.describe_hits(found.hits)}{fallback}")


@app.command()
def generate(
    pool: PoolOption,
    prompts: Prompts = None,
    input_file: InputOption = None,
    output: Annotated[Path | None, typer.Option(help="Write JSONL here instead of printing.")] = None,
    k: KOption = None,
    strategy: StrategyOption = None,
    weighting: WeightingOption = None,
    adapters: Annotated[
        str | None, typer.Option(help="Use these instead of retrieval: a=0.7,b=0.3; `base` for none.")
    ] = None,
    threshold: ThresholdOption = None,
    exclude: ExcludeOption = None,
    only: OnlyOption = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens generated per prompt at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling; 1 is off.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Most probable tokens kept; 0 is off.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop string (repeatable).")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Do not apply the chat template.")] = False,
    encoder: EncoderOption = None,
    base_model: BaseModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    batch_size: Annotated[int | None, typer.Option(help="Prompts in one batch at most.", show_default="32")] = None,
    slots: Annotated[int | None, typer.Option(help="Adapters in memory at once.", show_default="32")] = None,
    as_json: JsonOption = False,
) -> None:
    """Answer prompts, each by the adapters that fit it, in mixed batches."""
    from loraretriever.engine.memory import keep_freed_memory
    from loraretriever.pipeline import LoraRetriever
    from loraretriever.types import Sampling

    keep_freed_memory()
    rows = _read_prompts(prompts, input_file)
    sampling = Sampling(max_tokens, temperature, top_p, top_k, seed, tuple(stop or ()))
    named = None if adapters is None else _parse_weights(adapters)
    settings = {"encoder": encoder, "base_model": base_model, "device": device, "dtype": dtype}
    with LoraRetriever.open(pool, **settings, batch_size=batch_size, slots=slots) as retriever:
        _report_problems(retriever.pool.problems)
        completions: dict[int, Any] = {}
        with console.progress("generating", len(rows)) as advance:
            for position, completion in retriever.stream(
                [row["inputs"] for row in rows], k=k, strategy=strategy, weighting=weighting, threshold=threshold,
                exclude=exclude or (), only=only, adapters=named, sampling=sampling, chat=not raw,
            ):  # fmt: skip
                completions[position] = completion
                advance()
    ordered = [(row, completions[position]) for position, row in enumerate(rows)]
    if output:
        _write_lines(output, [console.completion_json(row, completion) for row, completion in ordered])
        return
    for row, completion in ordered:
        if as_json:
            console.print_json(console.completion_json(row, completion))
        else:
            console.print_completion(completion)


@pool_app.command("init")
def pool_init(
    pool: PoolOption,
    base_model: Annotated[str, typer.Option(help="The base model of all adapters: a folder or a hub id.")],
    as_json: JsonOption = False,
) -> None:
    """Make an empty pool for a base model."""
    from loraretriever.pool import Pool

    with Pool.create(pool, base_model=base_model) as created:
        if as_json:
            console.print_json({"pool": pool, "base_model": created.base_model})
        else:
            console.print_plain(f"created the pool {pool} for {created.base_model}")


@pool_app.command("add")
def pool_add(
    source: Annotated[str, typer.Argument(help="A PEFT folder, or a hub id (owner/name, or owner/name@revision).")],
    pool: PoolOption,
    name: Annotated[str | None, typer.Option(help="Name in the pool.", show_default="the folder's")] = None,
    samples: Annotated[Path | None, typer.Option(help="JSONL file with a prompt per line in `inputs`.")] = None,
    sample: Annotated[list[str] | None, typer.Option(help="A sample prompt (repeatable).")] = None,
    description: Annotated[str, typer.Option(help="What the adapter is for.")] = "",
    tag: Annotated[list[str] | None, typer.Option(help="Tag (repeatable).")] = None,
    allow_base_mismatch: Annotated[
        bool, typer.Option("--allow-base-mismatch", help="Accept an adapter that names another base model.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Add an adapter, or a new revision of one. Killed at any moment, the pool holds all of it or nothing."""
    from loraretriever.pool import Pool

    with Pool.open(pool) as opened:
        result = opened.add(
            source, name=name, samples=sample, samples_file=samples, description=description,
            tags=tag or (), allow_base_mismatch=allow_base_mismatch,
        )  # fmt: skip
    if as_json:
        console.print_json(result)
    else:
        adapter = result.adapter
        console.print_plain(f"{result.change}: {adapter.name} revision {adapter.revision}, {adapter.samples} samples")


@pool_app.command("list")
def pool_list(pool: PoolOption, as_json: JsonOption = False) -> None:
    """List the adapters."""
    from loraretriever.pool import Pool

    with Pool.open(pool) as opened:
        _report_problems(opened.problems)
        adapters = opened.list()
    if as_json:
        for adapter in adapters:
            console.print_json(adapter)
        return
    console.print_rows(
        ("name", "revision", "enabled", "ranks", "samples", "tags", "description"),
        [
            (a.name, str(a.revision), "yes" if a.enabled else "no", ",".join(map(str, a.ranks)), str(a.samples),
             ",".join(a.tags), console.shorten(a.description, 60))
            for a in adapters
        ],
    )  # fmt: skip


@pool_app.command("show")
def pool_show(name: str, pool: PoolOption, as_json: JsonOption = False) -> None:
    """Show one adapter and its samples."""
    from loraretriever.pool import Pool

    with Pool.open(pool) as opened:
        adapter, samples = opened.get(name), opened.samples(name)
    if as_json:
        console.print_json({"adapter": adapter, "samples": samples})
        return
    console.print_fields(adapter)
    for sample in samples:
        console.print_plain(f"  [{sample.source}] {console.shorten(sample.text)}")


@pool_app.command("remove")
def pool_remove(name: str, pool: PoolOption, as_json: JsonOption = False) -> None:
    """Remove an adapter with all its revisions."""
    from loraretriever.pool import Pool

    with Pool.open(pool) as opened:
        opened.remove(name)
    _print_done(as_json, name, "removed")


@pool_app.command("enable")
def pool_enable(name: str, pool: PoolOption, as_json: JsonOption = False) -> None:
    """Let an adapter be found again."""
    _set_enabled(pool, name, True, as_json)


@pool_app.command("disable")
def pool_disable(name: str, pool: PoolOption, as_json: JsonOption = False) -> None:
    """Keep an adapter in the pool, but let nothing find or use it."""
    _set_enabled(pool, name, False, as_json)


@pool_app.command("verify")
def pool_verify(pool: PoolOption, as_json: JsonOption = False) -> None:
    """Check every adapter's files, digests and samples. Exits with 1 if something is wrong."""
    from loraretriever.pool import Pool

    with Pool.open(pool) as opened:
        problems = opened.verify()
        count = len(opened.list())
    if as_json:
        console.print_json({"adapters": count, "problems": problems})
    else:
        for problem in problems:
            console.print_error(problem)
        console.print_plain(f"{count} adapters, {len(problems)} problems")
    if problems:
        raise typer.Exit(1)


def _set_enabled(pool: str, name: str, enabled: bool, as_json: bool) -> None:
    from loraretriever.pool import Pool

    with Pool.open(pool) as opened:
        opened.set_enabled(name, enabled)
    _print_done(as_json, name, "enabled" if enabled else "disabled")


def _print_done(as_json: bool, name: str, change: str) -> None:
    if as_json:
        console.print_json({"adapter": name, "change": change})
    else:
        console.print_plain(f"{change}: {name}")


def _report_problems(problems: Iterable[str]) -> None:
    for problem in problems:
        console.print_note(f"skipped: {problem}")


def _read_prompts(prompts: list[str] | None, file: Path | None) -> list[dict[str, Any]]:
    """One object per prompt with the field `inputs`, from the arguments and from a JSONL file."""
    rows: list[dict[str, Any]] = [{"inputs": prompt} for prompt in prompts or ()]
    if file is not None:
        rows += _parse_lines(file)
    if not rows:
        raise InvalidInputError("no prompts; give them as arguments, or as a JSONL file with --input.")
    return rows


def _parse_lines(file: Path) -> Iterator[dict[str, Any]]:
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"cannot read {file}: {error}; expected a JSONL file in UTF-8.") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InvalidInputError(f"{file}:{number} is not JSON ({error}); expected an object per line.") from error
        if not isinstance(row, dict) or not isinstance(row.get("inputs"), str):
            raise InvalidInputError(f"{file}:{number} has no text in the field `inputs`: {console.shorten(line)}")
        yield row


def _parse_weights(text: str) -> dict[str, float]:
    """`a=0.7,b=0.3` as a mapping; `base` as an empty one; an adapter without a weight gets 1."""
    if text.strip() == "base":
        return {}
    weights = {}
    for part in text.split(","):
        name, _, weight = part.strip().partition("=")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise InvalidInputError(f"--adapters has {part!r}; expected name=weight, such as sql=0.7.") from None
    return weights


def _write_lines(file: Path, values: list[dict[str, Any]]) -> None:
    """The whole file or nothing: written beside it, then renamed."""
    unfinished = file.with_name(file.name + ".part")
    try:
        unfinished.write_text("".join(console.to_json(value) + "\n" for value in values), encoding="utf-8")
        os.replace(unfinished, file)
    except OSError as error:
        raise InvalidInputError(f"cannot write {file}: {error}.") from error


def _quiet_libraries() -> None:
    """Progress bars and warnings of libraries are not for this program's users."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main() -> None:
    """Run the command line. Exit codes: 0, 1 (failure), 2 (usage)."""
    _quiet_libraries()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # arguments may hold bytes that are no text
    try:
        app(prog_name="loraretriever")
    except InvalidInputError as error:
        console.print_error(str(error))
        sys.exit(2)
    except LoraRetrieverError as error:
        console.print_error(str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
