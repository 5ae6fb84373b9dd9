"""Token routers: their functions against one token at a time, and whole models against hooks and PEFT's Arrow."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from batch_helpers import ATTENTION, MLP, Library, check_rows, decode, difference, left_padded, tiny_model
from gate_reference import Row, gated_model, gated_weights, make_router
from loraretriever.batch import BASE_ROW, AdapterRef, LoraLayers, RowRoute
from loraretriever.batch.gates import GATES, gate_weights
from loraretriever.compose.spectral import spectral_form
from loraretriever.errors import InvalidInputError
from loraretriever.types import AdapterWeights, Gate, Mixer
from tiny import write_peft_folder

ALL = (*ATTENTION, *MLP)


class GatedLibrary(Library):
    """A library that also has its adapters in spectral form, and routers."""

    def gated(
        self, refs: Sequence[AdapterRef], weights: Sequence[float], gate: Gate, router: AdapterRef | None = None
    ) -> RowRoute:
        """The row that an engine makes of plain adapters; a moe's experts are all of them, last one first."""
        form = GATES[gate.kind].form
        outputs = tuple(self.experts.index(ref.name) for ref in refs) if gate.kind == "moe" else ()
        chosen = tuple(refs) if form is None else tuple(self.in_form(ref, form) for ref in refs)
        return RowRoute(chosen, tuple(weights), gate=gate, router=router, outputs=outputs)

    @property
    def experts(self) -> tuple[str, ...]:
        return tuple(ref.name for ref in self.adapters if ref.name.startswith("a"))[::-1]

    def in_form(self, ref: AdapterRef, form: str) -> AdapterRef:
        made = replace(spectral_form(self.adapters[ref], form), name=f"{form} {ref.name}")
        key = AdapterRef(made.name, made.digest)
        self.adapters[key] = made
        return key

    def router(self, kind: str, targets: Sequence[str] = ALL, rank: int = 5) -> AdapterRef:
        ref = AdapterRef(f"router {kind}", f"router {kind}")
        rank = len(self.experts) if kind == "moe" else rank
        modules = make_router(self.model, kind, targets, rank)
        scaling = 1 / math.sqrt(rank) if kind == "ramole" else 1.0  # as an engine loads it
        self.adapters[ref] = AdapterWeights(
            ref.name, ref.digest, {name: replace(pair, scaling=scaling) for name, pair in modules.items()}
        )
        return ref

    def plain(self, row: RowRoute) -> Row:
        """The row for the reference, which decomposes by itself."""
        named = {ref.name: adapter for ref, adapter in self.adapters.items()}
        adapters = tuple(named[ref.name.rpartition(" ")[2]] for ref in row.adapters)
        experts = self.experts if row.gate is not None and row.gate.kind == "moe" else ()
        return Row(adapters, row.weights, row.gate, row.router and self.adapters[row.router], experts)


def oracle(model: Any, library: Library, row: RowRoute) -> Any:
    assert isinstance(library, GatedLibrary)
    if row.gate is None:
        from batch_helpers import merged

        return merged(model, library, row)
    return gated_model(model, library.plain(row))


@pytest.fixture
def model() -> Any:
    return tiny_model()


@pytest.fixture
def library(model: Any) -> GatedLibrary:
    """Four adapters of ranks 2 to 5 with all modules, whose updates are strong."""
    made = GatedLibrary(model)
    for rank in (2, 3, 4, 5):
        made.add(rank, ALL, 6.0)
    return made


GATE_OPTIONS = [(None, 1.0), (1, 1.0), (2, 0.3), (3, 2.0)]


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize(("top_k", "temperature"), GATE_OPTIONS)
def test_a_gated_row_equals_the_formula(
    kind: str, top_k: int | None, temperature: float, model: Any, library: GatedLibrary
) -> None:
    refs = list(library.adapters)
    router = library.router(kind) if GATES[kind].trained else None
    gate = Gate(kind, top_k, temperature)
    rows = [
        library.gated(refs, (0.25,) * 4, gate, router),
        library.gated(refs[1:3], (0.9, 0.2), gate, router),
        library.gated(refs[::-1][:3], (0.2, 0.2, 0.7), gate, router),
    ]
    served = copy.deepcopy(model)
    check_rows(served, LoraLayers(served, 12, library.load), library, rows, model, oracle=oracle)


def test_gates_must_make_a_difference(model: Any, library: GatedLibrary) -> None:
    """That the other tests can fail: options, priors and kinds all change the logits of the model."""
    refs = list(library.adapters)
    rows = [
        library.gated(refs, weights, Gate(kind, top_k, temperature), library.router(kind))
        for kind in GATES
        for top_k, temperature in GATE_OPTIONS
        for weights in ((0.25,) * 4, (0.1, 0.2, 0.6, 0.1))
    ] + [RowRoute(tuple(refs), (0.25,) * 4)]
    ids, mask = left_padded(1, 6)
    found = [decode(gated_model(model, library.plain(row)), ids, mask)[-1][0] for row in rows]
    gaps = [difference(one, other) for i, one in enumerate(found) for other in found[:i]]
    assert min(gaps) > 1e-3


