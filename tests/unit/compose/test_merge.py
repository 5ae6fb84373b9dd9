from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraretriever.compose.merge import (
    MERGES,
    add_agreeing,
    keep_largest,
    keep_random,
    merge_adapters,
    random_source,
)
from loraretriever.errors import InvalidInputError
from loraretriever.pool.weights import load_weights
from loraretriever.types import AdapterWeights, LoraPair, Merge
from tiny import TINY_SPEC, tiny_llama, write_peft_folder

PEFTS = [name for name in MERGES if name != "lego"]
DECOMPOSED = [name for name in MERGES if name.endswith("svd")]
ON_FACTORS = [name for name in MERGES if not name.endswith("svd") and name != "lego"]
# Ranks, alphas and targets of three adapters, two of which lack a module that another has.
SAME_RANK = ((4, 8), (4, 2), (4, 4))
OTHER_RANKS = ((4, 8), (2, 2), (6, 4))
TARGETS = (("q_proj", "v_proj"), ("q_proj", "down_proj"), ("q_proj", "v_proj", "lm_head"))


def load(folder: Path, shapes: Sequence[tuple[int, int]]) -> list[AdapterWeights]:
    adapters = []
    for i, ((rank, alpha), targets) in enumerate(zip(shapes, TARGETS, strict=False)):
        write_peft_folder(folder / f"a{i}", targets=targets, rank=rank, alpha=alpha, seed=i)
        adapters.append(load_weights(folder / f"a{i}", f"a{i}", f"{i}" * 64))
    return adapters


def update(pair: LoraPair) -> torch.Tensor:
    return pair.scaling * pair.b @ pair.a


def updates(adapter: AdapterWeights) -> dict[str, torch.Tensor]:
    return {module: update(pair) for module, pair in adapter.modules.items()}


