"""One adapter for a composition: against the plain formulas, against PEFT, and against the batch's own product."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from loraretriever.compose import compose_explicit
from loraretriever.compose.merge import merge_adapters
from loraretriever.compose.single import single_adapter, single_rank
from loraretriever.errors import InvalidInputError
from loraretriever.types import BASE_COMPOSITION, AdapterWeights, Composition, LoraPair, Mixer

INS, OUTS = 12, 10


def adapter(
    seed: int, rank: int, scaling: float, modules: str = "mn", dtype: torch.dtype = torch.float32
) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        module: LoraPair(
            torch.randn(rank, INS, generator=generator).to(dtype),
            torch.randn(OUTS, rank, generator=generator).to(dtype),
            scaling,
        )
        for module in modules
    }
    return AdapterWeights(f"a{seed}", f"{seed:064x}", pairs)


PARTS = [adapter(0, 2, 2.0), adapter(1, 4, 0.5, "m"), adapter(2, 3, 1.0, "mn", torch.bfloat16)]
WEIGHTS = (0.5, 0.3, 0.2)


def compose(strategy: str, parts: Sequence[AdapterWeights] = PARTS) -> Composition:
    return compose_explicit(strategy, {part.name: weight for part, weight in zip(parts, WEIGHTS, strict=False)})


def update(pair: LoraPair) -> torch.Tensor:
    return pair.scaling * pair.b.double() @ pair.a.double()


def plain(module: str, mixer: Mixer) -> torch.Tensor:
    """The update of a module by the formulas of `Mixer`."""
    pairs = [
        (part.modules[module], weight) for part, weight in zip(PARTS, WEIGHTS, strict=True) if module in part.modules
    ]
    if mixer is Mixer.OUTPUTS:
        return sum((weight * update(pair) for pair, weight in pairs), torch.zeros(OUTS, INS, dtype=torch.double))
    rank = max(len(pair.a) for pair, _ in pairs)
    a, b = torch.zeros(rank, INS, dtype=torch.double), torch.zeros(OUTS, rank, dtype=torch.double)
    for pair, weight in pairs:
        a[: len(pair.a)] += weight * pair.a.double()
        b[:, : len(pair.a)] += weight * pair.scaling * pair.b.double()
    return b @ a


@pytest.mark.parametrize(("strategy", "ranks"), [("mixture", {"m": 9, "n": 5}), ("fusion", {"m": 4, "n": 3})])
def test_plain_formulas(strategy: str, ranks: dict[str, int]) -> None:
    composition = compose(strategy)
    made = single_adapter(PARTS, composition)
    assert {module: len(pair.a) for module, pair in made.modules.items()} == ranks
    assert max(ranks.values()) == single_rank([2, 4, 3], composition)
    for module, pair in made.modules.items():
        assert pair.scaling == 1.0
        torch.testing.assert_close(update(pair), plain(module, composition.mixer), rtol=1e-6, atol=1e-6)


def test_stacked_factors_keep_their_dtype() -> None:
    same = [adapter(0, 2, 2.0, dtype=torch.bfloat16), adapter(1, 4, 0.5, dtype=torch.bfloat16)]
    made = single_adapter(same, compose("mixture", same)).modules["m"]
    assert made.a.dtype == torch.bfloat16
    assert made.b.dtype == torch.float32  # a weight times a number of half precision is none
    assert single_adapter(PARTS, compose("mixture")).modules["m"].a.dtype == torch.float32


@pytest.mark.parametrize("strategy", ["ties;density=0.5", "svd", "dare_linear;seed=3", "lego"])
def test_merges_are_those_of_the_local_engine(strategy: str) -> None:
    composition = compose(strategy)
    assert composition.merge is not None
    made = single_adapter(PARTS, composition)
    expected = merge_adapters(PARTS, composition.weights, composition.merge)
    for module, pair in made.modules.items():
        torch.testing.assert_close(pair.a, expected.modules[module].a)
        torch.testing.assert_close(pair.b, expected.modules[module].b)


def test_reduced_to_its_full_rank_a_mixture_is_as_before() -> None:
    made = single_adapter(PARTS, compose("svd;rank=9"))
    for module, pair in made.modules.items():
        torch.testing.assert_close(update(pair), plain(module, Mixer.OUTPUTS), rtol=1e-4, atol=1e-4)


def test_rank_of_merges() -> None:
    assert single_rank([2, 4, 3], compose("ties")) == 4
    assert single_rank([2, 4, 3], compose("svd;rank=1")) == 1


def test_what_is_no_single_adapter() -> None:
    with pytest.raises(InvalidInputError, match="'arrow' weighs its adapters anew for every token"):
        single_adapter(PARTS, compose("arrow"))
    with pytest.raises(InvalidInputError, match="the base model has no adapters"):
        single_rank([], BASE_COMPOSITION)
