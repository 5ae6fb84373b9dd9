"""Where an adapter's samples come from: the caller, a JSONL file, or else the model card and the description."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from loraretriever.errors import InvalidInputError
from loraretriever.jsonl import read_jsonl
from loraretriever.types import Sample

SAMPLES_FILE = "samples.jsonl"
MAX_SAMPLES = 1000
MAX_CHARACTERS = 20_000
MAX_FILE_BYTES = 64 << 20
_FIELDS = ("inputs", "text", "prompt")
_SOURCES = ("given", "model_card", "description", "name")
_CARD_PARAGRAPHS = 3  # the first ones tell what an adapter is for; later ones are about its training
_CARD_CHARACTERS = 500
_CARD_TEXT = 20_000  # characters of a card, after its front matter, that are looked at
_CARD_MATTER = 64_000  # characters of front matter; YAML is slow
# Control characters but tab and newline, halves of surrogate pairs, and what changes the direction of text.
_UNPRINTABLE = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a README.md tells of an adapter: prompts of its widget, and the first paragraphs of its text."""

    prompts: tuple[str, ...] = ()
    paragraphs: tuple[str, ...] = ()


def given_samples(texts: Iterable[str]) -> list[Sample]:
    """Samples from strings; repeated ones count once.

    Raises:
        InvalidInputError: there is none, there are too many, or one is empty, too long or not text.
    """
    if isinstance(texts, str):
        raise InvalidInputError(f"samples is the string {texts[:80]!r}; expected a list of strings.")
    return _checked([Sample(text) for text in texts], "samples")


def read_samples(file: Path) -> list[Sample]:
    """Samples from a JSONL file: each line an object with `inputs`, `text` or `prompt`; empty lines are skipped.

    Raises:
        InvalidInputError: the file cannot be read, or a line cannot be used; the message gives its number.
    """
    samples = [_sample_of(row, f"{file}:{number}") for number, row in read_jsonl(file, MAX_FILE_BYTES)]
    return _checked(samples, str(file))


def write_samples(samples: Sequence[Sample]) -> str:
    """The text of a JSONL file from which `read_samples` reads the same samples."""
    return "".join(
        json.dumps({"inputs": sample.text, "source": sample.source}, ensure_ascii=False) + "\n" for sample in samples
    )


def derived_samples(name: str, card: ModelCard, description: str) -> list[Sample]:
    """Samples for an adapter that came without any: from its card and its description, at last from its name."""
    samples = [Sample(prompt, "model_card") for prompt in card.prompts or card.paragraphs]
    if description.strip():
        samples.append(Sample(description.strip(), "description"))
    if not samples:
        samples.append(Sample(re.sub(r"[-_.]+", " ", name).strip(), "name"))
    return _checked(samples[:MAX_SAMPLES], f"model card of {name}")


def read_card(file: Path | None) -> ModelCard:
    """Read a model card; one that is missing or cannot be understood tells nothing."""
    if file is None:
        return ModelCard()
    try:
        with file.open(encoding="utf-8", errors="replace") as handle:
            text = handle.read(1 << 20)
    except OSError:
        return ModelCard()
    matter, body = _split_front_matter(printable(text))
    return ModelCard(_widget_prompts(matter), _paragraphs(body[:_CARD_TEXT]) or _description(matter))


def printable(text: str) -> str:
    """A text of foreign origin without what a terminal or the database would trip over."""
    return _UNPRINTABLE.sub("", text)


def _sample_of(row: dict[str, Any], where: str) -> Sample:
    names = [name for name in _FIELDS if name in row]
    if not names:
        raise InvalidInputError(f"{where}: {row!r:.80}; expected a JSON object with one of {', '.join(_FIELDS)}.")
    text, source = row[names[0]], row.get("source")
    if not isinstance(text, str):
        raise InvalidInputError(f"{where}: {names[0]} is {text!r:.80}; expected a string.")
    _check_text(text, where)
    return Sample(text, source if source in _SOURCES else "given")


def _check_text(text: object, where: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise InvalidInputError(f"{where}: the sample is {text!r}; expected some text.")
    if len(text) > MAX_CHARACTERS:
        raise InvalidInputError(f"{where}: the sample has {len(text)} characters; expected at most {MAX_CHARACTERS}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"{where}: the sample is not Unicode text: {error}.") from error


def _checked(samples: Sequence[Sample], where: str) -> list[Sample]:
    for position, sample in enumerate(samples, 1):
        _check_text(sample.text, f"{where}, sample {position}")
    unique: dict[str, Sample] = {}
    for sample in samples:
        unique.setdefault(sample.text, sample)
    if not unique:
        raise InvalidInputError(f"{where}: there is no sample; expected at least one prompt the adapter is meant for.")
    if len(unique) > MAX_SAMPLES:
        raise InvalidInputError(f"{where}: {len(unique)} samples; expected at most {MAX_SAMPLES} (20 do).")
    return list(unique.values())


def _split_front_matter(text: str) -> tuple[dict[str, Any], str]:
    match = re.match(r"\s*---\n(.*?)\n---[ \t]*(?:\n|$)", text, re.DOTALL)
    if match is None:
        return {}, text
    matter = None
    if len(match[1]) <= _CARD_MATTER:
        # The base loader makes strings of all scalars: others fail in many ways at values that do not fit their tags.
        with suppress(yaml.YAMLError, ValueError, RecursionError):
            matter = yaml.load(match[1], Loader=yaml.BaseLoader)
    return matter if isinstance(matter, dict) else {}, text[match.end() :]


def _widget_prompts(matter: dict[str, Any]) -> tuple[str, ...]:
    """The front matter's example prompts: `widget: [{text: ...}]` or `widget: [{messages: [{role, content}]}]`."""
    widget = matter.get("widget")
    prompts = []
    for example in widget if isinstance(widget, list) else []:
        if not isinstance(example, dict):
            continue
        messages = example.get("messages")
        turns = messages if isinstance(messages, list) else [{"role": "user", "content": example.get("text")}]
        contents = [turn.get("content") for turn in turns if isinstance(turn, dict) and turn.get("role") == "user"]
        prompts += [printable(text)[:MAX_CHARACTERS] for text in contents[:1] if isinstance(text, str)]
    return tuple(prompt for prompt in prompts if prompt.strip())


def _description(matter: dict[str, Any]) -> tuple[str, ...]:
    description = matter.get("description")
    text = printable(description).strip() if isinstance(description, str) else ""
    return (text[:_CARD_CHARACTERS],) if text else ()


def _paragraphs(body: str) -> tuple[str, ...]:
    """The first paragraphs of prose: without code, comments, headings, tables, pictures and unfilled places."""
    body = re.sub(r"```.*?(```|$)|<!--.*?(-->|$)", "", body, flags=re.DOTALL)
    # The bounds keep hostile text from taking quadratic time.
    body = re.sub(r"!\[[^\]\n]{0,500}\]\([^)\n]{0,500}\)|<[^<>]{0,500}>", "", body)
    body = re.sub(r"\[([^\]\n]{0,500})\]\([^)\n]{0,500}\)", r"\1", body)
    found = []
    for block in re.split(r"\n\s*\n", body):
        lines = [line.strip() for line in block.split("\n")]
        prose = [line for line in lines if line and not re.match(r"#|\||[-=*_]{3,}$", line)]
        prose = [line for line in prose if "more information needed" not in line.lower()]
        text = " ".join(prose)
        if sum(map(str.isalnum, text)) > 3:
            found.append(text[:_CARD_CHARACTERS])
    return tuple(found[:_CARD_PARAGRAPHS])
