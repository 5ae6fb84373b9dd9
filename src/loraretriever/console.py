"""What the command line prints: tables and progress bars on a terminal, plain lines when piped, JSON when asked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    from loraretriever.evaluate.engine_report import EngineReport, Percentiles
    from loraretriever.evaluate.fallback import Calibration
    from loraretriever.evaluate.retrieval import RetrievalReport
    from loraretriever.evaluate.robustness import Robustness
    from loraretriever.evaluate.server_report import ServerReport
    from loraretriever.evaluate.vllm_bench import VllmReport
    from loraretriever.pipeline import Submission
    from loraretriever.pool import Key
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
def progress(description: str, total: int | None, enabled: bool = True) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error while the block runs; call what is yielded once per finished item.

    `total` None: nobody knows how many there will be.
    """
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


def key_json(key: Key) -> dict[str, Any]:
    """A key's fields, and whether it is active, expired or revoked."""
    return {**dataclasses.asdict(key), "scopes": sorted(key.scopes), "state": key.state}


def route_json(row: dict[str, Any], route: Route, reason: Explanation | None) -> dict[str, Any]:
    """The fields of the input line and what was found for it."""
    found = {
        "fallback": route.fallback,
        "fit": route.fit,
        "threshold": route.threshold,
        "hits": [_hit_json(hit) for hit in route.hits],
    }
    if reason is not None:
        found["why"] = [dataclasses.asdict(hit) for hit in reason.hits]
    return {**row, **found}


def _hit_json(hit: Hit) -> dict[str, Any]:
    """What the retriever or the engine did not tell of a hit is left out."""
    return {name: value for name, value in dataclasses.asdict(hit).items() if value is not None}


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
    fields["hits"] = [_hit_json(hit) for hit in completion.hits]
    if not completion.logprobs:
        del fields["logprobs"]
    return {**row, **fields}


def print_completion(completion: Completion) -> None:
    """Prompt, composition and answer."""
    out.print(Text(shorten(completion.prompt), style="bold"), soft_wrap=True)
    out.print(Text(describe_composition(completion.composition), style="dim"), soft_wrap=True)
    print_plain(completion.text.strip() + "\n")


def print_stream(submission: Submission) -> None:
    """Composition, then the answer as it comes."""
    out.print(Text(describe_composition(submission.composition), style="dim"), soft_wrap=True)
    for piece in submission.answers:
        print(piece.text, end="", flush=True)  # noqa: T201 - as `print_plain`
    print()  # noqa: T201


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


def print_retrieval(report: RetrievalReport) -> None:
    """A line per method, then how sure the default one is of itself."""
    rows = []
    for name, figures in report.methods.items():
        top = (figures.top1, figures.top3, figures.top5, figures.top8)
        times = (figures.ms_p50, figures.ms_p99, figures.ms_batch32, figures.search_ms_p50)
        rows.append([name, *(f"{x:5.1f}" for x in top), *("-" if x is None else f"{x:5.2f}" for x in times)])
    for name, quoted in (report.quoted or {}).items():
        top = (quoted.top1, quoted.top3, quoted.top5, quoted.top8)
        rows.append([f"[{name}]", *(f"{x:5.1f}" for x in top), *"----"])
    print_rows(("method", "top1", "top3", "top5", "top8", "p50", "p99", "b32", "find"), rows)
    print_note("top1 ... top8: per cent of prompts whose adapter is among the first hits")
    print_note("ms: p50, p99 of one prompt; b32 each in batches of 32; find without encoding")
    if report.quoted:
        print_note("[...]: the paper's own figures, quoted")
    print_plain(
        f"{report.adapters} adapters, {report.samples} samples, {report.test_prompts} test prompts "
        f"({report.setup.repeated} are samples)"
    )
    if report.calibration is not None:
        _print_calibration(report.default, report.calibration, report.off_topic_prompts)
    for name, hardships in (report.robustness or {}).items():
        _print_hardships(name, hardships)


def _print_calibration(name: str, calibration: Calibration, off_topic: int) -> None:
    print_plain(
        f"{name}: calibration error {calibration.ece:.3f}, of the choice among adapters {calibration.ece_given_fit:.3f}"
    )
    print_plain(f"  base model gets {calibration.false_fallback_default:.1%} of prompts that have an adapter")
    if off_topic:
        print_plain(
            f"  and {calibration.off_topic_to_base_default:.1%} of {off_topic} off-topic ones "
            f"(AUROC {calibration.fit_auroc:.3f})"
        )
    for what, found in (("adapters", calibration.leave_adapters_out), ("domains", calibration.leave_domains_out)):
        if found is not None:
            sent = found.off_topic_to_base_at_5_percent_false_fallback
            print_plain(f"  {what} left out: AUROC {found.auroc:.3f}; {sent:.1%} at 5 % false fallback")


def _print_hardships(name: str, hardships: Robustness) -> None:
    rows = [
        ("as they are", hardships.plain),
        ("misspelt", hardships.typos),
        ("after a long context", hardships.context_before),
        ("before a long context", hardships.context_after),
        *((f"{m} samples per adapter", accuracy) for m, accuracy in hardships.samples_per_adapter.items()),
    ]
    if hardships.incremental is not None:
        rows.append(("half added, not learnt", hardships.incremental.delta))
        rows.append(("half added, learnt", hardships.incremental.settled))
    print_rows((name, "top1", "top3"), [(what, f"{of.top1:5.1f}", f"{of.top3:5.1f}") for what, of in rows])


