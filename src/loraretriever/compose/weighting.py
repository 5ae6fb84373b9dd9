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
    """Semantics: w_i = exp(s_i / τ) / Σ_j exp(s_j / τ) with the hits' logits s and the temperature τ > 0.

    With the hybrid retriever's logits, largely -½ d² of whitened distances d, this is SemLA's form.
    """
    best = max(hit.logit for hit in hits)
    powers = [math.exp((hit.logit - best) / temperature) for hit in hits]
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


def cover(hits: Sequence[Hit], weights: Sequence[float], coverage: float) -> tuple[tuple[Hit, ...], tuple[float, ...]]:
    """Adaptive k: the fewest hits, heaviest first, that have this share of the weight; their weights sum to one.

    Equal weights are not cut: they say nothing of which hits fit better.
    """
    if max(weights) - min(weights) < 1e-9:
        return tuple(hits), tuple(weights)
    order = sorted(range(len(hits)), key=lambda i: -weights[i])
    total, kept = 0.0, 0
    while total < coverage - 1e-9 and kept < len(order):
        total += weights[order[kept]]
        kept += 1
    return tuple(hits[i] for i in order[:kept]), tuple(weights[i] / total for i in order[:kept])
