"""Weightings against their papers' formulas."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraretriever.compose import round_weights, weigh
from loraretriever.errors import InvalidInputError
from loraretriever.types import Hit


def test_distance_is_the_softmax_of_inverse_distances_over_the_temperature() -> None:
    hits = [Hit("a", 0.9, distance=0.4), Hit("b", 0.5, distance=1.0), Hit("c", 0.5, distance=1.25)]
    powers = [math.exp(1 / (0.3 * d)) for d in (0.4, 1.0, 1.25)]
    assert weigh(hits, "distance", 0.3) == pytest.approx([power / sum(powers) for power in powers])


def test_a_distance_of_zero_takes_all() -> None:
    assert weigh([Hit("a", 1.0, distance=0.0), Hit("b", 0.5, distance=1.0)], "distance", 1.0) == (1.0, 0.0)


def test_distance_needs_a_retriever_that_gives_it() -> None:
    with pytest.raises(InvalidInputError, match="the retriever gave 'a' none; use the retriever 'paper'"):
        weigh([Hit("a", 1.0), Hit("b", 0.5)], "distance", 1.0)


def test_effect_is_each_norm_over_their_sum() -> None:
    hits = [Hit("a", 0.9, effect=1.0), Hit("b", 0.5, effect=3.0)]
    assert weigh(hits, "effect", 1.0) == (0.25, 0.75)
    assert weigh([Hit("a", 0.9, effect=0.0), Hit("b", 0.5, effect=0.0)], "effect", 1.0) == (0.5, 0.5)


@given(
    st.lists(st.floats(0.001, 1), min_size=1, max_size=8),
    st.sampled_from([0.01, 0.05, 0.1, 0.25]),
)
def test_rounded_weights_are_multiples_of_the_same_sum(raw: list[float], step: float) -> None:
    weights = [each / sum(raw) for each in raw]
    hits = [Hit(f"a{i}", weight) for i, weight in enumerate(weights)]
    kept, rounded = round_weights(hits, weights, step)
    if max(weights) - min(weights) < 1e-9:
        assert rounded == tuple(weights)
        return
    assert sum(rounded) == pytest.approx(1)
    assert all(weight > 0 and weight == pytest.approx(round(weight / step) * step) for weight in rounded)
    by_name = dict(zip([hit.adapter for hit in hits], weights, strict=True))
    assert all(abs(by_name[hit.adapter] - weight) < step for hit, weight in zip(kept, rounded, strict=True))
    assert hits[weights.index(max(weights))] in kept


def test_weights_are_left_as_they_are_without_a_step_and_where_they_are_equal() -> None:
    hits = [Hit("a", 1.0), Hit("b", 0.5), Hit("c", 0.2)]
    assert round_weights(hits, [0.61, 0.29, 0.1], 0.0) == (tuple(hits), (0.61, 0.29, 0.1))
    assert round_weights(hits, [1 / 3] * 3, 0.05) == (tuple(hits), (1 / 3,) * 3)
    assert round_weights(hits, [0.61, 0.29, 0.1], 0.05) == (tuple(hits), (0.6, 0.3, 0.1))
    assert round_weights(hits, [0.985, 0.01, 0.005], 0.05) == ((hits[0],), (1.0,))
