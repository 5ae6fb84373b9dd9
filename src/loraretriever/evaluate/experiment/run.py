"""The whole experiment: from a pool and a folder of tasks to the report."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from loraretriever.engine.loading import load_local_engine
from loraretriever.errors import InvalidInputError
from loraretriever.evaluate.environment import environment
from loraretriever.evaluate.experiment.answers import AnswerStore
from loraretriever.evaluate.experiment.harness import answer_all, curve, describe, prepare, rankings, time_all
from loraretriever.evaluate.experiment.paper48 import Preset
from loraretriever.evaluate.experiment.paper48_pool import make_pool
from loraretriever.evaluate.experiment.paper48_tables import published
from loraretriever.evaluate.experiment.registry import DEFAULT, make_methods
from loraretriever.evaluate.experiment.results import Results, TestPrompt
from loraretriever.evaluate.experiment.setup import Options, Setup, Stage, facts_of, silent
from loraretriever.evaluate.experiment.similarity import similarity
from loraretriever.evaluate.experiment.stream import (
    Catalogue,
    make_catalogue,
    make_stream,
    read_prompts,
    read_split,
)
from loraretriever.evaluate.tasks import Example
from loraretriever.pipeline import LoraRetriever


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run.

    `tasks` has the folders test, and where they are there validation and train. `prompts` are files to answer in
    place of the split. `methods`: None for all. `parts` are what is done besides the table.
    """

    pool: Path
    tasks: Path
    output: Path
    split: str = "test"
    prompts: tuple[Path, ...] = ()
    per_task: int | None = 40
    methods: tuple[str, ...] | None = None
    name: str = ""
    parts: frozenset[str] = frozenset({"curve", "times", "similarity"})
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Options = field(default_factory=Options)


def run(plan: Plan, stage: Stage = silent) -> Results:
    """Answer, score and time; what the output folder has already is not made again."""
    examples = read_split(plan.tasks, plan.split) if not plan.prompts else {}
    known = examples or read_split(plan.tasks, "test")
    if plan.prompts:
        examples = read_prompts(plan.prompts, known)
    with LoraRetriever.open(plan.pool, **plan.settings) as lr:
        domains = {task: rows[0].domain for task, rows in known.items() if rows}
        catalogue = make_catalogue([each for each in lr.pool.list() if each.enabled], domains)
        own = {task: names[0] for task in examples if (names := catalogue.adapters_of(task))}
        stream = make_stream(examples, own, plan.per_task, plan.options.seed)
        others = {name: _split_or_nothing(plan.tasks, name, own) for name in ("train", "validation")}
        return run_stream(plan, lr, catalogue, stream, others, stage)


def run_paper48(plan: Plan, preset: Preset, adapters: str | Path, stage: Stage = silent) -> Results:
    """The preset: its prompts, its adapters (see `make_pool`), and the published figures beside what comes out.

    The adapters' samples train what is trained, and choose what other experiments choose on validation examples.
    """
    with stage("fetching the adapters", len(preset.samples)) as advance:
        make_pool(preset, plan.pool, adapters, done=advance)
    with LoraRetriever.open(plan.pool, **plan.settings) as lr:
        catalogue = make_catalogue(lr.pool.list(), preset.domains)
        stream = make_stream(preset.examples, preset.own, plan.per_task, plan.options.seed)
        others = {"train": preset.samples, "validation": preset.samples}
        return run_stream(plan, lr, catalogue, stream, others, stage, published(preset.size))


def run_stream(
    plan: Plan,
    lr: LoraRetriever,
    catalogue: Catalogue,
    stream: tuple[TestPrompt, ...],
    others: Mapping[str, Mapping[str, Sequence[Example]]],
    stage: Stage,
    figures: Mapping[tuple[str, str, str, str], float] | None = None,
) -> Results:
    """As `run`, of a stream that is made already."""
    start = time.perf_counter()
    with LoraRetriever.open(plan.pool, **{**plan.settings, "retriever": "paper"}) as paper:
        setup = Setup(
            lr=lr,
            paper=paper,
            prompts=stream,
            catalogue=catalogue,
            options=plan.options,
            folder=plan.output,
            store=AnswerStore(plan.output, facts_of(lr, plan.options, stream)),
            # Merged adapters are not kept on disk: their making takes its time, and that is measured.
            open_engine=lambda routers: load_local_engine(lr.pool, lr.settings, None, routers),
            train=others.get("train", {}),
            validation=others.get("validation", {}),
            stage=stage,
        )
        try:
            methods = prepare(setup, make_methods(plan.methods))
            if not methods:
                raise InvalidInputError("none of the methods can be had with this pool and these tasks; name others.")
            scores, width = answer_all(setup, methods)
            infos = time_all(setup, methods) if "times" in plan.parts else {m.info.name: m.info for m in methods}
            points = curve(setup) if "curve" in plan.parts else ()
            alike = similarity(setup) if "similarity" in plan.parts else None
            ranked = rankings(setup)
        finally:
            setup.close_engine()
    for name, mean in width.items():
        infos[name] = replace(infos[name], adapters_per_prompt=mean)
    about = describe(setup) | {
        "command": _command(),
        "seconds": round(time.perf_counter() - start),
        "split": plan.split if not plan.prompts else ", ".join(file.name for file in plan.prompts),
        "environment": asdict(environment()),
    }
    return Results(
        name=plan.name or plan.pool.name,
        prompts=stream,
        methods=infos,
        scores=scores,
        default=DEFAULT,
        rankings=ranked,
        curve=points,
        similarity=alike,
        about=about,
        published=figures or {},
    )


def _split_or_nothing(folder: Path, split: str, own: Mapping[str, str]) -> Mapping[str, Sequence[Example]]:
    if not (folder / split).is_dir():
        return {}
    return {task: rows for task, rows in read_split(folder, split).items() if task in own}


def _command() -> str:
    return " ".join(["loraretriever", *sys.argv[1:]])
