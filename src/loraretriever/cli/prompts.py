"""What the commands read and write besides their options: prompts, adapter weights, answers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from loraretriever import console
from loraretriever.errors import InvalidInputError
from loraretriever.jsonl import parse_jsonl, read_jsonl


def read_prompts(prompts: list[str] | None, file: Path | None) -> list[dict[str, Any]]:
    """One object per prompt with the field `inputs`, from the arguments and from a JSONL file (`-`: standard input)."""
    rows: list[dict[str, Any]] = [{"inputs": prompt} for prompt in prompts or ()]
    if file is not None:
        lines = parse_jsonl(sys.stdin.read(), "standard input") if str(file) == "-" else read_jsonl(file)
        for number, row in lines:
            if not isinstance(row.get("inputs"), str):
                raise InvalidInputError(
                    f"{file}:{number} has no text in the field `inputs`: {console.shorten(str(row))}"
                )
            rows.append(row)
    if not rows:
        raise InvalidInputError("no prompts; give them as arguments, or as a JSONL file with --input.")
    return rows


def parse_weights(text: str) -> dict[str, float]:
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


class AnswerFile:
    """A JSONL file of answers. Each is kept in FILE.part as it comes; the file itself appears whole, in order."""

    def __init__(self, file: Path) -> None:
        """Open FILE.part.

        Raises:
            InvalidInputError: it cannot be written.
        """
        self._file = file
        self._part = file.parent / f"{file.name}.part"
        try:
            if file.is_dir():
                raise IsADirectoryError("it is a folder")
            self._stream = self._part.open("w", encoding="utf-8")
        except OSError as error:
            raise InvalidInputError(
                f"cannot write {file}: {error}; expected a file in a folder that exists."
            ) from error

    def add(self, answer: dict[str, Any]) -> None:
        """Keep an answer."""
        self._stream.write(console.to_json(answer) + "\n")
        self._stream.flush()

    def finish(self, answers: Iterable[dict[str, Any]]) -> None:
        """Write all answers in their order, and give the file its name."""
        self._stream.seek(0)
        self._stream.truncate()
        self._stream.writelines(console.to_json(answer) + "\n" for answer in answers)
        self._stream.close()
        os.replace(self._part, self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        if error is not None and self._part.is_file():
            if self._part.stat().st_size:
                console.print_note(f"the answers so far are in {self._part}")
            else:
                self._part.unlink()
