from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loraretriever.errors import ModelLoadError, PoolError
from loraretriever.models import base_model_spec, linear_modules
from loraretriever.pool.admission import admit
from loraretriever.pool.weights import load_weights, module_shapes
from tiny import TINY_BASE, TINY_SPEC, lora_tensors, tiny_llama, write_peft_folder

PATTERNS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 2}},
    {"rank_pattern": {"layers.0.self_attn.q_proj": 2, "q_proj": 3}, "alpha_pattern": {"v_proj": 5}},
    {"rank_pattern": {r"model\.layers\.\d\.self_attn\.v_proj": 2}, "alpha_pattern": {".*q_proj": 7}},
    {"rank_pattern": {"^model.layers.1.self_attn.q_proj": 6}, "use_rslora": True},
    {"rank_pattern": {"proj": 2}, "alpha_pattern": {"q_pro": 3}},
]


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # within PEFT
@pytest.mark.parametrize("options", PATTERNS)
def test_ranks_and_scalings_are_those_of_peft(tmp_path: Path, options: dict[str, Any]) -> None:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
    model = get_peft_model(tiny_llama(), config)
    model.peft_config["default"].base_model_name_or_path = TINY_BASE
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    # Saving sorts the patterns, and the first one that matches counts: what was saved is what there is to serve.
    model = PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    admit(tmp_path, TINY_BASE, TINY_SPEC)
    weights = load_weights(tmp_path, "a", "digest")
    layers = {
        path.removeprefix("base_model.model."): module
        for path, module in model.named_modules()
        if hasattr(module, "lora_A") and module.lora_A
    }
    assert weights.modules.keys() == layers.keys()
    for path, layer in layers.items():
        pair = weights.modules[path]
        assert pair.scaling == pytest.approx(layer.scaling["default"])
        assert torch.equal(pair.a, layer.lora_A["default"].weight)
        assert torch.equal(pair.b, layer.lora_B["default"].weight)


def test_weights_keep_their_dtype(tmp_path: Path) -> None:
    import torch

    weights = load_weights(write_peft_folder(tmp_path, dtype="float16"), "a", "digest")
    assert {pair.a.dtype for pair in weights.modules.values()} == {torch.float16}
    assert len(weights.modules) == len(lora_tensors()) // 2


def test_lost_files_are_an_error_of_the_pool(tmp_path: Path) -> None:
    with pytest.raises(PoolError, match="pool verify"):
        load_weights(tmp_path, "a", "digest")


def test_shapes_come_from_the_header(tmp_path: Path) -> None:
    shapes = module_shapes(write_peft_folder(tmp_path, targets=["down_proj"]))
    assert shapes == {f"model.layers.{layer}.mlp.down_proj": (32, 64) for layer in (0, 1)}


def test_the_spec_of_a_model_comes_from_its_configuration_alone(tmp_path: Path) -> None:
    model = tiny_llama()
    assert linear_modules(TINY_BASE, model) == TINY_SPEC
    model.config.save_pretrained(tmp_path)
    assert base_model_spec(str(tmp_path)).linear == TINY_SPEC.linear


def test_the_linear_modules_of_gpt2_count(tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16).save_pretrained(tmp_path)
    assert base_model_spec(str(tmp_path)).linear["transformer.h.0.attn.c_attn"] == (24, 8)


def test_a_missing_base_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="nowhere"):
        base_model_spec(str(tmp_path / "nowhere"))
