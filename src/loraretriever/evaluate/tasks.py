"""Task files: one JSON object a line with a prompt, its reference answer and how to score it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loraretriever.errors import InvalidInputError

METRICS = ("em", "rouge", "bleu")


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt (`inputs`), its reference answer (`targets`) and the metric that scores it."""

    inputs: str
    targets: str
    task: str
    domain: str
    metric: str


def read_examples(path: Path) -> list[Example]:
    """All examples of one JSONL file.

    Raises:
        InvalidInputError: the file is missing, or a line is not a complete example.
    """
    if not path.is_file():
        raise InvalidInputError(f"task file {path} does not exist; expected a JSONL file of examples.")
    return list(_parse_lines(path))


def _parse_lines(path: Path) -> Iterator[Example]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            example = Example(**{field: row[field] for field in Example.__slots__})
        except (ValueError, TypeError, KeyError) as error:
            fields = ", ".join(Example.__slots__)
            raise InvalidInputError(
                f"{path}:{number} is not an example ({error!r}); expected a JSON object with the fields {fields}."
            ) from error
        if example.metric not in METRICS:
            raise InvalidInputError(
                f"{path}:{number} has the metric {example.metric!r}; expected one of {', '.join(METRICS)}."
            )
        yield example
