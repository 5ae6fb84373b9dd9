from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint

import pytest

from loraretriever.compose import compose_explicit, cover, get_strategy, strategies, strategy_names, weigh
from loraretriever.compose.merge import MERGES
from loraretriever.errors import InvalidInputError
from loraretriever.types import Composition, Gate, Hit, Merge, Mixer

HITS = [Hit("a", 0.9, 2.5), Hit("b", 0.7, 1.0), Hit("c", 0.6, -0.5)]


def test_selection_takes_the_best() -> None:
    assert get_strategy("selection")(HITS, [0.5, 0.3, 0.2]) == Composition("selection", ("a",), (1.0,), Mixer.OUTPUTS)


@pytest.mark.parametrize(("name", "mixer"), [("mixture", Mixer.OUTPUTS), ("fusion", Mixer.PARAMETERS)])
def test_mixture_and_fusion_take_all(name: str, mixer: Mixer) -> None:
    assert get_strategy(name)(HITS, [0.5, 0.3, 0.2]) == Composition(name, ("a", "b", "c"), (0.5, 0.3, 0.2), mixer)


@pytest.mark.parametrize("name", ["ties", "dare_linear", "dare_ties", "svd"])
def test_merges_take_all(name: str) -> None:
    expected = Composition(name, ("a", "b", "c"), (0.5, 0.3, 0.2), merge=Merge(name))
    assert get_strategy(name)(HITS, [0.5, 0.3, 0.2]) == expected
    assert name in MERGES and name in strategy_names()
    assert compose_explicit(name, {"b": -0.3, "a": 1.7}) == Composition(
        name, ("a", "b"), (1.7, -0.3), merge=Merge(name)
    )


@pytest.mark.parametrize("name", strategies.MERGING)
def test_a_merge_of_one_is_none(name: str) -> None:
    assert get_strategy(name)(HITS[:1], [1.0]) == Composition(name, ("a",), (1.0,), Mixer.OUTPUTS)
    assert compose_explicit(name, {"a": 0.7}) == Composition(name, ("a",), (0.7,), Mixer.OUTPUTS)


@pytest.mark.parametrize(("name", "top_k"), [("arrow", 3), ("spectral", 3), ("ramole", None), ("moe", None)])
def test_gates_take_all_with_the_weights_given(name: str, top_k: int | None) -> None:
    expected = Composition(name, ("a", "b", "c"), (0.5, 0.3, 0.2), gate=Gate(name, top_k))
    assert get_strategy(name)(HITS, [0.5, 0.3, 0.2]) == expected
    assert name in strategy_names()
    assert get_strategy(f"{name};top_k=2, temperature=0.5")(HITS, [0.5, 0.3, 0.2]).gate == Gate(name, 2, 0.5)
    assert get_strategy(f"{name};top_k=all")(HITS, [0.5, 0.3, 0.2]).gate == Gate(name, None)


@pytest.mark.parametrize("name", strategies.GATING)
def test_a_gate_of_one_is_that_adapter(name: str) -> None:
    assert get_strategy(name)(HITS[:1], [0.4]) == Composition(name, ("a",), (1.0,))
    assert compose_explicit(f"{name};top_k=1", {"a": 0.7}) == Composition(name, ("a",), (1.0,))


@pytest.mark.parametrize(
    ("strategy", "problem"),
    [
        ("arrow;density=0.3", "option 'density=0.3'; expected top_k, temperature with a number, such as top_k=2"),
        ("arrow;top_k=some", "option 'top_k=some'"),
        ("arrow;top_k", "option 'top_k'"),
        ("ties;top_k=2", "option 'top_k=2'; expected density, rank, seed with a number, such as density=0.3"),
        ("ties;rank=all", "option 'rank=all'"),
        ("mixture;top_k=2", "was given the options 'top_k=2'; expected none, or one of the merges"),
    ],
)
def test_options_that_a_strategy_does_not_have(strategy: str, problem: str) -> None:
    with pytest.raises(InvalidInputError, match=problem):
        get_strategy(strategy)


def test_uniform_weights() -> None:
    assert weigh(HITS, "uniform", 1.0) == (1 / 3,) * 3