def test_gates_fusions_mixtures_and_base_rows_side_by_side(model: Any, library: GatedLibrary) -> None:
    refs = list(library.adapters)
    routers = {kind: library.router(kind) for kind in ("ramole", "moe")}
    rows = [
        BASE_ROW,
        library.gated(refs[:3], (0.2, 0.3, 0.5), Gate("arrow", 2)),
        RowRoute((refs[0], refs[3]), (0.6, 0.4), Mixer.PARAMETERS),
        library.gated(refs, (0.25,) * 4, Gate("moe", 1), routers["moe"]),
        RowRoute((refs[2],), (0.7,)),
        library.gated(refs[2:], (0.5, 0.5), Gate("ramole"), routers["ramole"]),
        library.gated(refs[1:], (0.5, 0.4, 0.1), Gate("arrow", 2)),
        RowRoute((refs[1], refs[2], refs[3]), (0.5, 0.3, 0.2)),
        library.gated(refs[:2], (0.5, 0.5), Gate("spectral", None, 3.0)),
        BASE_ROW,
    ]
    served = copy.deepcopy(model)
    layers = LoraLayers(served, 16, library.load)
    check_rows(served, layers, library, rows, model, oracle=oracle)
    check_rows(served, layers, library, rows[::-1], model, oracle=oracle)


@pytest.mark.parametrize("kind", GATES)
def test_an_adapter_without_a_module_has_no_part_in_it(kind: str, model: Any) -> None:
    library = GatedLibrary(model)
    refs = [
        library.add(2, ("q_proj", "down_proj"), 6.0),
        library.add(5, ("q_proj", "k_proj", "o_proj"), 6.0),
        library.add(3, ("q_proj", "v_proj", "up_proj"), 6.0),
        library.add(4, ("v_proj",), 6.0),
    ]
    router = library.router(kind) if GATES[kind].trained else None
    gate = Gate(kind, 2, 0.5)
    rows = [
        library.gated(refs[:3], (0.2, 0.3, 0.5), gate, router),
        library.gated(refs, (0.25,) * 4, gate, router),
        BASE_ROW,
        library.gated((refs[0], refs[3]), (0.5, 0.5), gate, router),
    ]
    served = copy.deepcopy(model)
    check_rows(served, LoraLayers(served, 8, library.load), library, rows, model, oracle=oracle)


def test_what_slots_hold_may_change(model: Any, library: GatedLibrary) -> None:
    """Fewer slots than adapters, ranks that grow, an adapter without modules that the last in its slot had."""
    refs = list(library.adapters)
    small = library.add(1, ("q_proj",), 6.0)
    large = library.add(11, ALL, 6.0)
    router = library.router("ramole")
    served = copy.deepcopy(model)
    layers = LoraLayers(served, 4, library.load)
    for chosen in (refs[:3], (small, *refs[1:3]), (large, small, refs[0]), refs[1:]):
        rows = [library.gated(chosen, (1 / 3,) * 3, Gate("ramole"), router)]
        check_rows(served, layers, library, rows, model, oracle=oracle)
        rows = [library.gated(chosen, (1 / 3,) * 3, Gate("arrow")), RowRoute()]
        check_rows(served, layers, library, rows, model, oracle=oracle)


def test_stacks_that_were_replaced_are_let_go(model: Any, library: GatedLibrary) -> None:
    """What a gated routing keeps of a stack must not outlive the stack's slots."""
    row = library.gated(list(library.adapters)[:2], (0.5, 0.5), Gate("arrow"))
    large = library.add(11, ALL)
    served = copy.deepcopy(model)
    layers = LoraLayers(served, 4, library.load)
    check_rows(served, layers, library, [row], model, oracle=oracle)
    before = [weakref.ref(stack) for stack in layers._stacks()]
    layers.acquire([large])
    gc.collect()
    assert before and not any(stack() for stack in before)


