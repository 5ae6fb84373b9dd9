"""Slots, their errors, and how the modules share their input."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from batch_helpers import ATTENTION, MLP, Library, difference, tiny_model
from loraretriever.batch import BASE_ROW, AdapterRef, LoraLayers, RowRoute, SlotTable, routing
from loraretriever.errors import InvalidInputError
from loraretriever.types import LoraPair, Mixer


def _refs(count: int) -> list[AdapterRef]:
    return [AdapterRef(f"a{i}", f"d{i}") for i in range(count)]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.lists(st.sets(st.integers(0, 9), min_size=1, max_size=6), max_size=12))
def test_slots_are_distinct_recent_and_not_spread_out(capacity: int, batches: list[set[int]]) -> None:
    table, refs = SlotTable(capacity), _refs(10)
    recent: list[AdapterRef] = []
    for batch in batches:
        wanted = [refs[i] for i in sorted(batch)][:capacity]
        missing = table.touch(wanted)
        for ref in missing:
            table.put(ref, table.make_room(wanted))
        table.compact(wanted)
        recent = [ref for ref in recent if ref not in wanted] + [r for r in wanted if r not in missing] + missing
        slots = [table[ref] for ref in table.resident]
        assert len(set(slots)) == len(slots) and set(slots) <= set(range(capacity))
        assert set(table.resident) == set(recent[-capacity:])
        assert max(table[ref] for ref in wanted) + 1 <= max(1.25 * len(wanted), 1)


def test_a_batch_with_too_many_adapters_is_refused() -> None:
    model = tiny_model()
    library = Library(model)
    refs = [library.add(2, ("q_proj",)) for _ in range(3)]
    layers = LoraLayers(model, 2, library.load)
    with pytest.raises(InvalidInputError, match="3 different adapters, but there are 2 slots; raise"):
        layers.route([RowRoute((ref,), (1.0,)) for ref in refs])
    assert layers.resident == () and library.loads == []
    with pytest.raises(InvalidInputError, match="slots is 0"):
        LoraLayers(model, 0, library.load)


def test_a_new_revision_is_another_entry() -> None:
    library = Library(tiny_model())
    old, new = library.add(2, ("q_proj",), name="sql"), library.add(2, ("q_proj",), name="sql")
    layers = LoraLayers(library.model, 2, library.load)
    layers.acquire([old])
    layers.acquire([old, new])
    assert library.loads == ["sql", "sql"] and set(layers.resident) == {old, new}
    library.adapters[AdapterRef("sql", "gone")] = library.adapters[new]
    with pytest.raises(InvalidInputError, match="replaced"):
        layers.acquire([AdapterRef("sql", "gone")])
    assert set(layers.resident) == {old, new}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: {"model.layers.9.self_attn.q_proj": next(iter(m.values()))}, "does not have"),
        (lambda m: {"model.norm": next(iter(m.values()))}, "only linear modules"),
        (lambda m: {"model.layers.0.mlp.down_proj": next(iter(m.values()))}, r"expected \(r, 48\)"),
        (lambda m: {k: LoraPair(p.a, p.b * float("inf"), 1.0) for k, p in m.items()}, "infinite"),
        (lambda m: {k: LoraPair(p.a * float("nan"), p.b, 1.0) for k, p in m.items()}, "infinite"),
        (lambda m: {}, "no modules"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_and_change_nothing(change: Callable[[Any], Any], message: str) -> None:
    library = Library(tiny_model())
    good, bad = library.add(2, ("q_proj",)), library.add(2, ("q_proj",))
    library.adapters[bad] = replace(library.adapters[bad], modules=change(dict(library.adapters[bad].modules)))
    layers = LoraLayers(library.model, 1, library.load)
    layers.acquire([good])
    with pytest.raises(InvalidInputError, match=message):
        layers.acquire([bad])
    assert layers.resident == (good,)


def test_stale_and_nested_routings_are_refused() -> None:
    library = Library(tiny_model())
    one, other = library.add(2, ("q_proj",)), library.add(2, ("q_proj",))
    layers = LoraLayers(library.model, 1, library.load)
    routing_of_one = layers.route([RowRoute((one,), (1.0,))])
    assert layers.route([RowRoute((one,), (1.0,))]) is routing_of_one
    with layers.use(routing_of_one):
        with pytest.raises(RuntimeError, match="another routing"):
            layers.use(routing_of_one)
        with pytest.raises(RuntimeError, match="cannot be loaded"):
            layers.acquire([other])
    layers.route([RowRoute((other,), (1.0,))])
    with pytest.raises(InvalidInputError, match="slots have changed"):
        layers.use(routing_of_one)


def test_two_routings_of_one_acquired_step() -> None:
    library = Library(tiny_model())
    refs = [library.add(2, ("q_proj",)) for _ in range(4)]
    layers = LoraLayers(library.model, 4, library.load)
    layers.acquire(refs)
    routings = [layers.route([RowRoute((ref,), (1.0,))]) for ref in refs]
    for made in routings:
        with layers.use(made):
            pass


def test_memory_grows_with_need_and_is_bounded() -> None:
    library = Library(tiny_model())
    refs = [library.add(rank, ("q_proj",)) for rank in (2, 2, 8, 2)]
    layers = LoraLayers(library.model, 2, library.load)
    sizes = []
    for ref in refs:
        layers.acquire([ref])
        sizes.append(layers.nbytes)
    per_slot = 2 * (32 + 32) * 4  # two layers, in + out, float32
    assert sizes == [1 * 2 * per_slot, 2 * 2 * per_slot, 2 * 8 * per_slot, 2 * 8 * per_slot]


def test_weights_that_cancel_and_adapters_named_twice() -> None:
    assert routing._pairs(RowRoute((AdapterRef("a", "d"),) * 2, (0.5, 0.25)), {AdapterRef("b", "d"): 3}) == [(3, 0.75)]
    assert routing._pairs(RowRoute((AdapterRef("a", "d"),), (0.0,)), {AdapterRef("a", "d"): 3}) == []
    with pytest.raises(InvalidInputError, match="1 adapters but 2 weights"):
        RowRoute((AdapterRef("a", "d"),), (0.5, 0.5))


class _Attention(nn.Module):
    """Calls its projections in whatever way a test asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, out) for out in (8, 4, 4))

    def forward(self, calls: list[tuple[str, torch.Tensor]]) -> list[torch.Tensor]:
        return [getattr(self, name)(x) for name, x in calls]


