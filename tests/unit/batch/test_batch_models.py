"""Mixed batches through whole models against merged weights and against PEFT."""

import copy
import math
from typing import Any

import pytest
import torch

from batch_helpers import (
    ATTENTION,
    FAMILIES,
    MLP,
    Library,
    OnePath,
    check_rows,
    decode,
    difference,
    left_padded,
    mixed_rows,
    tiny_model,
)
from loraretriever.batch import BASE_ROW, LoraLayers, RowRoute, routing
from loraretriever.types import Mixer

PATHS = ("dense", "gathered", "grouped", "split")


@pytest.fixture(params=PATHS)
def one_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(routing, "cost_model", lambda device, dtype: OnePath(request.param))
    return request.param


def copy_and_layers(model: Any, library: Library, slots: int) -> tuple[Any, LoraLayers]:
    served = copy.deepcopy(model)
    return served, LoraLayers(served, slots, library.load)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_serves_mixed_rows(family: str) -> None:
    model = tiny_model(family)
    library = Library(model)
    refs = [library.add(rank, FAMILIES[family]) for rank in (1, 4, 8)]
    served, layers = copy_and_layers(model, library, 3)
    check_rows(served, layers, library, mixed_rows(refs), model)


def test_every_path_serves_unequal_ranks_and_missing_modules(one_path: str) -> None:
    model = tiny_model()
    library = Library(model)
    refs = [
        library.add(1, ATTENTION, 2.0),
        library.add(8, ("q_proj", "v_proj"), 0.5),
        library.add(64, ("k_proj", "o_proj"), 16 / math.sqrt(64)),
        library.add(3, MLP),
        library.add(2, ("up_proj", "lm_head")),
        library.add(5, (*ATTENTION, *MLP, "lm_head")),
    ]
    served, layers = copy_and_layers(model, library, 8)
    check_rows(served, layers, library, mixed_rows(refs, largest=6), model)
    assert layers.rank == 64


@pytest.mark.parametrize("k", range(1, 9))
def test_k_up_to_eight(k: int) -> None:
    model = tiny_model()
    library = Library(model)
    refs = [library.add(2 + i, ATTENTION) for i in range(8)]
    served, layers = copy_and_layers(model, library, 8)
    rows = [RowRoute(tuple(refs[i:] + refs[:i])[:k], (1 / k,) * k, mixer) for i in (0, 3) for mixer in Mixer]
    check_rows(served, layers, library, rows, model)


@pytest.mark.parametrize(
    "popularity",
    [[0, 1, 2, 3, 4, 5, 0, 1], [0, 0, 0, 0, 0, 0, 1, 2], [3] * 8, [None] * 8, [None, 5, None, None, None]],
    ids=["uniform", "skewed", "one", "none", "one row"],
)
def test_popularity(popularity: list[int | None], one_path: str) -> None:
    model = tiny_model()
    library = Library(model)
    refs = [library.add(4, (*ATTENTION, *MLP)) for _ in range(6)]
    served, layers = copy_and_layers(model, library, 6)
    layers.acquire(refs)
    rows = [BASE_ROW if p is None else RowRoute((refs[p],), (1.0,)) for p in popularity]
    check_rows(served, layers, library, rows, model)


def test_slots_fewer_than_adapters() -> None:
    model = tiny_model()
    library = Library(model)
    refs = [library.add(1 + i, ATTENTION if i % 2 else MLP) for i in range(5)]
    served, layers = copy_and_layers(model, library, 2)
    for one, other in [(0, 1), (1, 2), (3, 4), (0, 4), (2, 0)]:
        rows = [RowRoute((refs[one],), (1.0,)), BASE_ROW, RowRoute((refs[other], refs[one]), (0.4, 0.6))]
        check_rows(served, layers, library, rows, model)
    # 0 and 1; 2 for 0; 3 and 4; 0 for 3; 2 for 4.
    assert library.loads == ["a0", "a1", "a2", "a3", "a4", "a0", "a2"]


def test_tied_embedding_stays_as_it_is() -> None:
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    library = Library(model)
    ref = library.add(4, ("lm_head",))
    served, layers = copy_and_layers(model, library, 1)
    check_rows(served, layers, library, [RowRoute((ref,), (1.0,)), BASE_ROW], model)
    assert served.lm_head.weight is served.model.embed_tokens.weight


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.06), (torch.float16, 0.01)])
def test_half_precision_is_near_float32(dtype: torch.dtype, tolerance: float, one_path: str) -> None:
    model = tiny_model()
    library = Library(model)
    refs = [library.add(rank, (*ATTENTION, *MLP), 2.0) for rank in (2, 8, 4)]
    served = copy.deepcopy(model).to(dtype)
    layers = LoraLayers(served, 3, library.load)
    check_rows(served, layers, library, mixed_rows(refs), model, tolerance)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT asks transformers for it
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), (*ATTENTION, *MLP)])
@pytest.mark.parametrize("rslora", [False, True])
def test_selection_equals_peft(targets: tuple[str, ...], rslora: bool) -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_model()
    library = Library(model)
    refs = []
    for rank in (1, 8, 64):
        refs.append(library.add(rank, targets, 16 / math.sqrt(rank) if rslora else 16 / rank))

    def oracle(reference: Any, library: Library, row: RowRoute) -> Any:
        if not row.adapters:
            return reference
        weights = library.adapters[row.adapters[0]]
        rank = next(iter(weights.modules.values())).a.shape[0]
        config = LoraConfig(r=rank, lora_alpha=16, use_rslora=rslora, target_modules=list(targets))
        wrapped = get_peft_model(copy.deepcopy(reference), config).eval()
        for path, pair in weights.modules.items():
            module = wrapped.base_model.model.get_submodule(path)
            module.lora_A["default"].weight.data.copy_(pair.a)
            module.lora_B["default"].weight.data.copy_(pair.b)
        return wrapped.base_model.model

    served, layers = copy_and_layers(model, library, 3)
    rows = [BASE_ROW, *(RowRoute((ref,), (1.0,)) for ref in (*refs, refs[0]))]
    check_rows(served, layers, library, rows, model, oracle=oracle)


def test_eject_restores_the_model_exactly() -> None:
    model = tiny_model()
    ids, mask = left_padded(4, 6)
    before, state = decode(model, ids, mask), list(model.state_dict())
    library = Library(model)
    refs = [library.add(4, (*ATTENTION, *MLP, "lm_head")) for _ in range(2)]
    layers = LoraLayers(model, 2, library.load)
    rows = [RowRoute((refs[0],), (1.0,)), RowRoute((refs[1],), (1.0,)), BASE_ROW, BASE_ROW]
    with layers.use(layers.route(rows)):
        inside = decode(model, ids, mask)
    outside = decode(model, ids, mask)
    assert list(model.state_dict()) == state
    layers.eject()
    after = decode(model, ids, mask)
    for one, two, three, four in zip(before, inside, outside, after, strict=True):
        assert torch.equal(one, three) and torch.equal(one, four)
        assert torch.equal(one[2:], two[2:])
        assert difference(two[:2], one[:2]) > 0.01
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    check_rows(model, layers, library, rows, copy.deepcopy(model))  # and adapters can come back