def assert_close(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for module, tensor in expected.items():
        assert tensor.abs().max() > 0
        torch.testing.assert_close(found[module], tensor, atol=2e-6, rtol=1e-4, msg=lambda m, at=module: f"{at}: {m}")


@contextmanager
def masks_in_peft(adapters: Sequence[AdapterWeights], merge: Merge, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """PEFT draws from the global generator: give it the masks that ours draws, in the order in which it asks."""
    factors = ("BA",) if merge.method.endswith("svd") else ("A", "B")
    sources = (
        random_source(merge.seed, adapter.digest, module, factor)
        for module in TINY_SPEC.linear
        for factor in factors
        for adapter in adapters
        if module in adapter.modules
    )

    def random_pruning(tensor: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
        assert rescale
        mask = keep_random(torch.ones_like(tensor), density, next(sources)) != 0
        return tensor * mask / density

    with monkeypatch.context() as patch:
        patch.setattr(peft.utils.merge_utils, "random_pruning", random_pruning)
        yield
    assert not merge.method.startswith("dare") or next(sources, None) is None


def merged_by_peft(folder: Path, adapters: Sequence[AdapterWeights], weights: Sequence[float], merge: Merge) -> Any:
    names = [adapter.name for adapter in adapters]
    model = peft.PeftModel.from_pretrained(tiny_llama(), folder / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(folder / name, adapter_name=name)
    model.base_model.add_weighted_adapter(
        names, list(weights), "merged", combination_type=merge.method, density=merge.density, svd_rank=merge.rank
    )
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("merged").detach()
        for name, module in model.named_modules()
        if "merged" in getattr(module, "lora_A", {})
    }


@pytest.mark.parametrize("weights", [(0.6, 0.3, 0.1), (1.0, -0.7, 2.0)])
@pytest.mark.parametrize(
    ("method", "shapes"),
    [*((name, SAME_RANK) for name in PEFTS), *((name, OTHER_RANKS) for name in DECOMPOSED)],
    ids=lambda value: value if isinstance(value, str) else "same" if value is SAME_RANK else "other",
)
def test_as_peft(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    shapes: Sequence[tuple[int, int]],
    weights: Sequence[float],
) -> None:
    adapters = load(tmp_path, shapes)
    merge = Merge(method, density=0.37, seed=3)
    with masks_in_peft(adapters, merge, monkeypatch):
        expected = merged_by_peft(tmp_path, adapters, weights, merge)
    merged = merge_adapters(adapters, weights, merge)
    assert_close(updates(merged), expected)
    assert all(pair.a.dtype == pair.b.dtype == torch.float32 for pair in merged.modules.values())


@pytest.mark.parametrize("method", ["svd", "ties_svd"])
def test_a_given_rank_as_peft(tmp_path: Path, method: str) -> None:
    adapters, merge = load(tmp_path, OTHER_RANKS), Merge(method, rank=3)
    merged = merge_adapters(adapters, (0.5, 0.3, 0.2), merge)
    assert max(pair.a.shape[0] for pair in merged.modules.values()) == 3
    assert_close(updates(merged), merged_by_peft(tmp_path, adapters, (0.5, 0.3, 0.2), merge))


@pytest.mark.parametrize("method", PEFTS)
def test_all_entries_kept_as_peft(tmp_path: Path, method: str) -> None:
    adapters, merge = load(tmp_path, SAME_RANK), Merge(method, density=1.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The density 1.0", UserWarning)
        expected = merged_by_peft(tmp_path, adapters, (0.5, 0.3, 0.2), merge)
    assert_close(updates(merge_adapters(adapters, (0.5, 0.3, 0.2), merge)), expected)


@pytest.mark.parametrize("weight", [0.4, -1.5])
@pytest.mark.parametrize("method", MERGES)
def test_one_adapter_alone_is_only_weighted(tmp_path: Path, method: str, weight: float) -> None:
    (adapter,) = load(tmp_path, SAME_RANK[:1])
    found = updates(merge_adapters([adapter], [weight], Merge(method, density=0.1)))
    assert_close(found, merged_by_peft(tmp_path, [adapter], [weight], Merge(method, density=0.1)))
    assert_close(found, {module: weight * tensor for module, tensor in updates(adapter).items()})


def weighted_sum(adapters: Sequence[AdapterWeights], weights: Sequence[float], module: str) -> torch.Tensor:
    pairs = [
        (adapter.modules[module], w) for adapter, w in zip(adapters, weights, strict=True) if module in adapter.modules
    ]
    return sum((w * p.scaling * (p.b.double() @ p.a.double()) for p, w in pairs), start=torch.zeros(()))


def test_svd_of_the_full_rank_is_the_weighted_sum(tmp_path: Path) -> None:
    adapters, weights = load(tmp_path, OTHER_RANKS), (0.7, -0.4, 1.1)
    merged = merge_adapters(adapters, weights, Merge("svd", rank=12))
    expected = {module: weighted_sum(adapters, weights, module).float() for module in merged.modules}
    assert_close(updates(merged), expected)
    ranks = {module: pair.a.shape[0] for module, pair in merged.modules.items()}
    assert ranks["model.layers.0.self_attn.q_proj"] == 12, "of all three"
    assert ranks["model.layers.0.mlp.down_proj"] == 2, "no more than the factors have"


def test_svd_cuts_to_the_best_approximation(tmp_path: Path) -> None:
    adapters, weights = load(tmp_path, OTHER_RANKS), (0.7, -0.4, 1.1)
    merged = merge_adapters(adapters, weights, Merge("svd", rank=5))
    for module in merged.modules:
        full = weighted_sum(adapters, weights, module).numpy()
        tail = np.linalg.svd(full, compute_uv=False)[5:]
        error = np.linalg.norm(full - update(merged.modules[module]).double().numpy())
        assert error == pytest.approx(math.sqrt((tail**2).sum()), rel=1e-4, abs=1e-5)


def random_modules(names: str, out: int, rank: int, inner: int) -> list[AdapterWeights]:
    """An adapter of one module, "m", for each letter."""
    generator = torch.Generator().manual_seed(0)
    pairs = [
        LoraPair(torch.randn(rank, inner, generator=generator), torch.randn(out, rank, generator=generator), 0.5)
        for _ in names
    ]
    return [AdapterWeights(name, name, {"m": pair}) for name, pair in zip(names, pairs, strict=True)]


def test_svd_of_factors_that_are_larger_than_the_module() -> None:
    adapters = random_modules("ab", 6, 8, 5)
    merged = merge_adapters(adapters, (1, 2), Merge("svd"))
    assert merged.modules["m"].a.shape == (5, 5)
    assert_close(updates(merged), {"m": weighted_sum(adapters, (1, 2), "m").float()})


@pytest.mark.parametrize("method", ON_FACTORS)
def test_other_ranks_are_padded_with_zeros(tmp_path: Path, method: str) -> None:
    adapters, weights = load(tmp_path, OTHER_RANKS), (0.6, -0.3, 0.2)
    merge = Merge(method, density=0.5, seed=1)
    merged = merge_adapters(adapters, weights, merge)
    for module, pair in merged.modules.items():
        parts = [(each, w) for each, w in zip(adapters, weights, strict=True) if module in each.modules]
        rank = max(each.modules[module].a.shape[0] for each, _ in parts)
        factors: dict[str, list[np.ndarray[Any, Any]]] = {"A": [], "B": []}
        for each, weight in parts:
            strength = weight * each.modules[module].scaling
            for name, factor in (("A", each.modules[module].a), ("B", each.modules[module].b)):
                kept = pruned(factor, merge, random_source(1, each.digest, module, name))
                wide = np.zeros((rank, kept.shape[1]) if name == "A" else (kept.shape[0], rank))
                wide[: kept.shape[0], : kept.shape[1]] = kept
                root = math.sqrt(abs(strength)) * (np.sign(strength) if name == "A" else 1)
                factors[name].append(np.stack([wide, root * wide]))
        a, b = (added(np.stack(factors[name]), method.endswith("ties")) for name in "AB")
        torch.testing.assert_close(update(pair).double(), torch.from_numpy(b @ a), atol=1e-6, rtol=1e-4)


def pruned(factor: torch.Tensor, merge: Merge, source: torch.Generator) -> np.ndarray[Any, Any]:
    values = factor.double().numpy()
    if merge.method.startswith("dare"):
        return values * (torch.rand(factor.shape, generator=source) < merge.density).numpy() / merge.density
    if merge.method == "linear":
        return values
    least = np.sort(np.abs(values), axis=None)[-int(merge.density * values.size)]
    return np.where(np.abs(values) >= least, values, 0)


def added(stacked: np.ndarray[Any, Any], elects: bool) -> np.ndarray[Any, Any]:
    """`stacked` is (P, 2, ...): entries as they are, and weighted."""
    plain, weighted = stacked[:, 0], stacked[:, 1]
    if not elects:
        return weighted.sum(0)
    agrees = np.sign(plain) == np.where(plain.sum(0) >= 0, 1, -1)
    return (weighted * agrees).sum(0) / np.maximum(agrees.sum(0), 1)


# Sums of eighths are exact, so that the sign of the sum is not a matter of rounding.
eighths = st.integers(-24, 24).map(lambda number: number / 8)


@given(st.lists(st.tuples(eighths, eighths), min_size=1, max_size=5))
def test_agreeing_entries_are_averaged(entries: list[tuple[float, float]]) -> None:
    tensors = torch.tensor([[[value]] for value, _ in entries])
    weights = [weight for _, weight in entries]
    positive = sum(value for value, _ in entries) >= 0
    agreeing = [w * t for t, w in entries if (t > 0 if positive else t < 0)]
    expected = sum(agreeing) / len(agreeing) if agreeing else 0.0
    assert add_agreeing(tensors, torch.tensor(weights)).item() == pytest.approx(expected, abs=1e-6)


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=30), st.floats(0.01, 1))
def test_the_largest_entries_are_kept(values: list[int], density: float) -> None:
    kept = keep_largest(torch.tensor([values], dtype=torch.float32), density, torch.Generator())[0].tolist()
    count = int(density * len(values))
    assert all(new in (0, old) for new, old in zip(kept, values, strict=True))
    assert sorted(map(abs, kept)) == sorted(
        [0] * (len(values) - count) + sorted(map(abs, values))[len(values) - count :]
    )


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_random_entries_are_kept_and_scaled_up(density: float) -> None:
    ones = torch.ones(400, 500)
    kept = keep_random(ones, density, random_source(0, "d", "m", "A"))
    torch.testing.assert_close(kept.unique(), torch.tensor([0.0, 1 / density]))
    spread = math.sqrt(density * (1 - density) / ones.numel())
    assert (kept > 0).float().mean().item() == pytest.approx(density, abs=5 * spread)
    rows = (kept > 0).float().mean(1)
    assert rows.std().item() == pytest.approx(math.sqrt(density * (1 - density) / 500), rel=0.2), "independent draws"


def test_dare_linear_svd_expects_the_weighted_sum(tmp_path: Path) -> None:
    adapters, weights = load(tmp_path, OTHER_RANKS), (0.7, 0.3, 0.5)
    module = "model.layers.1.self_attn.v_proj"
    exact = weighted_sum([adapters[0], adapters[2]], (0.7, 0.5), module).float()
    only = [replace(each, modules={module: each.modules[module]}) for each in (adapters[0], adapters[2])]
    draws = [
        updates(merge_adapters(only, (weights[0], weights[2]), Merge("dare_linear_svd", 0.5, 32, seed)))[module]
        for seed in range(200)
    ]
    mean = torch.stack(draws).mean(0)
    assert (draws[0] - exact).norm() > 0.5 * exact.norm()
    # At density 1/2, the error of one draw is as large as each adapter's own update; that of the mean is √200 smaller.
    assert (mean - exact).norm() < 0.12 * exact.norm()


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties_svd"])
def test_the_seed_decides_and_nothing_else(tmp_path: Path, method: str) -> None:
    adapters, weights = load(tmp_path, OTHER_RANKS), (0.7, 0.3, 0.5)
    state = torch.get_rng_state()
    first = updates(merge_adapters(adapters, weights, Merge(method, seed=1)))
    assert torch.equal(state, torch.get_rng_state()), "the caller's random numbers are its own"
    torch.manual_seed(99)
    again = updates(merge_adapters(adapters, weights, Merge(method, seed=1)))
    other = updates(merge_adapters(adapters, weights, Merge(method, seed=2)))
    for module, tensor in first.items():
        assert torch.equal(tensor, again[module])
        assert not torch.equal(tensor, other[module])


def test_masks_differ_between_adapters_modules_and_factors() -> None:
    sources = [("d", "m", "A"), ("e", "m", "A"), ("d", "n", "A"), ("d", "m", "B")]
    masks = [keep_random(torch.ones(64), 0.5, random_source(0, *source)).tolist() for source in sources]
    assert len({tuple(mask) for mask in masks}) == len(sources)


@pytest.mark.parametrize("method", ON_FACTORS)
def test_threads_change_nothing(method: str) -> None:
    adapters = random_modules("abc", 9000, 16, 9000)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(merge_adapters(adapters, (0.5, 0.3, 0.2), Merge(method)).modules["m"])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0].a, results[1].a) and torch.equal(results[0].b, results[1].b)


