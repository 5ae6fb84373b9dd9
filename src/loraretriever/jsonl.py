"""Reads JSONL: one JSON object a line, in UTF-8."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loraretriever.errors import InvalidInputError


def read_jsonl(path: Path, max_bytes: int = -1) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number and the object of each line of a file that is not blank. The file is read at once.

    Args:
        path: the file; it may begin with a byte order mark.
        max_bytes: the most bytes to accept; -1: any number.

    Raises:
        InvalidInputError: the file cannot be read, or (while iterating) a line is not a JSON object.
    """
    try:
        with path.open("rb") as handle:
            content = handle.read(max_bytes + 1 if max_bytes >= 0 else -1)
        text = content.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"cannot read {path}: {error}. Expected a JSONL file in UTF-8.") from error
    if 0 <= max_bytes < len(content):
        raise InvalidInputError(f"{path} has more than {max_bytes:,} bytes. Is it the right file?")
    return parse_jsonl(text, str(path))


def parse_jsonl(text: str, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """As `read_jsonl`, of a text that was read already; `name` stands for it in errors."""
    # Not splitlines: it also splits at U+2028 and others, which may stand inside a JSON string.
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidInputError(f"{name}:{number} is not JSON: {error}; expected a JSON object.") from error
        if not isinstance(row, dict):
            raise InvalidInputError(f"{name}:{number} is {line.strip()[:80]!r}; expected a JSON object.")
        yield number, row
