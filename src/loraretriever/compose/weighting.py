"""From the scores of the retrieved adapters to their weights, which sum to one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from loraretriever.errors import InvalidInputError
from loraretriever.types import Hit


def uniform(hits: Sequence[Hit], temperature: float) -> tuple[float, ...]:
    """1/k each, as in the paper (LoraRetriever, equation 5). The temperature plays no part."""
    return (1 / len(hits),) * len(hits)


def by_score(hits: Sequence[Hit], temperature: float) -> tuple[float, ...]:
    """Semantics: w_i = exp(s_i / τ) / Σ_j exp(s_j / τ) with the scores s and the temperature τ > 0."""
    best = max(hit.score for hit in hits)
    powers = [math.exp((hit.score - best) / temperature) for hit in hits]
    return tuple(power / sum(powers) for power in powers)


WEIGHTINGS: dict[str, Callable[[Sequence[Hit], float], tuple[float, ...]]] = {"uniform": uniform, "score": by_score}


def weigh(hits: Sequence[Hit], weighting: str, temperature: float) -> tuple[float, ...]:
    """Weights of the hits under the weighting of that name.

    Raises:
        InvalidInputError: the name is unknown, or the temperature is not positive.
    """
    if weighting not in WEIGHTINGS:
        raise InvalidInputError(f"unknown weighting {weighting!r}; expected one of {', '.join(WEIGHTINGS)}.")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise InvalidInputError(f"the weighting's temperature is {temperature}; expected a positive number.")
    return WEIGHTINGS[weighting](hits, temperature)
