"""What a training of a retriever came to: figures by epoch, and the record and the card beside the model."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loraretriever import __version__
from loraretriever.train.pairs import Split

RECORD_FILE = "loraretriever.json"
_LIBRARIES = ("sentence-transformers", "transformers", "torch", "accelerate", "datasets")


@dataclass(frozen=True, slots=True)
class Figures:
    """Retrieval over all adapters: shares of the queries whose adapter came first, or among three; mean of 1 / rank."""

    top1: float
    top3: float
    mrr: float
    queries: int


@dataclass(frozen=True, slots=True)
class Epoch:
    """Validation after an epoch, 0 being before the training.

    `trained` is on held-out samples of the trained tasks, `held_out` on all samples of the held-out ones, `mrr` on
    both. `loss` is the mean over the epoch's steps; `seconds` is the time since the training began.
    """

    epoch: int
    loss: float | None
    mrr: float
    trained: Figures | None
    held_out: Figures | None
    seconds: float


@dataclass(frozen=True, slots=True)
class TrainedRetriever:
    """A finished training. `epochs` begins with the figures before it; `best_epoch` is the one that was kept."""

    folder: Path
    trained_tasks: tuple[str, ...]
    held_out_tasks: tuple[str, ...]
    instruction: str
    best_epoch: int
    epochs: tuple[Epoch, ...]
    seconds: float


def best_epoch(epochs: Sequence[Epoch]) -> Epoch:
    """The one with the highest mean reciprocal rank; the first of equals, as the trainer counts."""
    return max(epochs, key=lambda epoch: epoch.mrr)


def parse_log(log: Sequence[Mapping[str, Any]]) -> list[Epoch]:
    """The trainer's log as epochs: a line with the loss precedes one with the evaluation."""
    epochs: list[Epoch] = []
    loss = None
    for line in log:
        loss = line.get("loss", loss)
        if "eval_mrr" in line:
            figures = {key.removeprefix("eval_"): value for key, value in line.items()}
            epochs.append(epoch_of(round(line["epoch"]), loss, figures))
    return epochs


def epoch_of(number: int, loss: float | None, figures: Mapping[str, Any]) -> Epoch:
    """An epoch from the figures of `contrastive.Validation` and the seconds."""
    kinds = [_figures(figures, kind) if f"{kind}_mrr" in figures else None for kind in ("trained", "held_out")]
    return Epoch(number, loss, figures["mrr"], kinds[0], kinds[1], figures["seconds"])


def _figures(figures: Mapping[str, Any], kind: str) -> Figures:
    top1, top3, mrr, queries = (figures[f"{kind}_{name}"] for name in ("top1", "top3", "mrr", "queries"))
    return Figures(top1, top3, mrr, int(queries))


def write_record(
    folder: Path,
    settings: Mapping[str, Any],
    hashes: Mapping[str, str],
    split: Split,
    before: Epoch,
    epochs: Sequence[Epoch],
) -> None:
    """Write how the model in `folder` came about: as JSON for programs, and as a card for readers."""
    record = {
        "format": 1,
        "encoder": settings["encoder"],
        "instruction": settings["instruction"],
        "seed": settings["seed"],
        "settings": settings,
        **hashes,
        "trained_tasks": split.trained,
        "held_out_tasks": split.held_out,
        "best_epoch": best_epoch(epochs).epoch,
        "epochs": [asdict(epoch) for epoch in (before, *epochs)],
        "seconds": epochs[-1].seconds,
        "versions": {"loraretriever": __version__, "python": platform.python_version()}
        | {name: version(name) for name in _LIBRARIES},
    }
    text = json.dumps(record, indent=1)
    (folder / RECORD_FILE).write_text(text + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(record, before, best_epoch(epochs)), encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record in a model's folder; None where there is none."""
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("format") == 1 else None


def read_trained(folder: Path) -> TrainedRetriever:
    """A finished training, from its record."""
    record = read_record(folder)
    assert record is not None
    epochs = [
        Epoch(**{**epoch, **{kind: epoch[kind] and Figures(**epoch[kind]) for kind in ("trained", "held_out")}})
        for epoch in record["epochs"]
    ]
    return TrainedRetriever(
        folder,
        tuple(record["trained_tasks"]),
        tuple(record["held_out_tasks"]),
        record["instruction"],
        record["best_epoch"],
        tuple(epochs),
        record["seconds"],
    )


def _card(record: Mapping[str, Any], before: Epoch, best: Epoch) -> str:
    settings = record["settings"]
    rows = []
    for kind, name in (("trained", "held-out samples of trained tasks"), ("held_out", "held-out tasks")):
        for moment, epoch in (("before", before), ("after", best)):
            figures = asdict(epoch)[kind]
            if figures:
                rows.append(
                    f"| {name} | {moment} | {figures['queries']} | {figures['top1']:.3f} | {figures['top3']:.3f} |"
                )
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [loraretriever, sentence-transformers]
---
# A retriever of LoRA adapters

Fine-tuned from `{record["encoder"]}` by LoraRetriever {record["versions"]["loraretriever"]} (the method of
arXiv 2402.09997), so that the sample prompts of one adapter lie together. An adapter's vector is the mean of its
samples' embeddings; a prompt goes to the adapters with the highest cosine.

- Instruction before every text: `{record["instruction"]}`
- Tasks whose samples were trained on: {len(record["trained_tasks"])}; held out: {len(record["held_out_tasks"])}.
- Learning rate {settings["learning_rate"]}, temperature {settings["temperature"]}, at most {settings["batch_size"]}
  anchors in a batch, {settings["hard_negatives"]} hard negatives, seed {record["seed"]}.
- Epoch {best.epoch} of {len(record["epochs"]) - 1} was kept.

Retrieval over all adapters, of samples that were not trained on:

| samples | training | queries | right adapter first | among three |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}

`{RECORD_FILE}` has all settings, figures and versions. Use: `loraretriever route --encoder FOLDER ...`, or
`SentenceTransformer(FOLDER).encode(texts, prompt_name="retrieval")`.
"""
