"""The preset `paper48`: what it reads, and the published figures beside it."""

from __future__ import annotations

import csv
import json
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from loraretriever.errors import InvalidInputError
from loraretriever.evaluate.experiment.paper48 import Preset, cut_answer, load_paper48
from loraretriever.evaluate.experiment.paper48_tables import COLUMNS, DOMAINS, SIZES, TASKS, find_row, published
from loraretriever.evaluate.experiment.results import METRICS
from paper_fakes import write_fake_paper, write_fake_repository

SHARED = Path(__file__).parents[4] / "shared" / "paper48"
SOME = ("sst2", "wmt14_enfr", "dart")
TABLES = ("table1_7b", "table1_13b", "table4_7b", "table5_13b")


def rows_of(table: str) -> list[dict[str, str]]:
    file = files("loraretriever.evaluate.experiment") / "published" / f"{table}.csv"
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))


def test_the_48_tasks_of_ten_domains() -> None:
    assert len(TASKS) == 48
    assert {task.domain for task in TASKS.values()} == set(DOMAINS)
    assert Counter(task.metric for task in TASKS.values()) == {"em": 36, "bleu": 8, "rouge": 4}


@pytest.mark.parametrize("table", TABLES)
def test_every_row_of_a_table_is_a_task_or_a_mean_over_a_domain(table: str) -> None:
    found = [find_row(row["task"]) for row in rows_of(table)]
    three = ("rouge1", "rouge2", "rougeL")
    kinds = {"em": ("em",), "bleu": ("bleu",), "rouge": three}
    if table.startswith("table1"):  # the aggregated rows
        expected = {(domain, "em") for domain in DOMAINS} - {("struct to text", "em"), ("translation", "em")}
        expected |= {("translation", "bleu"), *(("struct to text", metric) for metric in three)}
    else:
        expected = {(name, metric) for name, task in TASKS.items() for metric in kinds[task.metric]}
    assert set(found) == expected
    assert len(found) == len(expected)
    assert {metric for _, metric in found} <= set(METRICS)


@pytest.mark.parametrize("table", TABLES)
def test_every_column_is_a_method_under_a_setting(table: str) -> None:
    assert list(rows_of(table)[0])[1:] == list(COLUMNS)
    assert {setting for _, setting in COLUMNS.values()} == {"iid", "ood"}


@pytest.mark.parametrize(
    ("size", "key", "figure"),
    [
        ("7b", ("oracle", "iid", "struct to text", "rouge1"), 64.0),
        ("7b", ("selection", "ood", "qnli", "em"), 26.0),
        ("7b", ("mixture", "iid", "wmt16_translate_deen", "bleu"), 18.8),
        ("7b", ("lorahub", "iid", "e2e_nlg", "rougeL"), 42.2),
        ("7b", ("moe_soft", "iid", "closed_book QA", "em"), 40.0),
        ("13b", ("fusion", "ood", "drop", "em"), 14.0),
        ("13b", ("adaptersoup", "iid", "translation", "bleu"), 0.8),
        ("13b", ("smear", "iid", "common_gen", "rouge2"), 11.5),
    ],
)
def test_figures_are_where_the_paper_has_them(size: str, key: tuple[str, str, str, str], figure: float) -> None:
    assert published(size)[key] == figure


@pytest.mark.parametrize("size", SIZES)
def test_figures_of_domains_are_means_over_their_tasks(size: str) -> None:
    figures = published(size)
    assert len(figures) == 13 * (12 + 56)
    for (method, setting, place, metric), figure in figures.items():
        if place in DOMAINS:
            tasks = [figures[method, setting, name, metric] for name, task in TASKS.items() if task.domain == place]
            assert sum(tasks) / len(tasks) == pytest.approx(figure, abs=0.11)


def test_names_and_sizes_that_the_paper_does_not_have() -> None:
    with pytest.raises(InvalidInputError, match="'70b'; expected one of 7b, 13b"):
        published("70b")
    with pytest.raises(InvalidInputError, match="'GSM8K' is no row"):
        find_row("GSM8K")


def both_forms(folder: Path, **how: Any) -> list[Preset]:
    return [
        load_paper48(write_fake_paper(folder / "ours", SOME, **how)),
        load_paper48(write_fake_repository(folder / "repository", SOME, **how)),
        load_paper48(write_fake_repository(folder / "long", SOME, suffix="_10templates", **how)),
    ]


def test_both_forms_say_the_same(tmp_path: Path) -> None:
    ours, *others = both_forms(tmp_path, samples=3, prompts=2)
    assert set(ours.samples) == set(ours.examples) == set(SOME)
    for other in others:
        assert dict(other.samples) == dict(ours.samples)
        assert dict(other.examples) == dict(ours.examples)
    assert ours.domains == {task: TASKS[task].domain for task in SOME}
    assert {each.metric for each in ours.samples["dart"]} == {"rouge"}


def test_two_files_side_by_side(tmp_path: Path) -> None:
    write_fake_repository(tmp_path, SOME)
    (tmp_path / "config" / "config2.json").rename(tmp_path / "config2.json")
    (tmp_path / "dataset" / "combined_test.json").rename(tmp_path / "combined_test.json")
    assert set(load_paper48(tmp_path).examples) == set(SOME)