@settings(max_examples=15)
@given(st.permutations(range(3)), st.sampled_from(sorted(MERGES)))
def test_the_order_of_the_adapters_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], method: str
) -> None:
    adapters, weights = load(tmp_path_factory.mktemp("order"), OTHER_RANKS), (0.7, -0.3, 0.5)
    straight = merge_adapters(adapters, weights, Merge(method))
    turned = merge_adapters([adapters[i] for i in order], [weights[i] for i in order], Merge(method))
    for module, pair in straight.modules.items():
        assert torch.equal(pair.a, turned.modules[module].a) and torch.equal(pair.b, turned.modules[module].b)


@pytest.mark.parametrize("method", MERGES)
def test_half_precision_is_computed_in_float32(tmp_path: Path, method: str) -> None:
    adapters = load(tmp_path, SAME_RANK)

    def cast(adapter: AdapterWeights, *dtypes: torch.dtype) -> AdapterWeights:
        modules = {}
        for module, pair in adapter.modules.items():
            a, b = pair.a, pair.b
            for dtype in dtypes:
                a, b = a.to(dtype), b.to(dtype)
            modules[module] = LoraPair(a, b, pair.scaling)
        return replace(adapter, modules=modules)

    half = [cast(adapter, torch.bfloat16) for adapter in adapters]
    rounded = [cast(adapter, torch.bfloat16, torch.float32) for adapter in adapters]
    found = merge_adapters(half, (0.5, 0.3, 0.2), Merge(method))
    expected = merge_adapters(rounded, (0.5, 0.3, 0.2), Merge(method))
    for module, pair in expected.modules.items():
        assert torch.equal(found.modules[module].a, pair.a) and torch.equal(found.modules[module].b, pair.b)


