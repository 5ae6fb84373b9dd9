"""The report's tables, as rows of texts: what Markdown and HTML have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loraretriever.evaluate.experiment.results import METRICS, PRIMARY
from loraretriever.evaluate.experiment.statistics import Estimate, Statistics, shown_metrics

GROUPS = {
    "bounds": "bounds",
    "ours": "LoraRetriever: selection, mixture, fusion",
    "paper": "the paper's baselines",
    "after": "what came after",
}
_NAMES = {"em": "EM", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "bleu": "BLEU"}
_SETTINGS = {"iid": "IID", "ood": "OOD", "strict_ood": "strict OOD"}
NONE = "–"


@dataclass(frozen=True, slots=True)
class Row:
    """Cells from left to right. `kind` is "group", "total" or ""."""

    cells: tuple[str, ...]
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A title, the columns' names, and rows of as many cells. The first `texts` columns are no numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    texts: int = 1
    note: str = ""


def number(value: float | None, digits: int = 1) -> str:
    """A number, or a dash where there is none."""
    return NONE if value is None else f"{value:.{digits}f}"


def with_interval(estimate: Estimate | None) -> str:
    """Such as 54.2 [52.0, 56.1]."""
    return NONE if estimate is None else f"{estimate.mean:.1f} [{estimate.low:.1f}, {estimate.high:.1f}]"


def summary(statistics: Statistics) -> Table:
    """One row for each method."""
    results = statistics.results
    p_values = {setting: statistics.against_default(setting) for setting in ("iid", "ood")}
    rows: list[Row] = []
    for group, title in GROUPS.items():
        infos = [info for info in results.methods.values() if info.group == group]
        if infos:
            rows.append(Row((title,) + ("",) * 9, "group"))
        for info in infos:
            share = statistics.share_of_oracle(info.name)
            mark = " (default)" if info.name == results.default else ""
            p_cells = [number(p_values[setting].get(info.name), 3) for setting in ("iid", "ood")]
            rows.append(
                Row(
                    (
                        info.title + mark,
                        *(with_interval(statistics.estimate(info.name, setting)) for setting in _SETTINGS),
                        NONE if share is None else f"{share.mean:.1f} [{share.low:.1f}, {share.high:.1f}]",
                        " / ".join(p_cells),
                        number(info.adapters_per_prompt),
                        number(info.tokens_per_second, 0),
                        number(info.relative_speed, 2),
                        number(None if info.compose_seconds is None else 1000 * info.compose_seconds),
                    )
                )
            )
    columns = (
        "method", "IID", "OOD", "strict OOD", "% of oracle, IID", "p, IID / OOD", "adapters", "tokens/s", "speed", "ms",
    )  # fmt: skip
    note = (
        "Mean over tasks of each task's own metric, 0 to 100, with 95 % bootstrap intervals (drawn within tasks). "
        "p: permutation test against the default on the same prompts, Holm-corrected within the column. adapters: mean "
        "number in an IID composition. tokens/s: generated tokens over the whole time of one batch, choosing and "
        "composing included; speed: that over the base model's, timed right before; ms: choosing and composing."
    )
    return Table("Summary", columns, tuple(rows), 1, note)


def set_up(statistics: Statistics) -> Table:
    """How each method was set up, and how long its training took."""
    rows = [
        Row((info.title, info.name, info.note, "" if info.train_seconds is None else f"{info.train_seconds:.0f} s"))
        for info in statistics.results.methods.values()
    ]
    note = (
        "Out of domain most methods know nothing of a prompt's task. LoRAHub, the trained routers and LORAUTER with "
        "the task known saw examples of every task of the stream, also of those whose adapters a prompt may not use."
    )
    return Table("Methods", ("method", "name", "set-up here", "trained or fitted in"), tuple(rows), 3, note)


def paper_form(statistics: Statistics, settings: Sequence[str]) -> Table:
    """The paper's table: domains with their tasks, against methods under settings."""
    results = statistics.results
    columns = [
        (method, setting)
        for method in results.methods
        for setting in settings
        if statistics.has(method, setting) and (method not in ("base", "oracle") or setting == settings[0])
    ]
    names = [
        results.methods[method].title + ("" if method in ("base", "oracle") else f", {_SETTINGS[setting]}")
        for method, setting in columns
    ]
    rows: list[Row] = []
    for domain, tasks in statistics.domains.items():
        for metric in _metrics_of(statistics, tasks):
            values = [statistics.domain_mean(*column, domain, metric) for column in columns]
            rows.append(_row(statistics, domain, metric, columns, values, "group"))
        for task in tasks:
            for metric in shown_metrics(statistics.metrics[task]):
                values = [statistics.task_mean(*column, task, metric) for column in columns]
                rows.append(_row(statistics, task, metric, columns, values, ""))
    means = [statistics.estimate(*column) for column in columns]
    rows.append(Row(("mean over tasks", "own", *(number(each.mean if each else None) for each in means)), "total"))
    title = " and ".join(_SETTINGS[setting] for setting in settings)
    note = "In brackets: what the paper published." if results.published else ""
    return Table(f"Tasks and domains, {title}", ("", "metric", *names), tuple(rows), 2, note)


def _metrics_of(statistics: Statistics, tasks: Sequence[str]) -> list[str]:
    found = {metric for task in tasks for metric in shown_metrics(statistics.metrics[task])}
    return [metric for metric in METRICS if metric in found]


def _row(
    statistics: Statistics,
    name: str,
    metric: str,
    columns: Sequence[tuple[str, str]],
    values: Sequence[float | None],
    kind: str,
) -> Row:
    published = statistics.results.published
    cells = []
    for (method, setting), value in zip(columns, values, strict=True):
        known = published.get((method, setting, name, metric))
        cells.append(number(value) + (f" ({known:.1f})" if known is not None else ""))
    return Row((name, _NAMES[metric], *cells), kind)


def per_task(statistics: Statistics) -> Table:
    """Retrieval beside answer quality, for each task."""
    default = statistics.results.default
    retrievers = list(statistics.results.rankings)
    rows = [
        Row(
            (
                task,
                _NAMES[PRIMARY[statistics.metrics[task]]],
                *(number(statistics.task_retrieval(retriever, task), 0) for retriever in retrievers),
                *(number(statistics.task_mean(*key, task)) for key in (("base", "iid"), ("oracle", "iid"))),
                *(number(statistics.task_mean(default, setting, task)) for setting in _SETTINGS),
            )
        )
        for task in statistics.tasks
    ]
    titles = [f"{setting}, default" for setting in _SETTINGS.values()]
    columns = ("task", "metric", *(f"found first, {name}" for name in retrievers), "base", "oracle", *titles)
    return Table("Retrieval beside answer quality", columns, tuple(rows), 2, "found first: % of prompts, IID.")


def retrieval(statistics: Statistics) -> Table:
    """Accuracy of the retrievers over all prompts."""
    rows = [
        Row((name, *(number(value) for value in statistics.retrieval(name).values())))
        for name in statistics.results.rankings
    ]
    return Table(
        "Retrieval", ("retriever", "top 1", "top 3", "top 5"), tuple(rows), 1, "Own adapter found, % of prompts."
    )
