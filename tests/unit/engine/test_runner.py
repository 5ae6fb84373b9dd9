"""The runner against the model's own forward pass: ragged batches, chunks, windows, composed rows, models refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from batch_helpers import ATTENTION, FAMILIES, MLP, VOCABULARY, Library, difference, merged, tiny_model
from loraretriever.batch import BASE_ROW, LoraLayers, RowRoute
from loraretriever.engine.runner import ModelRunner, Work, check_model
from loraretriever.errors import InvalidInputError, ModelLoadError
from loraretriever.types import Mixer

WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "gemma2": {"sliding_window": 16, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
}
LONG = 150  # tokens: beyond the windows, and beyond the smallest rows of the cache


def make_runner(model: Any, layers: LoraLayers | None = None) -> ModelRunner:
    return ModelRunner(model, layers or no_layers(model), 1 << 21, 1 << 18)


def no_layers(model: Any) -> LoraLayers:
    return LoraLayers(model, 1, lambda ref: pytest.fail("there is nothing to load"))


def random_tokens(count: int, seed: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def own_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """(tokens, vocabulary), by the model's own attention."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()


def run_ragged(
    runner: ModelRunner, prompts: list[list[int]], routes: list[RowRoute], sizes: tuple[int, ...]
) -> list[list[torch.Tensor]]:
    """Run each prompt in chunks, those of different prompts in one step, and collect the logits of each chunk's end.

    Sequence i begins at step i, and its chunks are `sizes`, over and over, from another place on.
    """
    done = [0] * len(prompts)
    ends: list[list[torch.Tensor]] = [[] for _ in prompts]
    step = 0
    while any(at < len(prompt) for at, prompt in zip(done, prompts, strict=True)):
        works, rows = [], []
        for i, prompt in enumerate(prompts):
            if step >= i and done[i] < len(prompt):
                count = min(sizes[(step + i) % len(sizes)], len(prompt) - done[i])
                assert runner.table.place(i, done[i] + count)
                works.append((i, count))
        runner.settle()
        for i, count in works:
            tokens = prompts[i][done[i] : done[i] + count]
            rows.append(Work(runner.table[i], done[i], tokens, routes[i], is_last=(step + i) % 3 > 0))
            done[i] += count
        logits, order = runner.step(rows)
        assert sorted(order) == [k for k, row in enumerate(rows) if row.is_last]
        for row, k in zip(logits, order, strict=True):
            ends[works[k][0]].append((done[works[k][0]] - 1, row.float()))
        for i, prompt in enumerate(prompts):
            if done[i] == len(prompt) and i in runner.table:
                runner.table.remove(i)
        step += 1
    return ends


@pytest.mark.parametrize("sizes", [(7, 1, 1, 30), (200,), (1, 64, 1, 1, 1)])
@pytest.mark.parametrize("family", [*FAMILIES, *(f"{family}-window" for family in WINDOWED)])
def test_ragged_steps_equal_the_models_own_pass(family: str, sizes: tuple[int, ...]) -> None:
    name, _, window = family.partition("-")
    longest = {"n_positions": 256} if name == "gpt2" else {"max_position_embeddings": 256}
    model = tiny_model(name, **longest, **(WINDOWED[name] if window else {}))
    prompts = [random_tokens(count, seed) for seed, count in enumerate((LONG, 1, 40, 65, 17))]
    ends = run_ragged(make_runner(model), prompts, [BASE_ROW] * len(prompts), sizes)
    for prompt, found in zip(prompts, ends, strict=True):
        own = own_logits(model, prompt)
        for position, logits in found:
            assert difference(logits, own[position]) < 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_composed_rows_equal_merged_weights(family: str) -> None:
    model = tiny_model(family, **({"n_positions": 256} if family == "gpt2" else {"max_position_embeddings": 256}))
    library = Library(model)
    refs = [library.add(rank, FAMILIES[family]) for rank in (1, 4, 8)]
    refs.append(library.add(3, ("lm_head",) if family == "llama" else ("c_fc",)))
    routes = [
        BASE_ROW,
        RowRoute((refs[0],), (1.0,)),
        RowRoute(tuple(refs), (0.5, 0.3, 0.2, 0.9)),
        RowRoute((refs[1], refs[2]), (0.6, 0.4), Mixer.PARAMETERS),
        RowRoute((refs[3],), (0.7,)),
    ]
    served = copy.deepcopy(model)
    prompts = [random_tokens(count, seed) for seed, count in enumerate((33, 70, 9, 65, 20))]
    runner = make_runner(served, LoraLayers(served, 4, library.load))
    ends = run_ragged(runner, prompts, routes, (9, 1, 1, 30, 1))
    for prompt, route, found in zip(prompts, routes, ends, strict=True):
        own = own_logits(merged(model, library, route), prompt)
        assert found
        for position, logits in found:
            assert difference(logits, own[position]) < 1e-4


def test_what_a_broken_sequence_leaves_behind_reaches_no_other() -> None:
    """Rows are used again, and rows of unequal length are read together; a mask alone would let NaN through."""
    model = tiny_model("llama", max_position_embeddings=256)
    library = Library(model)
    broken = RowRoute((library.add(2, ATTENTION),), (float("nan"),))
    served = copy.deepcopy(model)
    runner = make_runner(served, LoraLayers(served, 2, library.load))
    run_ragged(runner, [random_tokens(60, i) for i in range(4)], [broken] * 4, (60,))
    prompts = [random_tokens(10 + 9 * i, i) for i in range(4)]
    ends = run_ragged(runner, prompts, [BASE_ROW] * 4, (8, 1, 1))
    for prompt, found in zip(prompts, ends, strict=True):
        own = own_logits(model, prompt)
        assert all(difference(logits, own[position]) < 1e-4 for position, logits in found)


