"""Train the adapters of the demo pool: one per task, on SmolLM2-135M-Instruct, on a CPU.

    python demo/train.py --tasks ../shared/tasks --pool demo/pool

A run that was stopped goes on where it was: finished adapters are kept, an unfinished one continues from its
last checkpoint. `training.json` beside each adapter records settings, losses, scores and time.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from loraretriever.evaluate.metrics import score
from loraretriever.evaluate.tasks import Example, read_examples
from loraretriever.models import DEFAULT_BASE_MODEL, BaseModel, load_base_model, render_prompt
from loraretriever.train.adapters import TrainingSettings, train_adapter

# Only tasks whose source states a licence that allows redistribution of a trained adapter and of 20 samples.
# Most telling first, so that a run cut short has covered the most domains.
TASKS = (
    "wikisql translate_en_de e2e_nlg movie_sentiment banking77 snli grammar_correction ncbi_disease "
    "mawps_expression stackoverflow_topic nl2bash translate_en_fr viggo product_sentiment clinc150 qnli "
    "wiki_split bc5cdr_chemical gsm8k_steps subjectivity nl_regex translate_en_es copa piqa"
).split()


def main(
    tasks: Annotated[Path, typer.Option(help="Folder with train/ and validation/.")] = Path("../shared/tasks"),
    pool: Annotated[Path, typer.Option(help="Folder that gets one adapter folder per task.")] = Path("demo/pool"),
    only: Annotated[list[str] | None, typer.Option(help="Train only this task (repeatable).")] = None,
    examples: Annotated[int, typer.Option(help="Training examples per task.")] = 800,
    epochs: int = 1,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> None:
    """Train every task that has no finished adapter yet, and write its files to the pool folder."""
    base = load_base_model(DEFAULT_BASE_MODEL, dtype="float32")
    base.model.set_attn_implementation("eager")
    settings = TrainingSettings(examples=examples, epochs=epochs, learning_rate=learning_rate, seed=seed)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        overall = progress.add_task("all tasks", total=len(only or TASKS), note="")
        for task in only or TASKS:
            record = _train_task(base, task, tasks, pool / task, settings, progress)
            progress.console.print(
                f"{task}: loss {record['first_loss']} -> {record['last_loss']}, {record['metric']} "
                f"{record['base_score']:.3f} -> {record['adapter_score']:.3f}, {record['seconds']} s",
                soft_wrap=True,
            )
            progress.advance(overall)


def _train_task(
    base: BaseModel, task: str, tasks: Path, folder: Path, settings: TrainingSettings, progress: Progress
) -> dict[str, Any]:
    record_file = folder / "training.json"
    if record_file.is_file():
        record: dict[str, Any] = json.loads(record_file.read_text())
        return record
    train = read_examples(tasks / "train" / f"{task}.jsonl")
    validation = read_examples(tasks / "validation" / f"{task}.jsonl")
    base_score = mean_score(base.model, base.tokenizer, validation)
    bar = progress.add_task(task, total=None, note="")
    result = train_adapter(
        base, train, folder, settings,
        on_step=lambda step, steps, loss: progress.update(bar, completed=step, total=steps, note=f"loss {loss:.3f}"),
    )  # fmt: skip
    progress.remove_task(bar)
    record = {
        "task": task,
        "domain": train[0].domain,
        "metric": train[0].metric,
        "base_model": base.name,
        "settings": asdict(settings),
        **asdict(result),
        "base_score": round(base_score, 4),
        "adapter_score": round(_score_with_adapter(base, folder, validation), 4),
        "validation_prompts": len(validation),
    }
    record_file.write_text(json.dumps(record, indent=1) + "\n")
    return record


def _score_with_adapter(base: BaseModel, folder: Path, validation: list[Example]) -> float:
    from peft import PeftModel

    model = PeftModel.from_pretrained(base.model, folder).eval()
    try:
        return mean_score(model, base.tokenizer, validation)
    finally:
        model.unload()


@torch.inference_mode()
def mean_score(model: Any, tokenizer: Any, examples: list[Example], batch: int = 25) -> float:
    """Mean score of greedy answers, between 0 and 1. Answers end a few tokens after the longest reference would."""
    new_tokens = 8 + max(len(tokenizer(example.targets).input_ids) for example in examples)
    total = 0.0
    for start in range(0, len(examples), batch):
        rows = examples[start : start + batch]
        texts = [render_prompt(tokenizer, row.inputs) for row in rows]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        answers = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        total += sum(score(row.metric, answer.strip(), row.targets) for row, answer in zip(rows, answers, strict=True))
    return total / len(examples)


if __name__ == "__main__":
    typer.run(main)
