"""Tiny models and adapters, made in a moment and without a network. Nothing here imports torch before it must."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from loraretriever.types import BaseModelSpec

TINY_BASE = "tiny/llama"
LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, VOCABULARY = 2, 32, 64, 4, 2, 128
WIDE = 128  # features of a model whose heads have 32, the fewest that vLLM's CPU build takes


def tiny_spec(hidden: int) -> BaseModelSpec:
    """The linear modules of the tiny model with so many features."""
    kv = hidden * KV_HEADS // HEADS
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (INNER, hidden),
        "mlp.up_proj": (INNER, hidden),
        "mlp.down_proj": (hidden, INNER),
    }
    layers = {f"model.layers.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in shapes.items()}
    return BaseModelSpec(TINY_BASE, layers | {"lm_head": (VOCABULARY, hidden)})


TINY_SPEC = tiny_spec(HIDDEN)


def tiny_llama(seed: int = 0, max_length: int = 512, hidden: int = HIDDEN) -> Any:
    """A random two-layer Llama in float32, in eval mode; its linear modules are those of `tiny_spec(hidden)`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=max_length,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def lora_tensors(
    targets: Sequence[str] = ("q_proj", "v_proj"),
    rank: int = 4,
    ranks: Mapping[str, int] | None = None,
    seed: int = 0,
    dtype: str = "float32",
    spec: BaseModelSpec = TINY_SPEC,
) -> dict[str, np.ndarray]:
    """Random factors, named as in a PEFT file. `ranks` gives modules (by path) other ranks."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for module, (out, inner) in spec.linear.items():
        if module.rpartition(".")[2] in targets:
            r = (ranks or {}).get(module, rank)
            for factor, shape in (("A", (r, inner)), ("B", (out, r))):
                tensors[f"base_model.model.{module}.lora_{factor}.weight"] = rng.normal(0, 0.1, shape).astype(dtype)
    return tensors


def write_peft_folder(
    folder: Path,
    *,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    rank: int = 4,
    alpha: float = 8,
    ranks: Mapping[str, int] | None = None,
    seed: int = 0,
    dtype: str = "float32",
    base_model: str = TINY_BASE,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    samples: Sequence[str] | None = None,
    card: str | None = None,
) -> Path:
    """Write an adapter for the tiny model in PEFT's format.

    `config` adds to, or overrides, what `adapter_config.json` holds; `tensors` replaces the random factors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(targets),
        "bias": "none",
    } | dict(config or {})
    (folder / "adapter_config.json").write_text(json.dumps(values))
    factors = tensors if tensors is not None else lora_tensors(targets, rank, ranks, seed, dtype)
    save_file(dict(factors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    if samples is not None:
        (folder / "samples.jsonl").write_text("".join(json.dumps({"inputs": text}) + "\n" for text in samples))
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder
