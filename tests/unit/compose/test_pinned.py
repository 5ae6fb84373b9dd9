from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraretriever.compose import compose_explicit
from loraretriever.compose.pinned import adapter_id, parse_pinned, pinned_name
from loraretriever.errors import InvalidInputError
from loraretriever.types import BASE_COMPOSITION, Composition

DIGESTS = {"sql": "3f9a1c2b0d1e" + "a" * 52, "german": "b7f0c2d41a9e" + "b" * 52, "acme:math": "0" * 64}


def weights_of(composition: Composition) -> dict[str, float]:
    return dict(zip(composition.adapters, composition.weights, strict=True))


def name_of(composition: Composition) -> str:
    return pinned_name(composition, [DIGESTS[name] for name in composition.adapters])


@pytest.mark.parametrize(
    ("strategy", "weights", "expected"),
    [
        ("selection", {"sql": 1.0}, "sql@3f9a1c2b0d1e"),
        ("mixture", {"sql": 1.0}, "sql@3f9a1c2b0d1e"),
        ("mixture", {"sql": 0.7, "german": 0.3}, "mixture(german@b7f0c2d41a9e=0.3,sql@3f9a1c2b0d1e=0.7)"),
        ("fusion", {"acme:math": 0.5, "sql": 0.5}, "fusion(acme:math@000000000000=0.5,sql@3f9a1c2b0d1e=0.5)"),
        (
            "ties;density=0.3",
            {"sql": 0.6, "german": 0.4},
            "ties(german@b7f0c2d41a9e=0.4,sql@3f9a1c2b0d1e=0.6;density=0.3)",
        ),
    ],
)
def test_names(strategy: str, weights: dict[str, float], expected: str) -> None:
    assert name_of(compose_explicit(strategy, weights)) == expected


def test_base_model() -> None:
    assert pinned_name(BASE_COMPOSITION, []) == "base"
    assert parse_pinned("base").composition == BASE_COMPOSITION


@given(
    st.sampled_from(["mixture", "fusion", "ties", "svd;rank=8", "arrow;top_k=1"]),
    st.dictionaries(st.sampled_from(sorted(DIGESTS)), st.floats(-2, 2).filter(bool), min_size=1),
)
def test_a_name_says_all(strategy: str, weights: dict[str, float]) -> None:
    composition = compose_explicit(strategy, weights)
    found = parse_pinned(name_of(composition))
    assert weights_of(found.composition) == weights_of(composition)
    for name, digest in zip(found.composition.adapters, found.digests, strict=True):
        assert DIGESTS[name].startswith(digest)
    assert (found.composition.mixer, found.composition.merge, found.composition.gate) == (
        composition.mixer,
        composition.merge,
        composition.gate,
    )
    assert name_of(found.composition) == name_of(composition)


def test_order_and_strategy_do_not_matter_where_the_result_is_the_same() -> None:
    one = Composition("mixture", ("sql", "german"), (0.7, 0.3))
    other = Composition("of another package", ("german", "sql"), (0.3, 0.7))
    assert name_of(one) == name_of(other)


@pytest.mark.parametrize("name", ["sql", "mixture(sql@3f9a1c2b0d1e=0.7,german=0.3)", "sql@3f9a", "sql@3F9A1C2B0D1E"])
def test_names_without_digests_are_refused(name: str) -> None:
    with pytest.raises(InvalidInputError, match="without its digest"):
        parse_pinned(name)


def test_ids_are_the_same_everywhere() -> None:
    assert adapter_id("sql@3f9a1c2b0d1e") == 2329770107095368443
    assert 1 <= adapter_id("") < 2**62
