"""Prepared adapters in slots, bit for bit what the plain conversion gives, and the checks."""

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_helpers import ATTENTION, MLP, Library, tiny_model
from loraretriever.batch import LoraLayers, RowRoute
from loraretriever.batch.stacks import GroupStack, Target, prepare_adapter, write_slot
from loraretriever.errors import InvalidInputError
from loraretriever.types import AdapterWeights, LoraPair

CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FEATURES, SLOTS, RANK = 5, 3, 4
OUTS = {"q": 6, "k": 3, "v": 3}


def factors(rank: int, out: int, dtype: torch.dtype, seed: int = 0, scaling: float = 1.7) -> LoraPair:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, FEATURES, generator=generator), torch.randn(out, rank, generator=generator)
    return LoraPair(a.to(dtype), b.to(dtype), scaling)


def targets(dtypes: Mapping[str, torch.dtype]) -> dict[str, Target]:
    return {name: Target(out, FEATURES, dtypes[name]) for name, out in OUTS.items()}


def empty_stack(dtype: torch.dtype, names: Any = OUTS, slots: int = SLOTS, rank: int = RANK) -> GroupStack:
    return GroupStack(slots, rank, {name: torch.empty(OUTS[name], 0, dtype=dtype) for name in names}, FEATURES)


def plain(stack: GroupStack, slot: int, modules: Mapping[str, LoraPair]) -> None:
    """The conversion as plainly as it can be written, into a stack of the slow reference."""
    stack.a[slot] = 0
    for i, name in enumerate(stack.names):
        stack.b[i][slot] = 0
        if name in modules:
            pair = modules[name]
            stack.a[slot, i, : pair.a.shape[0]] = pair.a.to(stack.a.dtype)
            stack.b[i][slot, : pair.a.shape[0]] = (pair.b.float() * pair.scaling).t().to(stack.a.dtype)


def assert_same(found: GroupStack, expected: GroupStack) -> None:
    assert torch.equal(found.a, expected.a)
    for one, other in zip(found.b, expected.b, strict=True):
        assert torch.equal(one, other)
    for slot in range(found.slots):
        assert (slot in found.filled) == bool(expected.a[slot].any())


@pytest.mark.parametrize("stored", [*FLOATS, torch.float64])
@pytest.mark.parametrize("dtype", FLOATS)
@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, SLOTS - 1), st.dictionaries(st.sampled_from(sorted(OUTS)), st.integers(1, RANK))),
        max_size=8,
    )
)
def test_slots_hold_what_the_plain_conversion_gives(
    dtype: torch.dtype, stored: torch.dtype, writes: list[tuple[int, dict[str, int]]]
) -> None:
    found, expected = empty_stack(dtype), empty_stack(dtype)
    other_group = empty_stack(dtype, ["q"])  # an adapter without modules is refused earlier
    for seed, (slot, ranks) in enumerate(writes):
        modules = {name: factors(rank, OUTS[name], stored, seed) for name, rank in ranks.items()}
        kinds = {**targets(dict.fromkeys(OUTS, dtype)), "other": Target(OUTS["q"], FEATURES, dtype)}
        weights = AdapterWeights("a", "d", {**modules, "other": factors(1, OUTS["q"], stored)})
        other_group.names = ["other"]
        write_slot([found, other_group], slot, prepare_adapter(weights, kinds, pinned=False), CPU)
        plain(expected, slot, modules)
        assert_same(found, expected)


def test_what_slots_hold_survives_growth_exchange_and_clearing() -> None:
    kinds = targets(dict.fromkeys(OUTS, torch.float32))
    small, expected = empty_stack(torch.float32, ["v", "q"], 2, 2), empty_stack(torch.float32)
    old = {"v": factors(2, 3, torch.float32), "q": factors(1, 6, torch.float32)}
    write_slot([small], 1, prepare_adapter(AdapterWeights("old", "d", old), kinds, False), CPU)
    grown = empty_stack(torch.float32)
    grown.copy_from(small)
    plain(expected, 1, old)
    assert_same(grown, expected)
    grown.exchange(1, 2)
    new = {"q": factors(4, 6, torch.float32, 1), "k": factors(1, 3, torch.float32, 2)}
    write_slot([grown], 1, prepare_adapter(AdapterWeights("new", "d", new), kinds, False), CPU)
    plain(expected, 2, old)
    plain(expected, 1, new)
    assert_same(grown, expected)
    less = {"q": factors(1, 6, torch.float32, 3)}  # over "old", which came here by growth and exchange
    write_slot([grown], 2, prepare_adapter(AdapterWeights("less", "d", less), kinds, False), CPU)
    plain(expected, 2, less)
    assert_same(grown, expected)
    grown.clear(1)
    plain(expected, 1, {})
    assert_same(grown, expected)


def test_modules_of_several_dtypes_have_a_block_each() -> None:
    dtypes = {"q": torch.bfloat16, "k": torch.float32, "v": torch.bfloat16}
    modules = {name: factors(2, out, torch.float32) for name, out in OUTS.items()}
    made = prepare_adapter(AdapterWeights("a", "d", modules), targets(dtypes), pinned=False)
    assert made.modules == ["k", "q", "v"] and made.rank == 2 and len(made.blocks) == 2
    numbers = {name: 2 * (FEATURES + out) for name, out in OUTS.items()}
    assert made.nbytes == sum(numbers[name] * dtypes[name].itemsize for name in OUTS)
    for block in made.blocks:
        for name, found in block.factors.items():
            assert found.a.dtype is found.b.dtype is dtypes[name]
            assert found.a.is_contiguous() and found.b.is_contiguous()
            assert torch.equal(found.a, modules[name].a.to(dtypes[name]))
            assert torch.equal(found.b, (modules[name].b * 1.7).t().to(dtypes[name]))


