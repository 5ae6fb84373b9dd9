"""Requests recorded by a server: lines of its log in JSON, or any JSONL file with the same fields."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from loraretriever.compose.canonical import parse_composition
from loraretriever.errors import InvalidInputError
from loraretriever.evaluate.plan.workload import Call
from loraretriever.jsonl import read_jsonl

_LOGGER = "loraretriever.access"


@dataclass(frozen=True, slots=True)
class Trace:
    """What was recorded: requests by arrival, the first at 0, and how many different adapters they use."""

    calls: tuple[Call, ...]
    adapters: int

    @property
    def rate(self) -> float:
        """Requests a second; 0 for a single one."""
        last = self.calls[-1].arrival
        return (len(self.calls) - 1) / last if last else 0.0

    def at(self, rate: float) -> Trace:
        """The same requests at another rate.

        Raises:
            InvalidInputError: the rate is not above 0, or all requests arrive at once.
        """
        if not 0 < rate < math.inf or not self.rate:
            raise InvalidInputError(
                f"the rate is {rate} for a trace with {self.rate:.3g} requests a second; expected both above 0."
            )
        factor = rate / self.rate
        return Trace(tuple(replace(call, arrival=call.arrival / factor) for call in self.calls), self.adapters)


def read_trace(path: Path) -> Trace:
    """The requests of a JSONL file.

    Each line has `time` (seconds, or a date and time in ISO 8601; less `seconds`, if given: the log's lines are
    written at the end), `composition` (as in answers) or `adapters` (a list of names), `prompt_tokens` and
    `completion_tokens`. `finish_reason` "stop" stands for one token more, the end's own. Lines of other loggers, and
    those that say nothing of an answer, are passed over; so are requests for several compositions.

    Raises:
        InvalidInputError: the file cannot be read, a field has another form, or there is no request.
    """
    numbers: dict[str, int] = {}
    rows = sorted(_rows(path, read_jsonl(path)), key=lambda row: row[0])
    if not rows:
        raise InvalidInputError(
            f"{path} has no request with prompt_tokens and completion_tokens; expected lines of the server's log "
            "(log_format json), or objects with time, composition or adapters, prompt_tokens, completion_tokens."
        )
    start = rows[0][0]
    calls = []
    for time, names, prompt, answer in rows:
        adapters = tuple(numbers.setdefault(name, len(numbers)) for name in names)
        calls.append(Call(time - start, adapters, prompt, answer))
    return Trace(tuple(calls), len(numbers))


_Row = tuple[float, tuple[str, ...], int, int]


def _rows(path: Path, lines: Iterable[tuple[int, dict[str, Any]]]) -> Iterable[_Row]:
    for number, row in lines:
        if row.get("logger", _LOGGER) != _LOGGER or row.get("completion_tokens") is None:
            continue
        if row.get("composition") == "several":
            continue
        place = f"{path}:{number}"
        time = _time(place, row) - _number(place, row, "seconds", default=0.0)
        prompt = max(1, int(_number(place, row, "prompt_tokens")))
        answer = int(_number(place, row, "completion_tokens"))
        yield time, _adapters(place, row), prompt, max(1, answer + (row.get("finish_reason") == "stop"))


def _time(place: str, row: Mapping[str, Any]) -> float:
    value = row.get("time")
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value).timestamp()
        except ValueError:
            raise _refusal(place, "time", value, "seconds, or a date and time such as 2026-01-31T12:00:00Z") from None
    return _number(place, row, "time")


def _number(place: str, row: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = row.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise _refusal(place, name, value, "a number, 0 or more")
    return float(value)


def _adapters(place: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    if "adapters" in row:
        names = row["adapters"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise _refusal(place, "adapters", names, "a list of names")
        return tuple(dict.fromkeys(names))
    text = row.get("composition")
    if not isinstance(text, str):
        raise _refusal(place, "composition", text, "one such as mixture(sql=0.7,german=0.3), or adapters")
    try:
        _, weights = parse_composition(text)
    except InvalidInputError as error:
        raise InvalidInputError(f"{place}: {error}") from error
    return tuple(sorted(weights, key=lambda name: -weights[name]))


def _refusal(place: str, name: str, value: object, expected: str) -> InvalidInputError:
    return InvalidInputError(f"{place}: {name} is {value!r:.200}; expected {expected}.")
