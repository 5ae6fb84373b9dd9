"""Statistics and report of the experiment, on made-up scores."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loraretriever.evaluate.experiment.report import summarise, to_html, to_markdown, write_report
from loraretriever.evaluate.experiment.results import (
    METRICS,
    SETTINGS,
    CurvePoint,
    MethodInfo,
    Results,
    Similarity,
    TestPrompt,
)
from loraretriever.evaluate.experiment.statistics import Statistics, holm
from loraretriever.evaluate.experiment.tables import paper_form, summary

TASKS = {"snli": ("inference", "em"), "qnli": ("inference", "em"), "viggo": ("text", "rouge"), "<b>|": ("code", "bleu")}
COUNTS = {"snli": 10, "qnli": 4, "viggo": 6, "<b>|": 6}
INFOS = {
    name: MethodInfo(name, f"the {name}", group, relative_speed=0.5 + i / 10, tokens_per_second=100.0)
    for i, (name, group) in enumerate(
        {"base": "bounds", "oracle": "bounds", "adaptive": "ours", "mixture": "ours", "smear": "paper"}.items()
    )
}


def make(**changes: object) -> Results:
    prompts = tuple(
        TestPrompt(f"{task}/{i}", f"in {i}", "out", task, *TASKS[task], task)
        for task in TASKS
        for i in range(COUNTS[task])
    )
    rng = np.random.default_rng(5)
    scores = {}
    for name in INFOS:
        for setting in SETTINGS if name not in ("base", "oracle") else ("iid",):
            level = {"base": 0.1, "oracle": 0.8, "adaptive": 0.75}.get(name, 0.5)
            scores[name, setting] = (rng.random((len(prompts), len(METRICS))) < level).astype(float)
    values = Results(
        name="made up",
        prompts=prompts,
        methods=INFOS,
        scores=scores,
        default="adaptive",
        rankings={"hybrid": tuple((str(p.own),) if i % 4 else ("snli", str(p.own)) for i, p in enumerate(prompts))},
        curve=tuple(CurvePoint("mixture", "iid", k, 50.0 - k, 26) for k in (1, 3)),
        similarity=Similarity(tuple(TASKS), np.eye(4), np.eye(4)),
        about={"command": "loraretriever evaluate", "environment": {"cpu": "one <two>"}},
    )
    return replace(values, **changes)  # type: ignore[arg-type]


def constant(results: Results, name: str, value: float) -> Results:
    scores = dict(results.scores)
    for setting in SETTINGS:
        scores[name, setting] = np.full((len(results.prompts), len(METRICS)), value)
    return replace(results, scores=scores)


def test_a_mean_counts_every_task_the_same_in_its_own_metric() -> None:
    results = make()
    statistics = Statistics(results)
    scores = results.scores["mixture", "ood"]
    means = []
    for task, (_, metric) in TASKS.items():
        column = METRICS.index({"em": "em", "rouge": "rougeL", "bleu": "bleu"}[metric])
        rows = [i for i, prompt in enumerate(results.prompts) if prompt.task == task]
        means.append(scores[rows, column].mean())
        assert statistics.task_mean("mixture", "ood", task) == pytest.approx(100 * means[-1])
    estimate = statistics.estimate("mixture", "ood")
    assert estimate is not None
    assert estimate.mean == pytest.approx(100 * np.mean(means))
    assert estimate.low < estimate.mean < estimate.high
    assert statistics.domain_mean("mixture", "ood", "inference") == pytest.approx(50 * (means[0] + means[1]))


def test_intervals_of_constants_are_constants_and_others_have_the_right_width() -> None:
    statistics = Statistics(constant(make(), "smear", 0.25))
    estimate = statistics.estimate("smear", "iid")
    assert estimate is not None
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((25, 25, 25))
    values = Statistics(make()).primary("mixture", "iid")
    places = [[i for i, p in enumerate(make().prompts) if p.task == task] for task in TASKS]
    deviation = 100 * np.sqrt(sum(values[rows].var() / len(rows) for rows in places)) / len(TASKS)
    found = Statistics(make()).estimate("mixture", "iid")
    assert found is not None
    assert found.high - found.low == pytest.approx(2 * 1.96 * deviation, rel=0.1)


def test_methods_that_answer_alike_do_not_differ_and_others_do() -> None:
    results = make()
    scores = dict(results.scores)
    scores["smear", "iid"] = scores["adaptive", "iid"]
    statistics = Statistics(replace(results, scores=scores))
    assert statistics.p_value("smear", "adaptive", "iid") == 1.0
    better = Statistics(constant(constant(results, "smear", 0.0), "adaptive", 1.0))
    assert better.p_value("smear", "adaptive", "iid") == pytest.approx(1 / 2001)
    assert better.p_value("smear", "adaptive", "iid") == better.p_value("adaptive", "smear", "iid")


def test_one_prompt_in_two_makes_no_significance() -> None:
    results = constant(constant(make(), "smear", 0.0), "adaptive", 0.0)
    results.scores["adaptive", "iid"][0] = 1.0
    assert Statistics(results).p_value("smear", "adaptive", "iid") == 1.0  # both signs are as far from zero


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_share_of_the_oracle_is_paired() -> None:
    results = make()
    scores = dict(results.scores)
    scores["adaptive", "iid"] = scores["oracle", "iid"]
    share = Statistics(replace(results, scores=scores)).share_of_oracle("adaptive")
    assert share is not None
    assert (share.mean, share.low, share.high) == pytest.approx((100, 100, 100))


def test_retrieval_and_confusion() -> None:
    statistics = Statistics(make())
    found = statistics.retrieval("hybrid")
    first = [i for i, p in enumerate(make().prompts) if i % 4 or p.own == "snli"]
    assert found == pytest.approx({1: 100 * len(first) / 26, 3: 100, 5: 100})
    columns, matrix = statistics.confusion("hybrid")
    np.testing.assert_allclose(matrix.sum(axis=1), 1)
    row, column = statistics.tasks.index("qnli"), columns.index("snli")
    own = [i for i, p in enumerate(make().prompts) if p.task == "qnli"]
    assert matrix[row, column] == pytest.approx(np.mean([i % 4 == 0 for i in own]))


def test_the_files_and_the_summary(tmp_path: Path) -> None:
    results = make()
    returned = write_report(results, tmp_path)
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found == json.loads(json.dumps(returned))
    assert found["default"] == "adaptive" and found["methods"].keys() == INFOS.keys()
    assert found["oracle"] == found["methods"]["oracle"]["iid_mean"] == found["methods"]["oracle"]["ood_mean"]
    assert found["base"] == found["methods"]["base"]["strict_ood_mean"]
    entry = found["methods"]["adaptive"]
    assert entry["iid_ci"][0] <= entry["iid_mean"] <= entry["iid_ci"][1]
    assert entry["train_seconds"] is None and entry["tokens_per_second"] == 100.0
    assert {file.name for file in tmp_path.iterdir()} == {"summary.json", "report.md", "report.html", "plots"}
    names = {"quality_against_k.svg", "confusion.svg", "quality_against_cost.svg", "similarity.svg"}
    assert {file.name for file in (tmp_path / "plots").iterdir()} == names
    again = write_report(results, tmp_path)
    assert again == returned


def test_the_page_loads_nothing_and_escapes_what_it_shows(tmp_path: Path) -> None:
    write_report(make(), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert all(link.strip().startswith(("#", "data:")) for link in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert "<b>|" not in page and "&lt;b&gt;|" in page and "one &lt;two&gt;" in page
    text = (tmp_path / "report.md").read_text()
    assert "&lt;b>\\|" in text
    widths = [len(re.split(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")]
    assert min(widths) > 3
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.split(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_what_was_not_measured_is_left_out() -> None:
    infos = {name: replace(info, relative_speed=None, tokens_per_second=None) for name, info in INFOS.items()}
    scores = {key: value for key, value in make().scores.items() if key[1] == "iid" and key[0] != "base"}
    infos.pop("base")
    bare = make(methods=infos, scores=scores, rankings={}, curve=(), similarity=None)
    statistics = Statistics(bare)
    text = to_markdown(statistics, [])
    assert "Retrieval" not in text and "strict OOD, default" not in text
    assert "the smear" in to_html(statistics, {})
    found = summarise(statistics)
    assert found["base"] is None
    assert found["methods"]["smear"]["ood_mean"] is None and found["methods"]["smear"]["ood_ci"] is None
    assert found["methods"]["smear"]["relative_speed"] is None


def test_the_papers_form_has_domains_tasks_and_published_figures() -> None:
    published = {("mixture", "iid", "viggo", "rouge1"): 61.3, ("mixture", "ood", "inference", "em"): 44.0}
    table = paper_form(Statistics(make(published=published)), ("iid", "ood"))
    assert table.columns[:4] == ("", "metric", "the base", "the oracle")
    by_name = {row.cells[:2]: row for row in table.rows}
    assert {("viggo", "ROUGE-1"), ("viggo", "ROUGE-2"), ("viggo", "ROUGE-L"), ("snli", "EM")} <= by_name.keys()
    assert by_name["inference", "EM"].kind == "group"
    mixture = table.columns.index("the mixture, IID")
    assert by_name["viggo", "ROUGE-1"].cells[mixture].endswith(" (61.3)")
    assert by_name["inference", "EM"].cells[table.columns.index("the mixture, OOD")].endswith(" (44.0)")
    assert "(" not in by_name["viggo", "ROUGE-2"].cells[mixture]
    assert all(len(row.cells) == len(table.columns) for row in table.rows)


def test_the_summary_marks_the_default_and_fits_its_columns() -> None:
    table = summary(Statistics(make()))
    assert all(len(row.cells) == len(table.columns) for row in table.rows)
    assert [row.cells[0] for row in table.rows if "(default)" in row.cells[0]] == ["the adaptive (default)"]