def test_one_adapter_alone_acts_as_it_is(model: Any, library: GatedLibrary) -> None:
    ref = next(iter(library.adapters))
    router = library.router("moe")
    rows = [
        library.gated([ref], (0.3,), Gate("arrow")),
        library.gated([ref], (0.3,), Gate("moe"), router),
        RowRoute((ref,), (1.0,)),
    ]
    served = copy.deepcopy(model)
    layers = LoraLayers(served, 4, library.load)
    ids, mask = left_padded(1, 6)
    with layers.use(layers.route(rows)):
        found = decode(served, ids.expand(3, -1), mask.expand(3, -1))
    for each in found:
        torch.testing.assert_close(each, each[2:].expand(3, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("kind", GATES)
def test_half_precision_is_near_float32(
    kind: str, dtype: torch.dtype, tolerance: float, model: Any, library: GatedLibrary
) -> None:
    refs = list(library.adapters)
    router = library.router(kind) if GATES[kind].trained else None
    rows = [library.gated(refs, (0.25,) * 4, Gate(kind, None, 2.0), router), BASE_ROW]
    served = copy.deepcopy(model).to(dtype)
    check_rows(served, LoraLayers(served, 8, library.load), library, rows, model, tolerance, oracle)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT asks transformers for it
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ALL])
@pytest.mark.parametrize(("top_k", "temperature"), [(3, 1.0), (2, 0.5), (1, 1.0)])
def test_arrow_equals_peft(targets: tuple[str, ...], top_k: int, temperature: float, tmp_path: Path) -> None:
    """PEFT's Arrow wants one rank for all, and finds singular vectors by 15 steps of power iteration."""
    from peft import ArrowConfig, create_arrow_model

    model = tiny_model()
    library = GatedLibrary(model)
    folders = []
    for i in range(4):
        ref = library.add(4, targets, 8.0)
        for pair in library.adapters[ref].modules.values():
            pair.a[0] *= 6  # one singular value far above the others: 15 steps are enough
        tensors = {
            f"base_model.model.{path}.lora_{factor}.weight": tensor.numpy()
            for path, pair in library.adapters[ref].modules.items()
            for factor, tensor in (("A", pair.a), ("B", pair.b))
        }
        folders.append(write_peft_folder(tmp_path / f"{i}", targets=targets, rank=4, alpha=32, tensors=tensors))
    config = ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=0)
    peft_model = create_arrow_model(copy.deepcopy(model), [str(folder) for folder in folders], config).eval()
    row = library.gated(list(library.adapters), (0.25,) * 4, Gate("arrow", top_k, temperature))
    served = copy.deepcopy(model)
    layers = LoraLayers(served, 4, library.load)
    ids, mask = left_padded(1, 8)
    with layers.use(layers.route([row])):
        found = decode(served, ids, mask)
    expected = decode(peft_model.base_model.model, ids, mask)
    plain = decode(model, ids, mask)
    for one, other, base in zip(found, expected, plain, strict=True):
        assert difference(one, other) < 1e-4 < 0.1 < difference(base, other)


def test_weights_of_the_best_sum_to_one() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 3, 5, 6, generator=generator, dtype=torch.float64)
    priors = torch.rand(1, 3, 1, 6, generator=generator, dtype=torch.float64)
    priors[0, 1, 0, 4:] = 0
    for top_k, temperature in GATE_OPTIONS:
        found = gate_weights(logits, priors.log(), top_k, temperature)
        for g, n, t in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)).tolist():
            expected = gated_weights(logits[g, n, t].tolist(), priors[0, n, 0].tolist(), Gate("", top_k, temperature))
            assert found[g, n, t].tolist() == pytest.approx(expected)


def test_of_equal_logits_exactly_the_top_k_act() -> None:
    weights = gate_weights(torch.zeros(1, 1, 1, 5), torch.zeros(1, 1, 1, 5), 2, 1.0)
    assert sorted(weights.flatten().tolist()) == [0, 0, 0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("gate", "problem"),
    [
        (Gate("oracle"), "unknown gate 'oracle'; expected one of arrow, spectral, ramole, moe"),
        (Gate("arrow", 0), "top_k is 0"),
        (Gate("arrow", temperature=0.0), "temperature is 0.0"),
        (Gate("arrow", temperature=math.inf), "temperature is inf"),
        (Gate("moe"), "no router"),
    ],
)
def test_wrong_gates_are_refused(gate: Gate, problem: str) -> None:
    with pytest.raises(InvalidInputError, match=problem):
        RowRoute((AdapterRef("a", "a"),), (1.0,), gate=gate)


def test_rows_that_no_gate_can_weigh_are_refused() -> None:
    refs = AdapterRef("a", "a"), AdapterRef("b", "b")
    for weights in ((-0.5, 1.5), (math.nan, 1.0)):
        with pytest.raises(InvalidInputError, match="gate arrow has the weight"):
            RowRoute(refs, weights, gate=Gate("arrow"))
    with pytest.raises(InvalidInputError, match="mixer parameters"):
        RowRoute(refs, (0.5, 0.5), Mixer.PARAMETERS, Gate("arrow"))
    with pytest.raises(InvalidInputError, match="2 adapters but 1 outputs"):
        RowRoute(refs, (0.5, 0.5), gate=Gate("moe"), router=AdapterRef("r", "r"), outputs=(0,))
