"""The mixed stream of prompts, and which adapters each setting takes away from a prompt."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraretriever.errors import InvalidInputError
from loraretriever.evaluate.experiment.results import TestPrompt
from loraretriever.evaluate.tasks import METRICS, Example, read_examples
from loraretriever.jsonl import read_jsonl
from loraretriever.types import Adapter

SPLITS = ("test", "validation", "train")


@dataclass(frozen=True, slots=True)
class Catalogue:
    """What each adapter of a pool was trained for. An adapter whose task is not known is never taken away."""

    tasks: Mapping[str, str]  # adapter -> task
    domains: Mapping[str, str]  # task -> domain

    def adapters_of(self, task: str) -> tuple[str, ...]:
        """The adapters of a task, in the order of their names."""
        return tuple(sorted(adapter for adapter, of in self.tasks.items() if of == task))

    def excluded(self, task: str, setting: str) -> frozenset[str]:
        """The adapters that a prompt of the task may not use: none (iid), its own (ood), its domain's (strict_ood)."""
        tasks = self.unseen(task, setting)
        return frozenset(adapter for adapter, of in self.tasks.items() if of in tasks)

    def unseen(self, task: str, setting: str) -> frozenset[str]:
        """The tasks whose adapters a prompt of the task may not use."""
        if setting == "iid":
            return frozenset()
        if setting == "ood":
            return frozenset((task,))
        domain = self.domains.get(task)
        tasks = self.domains.keys() | self.tasks.values()
        return frozenset(each for each in tasks if each == task or self.domains.get(each, each) == domain)


def make_catalogue(adapters: Sequence[Adapter], domains: Mapping[str, str]) -> Catalogue:
    """The tasks of the adapters: what a folder's `training.json` says, or else the adapter's own name.

    Args:
        adapters: of the pool.
        domains: of the tasks of the stream; `training.json` adds those of others.
    """
    tasks, known = {}, dict(domains)
    for adapter in adapters:
        record = _training_record(adapter.folder)
        task = record.get("task")
        tasks[adapter.name] = task if isinstance(task, str) else adapter.name
        if isinstance(record.get("domain"), str):
            known.setdefault(tasks[adapter.name], record["domain"])
    return Catalogue(tasks, known)


def _training_record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def read_split(folder: Path, split: str) -> dict[str, list[Example]]:
    """The examples of each task: of `folder/split/*.jsonl`.

    Raises:
        InvalidInputError: the folder has no such split, or a file in it is not a task file.
    """
    files = sorted((folder / split).glob("*.jsonl"))
    if not files:
        raise InvalidInputError(
            f"{folder / split} has no task files; expected one JSONL file per task, in a folder named {split}."
        )
    return {file.stem: read_examples(file) for file in files}


def read_prompts(files: Sequence[Path], tasks: Mapping[str, Sequence[Example]]) -> dict[str, list[Example]]:
    """Prompts of other files (new phrasings, say) by task; domain and metric are the task's where a line lacks them.

    Raises:
        InvalidInputError: a line has no inputs, targets and task, or a task that is not known.
    """
    found: dict[str, list[Example]] = {}
    for file in files:
        for number, row in read_jsonl(file):
            values = [row.get(field) for field in ("inputs", "targets", "task")]
            if not all(isinstance(value, str) for value in values):
                raise InvalidInputError(f"{file}:{number} lacks one of inputs, targets, task; expected texts.")
            inputs, targets, task = map(str, values)
            like = tasks.get(task, [None])[0]
            metric = str(row.get("metric") or (like.metric if like else ""))
            domain = str(row.get("domain") or (like.domain if like else ""))
            if metric not in METRICS or not domain:
                raise InvalidInputError(
                    f"{file}:{number} is of the task {task!r} without a domain, or with the metric {metric!r}; "
                    f"expected a task of the task folder, or a domain and one of {', '.join(METRICS)}."
                )
            found.setdefault(task, []).append(Example(inputs, targets, task, domain, metric))
    return found


def make_stream(
    tasks: Mapping[str, Sequence[Example]], own: Mapping[str, str], per_task: int | None, seed: int
) -> tuple[TestPrompt, ...]:
    """Prompts of all tasks that have an adapter, drawn and mixed by the seed.

    Args:
        tasks: the examples of each task.
        own: the adapter that perfect selection takes for a task; tasks without one are left out.
        per_task: prompts of each task at most.

    Raises:
        InvalidInputError: no task has an adapter.
    """
    stream: list[TestPrompt] = []
    for task, examples in sorted(tasks.items()):
        if task not in own:
            continue
        places = list(range(len(examples)))
        random.Random(f"{seed} {task}").shuffle(places)
        stream += (
            TestPrompt(f"{task}/{place}", each.inputs, each.targets, task, each.domain, each.metric, own[task])
            for place, each in ((place, examples[place]) for place in sorted(places[:per_task]))
        )
    if not stream:
        raise InvalidInputError(
            f"no adapter of the pool is for one of the tasks {', '.join(sorted(tasks))}; an adapter is for the task of "
            "its name, or for the one that training.json in its folder names."
        )
    random.Random(seed).shuffle(stream)
    return tuple(stream)