def test_a_token_amid_a_prompt_reads_no_further_than_its_row_is_written() -> None:
    model = tiny_model("llama", max_position_embeddings=256)
    library = Library(model)
    broken = RowRoute((library.add(2, ATTENTION),), (float("nan"),))
    served = copy.deepcopy(model)
    runner = make_runner(served, LoraLayers(served, 2, library.load))
    run_ragged(runner, [random_tokens(60, i) for i in range(2)], [broken] * 2, (60,))
    first, second = random_tokens(60, 1), random_tokens(40, 2)
    for key, prompt in enumerate((first, second)):
        runner.table.place(key, len(prompt))  # the whole prompt's room, as the scheduler asks for
    runner.settle()
    runner.step([Work(runner.table[0], 0, first[:-1], BASE_ROW, is_last=False)])
    for at in range(40):
        works = [Work(runner.table[1], at, second[at : at + 1], BASE_ROW, is_last=at == 39)]
        if at == 0:
            works.append(Work(runner.table[0], 59, first[59:], BASE_ROW, is_last=True))
        logits, _ = runner.step(works)
    assert difference(logits[0].float(), own_logits(model, second)[-1]) < 1e-4


def test_half_precision() -> None:
    model = tiny_model("llama", max_position_embeddings=256).bfloat16()
    prompt = random_tokens(90, 0)
    ends = run_ragged(make_runner(model), [prompt], [BASE_ROW], (30, 1))
    own = own_logits(model, prompt)
    assert all(difference(logits, own[position]) < 5e-2 for position, logits in ends[0])


def test_a_prefix_from_another_sequence_is_as_good_as_computed() -> None:
    model = tiny_model("llama", max_position_embeddings=256)
    runner = make_runner(model)
    first, second = random_tokens(70, 1), random_tokens(30, 2)
    second = first[:48] + second
    runner.table.place("first", len(first))
    runner.settle()
    runner.step([Work(runner.table["first"], 0, first, BASE_ROW, is_last=True)])
    runner.save_prefix(runner.table["first"], runner.prefixes.add(BASE_ROW, first))
    runner.table.remove("first")
    blocks = runner.prefixes.find(BASE_ROW, second)
    assert len(blocks) == 3
    runner.table.place("second", len(second))
    runner.settle()
    runner.load_prefix(runner.table["second"], blocks)
    logits, _ = runner.step([Work(runner.table["second"], 48, second[48:], BASE_ROW, is_last=True)])
    assert difference(logits[0], own_logits(model, second)[-1]) < 1e-5


def test_the_memory_is_bounded_by_the_setting() -> None:
    model = tiny_model("llama", max_position_embeddings=256)
    runner = ModelRunner(model, no_layers(model), 1 << 20, 1 << 16)
    assert runner.token_bytes == 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, numbers, bytes
    assert 0.9 * (1 << 20) <= runner.cache_bytes <= (1 << 20) + (1 << 16)
    with pytest.raises(InvalidInputError, match="cache_mib"):
        ModelRunner(model, no_layers(model), 100, 0)


def test_the_models_own_attention_is_back_after_a_step() -> None:
    model = tiny_model("gemma3_text", **WINDOWED["gemma3_text"])
    before = model.config._attn_implementation
    expected = own_logits(model, [5, 6, 7])
    make_runner(model)
    assert model.config._attn_implementation == before
    assert torch.equal(own_logits(model, [5, 6, 7]), expected)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": ({"hidden_size": 32, "n_head": 4, "n_layer": 2}, "position_ids"),
    "mamba": ({"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}, "position_ids|attention"),
    "gpt_oss": (
        {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
        "s_aux",
    ),
    "qwen3_next": (
        {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
        "linear_attention",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", REFUSED)
def test_models_that_cannot_be_run_right_are_refused(family: str) -> None:
    sizes, match = REFUSED[family]
    config = AutoConfig.for_model(family, vocab_size=VOCABULARY, pad_token_id=0, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ModelLoadError, match=match):
        make_runner(model)


def test_rotary_scaling_that_depends_on_the_length_bounds_it() -> None:
    scaling = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    model = tiny_model("llama", max_position_embeddings=256, rope_parameters=scaling)
    assert make_runner(model).max_length == 64


def test_shapes_are_those_of_the_model() -> None:
    shapes = check_model(tiny_model("gemma2"))
    assert [(shape.heads, shape.key, shape.value) for shape in shapes] == [(2, 8, 8)] * 2


def test_targets_outside_attention() -> None:
    model = tiny_model("llama", max_position_embeddings=256)
    library = Library(model)
    ref = library.add(4, (*ATTENTION, *MLP, "lm_head"))
    served = copy.deepcopy(model)
    prompt = random_tokens(40, 3)
    runner = make_runner(served, LoraLayers(served, 2, library.load))
    route = RowRoute((ref,), (1.0,))
    ends = run_ragged(runner, [prompt, prompt[:7]], [route, BASE_ROW], (12, 1))
    own = own_logits(merged(model, library, route), prompt)
    assert all(difference(logits, own[position]) < 1e-4 for position, logits in ends[0])
