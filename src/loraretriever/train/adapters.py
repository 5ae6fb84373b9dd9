"""Training of one LoRA adapter with PEFT: completion-only loss over batches of similar length.

The base weights stay in float32 and the products run in bfloat16 (autocast): on CPUs this is faster than
bfloat16 weights, whose element-wise operations are slow. The head is applied to the completion only.
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file

from loraretriever.errors import require_extra
from loraretriever.evaluate.tasks import Example
from loraretriever.models import BaseModel, render_prompt
from loraretriever.train.steps import Progress, StepsResult, Trained, run_steps

with require_extra("train"):
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """Hyper-parameters of one training. `examples` bounds how many are used; `warmup` is a share of the steps."""

    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    learning_rate: float = 1e-3
    warmup: float = 0.1
    batch_size: int = 16
    examples: int = 800
    epochs: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Tokens:
    """One example as token ids; the first `prompt` of them are the prompt."""

    ids: list[int]
    prompt: int


def train_adapter(
    base: BaseModel,
    examples: Sequence[Example],
    folder: Path,
    settings: TrainingSettings,
    on_step: Progress = lambda step, steps, loss: None,
    save_every: int = 10,
) -> StepsResult:
    """Train an adapter for `base` (float32 weights) and save it to `folder` in PEFT format, in float16.

    A checkpoint in `folder` is written every `save_every` steps; a call with the same settings goes on from it.
    `on_step` is called with the steps done, the steps in all and the loss. The base model is left as it was.
    """
    torch.manual_seed(settings.seed)
    folder.mkdir(parents=True, exist_ok=True)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=list(settings.targets),
    )
    model = get_peft_model(base.model, config)
    try:
        batches = _make_batches(base.tokenizer, examples, settings)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        trained = Trained(
            parameters,
            lambda: get_peft_model_state_dict(model),
            lambda state: set_peft_model_state_dict(model, state),
        )
        model.train()
        result = run_steps(
            trained,
            batches,
            lambda step, batch: completion_loss(model.base_model.model, batch),
            folder / "checkpoint.pt",
            asdict(settings),
            on_step,
            learning_rate=settings.learning_rate,
            warmup=settings.warmup,
            save_every=save_every,
        )
        model.eval()
        _save(model, base.name, folder)
        (folder / "checkpoint.pt").unlink(missing_ok=True)
    finally:
        model.unload()
        base.model.requires_grad_(True)
    return result


def _make_batches(tokenizer: Any, examples: Sequence[Example], settings: TrainingSettings) -> list[list[Tokens]]:
    """All batches of all epochs, in order."""
    rng = random.Random(settings.seed)
    chosen = list(examples)
    rng.shuffle(chosen)
    tokens = [tokenize_example(tokenizer, example) for example in chosen[: settings.examples]]
    return arrange(tokens, lambda each: len(each.ids), settings.batch_size, settings.epochs, rng)


_Item = TypeVar("_Item")


def arrange(
    items: Sequence[_Item], length: Callable[[_Item], int], batch_size: int, epochs: int, rng: random.Random
) -> list[list[_Item]]:
    """The batches of all epochs, in order: items of similar length together, the batches shuffled."""
    shuffled, batches = list(items), list[list[_Item]]()
    for _ in range(epochs):
        rng.shuffle(shuffled)
        ordered = sorted(shuffled, key=length)
        epoch = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
        rng.shuffle(epoch)
        batches += epoch
    return batches


def tokenize_example(tokenizer: Any, example: Example) -> Tokens:
    """The prompt in the model's template, the answer, and the end token."""
    prompt = tokenizer(render_prompt(tokenizer, example.inputs), add_special_tokens=False).input_ids
    completion = tokenizer(example.targets, add_special_tokens=False).input_ids
    return Tokens(prompt + completion + [tokenizer.eos_token_id], len(prompt))


def completion_loss(model: Any, batch: Sequence[Tokens]) -> torch.Tensor:
    """Mean cross-entropy of the completions' tokens; right padding, whose positions causal attention never sees."""
    longest = max(len(t.ids) for t in batch)
    ids = torch.tensor([t.ids + [0] * (longest - len(t.ids)) for t in batch])
    rows = [row for row, t in enumerate(batch) for _ in t.ids[t.prompt :]]
    positions = [p for t in batch for p in range(t.prompt, len(t.ids))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[rows, [p - 1 for p in positions]])
    return torch.nn.functional.cross_entropy(logits.float(), ids[rows, positions])


def _save(model: Any, base_name: str, folder: Path) -> None:
    """Write the adapter's two files; the weights last, and by renaming, so that they mark a finished training."""
    config = dataclasses.replace(model.peft_config["default"], base_model_name_or_path=base_name, inference_mode=True)
    config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))
    weights = {k: v.to(torch.float16).contiguous() for k, v in get_peft_model_state_dict(model).items()}
    unfinished = folder / "adapter_model.safetensors.tmp"
    save_file(weights, unfinished, metadata={"format": "pt"})
    os.replace(unfinished, folder / "adapter_model.safetensors")
