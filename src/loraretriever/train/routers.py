"""Training of routers over frozen adapters, with the language model's loss on the completions.

The paper's mixtures of experts and SMEAR have 20 samples of each task and one random adapter of each domain; RAMoLE's
gate has the adapters that retrieval finds for an example, of which each is dropped at random. Their learning rates and
numbers of steps are not in the papers: those here are ours.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from loraretriever.compose.routers import write_router
from loraretriever.errors import InvalidInputError
from loraretriever.evaluate.tasks import Example
from loraretriever.models import BaseModel
from loraretriever.pipeline import LoraRetriever
from loraretriever.train.adapters import Tokens, arrange, completion_loss, tokenize_example
from loraretriever.train.routed import RoutedModel
from loraretriever.train.steps import Progress, StepsResult, Trained, run_steps
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
    on_step: Progress = lambda step, steps, loss: None,
    save_every: int = 10,
) -> StepsResult:
    """Train a router and write it to `folder` (`compose.routers`). The base model is left as it was.

    A checkpoint in `folder` is written every `save_every` steps; a call with the same arguments goes on from it.

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
            result = run_steps(
                Trained(model.parameters, model.state, model.load_state),
                batches,
                lambda step, batch: _loss(base.model, model, batch, settings, step),
                folder / CHECKPOINT,
                asdict(settings) | {"kind": kind, "adapters": list(model.names), "data": _digest(items)},
                on_step,
                learning_rate=settings.learning_rate,
                warmup=settings.warmup,
                save_every=save_every,
            )
    finally:
        for parameter, needed in zip(base.model.parameters(), required, strict=True):
            parameter.requires_grad_(needed)
    experts = () if kind == "ramole" else model.names
    write_router(folder, kind, model.pairs(), experts, base.name, settings.top_k if kind == "moe" else None)
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return result


def retrieved_candidates(lr: LoraRetriever, examples: Sequence[Example], k: int) -> list[tuple[str, ...]]:
    """The adapters that retrieval finds for each example, k of them, however badly they fit."""
    routes = lr.route([each.inputs for each in examples], k=k, threshold=-1.0)
    return [tuple(hit.adapter for hit in route.hits) for route in routes]


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


def _digest(items: Sequence[_Item]) -> str:
    """Of the examples and the adapters that each may use."""
    return hashlib.sha256(
        repr([(item.tokens.ids, item.tokens.prompt, item.allowed) for item in items]).encode()
    ).hexdigest()


def _loss(model: Any, routed: RoutedModel, batch: Sequence[_Item], settings: RouterSettings, step: int) -> torch.Tensor:
    longest = max(len(item.tokens.ids) for item in batch)
    allowed = torch.zeros(len(batch), len(routed.names), dtype=torch.bool)
    prompt = torch.zeros(len(batch), longest, dtype=torch.bool)
    draw = random.Random(f"{settings.seed} {step}")  # by the step alone, so that a resumed run draws the same
    for n, item in enumerate(batch):
        kept = _dropped(item.allowed, settings.dropout, draw) if routed.kind == "ramole" else item.allowed
        allowed[n, list(kept)] = True
        prompt[n, : item.tokens.prompt] = True
    routed.allowed, routed.prompt = allowed, prompt
    return completion_loss(model, [item.tokens for item in batch])


def _dropped(allowed: tuple[int, ...], share: float, draw: random.Random) -> tuple[int, ...]:
    """RAMoLE's random dropping of adapters; one stays at least."""
    kept = tuple(each for each in allowed if draw.random() >= share)
    return kept or (draw.choice(allowed),)
