"""`loraretriever train-router`: a token router learns how adapters of a pool are to act together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraretriever import console
from loraretriever.cli.options import BaseModelOption, DeviceOption, EncoderOption, JsonOption, PoolOption
from loraretriever.errors import InvalidInputError

if TYPE_CHECKING:
    from loraretriever.evaluate.tasks import Example
    from loraretriever.pipeline import LoraRetriever

KINDS = ("ramole", "moe")


def train_router(
    output: Annotated[
        Path, typer.Option(help="Folder of the router; a training that was stopped goes on there.", metavar="DIR")
    ],
    tasks: Annotated[
        Path, typer.Option(help="Folder with train/, a JSONL file of examples for each task in it.", metavar="DIR")
    ],
    pool: PoolOption,
    kind: Annotated[
        str, typer.Option(help="ramole: a gate over what retrieval finds; moe: one over a fixed set of experts.")
    ] = "ramole",
    expert: Annotated[
        list[str] | None,
        typer.Option(help="moe: adapter to route to (repeatable).", metavar="NAME", show_default="all enabled ones"),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="moe: experts that act on a token.", show_default="all, softly")
    ] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="ramole: adapters that an example retrieves.")] = 3,
    rank: Annotated[int, typer.Option(min=1, help="ramole: of the router.")] = 8,
    dropout: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="ramole: share of an example's adapters that are left out.")
    ] = 0.5,
    examples: Annotated[int, typer.Option(min=1, help="Of each task at most.")] = 20,
    epochs: Annotated[int, typer.Option(min=1, help="Times that it sees each example.")] = 2,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples of a step.")] = 8,
    learning_rate: Annotated[float, typer.Option(min=1e-9, help="The greatest.")] = 2e-3,
    seed: Annotated[int, typer.Option(min=0, help="Of all random choices.")] = 0,
    base_model: BaseModelOption = None,
    encoder: EncoderOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a token router for the strategies ramole and moe, on examples of tasks."""
    from loraretriever.models import load_base_model
    from loraretriever.pipeline import LoraRetriever
    from loraretriever.train.progress import in_parts
    from loraretriever.train.routers import RouterSettings, retrieved_candidates
    from loraretriever.train.routers import train_router as train

    _check(kind, output, expert, top_k)
    settings = RouterSettings(
        rank=rank,
        top_k=top_k,
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=batch_size,
        dropout=dropout,
        seed=seed,
    )
    rows = _read_examples(tasks, examples)
    given: dict[str, Any] = {"base_model": base_model, "encoder": encoder, "device": device}
    with LoraRetriever.open(pool, **{name: value for name, value in given.items() if value is not None}) as lr:
        console.print_problems(lr.pool.problems)
        names = _experts(lr, expert)
        candidates = retrieved_candidates(lr, rows, k) if kind == "ramole" else None
        weights = {name: lr.pool.weights(name) for name in names}
        name = lr.settings.base_model or lr.pool.base_model
        base = load_base_model(name, "float32", lr.settings.device)
        with console.progress("training (percent)", 100, enabled=not as_json) as advance:
            on_step = in_parts(advance, 100)
            result = train(kind, base, weights, rows, candidates, output, settings, on_step)
    if as_json:
        console.print_json({"folder": output, "kind": kind, "adapters": names, "examples": len(rows), "result": result})
        return
    strategy = kind if kind == "ramole" else f"'moe;top_k={top_k or 'all'}'"
    console.print_plain(
        f"wrote {output}: {kind} over {len(names)} adapters, {result.steps} steps on {len(rows)} examples in "
        f"{result.seconds:.0f} s, loss {result.first_loss:.3f} at first and {result.last_loss:.3f} at last"
    )
    console.print_note(f"use it with LORARETRIEVER_ROUTERS={output} and --strategy {strategy}")


def _check(kind: str, output: Path, experts: Sequence[str] | None, top_k: int | None) -> None:
    from loraretriever.compose.routers import ROUTER_FILE

    if kind not in KINDS:
        raise InvalidInputError(f"--kind is {kind!r}; expected {' or '.join(KINDS)}.")
    if kind != "moe" and (experts or top_k):
        raise InvalidInputError(f"--expert and --top-k are of a moe; --kind is {kind}. Leave them out.")
    if (output / ROUTER_FILE).exists():
        raise InvalidInputError(f"{output} holds a router; expected a new folder. Choose another, or move that one.")
    if output.exists() and not output.is_dir():
        raise InvalidInputError(f"{output} is a file; expected a folder.")


def _read_examples(folder: Path, most: int) -> list[Example]:
    from loraretriever.evaluate.experiment.stream import read_split

    return [example for rows in read_split(folder, "train").values() for example in rows[:most]]


def _experts(lr: LoraRetriever, named: Sequence[str] | None) -> list[str]:
    enabled = sorted(adapter.name for adapter in lr.pool.list(enabled_only=True))
    for name in named or ():
        if name not in enabled:
            raise InvalidInputError(f"--expert is {name!r}; expected an enabled adapter of the pool.")
    names = sorted(set(named)) if named else enabled
    if not names:
        raise InvalidInputError("the pool has no enabled adapters; expected one at least.")
    return names
