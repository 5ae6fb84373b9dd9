"""`loraretriever train-retriever`: an encoder learns which samples belong to one adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraretriever import console
from loraretriever.cli.options import DeviceOption, EncoderOption, JsonOption
from loraretriever.config import DEFAULT_ENCODER, load_settings
from loraretriever.errors import InvalidInputError
from loraretriever.train.progress import in_parts
from loraretriever.train.retriever import RetrieverTraining

if TYPE_CHECKING:
    from loraretriever.train.trained import Epoch, Figures, TrainedRetriever

_DEFAULTS = RetrieverTraining()
_PARTS = 1000  # of the progress bar


def train_retriever(
    output: Annotated[Path, typer.Option(help="The folder to make; sentence-transformers can load it.", metavar="DIR")],
    pool: Annotated[
        str | None, typer.Option(help="Train on the samples of this pool's enabled adapters.", metavar="DIR")
    ] = None,
    samples: Annotated[
        Path | None, typer.Option(help="Train on this JSONL file: `adapter` and `inputs` in each line.")
    ] = None,
    encoder: EncoderOption = None,
    instruction: Annotated[
        str | None, typer.Option(help="Put before every text; '' for none.", show_default="the paper's")
    ] = None,
    task_share: Annotated[
        float | None, typer.Option(help="Share of the tasks to train on; the others are held out.", show_default="0.4")
    ] = None,
    held_out_tasks: Annotated[
        list[str] | None, typer.Option(help="Task to hold out, instead of a share (repeatable).", metavar="NAME")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Epochs at most.")] = _DEFAULTS.epochs,
    batch_size: Annotated[
        int, typer.Option(help="Anchors in a batch at most, each of another task.")
    ] = _DEFAULTS.batch_size,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = _DEFAULTS.learning_rate,
    temperature: Annotated[
        float, typer.Option(help="What similarities are divided by in the loss.")
    ] = _DEFAULTS.temperature,
    hard_negatives: Annotated[
        int, typer.Option(help="Near texts of other tasks for each anchor.")
    ] = _DEFAULTS.hard_negatives,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens that the encoder reads of a text.", show_default="the encoder's")
    ] = None,
    patience: Annotated[int, typer.Option(help="Stop after so many epochs that are no better.")] = _DEFAULTS.patience,
    seed: Annotated[int, typer.Option(help="Seed of all choices.")] = _DEFAULTS.seed,
    device: DeviceOption = None,
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 where the processor has it.")] = _DEFAULTS.dtype,
    activate: Annotated[bool, typer.Option("--activate", help="Make the pool use the trained encoder.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away an unfinished training.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune the sentence encoder on the adapters' samples. Killed, the same command goes on."""
    from loraretriever.train.retriever import train_retriever as train

    settings = load_settings(encoder=encoder, instruction=instruction, device=device)
    if activate and pool is None:
        raise InvalidInputError("--activate is given without --pool; expected the pool that is to use the encoder.")
    if task_share is not None and held_out_tasks:
        raise InvalidInputError("--task-share and --held-out-tasks are given; expected one of both.")
    config = RetrieverTraining(
        encoder=settings.encoder or DEFAULT_ENCODER,
        instruction=_DEFAULTS.instruction if settings.instruction is None else settings.instruction,
        task_share=_DEFAULTS.task_share if task_share is None else task_share,
        held_out_tasks=tuple(held_out_tasks) if held_out_tasks else None,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        temperature=temperature,
        hard_negatives=hard_negatives,
        max_tokens=max_tokens,
        patience=patience,
        seed=seed,
        device=settings.device,
        dtype=dtype,
    )
    texts = _read_texts(pool, samples)
    with console.progress("training (of 1000)", _PARTS, enabled=not as_json) as advance:
        tell = (lambda epoch: None) if as_json else _tell
        result = train(texts, output, config, in_parts(advance, _PARTS), tell, restart)
    if activate and pool is not None:
        _activate(pool, result.folder)
    if as_json:
        console.print_json(result)
    else:
        _print_result(result)


def _read_texts(pool: str | None, samples: Path | None) -> dict[str, list[str]]:
    from loraretriever.pool import Pool
    from loraretriever.train.retriever import read_task_samples

    if samples is not None and pool is None:
        return read_task_samples(samples)
    if pool is None or samples is not None:
        given = "both --pool and --samples are" if pool is not None else "neither --pool nor --samples is"
        raise InvalidInputError(f"{given} given; expected one of them.")
    with Pool.open(pool) as opened:
        console.print_problems(opened.problems)
        adapters = opened.list(enabled_only=True)
        return {adapter.name: [sample.text for sample in opened.samples(adapter.name)] for adapter in adapters}


def _activate(pool: str, folder: Path) -> None:
    from loraretriever.pool import Pool

    with Pool.open(pool) as opened:
        opened.set_encoder(str(folder))


def _tell(epoch: Epoch) -> None:
    name = f"epoch {epoch.epoch}" if epoch.epoch else "before training"
    console.print_note(f"{name}: {_describe(epoch)}, {epoch.seconds:.0f} s")


def _describe(epoch: Epoch) -> str:
    """Such as `trained tasks 61.2 % first, 85.0 % among three (180 samples)`."""

    def describe(kind: str, figures: Figures) -> str:
        return f"{kind} {figures.top1:.1%} first, {figures.top3:.1%} among three ({figures.queries} samples)"

    kinds = (("trained tasks", epoch.trained), ("held-out tasks", epoch.held_out))
    return "; ".join(describe(kind, figures) for kind, figures in kinds if figures is not None)


def _print_result(result: TrainedRetriever) -> None:
    before, best = result.epochs[0], result.epochs[result.best_epoch]
    console.print_plain(f"wrote {result.folder}: epoch {result.best_epoch} of {len(result.epochs) - 1}")
    console.print_plain(f"before: {_describe(before)}")
    console.print_plain(f"now: {_describe(best)}")
    if best.mrr <= before.mrr:
        console.print_note("no epoch was better than the encoder before the training. Try other settings.")
