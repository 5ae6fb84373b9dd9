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


def by_distance(hits: Sequence[Hit], temperature: float) -> tuple[float, ...]:
    """SemLA (Qorbani et al., arXiv 2503.21780). Semantics: w_i = exp(1 / (d_i τ)) / Σ_j exp(1 / (d_j τ)).

    Raises:
        InvalidInputError: the retriever gives no distances; the paper's formula does.
    """
    distances = [hit.distance for hit in hits]
    if None in distances:
        raise InvalidInputError(
            f"the weighting 'distance' needs distances, and the retriever gave {hits[0].adapter!r} none; use the "
            "retriever 'paper', or the weighting 'score'."
        )
    closeness = [1 / (max(distance or 0.0, _NEAREST) * temperature) for distance in distances]
    powers = [math.exp(each - max(closeness)) for each in closeness]
    return tuple(power / sum(powers) for power in powers)


def by_effect(hits: Sequence[Hit], temperature: float) -> tuple[float, ...]:
    """LoGo (Lee et al., arXiv 2511.07129). Semantics: w_i = e_i / Σ_j e_j, e_i = ‖s_i B_i A_i x‖ at the last token.

    The effects come from the engine, before the weights (`PROBING`). The temperature plays no part.
    """
    effects = [hit.effect or 0.0 for hit in hits]
    total = sum(effects)
    return tuple(effect / total for effect in effects) if total > 0 else uniform(hits, temperature)


PROBING = frozenset({"effect"})  # weightings that need the hits' effects
_NEAREST = 1e-6  # a distance of nothing would have an infinite weight
WEIGHTINGS: dict[str, Callable[[Sequence[Hit], float], tuple[float, ...]]] = {
    "uniform": uniform,
    "score": by_score,
    "distance": by_distance,
    "effect": by_effect,
}


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


def round_weights(
    hits: Sequence[Hit], weights: Sequence[float], step: float
) -> tuple[tuple[Hit, ...], tuple[float, ...]]:
    """Weights that are multiples of a step, of the same sum up to one; hits that are left without weight are left out.

    The largest remainders are rounded up, and the heaviest hit stays. Equal weights come again as they are, and step 0
    rounds nothing.
    """
    if step == 0 or max(weights) - min(weights) < 1e-9:
        return tuple(hits), tuple(weights)
    exact = [weight / step for weight in weights]
    units = [math.floor(each + 1e-9) for each in exact]
    missing = max(0, round(sum(exact)) - sum(units))
    for i in sorted(range(len(exact)), key=lambda i: units[i] - exact[i])[:missing]:
        units[i] += 1
    heaviest = max(range(len(exact)), key=exact.__getitem__)
    units[heaviest] = max(1, units[heaviest])
    kept = [i for i, count in enumerate(units) if count > 0]
    return tuple(hits[i] for i in kept), tuple(round(units[i] * step, 9) for i in kept)
