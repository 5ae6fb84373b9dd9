"""Task files: one JSON object a line with a prompt, its reference answer and how to score it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loraretriever.errors import InvalidInputError
from loraretriever.jsonl import read_jsonl

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
    examples = []
    for number, row in read_jsonl(path):
        try:
            example = Example(**{field: row[field] for field in Example.__slots__})
        except KeyError as error:
            fields = ", ".join(Example.__slots__)
            raise InvalidInputError(f"{path}:{number} lacks {error}; expected an object with {fields}.") from error
        if example.metric not in METRICS:
            raise InvalidInputError(
                f"{path}:{number} has the metric {example.metric!r}; expected one of {', '.join(METRICS)}."
            )
        examples.append(example)
    return examples