def one_module(name: str, out: int = 4, value: float = 1.0, scaling: float = 1.0) -> AdapterWeights:
    return AdapterWeights(name, name, {"m": LoraPair(torch.full((2, 3), value), torch.ones(out, 2), scaling)})


@pytest.mark.parametrize(
    ("adapters", "weights", "merge", "message"),
    [
        ([one_module("a")], [1.0], Merge("blend"), "unknown merge 'blend'; expected one of linear"),
        ([one_module("a")], [1.0], Merge("ties", density=0.0), "density is 0.0"),
        ([one_module("a")], [1.0], Merge("ties", density=1.1), "density is 1.1"),
        ([one_module("a")], [1.0], Merge("ties", density=math.nan), "density is nan"),
        ([one_module("a")], [1.0], Merge("svd", rank=0), "rank is 0"),
        ([], [], Merge("ties"), "no adapters"),
        ([one_module("a"), one_module("b")], [1.0], Merge("ties"), "1 weights for 2 adapters"),
        ([one_module("a")], [math.inf], Merge("ties"), "weight of 'a' is inf"),
        ([AdapterWeights("a", "a", {})], [1.0], Merge("ties"), "'a' has no modules"),
        ([one_module("a", value=math.nan)], [1.0], Merge("svd"), "'a' has NaN or infinite numbers in m"),
        ([one_module("a", scaling=math.inf)], [1.0], Merge("ties"), "'a' has NaN or infinite numbers in m"),
        ([one_module("a"), one_module("b", out=5)], [1.0, 1.0], Merge("svd"), r"features \(4, 3\), \(5, 3\)"),
    ],
)
def test_bad_merges(adapters: list[AdapterWeights], weights: list[float], merge: Merge, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as caught:
        merge_adapters(adapters, weights, merge)
    assert "expect" in str(caught.value)
