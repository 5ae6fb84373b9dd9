"""What a measurement of retrieval reads: each adapter's samples, and test prompts with the adapter that is right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraretriever.errors import InvalidInputError
from loraretriever.jsonl import read_jsonl
from loraretriever.pool import Pool

PER_ADAPTER = 20


@dataclass(frozen=True, slots=True)
class TaskSamples:
    """What one adapter is known by."""

    texts: tuple[str, ...]
    counter_texts: tuple[str, ...] = ()
    domain: str | None = None


@dataclass(frozen=True, slots=True)
class RetrievalData:
    """Samples by adapter, test prompts with their adapters, and prompts that no adapter is meant for."""

    samples: Mapping[str, TaskSamples]
    prompts: tuple[str, ...]
    tasks: tuple[str, ...]
    off_topic: tuple[str, ...] = ()

    @property
    def repeated(self) -> int:
        """Test prompts that are also a sample of their adapter, which makes them easier."""
        pairs = zip(self.prompts, self.tasks, strict=True)
        return sum(prompt in self.samples[task].texts for prompt, task in pairs)


def read_samples(paths: Sequence[Path], per_adapter: int = PER_ADAPTER) -> dict[str, TaskSamples]:
    """The first distinct samples of each adapter, from JSONL files and folders of them.

    A line's adapter is its `adapter`, or else its `task`, or else the file's name.

    Raises:
        InvalidInputError: a file cannot be read, a line cannot be used, or there is no sample.
    """
    texts: dict[str, list[str]] = {}
    domains: dict[str, str | None] = {}
    for path, number, row in _rows(paths):
        name = _name(row, path, number, ("adapter", "task")) or path.stem
        mine = texts.setdefault(name, [])
        text = _text(row, path, number)
        if len(mine) < per_adapter and text not in mine:
            mine.append(text)
        domain = row.get("domain")
        domains.setdefault(name, domain if isinstance(domain, str) else None)
    if not texts:
        raise InvalidInputError(f"no samples in {_listed(paths)}; expected lines with `adapter` and `inputs`.")
    return {name: TaskSamples(tuple(texts[name]), domain=domains[name]) for name in sorted(texts)}


def pool_samples(pool: Pool, per_adapter: int | None = None) -> dict[str, TaskSamples]:
    """The samples of a pool's enabled adapters.

    Raises:
        InvalidInputError: there is none.
    """
    found = {}
    for adapter in pool.list(enabled_only=True):
        texts = tuple(sample.text for sample in pool.samples(adapter.name)[:per_adapter])
        counters = tuple(sample.text for sample in pool.counter_samples(adapter.name))
        if texts:
            found[adapter.name] = TaskSamples(texts, counters)
    if not found:
        raise InvalidInputError(f"no enabled adapter in {pool.location} has samples; add some, or give --samples.")
    return found


def read_data(
    samples: Mapping[str, TaskSamples], test: Sequence[Path], off_topic: Sequence[Path] = ()
) -> RetrievalData:
    """Test prompts, `inputs` and `task` in each line; those of unknown tasks count as off-topic, as does a task null.

    Raises:
        InvalidInputError: a file cannot be read, a line cannot be used, or no prompt has an adapter.
    """
    pairs: list[tuple[str, str]] = []
    others: list[str] = []
    for path, number, row in _rows(test):
        if "task" not in row:
            raise InvalidInputError(f"{path}:{number} lacks 'task'; expected an adapter's name, or null for none.")
        task, text = _name(row, path, number, ("task",)), _text(row, path, number)
        if task in samples and task is not None:
            pairs.append((text, task))
        else:
            others.append(text)
    if not pairs:
        raise InvalidInputError(
            f"no task in {_listed(test)} is among the {len(samples)} adapters ({_listed(sorted(samples)[:3])} ...); "
            "expected the adapters' names in `task`."
        )
    others += [_text(row, path, number) for path, number, row in _rows(off_topic)]
    return RetrievalData(samples, tuple(text for text, _ in pairs), tuple(task for _, task in pairs), tuple(others))


def _rows(paths: Sequence[Path]) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    for path in paths:
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise InvalidInputError(f"the folder {path} has no file *.jsonl; expected some.")
        for file in files:
            for number, row in read_jsonl(file):
                yield file, number, row


def _text(row: Mapping[str, Any], path: Path, number: int) -> str:
    text = row.get("inputs")
    if not isinstance(text, str) or not text.strip():
        raise InvalidInputError(f"{path}:{number} has {str(text)[:60]!r} in `inputs`; expected a prompt.")
    return text


def _name(row: Mapping[str, Any], path: Path, number: int, fields: Sequence[str]) -> str | None:
    """What the first of these fields that is there says; None when none is, or it is null."""
    for field in fields:
        value = row.get(field)
        if value is None:
            continue
        if not isinstance(value, str) or not value.strip():
            raise InvalidInputError(f"{path}:{number} has {str(value)[:60]!r} in `{field}`; expected a name.")
        return value
    return None


def _listed(things: Sequence[object]) -> str:
    return ", ".join(map(str, things)) or "nothing"
