"""Compositions as text, as they stand in a request's `model` and in answers: `mixture(sql=0.7,german=0.3)`.

base                               the base model
sql                                one adapter alone, with weight 1
mixture(sql=0.7,german=0.3)        a strategy, adapters, weights
mixture(sql,german)                the same weight for each: 1/2
ties(a=0.6,b=0.4;density=0.3)      a merge with options
arrow(a=0.5,b=0.5;top_k=1)         a gate with options
"""

from __future__ import annotations

import math
import re

from loraretriever.compose.strategies import composition_options
from loraretriever.errors import InvalidInputError
from loraretriever.types import Composition

BASE = "base"
_EXPECTED = (
    "expected `base`, an adapter's name, or a strategy with adapters such as mixture(sql=0.7,german=0.3) or "
    "mixture(sql,german)."
)
_CALL = re.compile(r"\s*([^\s(),;=]+)\s*\(([^();]*)(?:;([^();]*))?\)\s*")
_WORD = re.compile(r"[^\s(),;=]+")


def format_composition(composition: Composition, digits: int | None = 4) -> str:
    """The text of a composition; `parse_composition` reads it, up to the rounding of the weights.

    Args:
        composition: its adapters' names are written as they are.
        digits: significant digits of a weight, without zeros at the end; None: as many as tell it from all others.
    """
    if not composition.adapters:
        return BASE
    weights = [_shortest(weight) if digits is None else f"{weight:.{digits}g}" for weight in composition.weights]
    options = composition_options(composition)
    first = composition.adapters[0]
    if len(weights) == 1 and weights[0] == "1" and not options and first != BASE:
        return first
    pairs = ",".join(f"{name}={weight}" for name, weight in zip(composition.adapters, weights, strict=True))
    return f"{composition.strategy}({pairs}{options and ';' + options})"


def parse_composition(text: str) -> tuple[str | None, dict[str, float]]:
    """The strategy, None where the text names none, and the adapters' weights; no adapters: the base model.

    Options of a merge or a gate stay with the strategy ("ties;density=0.3"), as `get_strategy` takes them. Whether
    strategy and adapters exist is not looked at.

    Raises:
        InvalidInputError: the text is no composition.
    """
    if text.strip() == BASE:
        return None, {}
    if _WORD.fullmatch(text.strip()):
        return None, {text.strip(): 1.0}
    call = _CALL.fullmatch(text)
    if call is None:
        raise InvalidInputError(f"{text!r:.200} is no composition; {_EXPECTED}")
    strategy, inside, options = call.groups()
    strategy = f"{strategy};{''.join(options.split())}" if options is not None else strategy
    return strategy, _weights(text, inside.split(","))


def _shortest(weight: float) -> str:
    return repr(float(weight)).removesuffix(".0")


def _weights(text: str, parts: list[str]) -> dict[str, float]:
    weights: dict[str, float | None] = {}
    for part in parts:
        name, is_given, number = (each.strip() for each in part.partition("="))
        if not _WORD.fullmatch(name):
            raise InvalidInputError(f"{text!r:.200} has no adapter's name in {part!r:.200}; {_EXPECTED}")
        if name in weights:
            raise InvalidInputError(f"{text!r:.200} names {name!r:.200} twice; expected each adapter once.")
        weights[name] = _weight(text, name, number) if is_given else None
    given = {name: weight for name, weight in weights.items() if weight is not None}
    if given and len(given) < len(weights):
        missing = next(name for name in weights if name not in given)
        raise InvalidInputError(
            f"{text!r:.200} gives {missing!r:.200} no weight, but others; expected a weight for all adapters or none."
        )
    return given or dict.fromkeys(weights, 1 / len(weights))


def _weight(text: str, name: str, number: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise InvalidInputError(
            f"{text!r:.200} gives {name!r:.200} the weight {number!r:.200}; expected a finite number, such as 0.7."
        )
    return weight