def print_engine(report: EngineReport) -> None:
    """A table of contenders for each workload, the ratios, and what a reader needs to judge them."""
    for workload in dict.fromkeys(on for figures in report.figures.values() for on in figures):
        rows = []
        for name, figures in report.figures.items():
            if workload in figures:
                found = figures[workload]
                first, later = found.first_token_seconds, found.token_seconds
                rows.append([name, f"{found.tokens_per_second.median:7.1f}", *_three(first, 1), *_three(later, 1000)])
        print_rows((workload, "tokens/s", "ttft50", "95", "99", "tpot50", "95", "99"), rows)
        out.print()
    ratios = [(name, *(f"{x:6.3f}" for x in (r.median, r.min, r.max))) for name, r in report.ratios.items()]
    print_rows(("ratio of tokens/s", "median", "least", "greatest"), ratios)
    print_note("tokens/s: generated ones, the median round's; ttft: seconds from a request's arrival to its first")
    print_note("token (percentiles 50, 95, 99); tpot: milliseconds for each token after it")
    for name, share in report.agreement.items():
        print_plain(f"{name}: {share:.1%} of the tokens are the same")
    for name, reason in report.set_up.left_out.items():
        print_note(f"left out: {name}: {reason}")
    _print_set_up(report)


def print_server(report: ServerReport) -> None:
    """Figures of the server and of the engine alone, their ratios, and what a reader needs to judge them."""
    rows = []
    for name, by_concurrency in report.figures.items():
        for concurrency, found in by_concurrency.items():
            speeds = [f"{found.requests_per_second.median:6.2f}", f"{found.tokens_per_second.median:7.1f}"]
            cpu = ", ".join(f"{process} {used.median:.0f}" for process, used in found.cpu_ms_per_request.items())
            times = [*_three(found.first_token_seconds, 1), *_three(found.token_seconds, 1000)]
            rows.append([name, concurrency, *speeds, *times, cpu])
    print_rows(("", "", "req/s", "tok/s", "ttft50", "95", "99", "tpot50", "95", "99", "cpu ms/request"), rows)
    out.print()
    ratios = [(name, *(f"{x:6.3f}" for x in (r.median, r.min, r.max))) for name, r in report.ratios.items()]
    print_rows(("server / engine alone", "median", "least", "greatest"), ratios)
    for kind, own in report.own_ms.items():
        print_plain(
            f"own time, {kind} answer of one token: {own.median:.2f} ms "
            f"({own.server_p50:.2f} with the server, {own.alone_p50:.2f} without)"
        )
    print_note("c8: 8 requests at a time; ttft: seconds from a request to its first token (percentiles 50, 95, 99);")
    print_note("tpot: milliseconds for each token after it; cpu: processor time of each process")
    print_plain(
        f"{report.agreement.compositions:.1%} of the compositions and {report.agreement.texts:.1%} of the texts are "
        "the same"
    )
    _print_set_up(report)


def print_vllm(report: VllmReport) -> None:
    """What the gateway adds to vLLM's time, and the throughput with new compositions."""
    told, cost = report.server, report.overhead
    how = "lanes" if told["lanes"] else "an adapter for each composition"
    print_plain(f"vLLM with {told['slots']} slots of rank {told['max_rank']}, {how}")
    print_plain(
        f"a request of one token: {cost.gateway:.1f} ms by the gateway, {cost.direct:.1f} straight to vLLM; "
        f"{cost.difference:.1f} more (median of the pairs), of which {cost.retrieval:.1f} to retrieve"
    )
    out.print()
    rows = [
        (f"{each.share:.0%}", f"{each.requests_per_second:.2f}", f"{each.compositions_per_second:.2f}")
        for each in report.throughput
    ]
    print_rows(("new compositions", "req/s", "new/s"), rows)
    half = "more than were asked for" if report.half_at is None else f"{report.half_at:.2f} a second"
    print_plain(f"new compositions until the throughput is half: {half}")
    here, options = report.environment, report.options
    print_note(
        f"{options.concurrency} requests at a time, {options.max_tokens} tokens each, mixtures of {options.k}; "
        f"{here.cpu}, {report.seconds:.0f} s"
    )


def _three(percentiles: Percentiles | None, scale: float) -> list[str]:
    if percentiles is None:
        return ["-"] * 3
    return [f"{scale * x:6.{2 if scale == 1 else 1}f}" for x in (percentiles.p50, percentiles.p95, percentiles.p99)]


def _print_set_up(report: EngineReport | ServerReport) -> None:
    set_up, here = report.set_up, report.set_up.environment
    arrivals = getattr(set_up, "rate", None)
    rate = "" if arrivals is None else f", {arrivals:.2f} requests/s"
    print_plain(f"{set_up.base_model}, {set_up.dtype}, {set_up.rounds} rounds, seed {set_up.seed}{rate}")
    print_plain(
        f"{here.cpu}, {here.threads} threads, load average {set_up.load_average_before:.1f} before, "
        f"{set_up.load_average_after:.1f} after"
    )
    print_plain(", ".join(f"{name} {here.versions[name]}" for name in ("python", "torch", "transformers")))


def print_experiment(summary: Mapping[str, Any]) -> None:
    """The means of each method, from what `write_report` returns."""

    def cell(value: float | None, digits: int = 1) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    rows = [
        [
            entry["title"] + (" *" if name == summary["default"] else ""),
            *(cell(entry[f"{setting}_mean"]) for setting in ("iid", "ood", "strict_ood")),
            cell(entry["oracle_share"]),
            cell(entry["relative_speed"], 2),
        ]
        for name, entry in summary["methods"].items()
    ]
    print_rows(["method", "IID", "OOD", "strict", "% oracle", "speed"], rows)
