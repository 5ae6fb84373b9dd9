"""Answers on disk: one line each, as they come, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loraretriever.compose import format_composition
from loraretriever.errors import InvalidInputError
from loraretriever.jsonl import parse_jsonl
from loraretriever.types import Composition

ANSWERS, CHOICES, RUN = "answers.jsonl", "choices.jsonl", "run.json"
EXACT = 17  # significant digits that keep every weight


@dataclass(frozen=True, slots=True)
class Answer:
    """What one composition answered to one prompt. Methods that compose the same way share it: decoding is greedy."""

    prompt: str  # the prompt's id
    composition: str  # in canonical form, weights exact
    text: str
    tokens: int


def composition_key(composition: Composition) -> str:
    """The text that stands for a composition in the files."""
    return format_composition(composition, EXACT)


class AnswerStore:
    """The answers of one output folder."""

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Open or begin a folder.

        Args:
            folder: made where it is missing.
            facts: what the answers depend on besides prompt and composition: the base model, its dtype, the pool.

        Raises:
            InvalidInputError: the folder holds answers under other facts, or cannot be written.
        """
        self._file = folder / ANSWERS
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _check_facts(folder / RUN, facts)
            self._known = {(each.prompt, each.composition): each for each in _read_lines(self._file)}
        except OSError as error:
            raise InvalidInputError(f"cannot use {folder}: {error}; expected a folder that can be written.") from error

    def get(self, prompt: str, composition: str) -> Answer | None:
        """The answer, if it is known."""
        return self._known.get((prompt, composition))

    def add(self, answers: Sequence[Answer]) -> None:
        """Keep answers, in memory and in the file."""
        with self._file.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
        self._known.update({(answer.prompt, answer.composition): answer for answer in answers})


def _check_facts(file: Path, facts: Mapping[str, Any]) -> None:
    wanted = json.loads(json.dumps(dict(facts)))
    if not file.is_file():
        unfinished = file.with_suffix(".tmp")
        unfinished.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(file)
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if found != wanted:
        known = found if isinstance(found, dict) else {}
        other = [name for name in wanted if known.get(name) != wanted[name]]
        raise InvalidInputError(
            f"{file.parent} holds answers of another run: it differs in {', '.join(other) or 'its form'} (see {file}). "
            "Name another output folder, or delete this one."
        )


def _read_lines(file: Path) -> Iterator[Answer]:
    """The answers of a file. A last line without an end was cut off when a run was killed: it is taken away."""
    if not file.is_file():
        return
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with file.open("r+b") as stream:
            stream.truncate(len(whole))
    for number, row in parse_jsonl(whole.decode("utf-8"), str(file)):
        try:
            yield Answer(str(row["prompt"]), str(row["composition"]), str(row["text"]), int(row["tokens"]))
        except (KeyError, ValueError, TypeError) as error:
            raise InvalidInputError(
                f"{file}:{number} is no answer ({error!r}); expected prompt, composition, text, tokens."
            ) from error