@pytest.mark.parametrize("order", [["q", "k", "v"], ["v", "q", "k"], ["q"], ["q", "q", "k"], ["k", "v", "k", "q", "q"]])
@pytest.mark.parametrize("inputs", ["same", "each", "alternating", "changed in place"])
@pytest.mark.parametrize("mixer", list(Mixer))
def test_sharing_is_right_however_modules_are_called(order: list[str], inputs: str, mixer: Mixer) -> None:
    torch.manual_seed(0)
    model = _Attention()
    library = Library(model)
    refs = [library.add(3, ("q_proj", "k_proj", "v_proj")), library.add(2, ("q_proj", "v_proj"))]
    layers = LoraLayers(model, 2, library.load)
    pool = [torch.randn(2, 1, 8) for _ in range(3)]
    rows = [RowRoute(tuple(refs), (0.5, 0.5), mixer), BASE_ROW]
    expected, found = [], []
    with torch.no_grad():
        for target in (expected, found):
            xs = [x.clone() for x in pool]
            with layers.use(layers.route(rows)):
                for i, name in enumerate(order):
                    x = xs[{"same": 0, "each": i % 3, "alternating": i % 2, "changed in place": 0}[inputs]]
                    if inputs == "changed in place":
                        x.add_(1.0)
                    if target is expected:  # forget after each call: nothing is ever shared
                        for group in layers._groups.values():
                            group.forget()
                    target.append(model([(f"{name}_proj", x)])[0])
    for one, other in zip(found, expected, strict=True):
        assert difference(one, other) < 1e-6


def test_inputs_are_let_go() -> None:
    model = _Attention()
    library = Library(model)
    ref = library.add(3, ("q_proj", "k_proj", "v_proj"))
    layers = LoraLayers(model, 1, library.load)
    x = torch.randn(1, 1, 8)
    with torch.no_grad(), layers.use(layers.route([RowRoute((ref,), (1.0,))])):
        (group,) = layers._groups.values()
        model([("q_proj", x)])
        assert group._x is x
        model([("k_proj", x), ("v_proj", x)])
        assert group._x is None and not group._parts
        model([("q_proj", x)])
    assert group._x is None


def test_wrong_inputs_are_refused() -> None:
    model = _Attention()
    library = Library(model)
    ref = library.add(3, ("q_proj",))
    layers = LoraLayers(model, 1, library.load)
    for shape in [(3, 8), (2, 1, 8)]:
        with (
            layers.use(layers.route([RowRoute((ref,), (1.0,))])),
            pytest.raises(InvalidInputError, match=r"expected \(rows, tokens, features\) with 1 rows"),
        ):
            model([("q_proj", torch.randn(shape))])


def test_slots_filled_in_inference_mode_can_be_refilled_outside() -> None:
    model = tiny_model()
    library = Library(model)
    one, other = library.add(2, ATTENTION), library.add(4, MLP)
    layers = LoraLayers(model, 1, library.load)
    with torch.inference_mode():
        layers.acquire([one])
    layers.acquire([other])
    layers.acquire([one])


def test_a_forward_replaced_by_others_comes_back() -> None:
    model = tiny_model()
    module = model.model.layers[0].self_attn.q_proj
    theirs = copy.copy(module.forward)
    module.forward = theirs
    library = Library(model)
    layers = LoraLayers(model, 1, library.load)
    layers.acquire([library.add(2, ATTENTION)])
    assert module.forward is not theirs
    layers.eject()
    assert vars(module)["forward"] is theirs
