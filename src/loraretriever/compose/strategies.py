"""Strategies: from ranked hits, best first, to a composition.

Third parties add a strategy by an entry point in the group `loraretriever.strategies` whose object is a
`Strategy`, such as a plain function; the entry point's name is the strategy's name.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol

from loraretriever.errors import InvalidInputError
from loraretriever.types import Composition, Gate, Hit, Merge, Mixer

ENTRY_POINT_GROUP = "loraretriever.strategies"


class Strategy(Protocol):
    """A rule that turns hits into a composition."""

    def __call__(self, hits: Sequence[Hit], weights: Sequence[float]) -> Composition:
        """Compose.

        Args:
            hits: at least one, best first.
            weights: one per hit, summing to 1 when they come from scores.
        """
        ...


def selection(hits: Sequence[Hit], weights: Sequence[float]) -> Composition:
    """The best adapter alone (LoraRetriever, section 3.3)."""
    return Composition("selection", (hits[0].adapter,), (1.0,))


def mixture(hits: Sequence[Hit], weights: Sequence[float]) -> Composition:
    """The weighted sum of the adapters' outputs (LoraRetriever, equation 5)."""
    return Composition("mixture", tuple(hit.adapter for hit in hits), tuple(weights), Mixer.OUTPUTS)


def fusion(hits: Sequence[Hit], weights: Sequence[float]) -> Composition:
    """The weighted average of the adapters' parameters, A and B each (LoraRetriever, equation 4)."""
    return Composition("fusion", tuple(hit.adapter for hit in hits), tuple(weights), Mixer.PARAMETERS)


def merging(merge: Merge, hits: Sequence[Hit], weights: Sequence[float]) -> Composition:
    """One new adapter made of the adapters by a method of `compose/merge.py`.

    One adapter alone acts with its weight, as in a mixture: all methods leave it as it is.
    """
    adapters = tuple(hit.adapter for hit in hits)
    return Composition(merge.method, adapters, tuple(weights), merge=merge if len(hits) > 1 else None)


def is_gate(strategy: str) -> bool:
    """Whether a strategy, with options or without, weighs the adapters anew for every token."""
    return strategy.partition(";")[0] in GATING


def gating(gate: Gate, hits: Sequence[Hit], weights: Sequence[float]) -> Composition:
    """The adapters weighed anew for every token by a gate of `batch/gates.py`; the weights are those before.

    One adapter alone has the weight 1.
    """
    adapters = tuple(hit.adapter for hit in hits)
    if len(adapters) == 1:
        return Composition(gate.kind, adapters, (1.0,))
    return Composition(gate.kind, adapters, tuple(weights), gate=gate)


# Of the merges, those that take seconds, and not many minutes, for a model with billions of parameters.
MERGING = ("dare_linear", "dare_ties", "lego", "svd", "ties")
# Arrow's top k is that of PEFT, and SpectR's the same. Of the two that are trained, all adapters act.
GATING: Mapping[str, Gate] = {
    gate.kind: gate for gate in (Gate("arrow", top_k=3), Gate("spectral", top_k=3), Gate("ramole"), Gate("moe"))
}
BUILT_IN: Mapping[str, Strategy] = {
    "selection": selection,
    "mixture": mixture,
    "fusion": fusion,
    **{method: functools.partial(merging, Merge(method)) for method in MERGING},
    **{kind: functools.partial(gating, gate) for kind, gate in GATING.items()},
}
_ALL = "all"  # how an option says None


def _count(value: str) -> int | None:
    return None if value == _ALL else int(value)


_Readers = Mapping[str, Callable[[str], float | int | None]]
_MERGE_OPTIONS: _Readers = {"density": float, "rank": int, "seed": int}
_GATE_OPTIONS: _Readers = {"top_k": _count, "temperature": float}
_EXAMPLES = {"density": 0.3, "top_k": 2}


@functools.cache
def _plug_ins() -> Mapping[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


def strategy_names() -> list[str]:
    """Names of the built-in strategies and of those of installed packages."""
    return sorted({*BUILT_IN, *_plug_ins()})


def get_strategy(name: str) -> Strategy:
    """The strategy of that name; a package cannot replace a built-in one.

    Merges and gates take options, which are those of `Merge` and `Gate`: "ties;density=0.3",
    "dare_ties;density=0.2,seed=1", "arrow;top_k=2,temperature=0.5", "arrow;top_k=all".

    Raises:
        InvalidInputError: there is none, it does not take these options, or the package that has it fails.
    """
    name, has_options, options = name.partition(";")
    if has_options:
        return _with_options(name, options)
    if name in BUILT_IN:
        return BUILT_IN[name]
    point = _plug_ins().get(name)
    if point is None:
        raise InvalidInputError(f"unknown strategy {name!r}; expected one of {', '.join(strategy_names())}.")
    try:
        strategy: Strategy = point.load()
    except Exception as error:  # a package of somebody else's: anything can go wrong while it is imported
        raise InvalidInputError(
            f"strategy {name!r} cannot be loaded from {point.value}: {error}; mend or remove that package."
        ) from error
    return strategy


def composition_options(composition: Composition) -> str:
    """Options of its merge or gate that are not the defaults, as `get_strategy` reads them: "density=0.3", or ""."""
    if composition.merge is not None:
        return _changed(composition.merge, Merge(composition.merge.method), _MERGE_OPTIONS)
    if composition.gate is not None:
        kind = composition.gate.kind
        return _changed(composition.gate, GATING.get(kind, Gate(kind)), _GATE_OPTIONS)
    return ""


def _changed(method: Merge | Gate, default: Merge | Gate, readers: _Readers) -> str:
    values = {option: getattr(method, option) for option in readers}
    return ",".join(
        f"{option}={_ALL if value is None else repr(value)}"
        for option, value in values.items()
        if value != getattr(default, option)
    )


def _with_options(name: str, options: str) -> Strategy:
    if name in MERGING:
        return functools.partial(merging, Merge(name, **_values(name, options, _MERGE_OPTIONS)))
    if name in GATING:
        return functools.partial(gating, replace(GATING[name], **_values(name, options, _GATE_OPTIONS)))
    raise InvalidInputError(
        f"strategy {name!r:.200} was given the options {options!r:.200}; expected none, or one of the merges "
        f"{', '.join(MERGING)} or the gates {', '.join(GATING)}."
    )


def _values(name: str, options: str, readers: _Readers) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for part in options.split(","):
        option, _, value = (each.strip() for each in part.partition("="))
        try:
            values[option] = readers[option](value)
        except (KeyError, ValueError):
            raise InvalidInputError(
                f"strategy {name!r} has the option {part!r:.200}; expected {', '.join(readers)} with a number, "
                f"such as {next(iter(readers))}={_EXAMPLES[next(iter(readers))]}."
            ) from None
    return values


def compose_explicit(strategy: str, weights: Mapping[str, float]) -> Composition:
    """A composition of adapters and weights that the caller names; all strategies but selection use them as given.

    Raises:
        InvalidInputError: no adapter, an unknown strategy, or a weight that is not a finite number.
    """
    if not weights:
        raise InvalidInputError("no adapters were named; expected at least one, such as sql=0.7,german=0.3.")
    for adapter, weight in weights.items():
        if not math.isfinite(weight):
            raise InvalidInputError(f"the weight of {adapter!r} is {weight}; expected a finite number.")
    hits = [Hit(adapter, weight) for adapter, weight in weights.items()]
    ordered = sorted(hits, key=lambda hit: -hit.score)
    return get_strategy(strategy)(ordered, [hit.score for hit in ordered])
