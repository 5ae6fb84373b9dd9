"""Tiny random models of several families, adapters in memory, and the two oracles: merged weights and PEFT."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from loraretriever.batch import AdapterRef, LoraLayers, RowRoute
from loraretriever.batch.reference import merged_update
from loraretriever.types import AdapterWeights, LoraPair, Mixer

VOCABULARY = 64
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
FAMILIES = {
    "llama": (*ATTENTION, *MLP),
    "qwen2": (*ATTENTION, *MLP),
    "qwen3": (*ATTENTION, *MLP),
    "mistral": (*ATTENTION, *MLP),
    "gemma2": (*ATTENTION, *MLP),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
}


def tiny_model(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A two-layer model of the family with random weights, float32, eval mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**common, **sizes, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    # The standard initialisation is so small that the adapters would drown the base model, or it them.
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(4.0 if "embed" not in name else 1.0)
    return model


def targets_of(model: Any, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(out, in) of the modules whose last name is among `names`."""
    found = {}
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in names:
            out_in = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
            found[path] = tuple(out_in)
    return found


class Library:
    """Adapters in memory for one model, and a `load` that counts."""

    def __init__(self, model: Any, seed: int = 1) -> None:
        self.model = model
        self.adapters: dict[AdapterRef, AdapterWeights] = {}
        self.loads: list[str] = []
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, rank: int, targets: Iterable[str], scaling: float = 1.0, name: str | None = None) -> AdapterRef:
        name = name or f"a{len(self.adapters)}"
        modules = {
            path: LoraPair(self._random(rank, features), self._random(out, rank) / rank**0.5, scaling)
            for path, (out, features) in targets_of(self.model, targets).items()
        }
        ref = AdapterRef(name, f"digest-{len(self.adapters)}")
        self.adapters[ref] = AdapterWeights(name, ref.digest, modules)
        return ref

    def load(self, ref: AdapterRef) -> AdapterWeights:
        self.loads.append(ref.name)
        return self.adapters[ref]

    def _random(self, *shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(*shape, generator=self._generator)


def merged(model: Any, library: Library, row: RowRoute) -> Any:
    """A copy of the model with the row's update in its weights: the plain formula of `reference.py`."""
    chosen = [library.adapters[ref] for ref in row.adapters]
    copied = copy.deepcopy(model)
    for path in {path for adapter in chosen for path in adapter.modules}:
        module = copied.get_submodule(path)
        out, features = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
        # An adapter without the module counts as zeros of the same rank.
        pairs = [a.modules.get(path, LoraPair(torch.zeros(1, features), torch.zeros(out, 1), 1.0)) for a in chosen]
        update = merged_update(pairs, row.weights, row.mixer)
        if not isinstance(module, nn.Linear):
            update = update.t()
        # A new parameter, for the old one may be tied to the embedding, which an adapter leaves as it is.
        module.weight = nn.Parameter((module.weight.double() + update).to(module.weight.dtype))
    return copied


def decode(model: Any, ids: torch.Tensor, mask: torch.Tensor, steps: int = 2) -> list[torch.Tensor]:
    """Logits of the prompt's last position, then of `steps` fixed tokens read one by one with a cache."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache: Any = DynamicCache(config=model.config)
    prompt = ids.shape[1] - steps
    logits = []
    ends = [prompt, *range(prompt + 1, ids.shape[1] + 1)]
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        positions = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, start:end]
        arguments = {name: cache, "use_cache": True, "attention_mask": mask[:, :end], "position_ids": positions}
        with torch.inference_mode():
            logits.append(model(input_ids=ids[:, start:end], **arguments).logits[:, -1].float().cpu())
    return logits


def left_padded(rows: int, length: int, steps: int = 2, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids (rows, length + steps) and a mask with more padding from row to row."""
    ids = torch.randint(3, VOCABULARY, (rows, length + steps), generator=torch.Generator().manual_seed(seed))
    padding = torch.arange(rows) % max(1, length - 2)
    mask = (torch.arange(length + steps)[None] >= padding[:, None]).long()
    return ids * mask, mask


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference relative to the largest expected number."""
    return float((found - expected).abs().max() / expected.abs().max())


def check_rows(
    model: Any,
    layers: LoraLayers,
    library: Library,
    rows: Sequence[RowRoute],
    reference: Any = None,
    tolerance: float = 1e-4,
    oracle: Callable[[Any, Library, RowRoute], Any] = merged,
) -> None:
    """Each row of the mixed batch, prefill and decode, equals the reference model with that row's update merged."""
    ids, mask = left_padded(len(rows), 6)
    device = model.device
    with layers.use(layers.route(rows)):
        found = decode(model, ids.to(device), mask.to(device))
    references = {row: oracle(reference, library, row) for row in dict.fromkeys(rows)}
    for n, row in enumerate(rows):
        expected = decode(references[row], ids[n : n + 1], mask[n : n + 1])
        for step, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert difference(one[n], other[0]) <= tolerance, f"row {n}, step {step}: {row}"


def mixed_rows(refs: Sequence[AdapterRef], largest: int = 3) -> list[RowRoute]:
    """Base rows, selections, mixtures and fusions side by side, with 1 up to `largest` adapters."""
    rows = [RowRoute()]
    for k in range(1, largest + 1):
        for mixer in Mixer:
            chosen = tuple(refs[(k + i * 2 + (mixer is Mixer.OUTPUTS)) % len(refs)] for i in range(k))
            chosen = tuple(dict.fromkeys(chosen))
            total = sum(range(1, len(chosen) + 1))
            rows.append(RowRoute(chosen, tuple((i + 1) / total for i in range(len(chosen))), mixer))
    return [*rows, RowRoute()]


class OnePath:
    """Stands in for the cost model: always the same path."""

    def __init__(self, path: str) -> None:
        self._path = path

    def cheapest(self, rows: int, tokens: int, width: int, counts: Sequence[int], additive: bool) -> str:
        if self._path == "kernels" and tokens > 1:
            return "gathered"
        return "grouped" if self._path == "split" and not additive else self._path
