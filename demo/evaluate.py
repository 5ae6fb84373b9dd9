"""Score the demo pool on the validation split: base model, own adapter, and what retrieval composes.

    python demo/evaluate.py --tasks ../shared/tasks

Answers are kept in the results file as they come, so that a run that was stopped goes on where it was. The table
goes into `demo/README.md`, between its two markers.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from loraretriever import LoraRetriever, Sampling, console
from loraretriever.engine.memory import keep_freed_memory
from loraretriever.evaluate.metrics import score
from loraretriever.evaluate.tasks import Example, read_examples
from loraretriever.jsonl import read_jsonl
from loraretriever.models import load_tokenizer

MARKERS = ("<!-- table: demo/evaluate.py -->", "<!-- end of table -->")
# Through retrieval with k = 3: name -> options of `LoraRetriever.stream`. Uniform weights are the paper's.
RETRIEVED: dict[str, dict[str, Any]] = {
    "selection": {"strategy": "selection"},
    "mixture": {"strategy": "mixture", "weighting": "score"},
    "mixture, uniform": {"strategy": "mixture", "weighting": "uniform"},
    "fusion": {"strategy": "fusion", "weighting": "score"},
    "fusion, uniform": {"strategy": "fusion", "weighting": "uniform"},
}
METHODS = ("base model", "own adapter", *RETRIEVED)


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer under one method. `found`: the task's own adapter is the first hit."""

    method: str
    task: str
    position: int
    text: str
    score: float
    found: bool | None


def main(
    tasks: Annotated[Path, typer.Option(help="Folder with validation/.")] = Path("../shared/tasks"),
    pool: Annotated[Path, typer.Option(help="The demo pool.")] = Path("demo/pool"),
    results: Annotated[Path, typer.Option(help="Answers, one JSON object a line.")] = Path("demo/validation.jsonl"),
    readme: Annotated[Path, typer.Option(help="File that gets the table.")] = Path("demo/README.md"),
    dtype: str = "auto",
) -> None:
    """Answer what has no answer yet, then write the table."""
    keep_freed_memory()
    answers = _read_answers(results)
    done = {(answer.method, answer.task) for answer in answers}
    with LoraRetriever.open(pool, dtype=dtype, retriever="paper", threshold=-1.0, coverage=1.0) as retriever:
        names = [adapter.name for adapter in retriever.pool.list()]
        examples = {name: read_examples(tasks / "validation" / f"{name}.jsonl") for name in names}
        for method in METHODS:
            todo = [name for name in names if (method, name) not in done]
            start, tokens = time.perf_counter(), 0
            for batch in [[name] for name in todo] if method == "own adapter" else [todo] if todo else []:
                for answer, completion_tokens in _answer(retriever, method, batch, examples):
                    answers.append(answer)
                    tokens += completion_tokens
                _write_answers(results, answers)
            if todo:
                console.print_note(f"{method}: {tokens / (time.perf_counter() - start):.0f} tokens/s")
    _write_table(readme, _table(answers, examples))


def _answer(
    retriever: LoraRetriever, method: str, names: list[str], examples: dict[str, list[Example]]
) -> Iterator[tuple[Answer, int]]:
    rows = [(position, example) for name in names for position, example in enumerate(examples[name])]
    tokenizer = load_tokenizer(retriever.pool.base_model)
    limits = {name: _longest_answer(tokenizer, examples[name]) for name in names}
    options = {"base model": {"adapters": {}}, "own adapter": {"adapters": {names[0]: 1.0}}} | RETRIEVED
    samplings = [Sampling(max_tokens=limits[example.task]) for _, example in rows]
    prompts = [example.inputs for _, example in rows]
    with console.progress(f"{method} {' '.join(names) if len(names) == 1 else ''}", len(rows)) as advance:
        for place, done in retriever.stream(prompts, sampling=samplings, **options[method]):
            position, example = rows[place]
            points = score(example.metric, done.text.strip(), example.targets)
            found = done.hits[0].adapter == example.task if done.hits else None
            yield Answer(method, example.task, position, done.text, round(points, 4), found), done.completion_tokens
            advance()


def _longest_answer(tokenizer: Any, examples: list[Example]) -> int:
    """Tokens to generate at most: a few more than the longest reference has, for a longer answer is wrong anyway."""
    return 8 + max(len(tokenizer(example.targets).input_ids) for example in examples)


def _read_answers(file: Path) -> list[Answer]:
    return [Answer(**row) for _, row in read_jsonl(file)] if file.is_file() else []


def _write_answers(file: Path, answers: list[Answer]) -> None:
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text("".join(console.to_json(answer) + "\n" for answer in answers), encoding="utf-8")
    unfinished.replace(file)


def _table(answers: list[Answer], examples: dict[str, list[Example]]) -> str:
    scores: dict[tuple[str, str], list[float]] = defaultdict(list)
    found: dict[str, list[bool]] = defaultdict(list)
    for answer in answers:
        scores[answer.method, answer.task].append(answer.score)
        if answer.method == "selection" and answer.found is not None:
            found[answer.task].append(answer.found)
    mean = {key: 100 * sum(values) / len(values) for key, values in scores.items()}
    lines = [
        f"| task | metric | {' | '.join(METHODS)} | found first, % |",
        f"| --- | --- | {' | '.join('---:' for _ in METHODS)} | ---: |",
    ]
    for task in sorted(examples):
        cells = " | ".join(f"{mean[method, task]:.1f}" for method in METHODS)
        first = 100 * sum(found[task]) / len(found[task])
        lines.append(f"| `{task}` | {examples[task][0].metric} | {cells} | {first:.0f} |")
    overall = [sum(mean[method, task] for task in examples) / len(examples) for method in METHODS]
    everyone = [value for values in found.values() for value in values]
    cells = " | ".join(f"**{value:.1f}**" for value in overall)
    lines.append(f"| **mean** | | {cells} | **{100 * sum(everyone) / len(everyone):.1f}** |")
    return "\n".join(lines)


def _write_table(readme: Path, table: str) -> None:
    before, _, rest = readme.read_text(encoding="utf-8").partition(MARKERS[0])
    _, _, after = rest.partition(MARKERS[1])
    readme.write_text(f"{before}{MARKERS[0]}\n{table}\n{MARKERS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
