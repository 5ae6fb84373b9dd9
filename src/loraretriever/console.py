"""What the command line prints: tables and progress bars on a terminal, plain lines when piped, JSON when asked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from loraretriever.types import Completion, Composition, Hit, Route

if TYPE_CHECKING:
    from loraretriever.evaluate.demo import DemoReport
    from loraretriever.retrieve.explain import Explanation, HitExplanation

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """One line of JSON on standard output; dataclasses become objects."""
    print(to_json(value))  # noqa: T201 - the command's output, which rich would wrap


def to_json(value: Any) -> str:
    """One line of JSON; dataclasses become objects, paths and times text, lone surrogates escapes."""
    return json.dumps(value, default=_plain)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)


def print_rows(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on a terminal, its last column cut to fit; tab-separated lines without a header when piped."""
    if not out.is_terminal:
        for row in rows:
            print_plain("\t".join(cell.replace("\t", " ").replace("\n", " ") for cell in row))
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    used = sum(2 + max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns) - 1))
    for *cells, last in rows:
        table.add_row(*map(Text, cells), Text(shorten(last, max(10, out.width - used))))
    out.print(table)


def print_plain(line: str) -> None:
    """One line as it is: no wrapping, no mark-up, tabs kept."""
    print(line, file=out.file)


def print_error(message: str) -> None:
    """An error on standard error."""
    err.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


def print_note(message: str) -> None:
    """A remark on standard error."""
    err.print(Text(message, style="dim"), soft_wrap=True)


def print_problems(problems: Iterable[str]) -> None:
    """Adapters that a pool leaves out, and why, on standard error."""
    for problem in problems:
        print_note(f"skipped: {problem}")


@contextmanager
def progress(description: str, total: int, enabled: bool = True) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error while the block runs; call what is yielded once per finished item."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not (enabled and err.is_terminal)) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)


def describe_hits(hits: Sequence[Hit]) -> str:
    """Such as `sql 0.712, bash 0.554`."""
    return ", ".join(f"{hit.adapter} {hit.score:.3f}" for hit in hits) or "no hits"


def describe_composition(composition: Composition) -> str:
    """Such as `mixture: 0.81 sql + 0.19 bash`, or `base model`."""
    if not composition.adapters:
        return "base model"
    terms = zip(composition.weights, composition.adapters, strict=True)
    return f"{composition.strategy}: " + " + ".join(f"{weight:.2f} {adapter}" for weight, adapter in terms)


def shorten(text: str, width: int = 100) -> str:
    """The text on one line, without control characters, cut with an ellipsis."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= width else line[: width - 1] + "…"


def print_fields(value: Any) -> None:
    """A dataclass, one field a line."""
    for field in dataclasses.fields(value):
        content = getattr(value, field.name)
        text = ", ".join(map(str, content)) if isinstance(content, tuple) else str(content)
        out.print(Text.assemble((f"{field.name:<12}", "bold"), text), soft_wrap=True)


def route_json(row: dict[str, Any], route: Route, reason: Explanation | None) -> dict[str, Any]:
    """The fields of the input line and what was found for it."""
    found = {
        "fallback": route.fallback,
        "fit": route.fit,
        "threshold": route.threshold,
        "hits": [dataclasses.asdict(hit) for hit in route.hits],
    }
    if reason is not None:
        found["why"] = [dataclasses.asdict(hit) for hit in reason.hits]
    return {**row, **found}


def print_route(route: Route, reason: Explanation | None) -> None:
    """A prompt, its hits, and why they were found if that is known."""
    print_plain(shorten(route.prompt))
    sign, outcome = ("<", " -> base model") if route.fallback else (">=", "")
    print_plain(f"  {describe_hits(route.hits)}  (fit {route.fit:.3f} {sign} {route.threshold:.3f}{outcome})")
    for hit in reason.hits if reason else ():
        _print_reason(hit)


def _print_reason(hit: HitExplanation) -> None:
    penalty = f" - {hit.penalty:.2f} from counter samples" if hit.penalty > 0.005 else ""
    print_plain(
        f"  {hit.adapter}: probability {hit.probability:.3f}; logit {hit.dense:+.2f} from meaning and form, "
        f"{hit.sparse:+.2f} from words{penalty}"
    )
    terms = ", ".join(f"{term.term!r} {term.part:+.2f}" for term in hit.terms)
    print_plain(f"    words    {terms or 'none in common'}")
    for sample in hit.samples:
        print_plain(f"    sample   {sample.cosine:.3f} {shorten(sample.text, max(20, out.width - 20))}")


def completion_json(row: dict[str, Any], completion: Completion) -> dict[str, Any]:
    """The fields of the input line and those of its completion."""
    fields = dataclasses.asdict(completion)
    del fields["prompt"]
    return {**row, **fields}


def print_completion(completion: Completion) -> None:
    """Prompt, composition and answer."""
    out.print(Text(shorten(completion.prompt), style="bold"), soft_wrap=True)
    out.print(Text(describe_composition(completion.composition), style="dim"), soft_wrap=True)
    print_plain(completion.text.strip() + "\n")


def print_demo(report: DemoReport) -> None:
    """Each prompt with its adapters and both answers side by side, then the figures."""
    for row in report.prompts:
        out.print(Text(shorten(row.prompt, 2 * out.width), style="bold"))
        mark = "" if row.hits and row.hits[0].adapter == row.task else f"  (meant for {row.task})"
        out.print(Text(f"found   {describe_hits(row.hits)}{mark}", style="dim"))
        out.print(Text(f"used    {describe_composition(row.composition)}", style="dim"))
        table = Table(box=box.SIMPLE_HEAD, expand=True, show_edge=False, padding=(0, 1))
        table.add_column("base model", ratio=1, overflow="fold")
        table.add_column("composed", ratio=1, overflow="fold", style="green")
        table.add_row(Text(shorten(row.base_text, 300)), Text(shorten(row.text, 300)))
        out.print(table)
        out.print()
    count = len(report.prompts)
    out.print(
        f"retrieval: right adapter first for {report.retrieval_top1:.1%}, among three for {report.retrieval_top3:.1%} "
        f"of {count} prompts"
    )
    for name, seconds, speed in (
        ("composed", report.seconds, report.tokens_per_second),
        ("base model", report.base_seconds, report.base_tokens_per_second),
    ):
        out.print(f"{name}: {count} prompts in {seconds:.1f} s, {speed:.0f} generated tokens/s")
