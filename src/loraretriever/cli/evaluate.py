"""`loraretriever evaluate`: the paper's experiment on any pool and task folder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraretriever import console
from loraretriever.cli.options import BaseModelOption, DeviceOption, DtypeOption, EncoderOption, JsonOption
from loraretriever.errors import InvalidInputError

if TYPE_CHECKING:
    from loraretriever.evaluate.experiment.results import Results
    from loraretriever.evaluate.experiment.run import Plan
    from loraretriever.evaluate.experiment.setup import Stage

PROMPTS, QUICK_PROMPTS = 40, 3  # of each task


def evaluate(
    tasks: Annotated[
        Path | None,
        typer.Option(
            help="Folder with test/, and for what is trained or chosen train/ and validation/.", metavar="DIR"
        ),
    ] = None,
    pool: Annotated[
        str | None, typer.Option(help="The pool's folder.", metavar="DIR", show_default="the demo's")
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder for answers and report; a run that was stopped goes on there.", metavar="DIR")
    ] = Path("evaluation"),
    split: Annotated[str, typer.Option(help="Which folder of --tasks has the prompts.")] = "test",
    prompts: Annotated[
        list[Path] | None,
        typer.Option(help="JSONL file of prompts to take in place of the split (repeatable): inputs, targets, task."),
    ] = None,
    prompts_per_task: Annotated[
        int | None, typer.Option(min=1, help="Prompts of each task at most.", show_default="40; quick 3")
    ] = None,
    method: Annotated[list[str] | None, typer.Option(help="Only this method (repeatable).", metavar="NAME")] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="Adapters that are retrieved.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of the stream, of random choices, and of training.")] = 0,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="New tokens at most.", show_default="8 more than a task's longest reference"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer prompts, shorter trainings, one timed round.")] = False,
    preset: Annotated[str | None, typer.Option(help="paper48: the paper's own tasks and adapters.")] = None,
    paper: Annotated[
        Path | None, typer.Option(help="Preset: folder with the paper's samples and test prompts.", metavar="DIR")
    ] = None,
    adapters: Annotated[
        str | None,
        typer.Option(help="Preset: folder with the adapters.", metavar="DIR", show_default="from the hub"),
    ] = None,
    size: Annotated[str, typer.Option(help="Preset: 7b or 13b.")] = "7b",
    no_times: Annotated[bool, typer.Option("--no-times", help="Do not take the time of the methods.")] = False,
    no_curve: Annotated[bool, typer.Option("--no-curve", help="Do not measure quality against k.")] = False,
    base_model: BaseModelOption = None,
    encoder: EncoderOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure answer quality of ways to choose and compose adapters over a mixed stream, as the paper does."""
    from loraretriever.engine.memory import keep_freed_memory
    from loraretriever.evaluate.demo import demo_folder
    from loraretriever.evaluate.experiment.report import write_report
    from loraretriever.evaluate.experiment.run import Plan, run
    from loraretriever.evaluate.experiment.setup import Options

    keep_freed_memory()
    options = Options(k=k, seed=seed, max_tokens=max_tokens)
    if quick:
        options = options.quick()
    parts = {"similarity", *(() if no_times else ("times",)), *(() if no_curve else ("curve",))}
    settings = {"base_model": base_model, "encoder": encoder, "device": device, "dtype": dtype}
    plan = Plan(
        pool=Path(pool or demo_folder() / "pool"),
        tasks=tasks or Path(),
        output=output,
        split=split,
        prompts=tuple(prompts or ()),
        per_task=prompts_per_task or (QUICK_PROMPTS if quick else PROMPTS),
        methods=tuple(method) if method else None,
        parts=frozenset(parts),
        settings={name: value for name, value in settings.items() if value is not None},
        options=options,
    )
    stages = _stages(enabled=not as_json)
    if preset is not None:
        results = _run_preset(preset, plan, pool, paper, adapters, size, prompts_per_task, stages)
    elif tasks is None:
        raise InvalidInputError("--tasks is missing; expected the folder of your tasks, with a folder test/ in it.")
    else:
        results = run(plan, stages)
    summary = write_report(results, output)
    if as_json:
        console.print_json(summary)
    else:
        console.print_experiment(summary)
        console.print_note(f"{output / 'report.html'}, report.md, summary.json, answers.jsonl")


def _run_preset(
    name: str,
    plan: Plan,
    pool: str | None,
    paper: Path | None,
    adapters: str | None,
    size: str,
    prompts_per_task: int | None,
    stages: Stage,
) -> Results:
    from loraretriever.evaluate.experiment.paper48 import PROMPTS_PER_TASK, load_paper48
    from loraretriever.evaluate.experiment.paper48_pool import HUB
    from loraretriever.evaluate.experiment.run import run_paper48

    if name != "paper48":
        raise InvalidInputError(f"unknown preset {name!r}; expected paper48.")
    if paper is None:
        raise InvalidInputError(
            "--paper is missing; expected a copy of the repository StyxXuan/LoraRetriever, or a folder with its "
            "samples.jsonl and test.jsonl."
        )
    preset = load_paper48(paper, size)
    options = replace(plan.options, max_tokens=plan.options.max_tokens or preset.sampling.max_tokens)
    plan = replace(
        plan,
        pool=Path(pool) if pool else plan.output / "pool",
        name=preset.name,
        per_task=prompts_per_task or PROMPTS_PER_TASK,
        settings={"base_model": preset.base_model, "dtype": preset.dtype} | dict(plan.settings),
        options=replace(options, render=preset.render),
    )
    return run_paper48(plan, preset, adapters or HUB, stages)


def _stages(enabled: bool) -> Callable[[str, int], AbstractContextManager[Callable[[], None]]]:
    def stage(title: str, steps: int) -> AbstractContextManager[Any]:
        return console.progress(title, steps, enabled=enabled)

    return stage
