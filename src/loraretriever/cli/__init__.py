"""The command line. Every command is thin: it reads arguments, calls the library, prints."""

from __future__ import annotations

import io
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from loraretriever import __version__, console
from loraretriever.cli.bench import bench_app
from loraretriever.cli.evaluate import evaluate
from loraretriever.cli.feedback import feedback_app
from loraretriever.cli.keys import keys_app
from loraretriever.cli.options import (
    BaseModelOption,
    DeviceOption,
    DtypeOption,
    EncoderOption,
    EngineOption,
    ExcludeOption,
    InputOption,
    JsonOption,
    KOption,
    OnlyOption,
    PoolOption,
    Prompts,
    RetrieverOption,
    StrategyOption,
    TagOption,
    TenantOption,
    ThresholdOption,
    VllmUrlOption,
    WeightingOption,
)
from loraretriever.cli.plan import plan
from loraretriever.cli.pool import pool_app
from loraretriever.cli.prompts import AnswerFile, parse_weights, read_prompts
from loraretriever.cli.routers import train_router
from loraretriever.cli.serve import serve
from loraretriever.cli.train import train_retriever
from loraretriever.errors import InvalidInputError, LoraRetrieverError
from loraretriever.models import quiet_libraries as _quiet_libraries

app = typer.Typer(
    help="Retrieve the LoRA adapters that fit each prompt, compose them, answer mixed prompts in one batch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(pool_app, name="pool")
app.add_typer(feedback_app, name="feedback")
app.add_typer(keys_app, name="keys")
app.add_typer(bench_app, name="bench")
app.command("serve")(serve)
app.command("train-retriever")(train_retriever)
app.command("train-router")(train_router)
app.command("evaluate")(evaluate)
app.command("plan")(plan)


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
        console.print_problems(retriever.pool.problems)
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
    tag: TagOption = None,
    tenant: TenantOption = None,
    retriever: RetrieverOption = None,
    encoder: EncoderOption = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say why: nearest samples, terms, parts.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show which adapters fit each prompt. Loads no base model."""
    from loraretriever.pipeline import LoraRetriever

    rows = read_prompts(prompts, input_file)
    texts = [row["inputs"] for row in rows]
    filters: dict[str, Any] = {"exclude": exclude or (), "only": only, "tags": tag or (), "tenant": tenant}
    with LoraRetriever.open(pool, encoder=encoder, retriever=retriever) as opened:
        console.print_problems(opened.pool.problems)
        routes = opened.route(texts, k=k, threshold=threshold, **filters)
        reasons = opened.explain(texts, k=k, **filters) if explain else [None] * len(rows)
    for row, found, reason in zip(rows, routes, reasons, strict=True):
        if as_json:
            console.print_json(console.route_json(row, found, reason))
        else:
            console.print_route(found, reason)


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
    tag: TagOption = None,
    tenant: TenantOption = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens generated per prompt at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling; 1 is off.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Most probable tokens kept; 0 is off.")] = 0,
    min_p: Annotated[float, typer.Option(help="Least share of the best token's probability; 0 is off.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Of tokens in prompt and answer; 1 is off.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Of tokens in the answer; 0 is off.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, for each time; 0 is off.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    n: Annotated[int, typer.Option("--n", help="Answers to each prompt.")] = 1,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json or --output: log-probabilities, and so many alternatives.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop string (repeatable).")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Do not apply the chat template.")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer to one prompt as it comes.")] = False,
    retriever: RetrieverOption = None,
    encoder: EncoderOption = None,
    base_model: BaseModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    batch_size: Annotated[int | None, typer.Option(help="Prompts in one batch at most.", show_default="32")] = None,
    slots: Annotated[int | None, typer.Option(help="Adapters in memory at once.", show_default="32")] = None,
    engine: EngineOption = None,
    vllm_url: VllmUrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer prompts, each by the adapters that fit it, in mixed batches."""
    from loraretriever.engine.memory import keep_freed_memory
    from loraretriever.pipeline import LoraRetriever
    from loraretriever.types import Completion, Sampling

    keep_freed_memory()
    rows = read_prompts(prompts, input_file)
    sampling = Sampling(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
        repetition_penalty=repetition_penalty, presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
        seed=seed, stop=tuple(stop or ()), logprobs=logprobs, n=n,
    )  # fmt: skip
    how: dict[str, Any] = {
        "k": k, "strategy": strategy, "weighting": weighting, "threshold": threshold, "exclude": exclude or (),
        "only": only, "tags": tag or (), "tenant": tenant, "sampling": sampling, "chat": not raw,
    }  # fmt: skip
    if stream and (len(rows) != 1 or n != 1 or output or as_json):
        raise InvalidInputError("--stream prints one answer to one prompt; leave out --n, --output and --json.")
    named = None if adapters is None else parse_weights(adapters)
    settings = {
        "retriever": retriever, "encoder": encoder, "base_model": base_model, "device": device, "dtype": dtype,
        "batch_size": batch_size, "slots": slots, "engine": engine, "vllm_urls": vllm_url or None,
    }  # fmt: skip
    answers: dict[tuple[int, int], dict[str, Any]] = {}
    completions: dict[tuple[int, int], Completion] = {}
    with ExitStack() as stack:
        opened = stack.enter_context(LoraRetriever.open(pool, **settings))
        console.print_problems(opened.pool.problems)
        if stream:
            submission = opened.submit(rows[0]["inputs"], adapters=named, **how)
            console.print_stream(submission)
            return
        file = stack.enter_context(AnswerFile(output)) if output else None
        advance = stack.enter_context(console.progress("generating", n * len(rows)))
        for position, completion in opened.stream([row["inputs"] for row in rows], adapters=named, **how):
            key = position, completion.index
            answers[key] = console.completion_json(rows[position], completion)
            if file:
                file.add(answers[key])
            completions[key] = completion
            advance()
        if file:
            file.finish(answers[key] for key in sorted(answers))
            return
    for key in sorted(completions):
        if as_json:
            console.print_json(answers[key])
        else:
            console.print_completion(completions[key])


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