def test_prepared_memory_is_the_adapters_own() -> None:
    pair = factors(2, 6, torch.float32)
    made = prepare_adapter(AdapterWeights("a", "d", {"q": pair}), targets(dict.fromkeys(OUTS, torch.float32)), False)
    kept = made.blocks[0].memory.clone()
    pair.a.zero_(), pair.b.zero_()  # the file that they were mapped from changes
    assert torch.equal(made.blocks[0].memory, kept)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("factor", ["a", "b"])
@pytest.mark.parametrize("place", [0, 7, -1])
def test_numbers_that_do_not_stay_finite_are_refused(dtype: torch.dtype, value: float, factor: str, place: int) -> None:
    modules = {name: factors(2, out, torch.float32, scaling=1.0) for name, out in OUTS.items()}
    getattr(modules["k"], factor).view(-1)[min(place, 5) if factor == "b" else place] = value
    weights = AdapterWeights("sql", "d", modules)
    kinds = targets(dict.fromkeys(OUTS, dtype))
    if value == 3e38 and dtype is not torch.float16:
        assert prepare_adapter(weights, kinds, pinned=False).rank == 2
        modules["k"] = replace(modules["k"], scaling=4.0)  # only B is scaled
        if factor == "a":
            prepare_adapter(weights, kinds, pinned=False)
            return
    with pytest.raises(InvalidInputError, match="adapter 'sql', module 'k': a number is infinite or above"):
        prepare_adapter(weights, kinds, pinned=False)


@pytest.mark.parametrize(
    ("a", "b"), [((2, 4), (6, 2)), ((2, 5), (5, 2)), ((2, 5), (6, 3)), ((0, 5), (6, 0)), ((5,), (6, 2))]
)
def test_factors_of_other_shapes_are_refused(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    weights = AdapterWeights("sql", "d", {"q": LoraPair(torch.zeros(a), torch.zeros(b), 1.0)})
    with pytest.raises(InvalidInputError, match=r"module 'q': A is .* expected \(r, 5\) and \(6, r\)"):
        prepare_adapter(weights, targets(dict.fromkeys(OUTS, torch.float32)), pinned=False)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("inference", [False, True])
def test_prepared_adapters_fill_the_layers_as_plain_ones_do(dtype: torch.dtype, inference: bool) -> None:
    library = Library(tiny_model().to(dtype))
    refs = [library.add(2, ATTENTION, 1.5), library.add(8, ("q_proj", "up_proj")), library.add(3, MLP, 0.3)]
    prepared: dict[Any, Any] = {}
    plain_layers = LoraLayers(library.model, 2, library.load)
    layers = LoraLayers(library.model, 2, prepared.__getitem__)

    def prepare() -> None:
        with torch.inference_mode(inference):
            prepared.update({ref: layers.prepare(library.adapters[ref]) for ref in refs})

    thread = threading.Thread(target=prepare)
    thread.start()
    thread.join()
    for batch in ([0], [0, 1], [2, 1], [0, 2]):
        for each in (plain_layers, layers):
            each.acquire([refs[i] for i in batch])
        assert layers.resident == plain_layers.resident and layers.rank == plain_layers.rank
        for one, other in zip(layers._stacks(), plain_layers._stacks(), strict=True):
            assert one.filled == other.filled
            for found, expected in zip((one.a, *one.b), (other.a, *other.b), strict=True):
                assert torch.equal(found, expected)


def test_a_prepared_adapter_of_another_digest_is_refused() -> None:
    library = Library(tiny_model())
    one, other = library.add(2, ATTENTION, name="sql"), library.add(2, ATTENTION, name="sql")
    layers = LoraLayers(library.model, 2, lambda ref: layers.prepare(library.adapters[other]))
    with pytest.raises(InvalidInputError, match="replaced"):
        layers.acquire([one])
    assert layers.resident == ()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("model.layers.7.mlp.up_proj", "which the base model does not have"),
        ("model.layers.0", "is a LlamaDecoderLayer; only linear modules"),
    ],
)
def test_modules_that_cannot_have_adapters_are_refused(path: str, message: str) -> None:
    layers = LoraLayers(tiny_model(), 1, lambda ref: pytest.fail("nothing is to be loaded"))
    pair = LoraPair(torch.zeros(2, 32), torch.zeros(48, 2), 1.0)
    with pytest.raises(InvalidInputError, match=message):
        layers.prepare(AdapterWeights("sql", "d", {path: pair}))


def test_a_quantised_base_model_is_refused() -> None:
    library = Library(tiny_model())
    ref = library.add(2, ("q_proj",))
    module = library.model.model.layers[0].self_attn.q_proj
    module.weight = torch.nn.Parameter(module.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(InvalidInputError, match="stored as torch.int8"):
        LoraLayers(library.model, 1, library.load).prepare(library.adapters[ref])


def test_a_write_that_fails_leaves_an_empty_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(tiny_model())
    first, failing = library.add(4, ATTENTION), library.add(2, ATTENTION)
    layers = LoraLayers(library.model, 1, library.load)
    layers.acquire([first])
    with monkeypatch.context() as patched:
        patched.setattr(torch, "_foreach_copy_", lambda *lists: pytest.fail("no memory"))
        with pytest.raises(pytest.fail.Exception):
            layers.acquire([failing])
    assert layers.resident == ()
    for stack in layers._stacks():
        assert not stack.filled and not any(part.any() for part in (stack.a, *stack.b))
    layers.route([RowRoute((failing,), (1.0,))])
    assert layers.resident == (failing,)
