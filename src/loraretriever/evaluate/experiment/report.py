"""The report: summary.json, report.md, and report.html, which needs no other file and no network."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loraretriever.evaluate.experiment import tables
from loraretriever.evaluate.experiment.plots import draw_all
from loraretriever.evaluate.experiment.results import SETTINGS, Results
from loraretriever.evaluate.experiment.statistics import DRAWS, Statistics
from loraretriever.evaluate.experiment.tables import Table

_CAPTIONS = {
    "quality_against_k": "Quality against k: uniform weights, some prompts of each task.",
    "confusion": "Confusion of retrieval (IID): share of a task's prompts that find each adapter first.",
    "quality_against_cost": "Quality against cost: the paper's baselines, followers and ours, IID and OOD.",
    "similarity": "Similarity of the adapters.",
}
_METRICS = """\
A task is scored in the metric that its file names. *Exact match*: lower case, full stops removed, the reference cut at
its first blank line, as in the paper's script. *ROUGE*: F measures of `rouge-score` without stemming; the mean over
tasks takes ROUGE-L. *BLEU*: sentence BLEU of `sacrebleu`, with exponential smoothing and effective order, where the
paper's script took nltk's unsmoothed sentence BLEU over white-space tokens, so that its figures are lower. Answers are
greedy; white space around them does not count."""


def write_report(results: Results, folder: Path) -> dict[str, Any]:
    """Write all files of the report, each whole or not at all, and return what summary.json holds."""
    statistics = Statistics(results)
    figures = draw_all(statistics)
    summary = summarise(statistics)
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    for name, svg in figures.items():
        _write(folder / "plots" / f"{name}.svg", svg)
    _write(folder / "report.md", to_markdown(statistics, list(figures)))
    _write(folder / "report.html", to_html(statistics, figures))
    _write(folder / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    return summary


def _write(file: Path, text: str) -> None:
    unfinished = file.with_name(file.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(file)


def summarise(statistics: Statistics) -> dict[str, Any]:
    """Figures for programs. Means are between 0 and 100; what was not measured is None."""
    results = statistics.results
    p_values = {setting: statistics.against_default(setting) for setting in SETTINGS}
    methods: dict[str, Any] = {}
    for name, info in results.methods.items():
        entry: dict[str, Any] = {"title": info.title, "group": info.group}
        for setting in SETTINGS:
            estimate = statistics.estimate(name, setting)
            entry[f"{setting}_mean"] = _rounded(estimate.mean if estimate else None)
            entry[f"{setting}_ci"] = estimate and [_rounded(estimate.low), _rounded(estimate.high)]
            entry[f"p_{setting}"] = p_values[setting].get(name)
        share = statistics.share_of_oracle(name)
        entry |= {
            "oracle_share": _rounded(share.mean if share else None),
            "oracle_share_ci": share and [_rounded(share.low), _rounded(share.high)],
            "adapters_per_prompt": _rounded(info.adapters_per_prompt),
            "tokens_per_second": _rounded(info.tokens_per_second),
            "relative_speed": _rounded(info.relative_speed, 3),
            "compose_seconds": _rounded(info.compose_seconds, 5),
            "train_seconds": info.train_seconds,
        }
        methods[name] = entry
    return {
        "methods": methods,
        "oracle": methods.get("oracle", {}).get("iid_mean"),
        "base": methods.get("base", {}).get("iid_mean"),
        "default": results.default,
        "retrieval": {
            name: {f"top{k}": _rounded(v) for k, v in statistics.retrieval(name).items()} for name in results.rankings
        },
        "tasks": {
            name: {
                setting: {task: _rounded(statistics.task_mean(name, setting, task)) for task in statistics.tasks}
                for setting in SETTINGS
                if (name, setting) in results.scores
            }
            for name in results.methods
        },
        "curve": [
            {"strategy": p.strategy, "setting": p.setting, "k": p.k, "mean": _rounded(p.mean), "prompts": p.prompts}
            for p in results.curve
        ],
        "about": dict(results.about),
    }


def _rounded(value: float | None, digits: int = 2) -> float | None:
    return None if value is None else round(value, digits)


def _all_tables(statistics: Statistics) -> list[Table]:
    found = [tables.summary(statistics)]
    if statistics.results.rankings:
        found += [tables.retrieval(statistics), tables.per_task(statistics)]
    for settings in (("iid", "ood"), ("strict_ood",)):
        if any(statistics.has(name, setting) for name in statistics.results.methods for setting in settings):
            found.append(tables.paper_form(statistics, settings))
    return [*found, tables.set_up(statistics)]


def _title(results: Results) -> str:
    return f"Ways to choose and compose adapters: {results.name}"


def _settings_text() -> str:
    return (
        "IID: every adapter may be used. OOD: those of the prompt's own task may not. Strict OOD: nor may those of its "
        f"whole domain. Intervals and p values come from {DRAWS:,} draws."
    )


def _facts(about: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in about.items():
        if isinstance(value, Mapping):
            rows += _facts(value, f"{prefix}{name} ")
        else:
            rows.append((f"{prefix}{name}", str(value)))
    return rows


def to_markdown(statistics: Statistics, figures: Sequence[str]) -> str:
    """The report as Markdown; figures are files in plots/."""
    lines = [f"# {_title(statistics.results)}", "", _settings_text(), ""]
    for table in _all_tables(statistics):
        lines += [f"## {_markdown(table.title)}", ""]
        if table.note:
            lines += [table.note, ""]
        lines += [_markdown_row(table.columns)]
        lines += [_markdown_row(["---" if i < table.texts else "---:" for i in range(len(table.columns))])]
        for row in table.rows:
            bold = row.kind in ("group", "total")
            lines.append(
                _markdown_row([f"**{cell}**" if bold and cell else cell for cell in map(_markdown, row.cells)])
            )
        lines.append("")
    lines += ["## Figures", ""]
    for name in figures:
        lines += [f"![{_CAPTIONS[name]}](plots/{name}.svg)", ""]
    lines += ["## Metrics", "", _METRICS, "", "## How it was run", ""]
    lines += [f"- {_markdown(name)}: {_markdown(value)}" for name, value in _facts(statistics.results.about)]
    return "\n".join(lines) + "\n"


def _markdown(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


_STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.box { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .6rem; text-align: right; white-space: nowrap; }
td.wrap { white-space: normal; min-width: 16rem; }
th { vertical-align: bottom; border-bottom: 1px solid var(--line); font-weight: 600; }
.wide th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; vertical-align: top; }
.wide th.text { writing-mode: horizontal-tb; transform: none; vertical-align: bottom; }
.text { text-align: left; } td.text:first-child, th.text:first-child { position: sticky; left: 0; background: Canvas; }
tr.group td { font-weight: 600; border-top: 1px solid var(--line); background: var(--soft); }
tr.total td { font-weight: 700; border-top: 2px solid var(--line); }
tr.default td { font-weight: 700; }
figure { margin: 1.5rem 0; } figure svg { max-width: 100%; height: auto; background: white; border-radius: 6px; }
figcaption, .note { opacity: .75; font-size: 13px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: 13px; }
dd { overflow-wrap: anywhere; }
dt { opacity: .75; } dd { margin: 0; }
"""


