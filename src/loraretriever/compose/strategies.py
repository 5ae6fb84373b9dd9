"""Strategies: from ranked hits, best first, to a composition.

Third parties add a strategy by an entry point in the group `loraretriever.strategies` whose object is a
`Strategy`, such as a plain function; the entry point's name is the strategy's name.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol

from loraretriever.errors import InvalidInputError
from loraretriever.types import Composition, Hit, Merge, Mixer

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


# Of the merges, those that take seconds, and not many minutes, for a model with billions of parameters.
MERGING = ("dare_linear", "dare_ties", "svd", "ties")
BUILT_IN: Mapping[str, Strategy] = {
    "selection": selection,
    "mixture": mixture,
    "fusion": fusion,
    **{method: functools.partial(merging, Merge(method)) for method in MERGING},
}
_OPTIONS: Mapping[str, Callable[[str], float | int]] = {"density": float, "rank": int, "seed": int}


@functools.cache
def _plug_ins() -> Mapping[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


def strategy_names() -> list[str]:
    """Names of the built-in strategies and of those of installed packages."""
    return sorted({*BUILT_IN, *_plug_ins()})


def get_strategy(name: str) -> Strategy:
    """The strategy of that name; a package cannot replace a built-in one.

    Merges take options, which are those of `Merge`: "ties;density=0.3", "dare_ties;density=0.2,seed=1".

    Raises:
        InvalidInputError: there is none, it does not take these options, or the package that has it fails.
    """
    name, has_options, options = name.partition(";")
    if has_options:
        return functools.partial(merging, _merge(name, options))
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


def merge_options(merge: Merge) -> str:
    """The options that are not the default ones, as `get_strategy` reads them: "density=0.3,seed=1", or ""."""
    default = Merge(merge.method)
    return ",".join(
        f"{option}={getattr(merge, option)!r}"
        for option in _OPTIONS
        if getattr(merge, option) != getattr(default, option)
    )


def _merge(method: str, options: str) -> Merge:
    if method not in MERGING:
        raise InvalidInputError(
            f"strategy {method!r:.200} was given the options {options!r:.200}; expected none, or one of the merges "
            f"{', '.join(MERGING)}."
        )
    values: dict[str, Any] = {}
    for part in options.split(","):
        option, _, value = (each.strip() for each in part.partition("="))
        try:
            values[option] = _OPTIONS[option](value)
        except (KeyError, ValueError):
            raise InvalidInputError(
                f"strategy {method!r} has the option {part!r:.200}; expected {', '.join(_OPTIONS)} with a number, "
                "such as density=0.3."
            ) from None
    return Merge(method, **values)


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
