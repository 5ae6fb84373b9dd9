"""Training of one LoRA adapter with PEFT: completion-only loss over batches of similar length.

The base weights stay in float32 and the products run in bfloat16 (autocast): on CPUs this is faster than
bfloat16 weights, whose element-wise operations are slow. The head is applied to the completion only.
"""

from __future__ import annotations

import dataclasses
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file

from loraretriever.errors import require_extra
from loraretriever.evaluate.tasks import Example
from loraretriever.models import BaseModel, render_prompt

with require_extra("train"):
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

Progress = Callable[[int, int, float], None]


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
class TrainingResult:
    """Mean loss over the first and the last tenth of the steps, their number, and the time in seconds."""

    first_loss: float
    last_loss: float
    steps: int
    seconds: float


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
) -> TrainingResult:
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
        result = _run_steps(model, batches, folder / "checkpoint.pt", settings, on_step, save_every)
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


def _run_steps(
    model: Any,
    batches: list[list[Tokens]],
    checkpoint: Path,
    settings: TrainingSettings,
    on_step: Progress,
    save_every: int,
) -> TrainingResult:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_then_linear(settings.warmup, len(batches)))
    losses, seconds = _resume(checkpoint, settings, model, optimizer, schedule)
    model.train()
    for step in range(len(losses), len(batches)):
        start = time.perf_counter()
        loss = completion_loss(model.base_model.model, batches[step])
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds += time.perf_counter() - start
        if (step + 1) % save_every == 0:
            _write_checkpoint(checkpoint, settings, model, optimizer, schedule, losses, seconds)
        on_step(step + 1, len(batches), losses[-1])
    model.eval()
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    return TrainingResult(round(first, 4), round(last, 4), len(losses), round(seconds, 1))


def warmup_then_linear(warmup: float, steps: int) -> Callable[[int], float]:
    """The learning rate's factor at each step: rising over a share of the steps, then falling to zero."""
    rising = max(1, round(warmup * steps))
    return lambda step: min((step + 1) / rising, (steps - step) / max(1, steps - rising))


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


def _write_checkpoint(
    path: Path,
    settings: TrainingSettings,
    model: Any,
    optimizer: Any,
    schedule: Any,
    losses: list[float],
    seconds: float,
) -> None:
    state = {
        "settings": asdict(settings),
        "adapter": get_peft_model_state_dict(model),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "losses": losses,
        "seconds": seconds,
    }
    unfinished = path.with_suffix(".tmp")
    torch.save(state, unfinished)
    unfinished.rename(path)


def _resume(
    path: Path, settings: TrainingSettings, model: Any, optimizer: Any, schedule: Any
) -> tuple[list[float], float]:
    """Restore a checkpoint of the same settings, if there is one: its losses and seconds so far."""
    if not path.is_file():
        return [], 0.0
    state = torch.load(path, weights_only=True)
    if state["settings"] != asdict(settings):
        return [], 0.0
    set_peft_model_state_dict(model, state["adapter"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return list(state["losses"]), float(state["seconds"])


def _save(model: Any, base_name: str, folder: Path) -> None:
    """Write the adapter's two files; the weights last, and by renaming, so that they mark a finished training."""
    config = dataclasses.replace(model.peft_config["default"], base_model_name_or_path=base_name, inference_mode=True)
    config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))
    weights = {k: v.to(torch.float16).contiguous() for k, v in get_peft_model_state_dict(model).items()}
    unfinished = folder / "adapter_model.safetensors.tmp"
    save_file(weights, unfinished, metadata={"format": "pt"})
    os.replace(unfinished, folder / "adapter_model.safetensors")
