"""The steps of a training on completions: optimiser, schedule, and checkpoints that a later call goes on from."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

Progress = Callable[[int, int, float], None]  # steps done, steps in all, loss
_Batch = TypeVar("_Batch")


@dataclass(frozen=True, slots=True)
class StepsResult:
    """Mean loss over the first and the last tenth of the steps, their number, and the time in seconds."""

    first_loss: float
    last_loss: float
    steps: int
    seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """What is trained: its parameters, and how they are read from and written to checkpoints."""

    parameters: Sequence[nn.Parameter]
    state: Callable[[], Any]
    load: Callable[[Any], None]


def run_steps(
    trained: Trained,
    batches: Sequence[_Batch],
    loss_of: Callable[[int, _Batch], torch.Tensor],
    checkpoint: Path,
    identity: Mapping[str, Any],
    on_step: Progress,
    *,
    learning_rate: float,
    warmup: float,
    save_every: int,
) -> StepsResult:
    """Run the steps that are left: AdamW, gradients of norm 1 at most, a rate that rises and then falls to zero.

    Args:
        trained: what is trained.
        batches: one for each step.
        loss_of: the loss of a step's batch.
        checkpoint: a file, written every `save_every` steps.
        identity: what a checkpoint must have been written under to be gone on from; another one is ignored.
        on_step: called after each step.
        learning_rate: the greatest.
        warmup: the share of the steps during which the rate rises.
        save_every: steps.
    """
    optimizer = torch.optim.AdamW(trained.parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_then_linear(warmup, len(batches)))
    losses, seconds = _resume(checkpoint, identity, trained, optimizer, schedule)
    for step in range(len(losses), len(batches)):
        start = time.perf_counter()
        loss = loss_of(step, batches[step])
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(trained.parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds += time.perf_counter() - start
        if (step + 1) % save_every == 0:
            state = {
                "identity": dict(identity),
                "weights": trained.state(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "losses": losses,
                "seconds": seconds,
            }
            unfinished = checkpoint.with_suffix(".tmp")
            torch.save(state, unfinished)
            unfinished.rename(checkpoint)
        on_step(step + 1, len(batches), losses[-1])
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    return StepsResult(round(first, 4), round(last, 4), len(losses), round(seconds, 1))


def _warmup_then_linear(warmup: float, steps: int) -> Callable[[int], float]:
    rising = max(1, round(warmup * steps))
    return lambda step: min((step + 1) / rising, (steps - step) / max(1, steps - rising))


def _resume(
    path: Path, identity: Mapping[str, Any], trained: Trained, optimizer: Any, schedule: Any
) -> tuple[list[float], float]:
    """Restore a checkpoint of the same identity, if there is one: its losses and seconds so far."""
    if not path.is_file():
        return [], 0.0
    state = torch.load(path, weights_only=True)
    if state.get("identity") != dict(identity):
        return [], 0.0
    trained.load(state["weights"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return list(state["losses"]), float(state["seconds"])
