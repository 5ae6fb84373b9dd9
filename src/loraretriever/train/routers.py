"""Training of routers over frozen adapters, with the language model's loss on the completions.

The paper's mixtures of experts and SMEAR have 20 samples of each task and one random adapter of each domain; RAMoLE's
gate has the adapters that retrieval finds for an example, of which each is dropped at random. Their learning rates and
numbers of steps are not in the papers: those here are ours.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from loraretriever.compose.routers import write_router
from loraretriever.errors import InvalidInputError
from loraretriever.evaluate.tasks import Example
from loraretriever.models import BaseModel
from loraretriever.train.adapters import Tokens, arrange, completion_loss, tokenize_example, warmup_then_linear
from loraretriever.train.routed import RoutedModel
from loraretriever.types import AdapterWeights

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """Hyper-parameters. `rank` is of RAMoLE's router, `dropout` how many adapters it drops; `top_k` of a moe."""

    rank: int = 8
    top_k: int | None = None
    learning_rate: float = 2e-3
    warmup: float = 0.1
    epochs: int = 2
    batch_size: int = 8
    dropout: float = 0.5
    seed: int = 0


@dataclass(frozen=True, slots=True)
class RouterResult:
    """Mean loss over the first and the last tenth of the steps, their number, and the time in seconds."""

    first_loss: float
    last_loss: float
    steps: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Item:
    tokens: Tokens
    allowed: tuple[int, ...]


def train_router(
    kind: str,
    base: BaseModel,
    adapters: Mapping[str, AdapterWeights],
    examples: Sequence[Example],
    candidates: Sequence[tuple[str, ...]] | None,
    folder: Path,
    settings: RouterSettings,
    on_step: Callable[[int, int, float], None] = lambda step, steps, loss: None,
    save_every: int = 10,
) -> RouterResult:
    """Train a router and write it to `folder` (`compose.routers`). The base model is left as it was.

    A checkpoint in `folder` is written every `save_every` steps; a call with the same settings goes on from it.

    Args:
        kind: "moe", "smear" or "ramole".
        base: in float32.
        adapters: in the order of the router's outputs.
        examples: what it learns from.
        candidates: for each example the adapters that it may use; None: all.
        folder: made if need be.
        settings: of the training.
        on_step: called with the steps done, the steps in all and the loss.
        save_every: steps.

    Raises:
        InvalidInputError: an unknown kind, no adapters, no examples, or a candidate that is no adapter.
    """
    torch.manual_seed(settings.seed)
    model = RoutedModel(base.model, adapters, kind, settings.rank, settings.top_k if kind == "moe" else None)
    items = _items(base.tokenizer, examples, candidates, model.names)
    batches = arrange(
        items, lambda item: len(item.tokens.ids), settings.batch_size, settings.epochs, random.Random(settings.seed)
    )
    folder.mkdir(parents=True, exist_ok=True)
    required = [parameter.requires_grad for parameter in base.model.parameters()]
    base.model.requires_grad_(False)
    try:
        with model.installed():
            result = _run_steps(base.model, model, batches, folder / CHECKPOINT, settings, on_step, save_every)
    finally:
        for parameter, needed in zip(base.model.parameters(), required, strict=True):
            parameter.requires_grad_(needed)
    experts = () if kind == "ramole" else model.names
    write_router(folder, kind, model.pairs(), experts, base.name, settings.top_k if kind == "moe" else None)
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return result


def _items(
    tokenizer: Any, examples: Sequence[Example], candidates: Sequence[tuple[str, ...]] | None, names: Sequence[str]
) -> list[_Item]:
    if not examples:
        raise InvalidInputError("a router was given no examples to learn from; expected one at least.")
    place = {name: e for e, name in enumerate(names)}
    for name in {name for row in candidates or () for name in row}:
        if name not in place:
            raise InvalidInputError(f"an example's candidate {name!r} is none of the adapters {', '.join(names)}.")
    rows = candidates or [tuple(names)] * len(examples)
    return [
        _Item(tokenize_example(tokenizer, example), tuple(place[name] for name in row))
        for example, row in zip(examples, rows, strict=True)
    ]


def _run_steps(
    model: Any,
    routed: RoutedModel,
    batches: Sequence[Sequence[_Item]],
    checkpoint: Path,
    settings: RouterSettings,
    on_step: Callable[[int, int, float], None],
    save_every: int,
) -> RouterResult:
    optimizer = torch.optim.AdamW(routed.parameters, lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_then_linear(settings.warmup, len(batches)))
    losses, seconds = _resume(checkpoint, settings, routed, optimizer, schedule)
    for step in range(len(losses), len(batches)):
        start = time.perf_counter()
        loss = _loss(model, routed, batches[step], settings, step)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(routed.parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds += time.perf_counter() - start
        if (step + 1) % save_every == 0:
            _write_checkpoint(checkpoint, settings, routed, optimizer, schedule, losses, seconds)
        on_step(step + 1, len(batches), losses[-1])
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    return RouterResult(round(first, 4), round(last, 4), len(losses), round(seconds, 1))


def _loss(model: Any, routed: RoutedModel, batch: Sequence[_Item], settings: RouterSettings, step: int) -> torch.Tensor:
    longest = max(len(item.tokens.ids) for item in batch)
    allowed = torch.zeros(len(batch), len(routed.names), dtype=torch.bool)
    prompt = torch.zeros(len(batch), longest, dtype=torch.bool)
    draw = random.Random(f"{settings.seed} {step}")  # by the step alone, so that a resumed run draws the same
    for n, item in enumerate(batch):
        allowed[
            n, list(_dropped(item.allowed, settings.dropout, draw) if routed.kind == "ramole" else item.allowed)
        ] = True
        prompt[n, : item.tokens.prompt] = True
    routed.allowed, routed.prompt = allowed, prompt
    return completion_loss(model, [item.tokens for item in batch])


def _dropped(allowed: tuple[int, ...], share: float, draw: random.Random) -> tuple[int, ...]:
    """RAMoLE's random dropping of adapters; one stays at least."""
    kept = tuple(each for each in allowed if draw.random() >= share)
    return kept or (draw.choice(allowed),)


def _write_checkpoint(
    path: Path,
    settings: RouterSettings,
    routed: RoutedModel,
    optimizer: Any,
    schedule: Any,
    losses: list[float],
    seconds: float,
) -> None:
    state = {
        "settings": asdict(settings),
        "names": list(routed.names),
        "routers": [parameter.detach() for parameter in routed.parameters],
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "losses": losses,
        "seconds": seconds,
    }
    unfinished = path.with_suffix(".tmp")
    torch.save(state, unfinished)
    unfinished.rename(path)


def _resume(
    path: Path, settings: RouterSettings, routed: RoutedModel, optimizer: Any, schedule: Any
) -> tuple[list[float], float]:
    """Restore a checkpoint of the same settings and adapters, if there is one: its losses and seconds so far."""
    if not path.is_file():
        return [], 0.0
    state = torch.load(path, weights_only=True)
    if state["settings"] != asdict(settings) or state["names"] != list(routed.names):
        return [], 0.0
    with torch.no_grad():
        for parameter, kept in zip(routed.parameters, state["routers"], strict=True):
            parameter.copy_(kept)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return list(state["losses"]), float(state["seconds"])
