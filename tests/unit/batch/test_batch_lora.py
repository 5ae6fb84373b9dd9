"""The rank-space product against the plain formula and the paper's, and the cost model."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_helpers import difference
from loraretriever.batch.costs import CPU_COSTS, CPU_HALF_COSTS
from loraretriever.batch.paths import DensePath, GatheredPath, GroupedPath, SplitPath
from loraretriever.batch.reference import merged_update, paper_fusion, paper_mixture
from loraretriever.types import LoraPair, Mixer

CPU = torch.device("cpu")
PATHS = (DensePath, GatheredPath, GroupedPath, SplitPath)


@st.composite
def batches(draw: Any) -> Any:
    slots = draw(st.integers(1, 7))
    weight = st.floats(-1, 1).filter(lambda w: abs(w) > 0.01)
    row = st.dictionaries(st.integers(0, slots - 1), weight, max_size=slots)
    rows = draw(st.lists(row, min_size=1, max_size=9).filter(any))
    mixers = draw(st.lists(st.sampled_from(list(Mixer)), min_size=len(rows), max_size=len(rows)))
    return slots, [list(r.items()) for r in rows], mixers, draw(st.integers(1, 3)), draw(st.integers(1, 5))


@settings(max_examples=60, deadline=None)
@given(batches(), st.integers(1, 3))
def test_all_paths_equal_the_formula(batch: Any, members: int) -> None:
    slots, pairs, mixers, tokens, rank = batch
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(slots, members, rank, 6, generator=generator)
    b = [torch.randn(slots, rank, 4 + g, generator=generator) for g in range(members)]
    x = torch.randn(len(pairs), tokens, 6, generator=generator)
    flags = [mixer is Mixer.PARAMETERS for mixer in mixers]
    parameters = torch.tensor(flags) if any(flags) else None
    for kind in PATHS:
        if kind is SplitPath and parameters is not None:
            continue
        path = kind(pairs, parameters, torch.float32, CPU)
        h = path.hidden(x, a)
        for g in range(members):
            y = torch.zeros(len(pairs), tokens, 4 + g)
            path.add(y, h, g, b[g])
            for n, row in enumerate(pairs):
                if not row:
                    assert not y[n].any()
                    continue
                factors = [LoraPair(a[slot, g], b[g][slot].t(), 1.0) for slot, _ in row]
                update = merged_update(factors, [w for _, w in row], mixers[n])
                torch.testing.assert_close(y[n].double(), x[n].double() @ update.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", PATHS[:3])
@pytest.mark.parametrize("mixer", list(Mixer))
def test_the_papers_einsum_formulation_is_ours(kind: Any, mixer: Mixer) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(5, 6, 12, generator=generator)
    b = torch.randn(5, 10, 6, generator=generator)
    x = torch.randn(4, 7, 12, generator=generator)
    pairs = [[(0, 1 / 3), (2, 1 / 3), (4, 1 / 3)], [(1, 1.0)], [(0, 0.5), (1, 0.5)], [(3, 0.5), (4, 0.5)]]
    mapping = torch.zeros(4, 5)
    for n, row in enumerate(pairs):
        for slot, weight in row:
            mapping[n, slot] = weight
    parameters = torch.ones(4, dtype=torch.bool) if mixer is Mixer.PARAMETERS else None
    path = kind(pairs, parameters, torch.float32, CPU)
    y = torch.zeros(4, 7, 10)
    path.add(y, path.hidden(x, a[:, None]), 0, b.transpose(1, 2).contiguous())
    paper = paper_fusion if mixer is Mixer.PARAMETERS else paper_mixture
    assert difference(y, paper(x, a, b, mapping)) < 1e-5


@pytest.mark.parametrize("kind", PATHS[:3])
@pytest.mark.parametrize("mixer", list(Mixer))
def test_gradients_reach_the_factors(kind: Any, mixer: Mixer) -> None:
    a = torch.randn(2, 1, 3, 4, requires_grad=True)
    b = torch.randn(2, 3, 5, requires_grad=True)
    path = kind(
        [[(0, 0.5), (1, 0.5)], [(1, 1.0)]],
        torch.tensor([mixer is Mixer.PARAMETERS] * 2) if mixer is Mixer.PARAMETERS else None,
        torch.float32,
        CPU,
    )
    y = torch.zeros(2, 1, 5)
    path.add(y, path.hidden(torch.randn(2, 1, 4), a), 0, b)
    y.sum().backward()
    assert a.grad is not None and b.grad is not None
    assert a.grad.abs().sum(dim=(1, 2, 3)).gt(0).all() and b.grad.abs().sum(dim=(1, 2)).gt(0).all()


@pytest.mark.parametrize(
    ("rows", "tokens", "width", "counts", "expected"),
    [
        (1, 1, 3, [1, 1, 1], "dense"),
        (32, 1, 1, [4] * 8, "dense"),
        (32, 128, 1, [32], "dense"),
        (32, 128, 3, [2] * 48, "gathered"),
        (32, 1, 3, [2] * 48, "grouped"),
        (32, 1, 3, [2] * 32 + [32], "split"),
    ],
)
def test_the_cost_model_chooses(rows: int, tokens: int, width: int, counts: list[int], expected: str) -> None:
    assert CPU_COSTS.cheapest(rows, tokens, width, counts, additive=True) == expected


def test_averaged_parameters_are_never_split() -> None:
    assert CPU_COSTS.cheapest(32, 1, 3, [2] * 32 + [32], additive=False) != "split"


def test_half_precision_prefers_large_products() -> None:
    assert CPU_HALF_COSTS.cheapest(32, 1, 3, [2] * 40, additive=True) == "dense"
