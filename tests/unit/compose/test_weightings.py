"""Weightings against their papers' formulas."""

from __future__ import annotations

import math

import pytest

from loraretriever.compose import weigh
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
