"""The demo: one fresh prompt per adapter of the demo pool, answered by the base model and by what was composed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loraretriever.errors import PoolError
from loraretriever.evaluate.tasks import Example
from loraretriever.pipeline import LoraRetriever
from loraretriever.types import Completion, Composition, Hit, Sampling

DEMO_SAMPLING = Sampling(max_tokens=48)


@dataclass(frozen=True, slots=True)
class DemoPrompt:
    """One prompt of the demo with both answers. `task` is the name of the adapter that was trained for it."""

    prompt: str
    task: str
    hits: tuple[Hit, ...]
    composition: Composition
    base_text: str
    text: str
    reference: str


@dataclass(frozen=True, slots=True)
class DemoReport:
    """The demo's outcome. `retrieval_top1`, `retrieval_top3` are shares of prompts.

    `seconds` and `base_seconds`: time to answer all prompts, composed (retrieval included) and by the base model.
    `tokens_per_second` counts generated tokens alone. Composed answers are short here, so most of their time goes
    into reading the prompts, and this figure is low beside the base model's, whose answers ramble.
    """

    prompts: tuple[DemoPrompt, ...]
    retrieval_top1: float
    retrieval_top3: float
    seconds: float
    tokens_per_second: float
    base_seconds: float
    base_tokens_per_second: float


def demo_folder() -> Path:
    """The folder with the demo's pool and prompts: in the source tree, or in the installed package.

    Raises:
        PoolError: neither is there.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parents[1] / "demo", package / "demo_data"):
        if (folder / "prompts.jsonl").is_file():
            return folder
    raise PoolError(
        f"the demo pool is neither in the source tree nor in {package / 'demo_data'}; reinstall the package."
    )


def run_demo(
    retriever: LoraRetriever,
    examples: Sequence[Example],
    on_answer: Callable[[], None] = lambda: None,
    k: int | None = None,
    strategy: str | None = None,
) -> DemoReport:
    """Answer every example twice, in mixed batches: composed, and by the base model. Each answer is reported."""
    if not examples:
        raise PoolError("the demo pool has no adapter for any of the demo's prompts; reinstall it.")
    prompts = [example.inputs for example in examples]
    # Ranks three at least, so that both accuracies can be told; the composition gets the k asked for.
    routes = retriever.route(prompts, k=3)
    assert retriever.engine, "loads the base model, which is not part of the batch's time"
    base, base_seconds = _answer(retriever, prompts, on_answer, adapters={})
    composed, seconds = _answer(retriever, prompts, on_answer, k=k, strategy=strategy)
    rows = tuple(
        DemoPrompt(e.inputs, e.task, c.hits, c.composition, b.text.strip(), c.text.strip(), e.targets)
        for e, c, b in zip(examples, composed, base, strict=True)
    )
    ranked = [[hit.adapter for hit in route.hits] for route in routes]
    top1 = sum(names[:1] == [e.task] for names, e in zip(ranked, examples, strict=True)) / len(examples)
    top3 = sum(e.task in names for names, e in zip(ranked, examples, strict=True)) / len(examples)
    return DemoReport(rows, top1, top3, seconds, _speed(composed, seconds), base_seconds, _speed(base, base_seconds))


def _answer(
    retriever: LoraRetriever, prompts: list[str], on_answer: Callable[[], None], **options: object
) -> tuple[list[Completion], float]:
    """All completions in the prompts' order, and the seconds that they took."""
    start = time.perf_counter()
    completions: dict[int, Completion] = {}
    for position, completion in retriever.stream(prompts, sampling=DEMO_SAMPLING, **options):  # type: ignore[arg-type]
        completions[position] = completion
        on_answer()
    seconds = time.perf_counter() - start
    return [completions[position] for position in range(len(prompts))], seconds


def _speed(completions: list[Completion], seconds: float) -> float:
    return sum(completion.completion_tokens for completion in completions) / seconds
