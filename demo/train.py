"""Make the demo pool: one adapter per task, trained on SmolLM2-135M-Instruct, on a CPU.

    python demo/train.py --tasks ../shared/tasks --work .train --pool demo/pool

A run that was stopped goes on where it was: finished adapters are kept, an unfinished one continues from its last
checkpoint. Only an adapter that beats the base model on its validation split by a clear margin enters the pool.

`--large` makes a larger pool instead, of three or four short trainings per task. All of them enter it, whatever they
would score: it is for the study of retrieval and composition among near-duplicates.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cards import choose_samples, read_sources, write_card, write_samples
from loraretriever.engine.memory import keep_freed_memory
from loraretriever.evaluate.metrics import score
from loraretriever.evaluate.tasks import Example, read_examples
from loraretriever.models import DEFAULT_BASE_MODEL, BaseModel, load_base_model, render_prompt
from loraretriever.retrieve import Encoder, SentenceEncoder
from loraretriever.train.adapters import train_adapter
from variations import Variation, demo_variations, large_variations

CLEAR_MARGIN = 0.05  # of a score between 0 and 1
FILES = ("adapter_config.json", "adapter_model.safetensors", "training.json")


def main(
    tasks: Annotated[Path, typer.Option(help="Folder with SOURCES.md, train/ and validation/.")] = Path(
        "../shared/tasks"
    ),
    work: Annotated[
        Path | None, typer.Option(help="Folder for trainings, finished or not: .train, or .train/large.")
    ] = None,
    pool: Annotated[
        Path | None, typer.Option(help="Folder that gets the adapter folders: demo/pool, or .train/large-pool.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this task or adapter (repeatable).")] = None,
    large: Annotated[bool, typer.Option("--large", help="Several adapters per task, whatever they score.")] = False,
    score_prompts: Annotated[
        int | None, typer.Option(min=0, help="Validation prompts per adapter: all, or none with --large.")
    ] = None,
) -> None:
    """Train every adapter that is not finished yet, and put those that are good enough into the pool."""
    if score_prompts == 0 and not large:
        raise typer.BadParameter("--score-prompts 0 goes with --large only: an unscored adapter is not shipped.")
    chosen = _choose(large_variations() if large else demo_variations(), only)
    keep_freed_memory()
    base, encoder = load_base_model(DEFAULT_BASE_MODEL, dtype="float32"), SentenceEncoder()
    base.model.set_attn_implementation("eager")  # faster than the fused kernel when trained on a CPU
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeElapsedColumn()) as progress:
        prompts = 0 if large and score_prompts is None else score_prompts
        trainer = _Trainer(base, tasks, work or Path(".train/large" if large else ".train"), prompts, progress)
        target = pool or Path(".train/large-pool" if large else "demo/pool")
        overall = progress.add_task("all adapters", note="")
        for variation in progress.track(chosen, task_id=overall):
            examples = variation.subset(read_examples(tasks / "train" / f"{variation.task}.jsonl"))
            record = trainer.train(variation, examples)
            shipped = large or record["adapter_score"] - record["base_score"] >= CLEAR_MARGIN
            if shipped:
                _publish(trainer.work / variation.name, target, record, examples, encoder, tasks / "SOURCES.md")
            progress.console.print(_outcome(record) + ("" if shipped else ", not shipped"), soft_wrap=True)


def _choose(variations: list[Variation], only: list[str] | None) -> list[Variation]:
    """The variations whose own name or task's name was asked for; without names, all."""
    unknown = set(only or ()) - {name for variation in variations for name in (variation.name, variation.task)}
    if unknown:
        names = ", ".join(variation.name for variation in variations)
        raise typer.BadParameter(f"no adapter or task is named {', '.join(sorted(unknown))}; expected some of {names}.")
    return [v for v in variations if not only or v.name in only or v.task in only]


@dataclass(frozen=True, slots=True)
class _Trainer:
    """Trains and scores in folders under `work`. `prompts`: validation prompts that score an adapter, None for all."""

    base: BaseModel
    tasks: Path
    work: Path
    prompts: int | None
    progress: Progress
    base_scores: dict[str, float] = field(default_factory=dict)

    def train(self, variation: Variation, examples: list[Example]) -> dict[str, Any]:
        """Train and score, unless it was done before; the record is written last."""
        folder = self.work / variation.name
        record_file = folder / "training.json"
        if record_file.is_file():
            record: dict[str, Any] = json.loads(record_file.read_text())
            return {"name": variation.name} | record
        bar = self.progress.add_task(variation.name, total=None, note="")

        def show(step: int, steps: int, loss: float) -> None:
            self.progress.update(bar, completed=step, total=steps, note=f"loss {loss:.3f}")

        result = train_adapter(self.base, examples, folder, variation.settings, show)
        self.progress.remove_task(bar)
        record = {
            "name": variation.name,
            "task": examples[0].task,
            "domain": examples[0].domain,
            "metric": examples[0].metric,
            "base_model": self.base.name,
            "settings": asdict(variation.settings),
            "subset_start": variation.start,
            **asdict(result),
            **self._scores(variation.task, folder),
        }
        record_file.write_text(json.dumps(record, indent=1) + "\n")
        return record

    def _scores(self, task: str, folder: Path) -> dict[str, Any]:
        """The base model's score and the adapter's, or nothing where none is wanted."""
        if self.prompts == 0:
            return {}
        validation = read_examples(self.tasks / "validation" / f"{task}.jsonl")[: self.prompts]
        if task not in self.base_scores:
            self.base_scores[task] = mean_score(self.base.model, self.base.tokenizer, validation)
        return {
            "base_score": round(self.base_scores[task], 4),
            "adapter_score": round(_score_with_adapter(self.base, folder, validation), 4),
            "validation_prompts": len(validation),
        }


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


def _outcome(record: dict[str, Any]) -> str:
    scores = ""
    if "base_score" in record:
        scores = f"{record['metric']} {record['base_score']:.3f} -> {record['adapter_score']:.3f}, "
    losses = f"loss {record['first_loss']:.3f} -> {record['last_loss']:.3f}"
    return f"{record['name']}: {scores}{losses}, {record['seconds']:.0f} s"


def _publish(
    source: Path, pool: Path, record: dict[str, Any], examples: list[Example], encoder: Encoder, sources: Path
) -> None:
    """Put an adapter into the pool with its samples and its card, in place of an older one."""
    unfinished = source / "published"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    for file in FILES:
        shutil.copy(source / file, unfinished / file)
        (unfinished / file).chmod(0o644)
    write_samples(unfinished, choose_samples(examples, encoder))
    write_card(unfinished, record, read_sources(sources)[record["task"]])
    target = pool / record["name"]
    shutil.rmtree(target, ignore_errors=True)
    pool.mkdir(parents=True, exist_ok=True)
    shutil.move(unfinished, target)


if __name__ == "__main__":
    typer.run(main)
