from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraretriever.compose import compose_explicit, format_composition, parse_composition, strategies
from loraretriever.errors import InvalidInputError
from loraretriever.types import BASE_COMPOSITION, Composition, Gate, Merge

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}(:[A-Za-z0-9]{1,4})?", fullmatch=True)
weights = st.floats(-1e6, 1e6, allow_nan=False).filter(bool)
merges = st.builds(
    Merge,
    st.sampled_from(strategies.MERGING),
    st.floats(0.01, 1),
    st.none() | st.integers(1, 64),
    st.integers(0, 2**40),
)
gates = st.builds(Gate, st.sampled_from(list(strategies.GATING)), st.none() | st.integers(1, 99), st.floats(0.01, 100))


def read(text: str) -> Composition:
    strategy, adapters = parse_composition(text)
    return compose_explicit(strategy or "mixture", adapters) if adapters else BASE_COMPOSITION


@pytest.mark.parametrize(
    ("composition", "text"),
    [
        (BASE_COMPOSITION, "base"),
        (Composition("selection", ("sql",), (1.0,)), "sql"),
        (Composition("mixture", ("acme:sql",), (1.0,)), "acme:sql"),
        (Composition("mixture", ("sql",), (0.99999,)), "sql"),
        (Composition("mixture", ("sql",), (0.5,)), "mixture(sql=0.5)"),
        (Composition("mixture", ("sql", "german"), (0.7, 0.3)), "mixture(sql=0.7,german=0.3)"),
        (Composition("mixture", ("a", "b"), (2 / 3, 1 / 3)), "mixture(a=0.6667,b=0.3333)"),
        (Composition("fusion", ("a", "b"), (1.5, -0.5)), "fusion(a=1.5,b=-0.5)"),
        (Composition("ties", ("a", "b"), (0.6, 0.4), merge=Merge("ties")), "ties(a=0.6,b=0.4)"),
        (Composition("ties", ("a", "b"), (0.6, 0.4), merge=Merge("ties", 0.3)), "ties(a=0.6,b=0.4;density=0.3)"),
        (
            Composition("dare_ties", ("a", "b"), (0.6, 0.4), merge=Merge("dare_ties", 0.1, 8, 3)),
            "dare_ties(a=0.6,b=0.4;density=0.1,rank=8,seed=3)",
        ),
        (Composition("arrow", ("a", "b"), (0.6, 0.4), gate=Gate("arrow", 3)), "arrow(a=0.6,b=0.4)"),
        (Composition("arrow", ("a", "b"), (0.6, 0.4), gate=Gate("arrow")), "arrow(a=0.6,b=0.4;top_k=all)"),
        (Composition("moe", ("a", "b"), (0.6, 0.4), gate=Gate("moe")), "moe(a=0.6,b=0.4)"),
        (
            Composition("moe", ("a", "b"), (0.6, 0.4), gate=Gate("moe", 1, 0.5)),
            "moe(a=0.6,b=0.4;top_k=1,temperature=0.5)",
        ),
        (Composition("arrow", ("a",), (1.0,)), "a"),
        (Composition("selection", ("base",), (1.0,)), "selection(base=1)"),
    ],
)
def test_text_of_a_composition_and_back(composition: Composition, text: str) -> None:
    assert format_composition(composition) == text
    assert format_composition(read(text)) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mixture(sql,german)", ("mixture", {"sql": 0.5, "german": 0.5})),
        (" mixture ( sql = 0.7 , german=3e-1 ) ", ("mixture", {"sql": 0.7, "german": 0.3})),
        ("base", (None, {})),
        (" sql ", (None, {"sql": 1.0})),
        ("selection(sql)", ("selection", {"sql": 1.0})),
        ("ties(a,b; density = 0.3, seed=1)", ("ties;density=0.3,seed=1", {"a": 0.5, "b": 0.5})),
    ],
)
def test_what_is_read(text: str, expected: tuple[str | None, dict[str, float]]) -> None:
    assert parse_composition(text) == expected