def to_html(statistics: Statistics, figures: Mapping[str, str]) -> str:
    """The report as one HTML page with everything in it."""
    results, escape = statistics.results, html.escape
    parts = [f"<h1>{escape(_title(results))}</h1>", f"<p>{escape(_settings_text())}</p>"]
    parts += [_html_table(table, escape) for table in _all_tables(statistics)]
    for name, svg in figures.items():
        parts.append(f"<figure>{svg}<figcaption>{escape(_CAPTIONS[name])}</figcaption></figure>")
    metrics = escape(_METRICS).replace("`", "")
    parts.append(f"<h2>Metrics</h2><p>{metrics.replace('*', '')}</p>")
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in _facts(results.about))
    parts.append(f"<h2>How it was run</h2><dl>{facts}</dl>")
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(_title(results))}</title><style>{_STYLE}</style></head><body>"
    )
    return head + "\n".join(parts) + "</body></html>\n"


def _html_table(table: Table, escape: Callable[[str], str]) -> str:
    def cell(tag: str, i: int, text: str) -> str:
        kinds = ["text"] if i < table.texts else []
        if tag == "td" and i < table.texts and len(text) > 40:
            kinds.append("wrap")
        css = f' class="{" ".join(kinds)}"' if kinds else ""
        return f"<{tag}{css}>{escape(text)}</{tag}>"

    head = "".join(cell("th", i, name) for i, name in enumerate(table.columns))
    rows = []
    for row in table.rows:
        kind = row.kind or ("default" if row.cells[0].endswith("(default)") else "")
        cells = "".join(cell("td", i, text) for i, text in enumerate(row.cells))
        rows.append(f'<tr class="{kind}">{cells}</tr>' if kind else f"<tr>{cells}</tr>")
    wide = " wide" if len(table.columns) > 14 else ""
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    body = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<h2>{escape(table.title)}</h2>{note}<div class="box{wide}" tabindex="0">{body}</div>'