def test_prompts_of_the_stream(tmp_path: Path) -> None:
    preset = load_paper48(write_fake_paper(tmp_path, SOME, prompts=60))
    prompts = preset.prompts()
    assert len(prompts) == 3 * 50
    assert [each.id for each in prompts[:2]] == ["dart/0", "dart/1"]
    assert {each.task: (each.own, each.metric) for each in prompts}["wmt14_enfr"] == ("wmt14_enfr", "bleu")
    assert [each.id for each in preset.prompts(1)] == ["dart/0", "sst2/0", "wmt14_enfr/0"]


def test_samples_count_once_and_are_twenty_at_most(tmp_path: Path) -> None:
    write_fake_paper(tmp_path, ("sst2",), samples=30)
    lines = (tmp_path / "samples.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "samples.jsonl").write_text(lines[0] + "".join(lines))
    preset = load_paper48(tmp_path)
    assert [each.inputs.partition(":")[0] for each in preset.samples["sst2"]] == [f"sample {i}" for i in range(20)]
    assert preset.repeated == 0
    with (tmp_path / "test.jsonl").open("a") as stream:
        stream.write(json.dumps(json.loads(lines[5]) | {"task": "sst2", "metric": "em"}))
    assert load_paper48(tmp_path).repeated == 1


def test_a_question_without_an_answer(tmp_path: Path) -> None:
    write_fake_paper(tmp_path, ("squad_v2",))
    row = json.loads((tmp_path / "test.jsonl").read_text().splitlines()[0]) | {"targets": ""}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    assert load_paper48(tmp_path).examples["squad_v2"][0].targets == ""


def test_settings_of_the_paper(tmp_path: Path) -> None:
    folder = write_fake_paper(tmp_path, SOME)
    small, large = load_paper48(folder), load_paper48(folder, "13b")
    assert (small.base_model, small.adapter_id("dart")) == ("meta-llama/Llama-2-7b-hf", "Styxxxx/llama2_7b_lora-dart")
    assert (large.base_model, large.adapter_id("dart")) == (
        "meta-llama/Llama-2-13b-hf",
        "Styxxxx/llama2_13b_lora-dart",
    )
    for preset in (small, large):
        assert (preset.k, preset.dtype, preset.sampling.max_tokens, preset.sampling.temperature) == (
            3,
            "bfloat16",
            50,
            0,
        )
    with pytest.raises(InvalidInputError, match="size is '70b'"):
        load_paper48(folder, "70b")


def test_the_template_takes_prompts_as_they_are(tmp_path: Path) -> None:
    preset = load_paper48(write_fake_paper(tmp_path, SOME))
    text = preset.render("Fill {inputs} and {0}.\n")
    assert text.startswith("Below is an instruction that describes a task. Write a response")
    assert text.endswith("\n\n### Instruction:\nFill {inputs} and {0}.\n\n\n### Response:\n")


@pytest.mark.parametrize(
    ("answer", "cut"),
    [
        (" yes\n", "yes"),
        ("no\n\n### Response:\nyes", "yes"),
        ("yes\n\n### Instruction:\nAnother", "yes\n\n### Instruction:\nAnother"),
        ("yes ### Response: no", "yes ### Response: no"),
    ],
)
def test_answers_are_cut_as_the_script_cut_them(answer: str, cut: str) -> None:
    assert cut_answer(answer) == cut
    rendered = "### Instruction:\nq\n\n### Response:\n" + answer
    assert rendered.strip().split("### Response:\n")[-1].strip() == cut  # what the script did, with the prompt before


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"expected samples\.jsonl and test\.jsonl, or a copy"):
        load_paper48(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config/config2.json", "{", "cannot read"),
        ("config/config2.json", '{"a": 1}', "not a list of objects"),
        ("config/config2.json", '[{"model_name": "sst2", "domain": "x"}]', "entry 1 has no list of objects"),
        ("config/config2.json", "[]", "no samples"),
        ("dataset/combined_test.json", "[]", "has no prompt"),
        ("dataset/combined_test.json", '[{"inputs": "q"}]', "entry 1 has 'None' in `task`"),
        ("dataset/combined_test.json", '[{"task": "a", "metric": "f1"}]', "entry 1 has the metric 'f1'"),
        (
            "dataset/combined_test.json",
            '[{"task": "a", "metric": "em", "inputs": "q", "domain": "d"}]',
            "in `targets`; expected a reference answer",
        ),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, file: str, content: str, message: str) -> None:
    write_fake_repository(tmp_path, SOME)
    (tmp_path / file).write_text(content)
    with pytest.raises(InvalidInputError, match=message):
        load_paper48(tmp_path)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the paper's prompts are not in this repository")
def test_the_papers_own_prompts() -> None:
    preset = load_paper48(SHARED)
    assert set(preset.samples) == set(preset.examples) == set(TASKS)
    for task, rows in preset.examples.items():
        assert {(each.domain, each.metric) for each in rows} == {(TASKS[task].domain, TASKS[task].metric)}
        assert 15 <= len(preset.samples[task]) <= 20
        assert preset.domains[task] == TASKS[task].domain
    assert len(preset.prompts()) == 1580