@given(st.dictionaries(names, weights, min_size=1, max_size=5), st.sampled_from(["mixture", "fusion"]))
def test_all_digits_make_the_round_trip_exact(adapters: dict[str, float], strategy: str) -> None:
    composition = compose_explicit(strategy, adapters)
    found, read_weights = parse_composition(format_composition(composition, digits=17))
    assert found in (None, strategy)
    assert read_weights == dict(zip(composition.adapters, composition.weights, strict=True))


@given(st.dictionaries(names, weights, min_size=1, max_size=5), st.sampled_from(["mixture", "fusion"]))
def test_rounded_text_stays_as_it_is(adapters: dict[str, float], strategy: str) -> None:
    text = format_composition(compose_explicit(strategy, adapters))
    found, again = parse_composition(text)
    assert format_composition(Composition(found or strategy, tuple(again), tuple(again.values()))) == text


@given(st.dictionaries(names, weights, min_size=2, max_size=4), merges)
def test_merges_with_options(adapters: dict[str, float], merge: Merge) -> None:
    composition = Composition(merge.method, tuple(adapters), tuple(adapters.values()), merge=merge)
    strategy, read_weights = parse_composition(format_composition(composition, digits=17))
    assert strategy is not None
    assert compose_explicit(strategy, read_weights).merge == merge and read_weights == adapters


@given(st.dictionaries(names, weights, min_size=2, max_size=4), gates)
def test_gates_with_options(adapters: dict[str, float], gate: Gate) -> None:
    composition = Composition(gate.kind, tuple(adapters), tuple(adapters.values()), gate=gate)
    strategy, read_weights = parse_composition(format_composition(composition, digits=17))
    assert strategy is not None
    assert compose_explicit(strategy, read_weights).gate == gate and read_weights == adapters


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no composition"),
        ("two words", "no composition"),
        ("mixture(sql", "no composition"),
        ("mixture(sql))", "no composition"),
        ("(sql)", "no composition"),
        ("sql=1", "no composition"),
        ("mixture(a(b))", "no composition"),
        ("mixture()", "no adapter's name in ''"),
        ("mixture(sql,)", "no adapter's name in ''"),
        ("mixture(=0.5)", "no adapter's name in '=0.5'"),
        ("mixture(a b=1)", "no adapter's name in 'a b=1'"),
        ("mixture(sql,sql)", "'sql' twice"),
        ("mixture(sql=0.5,german)", "gives 'german' no weight"),
        ("mixture(sql=much)", "the weight 'much'"),
        ("mixture(sql=)", "the weight ''"),
        ("mixture(sql=inf)", "the weight 'inf'"),
        ("mixture(sql=1=2)", "the weight '1=2'"),
    ],
)
def test_what_is_no_composition(text: str, problem: str) -> None:
    with pytest.raises(InvalidInputError, match="expected") as error:
        parse_composition(text)
    assert problem in str(error.value)


def test_a_long_text_does_not_fill_the_error() -> None:
    with pytest.raises(InvalidInputError) as error:
        parse_composition("mixture(" + "x " * 100_000)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("strategy", "problem"),
    [
        ("mixture;density=0.3", "'mixture' was given the options"),
        ("ties;", "the option ''"),
        ("ties;depth=3", "the option 'depth=3'"),
        ("ties;rank=0.5", "the option 'rank=0.5'"),
        ("ties;density", "the option 'density'"),
    ],
)
def test_options_that_a_strategy_does_not_take(strategy: str, problem: str) -> None:
    with pytest.raises(InvalidInputError, match="expected") as error:
        compose_explicit(strategy, {"a": 0.5, "b": 0.5})
    assert problem in str(error.value)


def test_weights_are_numbers() -> None:
    assert math.isclose(sum(parse_composition("mixture(a,b,c)")[1].values()), 1)
