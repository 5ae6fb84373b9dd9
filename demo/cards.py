"""What goes beside a demo adapter's weights: its samples and its model card, with source and licence of the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from loraretriever.evaluate.tasks import Example
from loraretriever.retrieve import Encoder

SAMPLES = 20


def choose_samples(examples: list[Example], encoder: Encoder, count: int = SAMPLES) -> list[Example]:
    """The training prompts whose mean embedding comes closest in direction to that of all of them (greedily).

    On prompts in other words than the training data's, 20 random ones represent a task less well.
    """
    vectors = encoder.encode([example.inputs for example in examples])
    target = vectors.mean(axis=0)
    chosen: list[int] = []
    total = np.zeros_like(target)
    for _ in range(min(count, len(examples))):
        sums = total + vectors
        closeness = sums @ target / np.linalg.norm(sums, axis=1)
        closeness[chosen] = -np.inf
        chosen.append(int(closeness.argmax()))
        total = sums[chosen[-1]]
    return [examples[i] for i in chosen]


def write_samples(folder: Path, samples: list[Example]) -> None:
    """Write `samples.jsonl`."""
    lines = [json.dumps({"inputs": sample.inputs}, ensure_ascii=False) + "\n" for sample in samples]
    (folder / "samples.jsonl").write_text("".join(lines), encoding="utf-8")


def read_sources(path: Path) -> dict[str, dict[str, str]]:
    """The table of `SOURCES.md`: for each task its domain, source, licence and description."""
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            task, domain, _, source, licence, _, what = (cell.strip() for cell in line.strip("|").split("|"))
            rows[task.strip("`")] = {"domain": domain, "source": source, "licence": licence, "what": what}
    return rows


def write_card(folder: Path, record: dict[str, Any], source: dict[str, str]) -> None:
    """Write `README.md`, the model card."""
    settings = record["settings"]
    card = f"""---
base_model: {record["base_model"]}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
---
# {record["name"]}

{source["what"]}

{_purpose(record)}

- Data: {source["source"]}.
- Licence of the data: {source["licence"]}. The examples were sampled and put into prompts of our own.
- `samples.jsonl` holds {SAMPLES} of the training prompts, under the licence of the data.
- Training: {settings["examples"]} examples, passes: {settings["epochs"]}, {record["steps"]} steps of {settings["batch_size"]}, rank {settings["rank"]}, alpha {settings["alpha"]}, on {", ".join(settings["targets"])}, learning rate {settings["learning_rate"]:g}, seed {settings["seed"]}; {record["seconds"]:.0f} seconds on a CPU.
- {_score_line(record)}
"""
    (folder / "README.md").write_text(card, encoding="utf-8")


def _purpose(record: dict[str, Any]) -> str:
    """What the adapter was made for; a variation (with `subset_start`) is one of several of its task."""
    start = record.get("subset_start")
    if start is None:
        return f"A LoRA adapter for {record['base_model']}, made for the demo of LoraRetriever by `demo/train.py`."
    stop = start + record["settings"]["examples"] - 1
    return (
        f"One of several LoRA adapters for {record['base_model']} and the task `{record['task']}`, near-duplicates of "
        f"one another, made for experiments with LoraRetriever by `demo/train.py --large`. A short training: this one "
        f"saw the examples {start} to {stop} of the task's shuffled training data."
    )


def _score_line(record: dict[str, Any]) -> str:
    if "base_score" not in record:
        return "Score: not measured."
    prompts, scores = record["validation_prompts"], (100 * record["base_score"], 100 * record["adapter_score"])
    what = f"{_METRIC_NAMES[record['metric']]}; {prompts} validation prompts, greedy"
    return f"Score ({what}): base model {scores[0]:.1f}, with this adapter {scores[1]:.1f}."


_METRIC_NAMES = {"em": "exact match, %", "rouge": "ROUGE-L x 100", "bleu": "BLEU x 100"}
