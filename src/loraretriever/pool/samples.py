"""Where an adapter's samples come from: the caller, a JSONL file, or else the model card and the description."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from loraretriever.errors import InvalidInputError
from loraretriever.jsonl import parse_jsonl
from loraretriever.types import Sample

SAMPLES_FILE = "samples.jsonl"
MAX_SAMPLES = 1000
MAX_CHARACTERS = 20_000
MAX_FILE_BYTES = 64 << 20
_FIELDS = ("inputs", "text", "prompt")
_GIVEN_SOURCES = ("given", "feedback")
_SOURCES = (*_GIVEN_SOURCES, "model_card", "description", "name")
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
    return _checked([sample for _, sample in _read_lines(file)], str(file))


def write_samples(samples: Sequence[Sample]) -> str:
    """The text of a JSONL file from which `read_samples` reads the same samples."""
    return "".join(_line_of(sample) + "\n" for sample in samples)


def rewrite_samples(file: Path, samples: Sequence[Sample]) -> str:
    """The text of a samples file after its samples were changed to these: lines of those that stay, stay as they are.

    Raises:
        InvalidInputError: the file cannot be read.
    """
    wanted = {(sample.text, sample.counter) for sample in samples}
    lines = [(line, (sample.text, sample.counter)) for line, sample in _read_lines(file)]
    kept = [line for line, key in lines if key in wanted]
    there = {key for _, key in lines}
    new = [_line_of(sample) for sample in samples if (sample.text, sample.counter) not in there]
    return "".join(line + "\n" for line in kept + new)


def is_given(sample: Sample) -> bool:
    """Whether a user gave the sample; others are derived from what came with the adapter."""
    return sample.source in _GIVEN_SOURCES


def with_added(old: Sequence[Sample], new: Sequence[Sample], name: str) -> list[Sample]:
    """An adapter's samples with more of them; what it has already counts once.

    Raises:
        InvalidInputError: one cannot be used, or is a sample and a counter sample at once, or there are too many.
    """
    return _checked([*old, *new], f"adapter {name!r}")


def new_samples(texts: Iterable[str], counter: bool, source: str) -> list[Sample]:
    """Samples, or counter samples, from strings; repeated ones count once.

    Raises:
        InvalidInputError: there is none, there are too many, one cannot be used, or the source is unknown.
    """
    if source not in _SOURCES:
        raise InvalidInputError(f"source is {source!r}; expected one of {', '.join(_SOURCES)}.")
    return [Sample(sample.text, source, counter) for sample in given_samples(texts)]


def check_prompt(prompt: object) -> str:
    """A prompt that could be a sample.

    Raises:
        InvalidInputError: it is empty, too long or not text.
    """
    return _check_text(prompt, "prompt")


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
    text, source, counter = row[names[0]], row.get("source"), row.get("counter", False)
    if not isinstance(text, str):
        raise InvalidInputError(f"{where}: {names[0]} is {text!r:.80}; expected a string.")
    if not isinstance(counter, bool):
        raise InvalidInputError(f"{where}: counter is {counter!r:.80}; expected true or false.")
    return Sample(_check_text(text, where), source if source in _SOURCES else "given", counter)


def _read_lines(file: Path) -> Iterator[tuple[str, Sample]]:
    """Each line of a samples file that is not blank, as it is, and the sample that it gives."""
    try:
        with file.open("rb") as handle:
            content = handle.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise InvalidInputError(f"{file} has more than {MAX_FILE_BYTES:,} bytes. Is it the right file?")
        text = content.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"cannot read {file}: {error}. Expected a JSONL file in UTF-8.") from error
    lines = text.split("\n")
    for number, row in parse_jsonl(text, str(file)):
        yield lines[number - 1], _sample_of(row, f"{file}:{number}")


def _line_of(sample: Sample) -> str:
    fields: dict[str, object] = {"inputs": sample.text, "source": sample.source}
    return json.dumps(fields | ({"counter": True} if sample.counter else {}), ensure_ascii=False)


def _check_text(text: object, where: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise InvalidInputError(f"{where}: the sample is {text!r}; expected some text.")
    if len(text) > MAX_CHARACTERS:
        raise InvalidInputError(f"{where}: the sample has {len(text)} characters; expected at most {MAX_CHARACTERS}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"{where}: the sample is not Unicode text: {error}.") from error
    return text


def _checked(samples: Sequence[Sample], where: str) -> list[Sample]:
    """The samples, each once, and after them the counter samples."""
    for position, sample in enumerate(samples, 1):
        _check_text(sample.text, f"{where}, sample {position}")
    unique: dict[str, Sample] = {}
    for sample in samples:
        if unique.setdefault(sample.text, sample).counter != sample.counter:
            raise InvalidInputError(
                f"{where}: {sample.text!r:.80} is a sample and a counter sample at once; expected one of them. Remove "
                "the other one first."
            )
    if all(sample.counter for sample in samples):
        raise InvalidInputError(f"{where}: there is no sample; expected at least one prompt the adapter is meant for.")
    if len(unique) > MAX_SAMPLES:
        raise InvalidInputError(f"{where}: {len(unique)} samples; expected at most {MAX_SAMPLES} (20 do).")
    return sorted(unique.values(), key=lambda sample: sample.counter)


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