def test_score_weights_are_a_softmax_of_the_logits() -> None:
    powers = [math.exp(hit.logit / 0.7) for hit in HITS]
    assert weigh(HITS, "score", 0.7) == pytest.approx([power / sum(powers) for power in powers])
    assert weigh(HITS, "score", 1e-9) == pytest.approx([1, 0, 0])
    assert weigh([Hit("a", 0.5, 5000.0), Hit("b", 0.5, 4999.0)], "score", 1e-3) == pytest.approx([1, 0])
    shifted = [Hit(hit.adapter, hit.score, hit.logit - 3000) for hit in HITS]
    assert weigh(shifted, "score", 1.0) == pytest.approx(weigh(HITS, "score", 1.0)), "only differences count"
    assert weigh(HITS[:1], "score", 1.0) == (1.0,)


@pytest.mark.parametrize(
    ("weights", "coverage", "kept"),
    [
        ((0.6, 0.3, 0.1), 0.95, (0, 1, 2)),
        ((0.6, 0.3, 0.1), 0.9, (0, 1)),
        ((0.6, 0.3, 0.1), 0.61, (0, 1)),
        ((0.6, 0.3, 0.1), 0.6, (0,)),
        ((0.6, 0.3, 0.1), 1e-6, (0,)),
        ((0.6, 0.3, 0.1), 1.0, (0, 1, 2)),
        ((0.1, 0.3, 0.6), 0.9, (2, 1)),
        ((1.0, 0.0, 0.0), 1.0, (0,)),
        ((1 / 3, 1 / 3, 1 / 3), 0.5, (0, 1, 2)),
    ],
)
def test_cover_keeps_the_fewest_hits_that_have_the_share(
    weights: tuple[float, ...], coverage: float, kept: tuple[int, ...]
) -> None:
    hits, left = cover(HITS, weights, coverage)
    assert hits == tuple(HITS[i] for i in kept)
    share = sum(weights[i] for i in kept)
    assert left == pytest.approx([weights[i] / share for i in kept])
    assert sum(left) == pytest.approx(1)


def test_cover_of_one_hit() -> None:
    assert cover(HITS[:1], (1.0,), 0.95) == ((HITS[0],), (1.0,))


@pytest.mark.parametrize(("weighting", "temperature"), [("best", 1.0), ("score", 0.0), ("score", math.nan)])
def test_bad_weighting(weighting: str, temperature: float) -> None:
    with pytest.raises(InvalidInputError, match="expected"):
        weigh(HITS, weighting, temperature)


def test_explicit_weights_are_used_as_given() -> None:
    assert compose_explicit("mixture", {"b": 0.3, "a": 1.7}) == Composition("mixture", ("a", "b"), (1.7, 0.3))


@pytest.mark.parametrize(
    ("strategy", "weights"), [("mixture", {}), ("mixture", {"a": math.inf}), ("unheard-of", {"a": 1.0})]
)
def test_bad_explicit_compositions(strategy: str, weights: dict[str, float]) -> None:
    with pytest.raises(InvalidInputError, match="expected"):
        compose_explicit(strategy, weights)


def best_two(hits: list[Hit], weights: list[float]) -> Composition:
    return Composition("best-two", tuple(hit.adapter for hit in hits[:2]), (0.5, 0.5))


@pytest.fixture
def plug_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    group = strategies.ENTRY_POINT_GROUP
    points = [
        EntryPoint("best-two", f"{__name__}:best_two", group),
        EntryPoint("selection", f"{__name__}:best_two", group),
        EntryPoint("broken", "no_such_package:strategy", group),
    ]
    monkeypatch.setattr(strategies, "entry_points", lambda group: points)
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    strategies._plug_ins.cache_clear()
    yield
    strategies._plug_ins.cache_clear()


def test_entry_points_add_strategies_but_replace_none(plug_ins: None) -> None:
    assert get_strategy("best-two")(HITS, []).adapters == ("a", "b")
    assert get_strategy("selection")(HITS, []).adapters == ("a",)
    built_in = {"dare_linear", "dare_ties", "fusion", "mixture", "selection", "svd", "ties"}
    built_in |= {"arrow", "spectral", "ramole", "moe", "lego"}
    assert strategy_names() == sorted({"best-two", "broken", *built_in})


def test_a_broken_plug_in_breaks_nothing_else(plug_ins: None) -> None:
    assert get_strategy("mixture") is strategies.mixture
    with pytest.raises(InvalidInputError, match="'broken' cannot be loaded from no_such_package:strategy"):
        get_strategy("broken")
