"""LoRA-LEGO on constructed adapters: units of rank one that are known to belong together."""

from __future__ import annotations

import math

import pytest
import torch

from loraretriever.compose.merge import merge_adapters
from loraretriever.types import AdapterWeights, LoraPair, Merge


def adapter(name: str, a: torch.Tensor, b: torch.Tensor, scaling: float = 1.0) -> AdapterWeights:
    return AdapterWeights(name, name * 64, {"m": LoraPair(a, b, scaling)})


def update(weights: AdapterWeights) -> torch.Tensor:
    pair = weights.modules["m"]
    return (pair.scaling * pair.b @ pair.a).double()


# Three directions far apart; what the adapters have is near them.
CENTRES = 10 * torch.eye(3, 9)


def near(noise: float, order: list[int], seed: int, scaling: float = 1.0) -> AdapterWeights:
    points = CENTRES[order] + noise * torch.randn(3, 9, generator=torch.Generator().manual_seed(seed))
    return adapter(f"{seed}", points[:, :5].clone(), points[:, 5:].T.clone() / scaling, scaling)


def test_adapters_that_differ_in_the_order_of_their_units_merge_to_themselves() -> None:
    one = near(0.5, [0, 1, 2], 1)
    pair = one.modules["m"]
    other = adapter("2", pair.a[[2, 0, 1]], pair.b[:, [2, 0, 1]])
    for weights in ([0.5, 0.5], [0.9, 0.1]):
        torch.testing.assert_close(
            update(merge_adapters([one, other], weights, Merge("lego"))), update(one), atol=1e-5, rtol=1e-5
        )


def test_clusters_are_averaged_and_keep_the_mean_length_of_their_members() -> None:
    parts = [near(1.0, [0, 1, 2], 1), near(1.0, [1, 2, 0], 2, scaling=4.0), near(1.0, [2, 0, 1], 3)]
    weights = [0.5, 0.3, 0.2]
    everything = [
        (weight, torch.cat([row, part.modules["m"].scaling * column]).double())
        for part, weight in zip(parts, weights, strict=True)
        for row, column in zip(part.modules["m"].a, part.modules["m"].b.T, strict=True)
    ]
    expected = torch.zeros(4, 5, dtype=torch.float64)
    for centre in CENTRES.double():
        place = torch.argmax(CENTRES.double() @ centre)
        mine = [(w, unit) for w, unit in everything if torch.argmax(CENTRES.double() @ unit) == place]
        assert len(mine) == 3
        mean = sum(w * unit for w, unit in mine) / sum(w for w, _ in mine)
        length = sum(w * unit.norm() for w, unit in mine) / sum(w for w, _ in mine)
        mean = mean * length / mean.norm()
        expected += torch.outer(mean[5:], mean[:5])
    torch.testing.assert_close(update(merge_adapters(parts, weights, Merge("lego"))), expected, atol=1e-4, rtol=1e-4)


def test_more_clusters_than_ranks_are_scaled_down() -> None:
    one, other = near(0.1, [0, 1, 2], 1), adapter("2", -near(0.1, [0, 1, 2], 2).modules["m"].a, torch.ones(4, 3))
    both = merge_adapters([one, other], [0.5, 0.5], Merge("lego", rank=6))
    torch.testing.assert_close(update(both), math.sqrt(3 / 6) * (update(one) + update(other)), atol=1e-4, rtol=1e-4)
    assert both.modules["m"].a.shape[0] == 6


@pytest.mark.parametrize("weight", [1.0, 0.25, -2.0])
def test_one_adapter_alone_is_only_weighted(weight: float) -> None:
    one = near(1.0, [0, 1, 2], 1, scaling=2.0)
    torch.testing.assert_close(
        update(merge_adapters([one], [weight], Merge("lego"))), weight * update(one), atol=1e-5, rtol=1e-5
    )


def test_order_and_threads_change_nothing_and_the_seed_only_where_clusters_are_unclear() -> None:
    parts = [near(8.0, [0, 1, 2], seed) for seed in (1, 2, 3)]
    found = update(merge_adapters(parts, [0.2, 0.3, 0.5], Merge("lego")))
    again = update(merge_adapters(parts[::-1], [0.5, 0.3, 0.2], Merge("lego")))
    torch.testing.assert_close(found, again, atol=0, rtol=0)
    seeds = [update(merge_adapters(parts, [0.2, 0.3, 0.5], Merge("lego", seed=seed))) for seed in range(8)]
    assert any((found - other).abs().max() > 1e-3 for other in seeds)
