"""`loraretriever evaluate` on tiny models: a pool with task files, and the preset with stand-ins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from loraretriever.evaluate.experiment.paper48_tables import TASKS
from paper_fakes import write_fake_adapters, write_fake_base, write_fake_paper

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.slow
def test_every_method_on_a_pool_of_ones_own(task_run: Run, task_pool: Path, tasks: Path, tmp_path: Path) -> None:
    arguments = (
        "evaluate", "--pool", task_pool, "--tasks", tasks, "--output", tmp_path / "out", "--prompts-per-task", 2,
        "--quick", "--json",
    )  # fmt: skip
    code, out, err = task_run(*arguments)
    assert code == 0, err
    found = json.loads(out)
    names = set(found["methods"])
    assert {"base", "oracle", "best_single", "selection", "mixture", "fusion", "adaptersoup", "lorahub"} <= names
    assert {"smear", "moe_top1", "moe_top3", "moe_soft", "ties", "dare", "lego", "semla", "arrow"} <= names
    assert {"spectral", "ramole", "lorauter", "logo", found["default"]} <= names
    for name, entry in found["methods"].items():
        for setting in ("iid", "ood", "strict_ood"):
            assert entry[f"{setting}_mean"] is not None, (name, setting)
        assert (entry["tokens_per_second"] is None) == (name == "smear")
    answers = (tmp_path / "out" / "answers.jsonl").read_bytes()
    code, again, err = task_run(*arguments)
    assert code == 0, err
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == answers  # nothing was answered twice
    assert json.loads(again)["methods"] == found["methods"]
    keys = {(row["prompt"], row["composition"]) for row in map(json.loads, answers.decode().splitlines())}
    for line in (tmp_path / "out" / "choices.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert (row["prompt"], row["composition"]) in keys  # every choice can be scored again


def test_some_methods_as_text(task_run: Run, task_pool: Path, tasks: Path, tmp_path: Path) -> None:
    code, out, err = task_run(
        "evaluate", "--pool", task_pool, "--tasks", tasks, "--output", tmp_path / "out", "--prompts-per-task", 1,
        "--method", "base", "--method", "adaptive", "--max-tokens", 3, "--no-times", "--no-curve",
    )  # fmt: skip
    assert code == 0, err
    assert "base model" in out and "adaptive k" in out
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--tasks is missing"),
        (("--tasks", "TASKS", "--method", "nobody"), "unknown method 'nobody'"),
        (("--tasks", "TASKS", "--split", "dev"), "has no task files"),
        (("--preset", "other"), "unknown preset 'other'"),
        (("--preset", "paper48"), "--paper is missing"),
    ],
)
def test_bad_requests(
    task_run: Run, task_pool: Path, tasks: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    given = [str(tasks) if argument == "TASKS" else argument for argument in arguments]
    code, _, err = task_run("evaluate", "--pool", task_pool, "--output", tmp_path / "out", *given)
    assert code == 2 and message in " ".join(err.split())


@pytest.mark.slow
def test_the_preset_prints_published_figures_beside_its_own(task_run: Run, tmp_path: Path) -> None:
    paper = write_fake_paper(tmp_path / "paper", samples=2, prompts=1)
    write_fake_base(tmp_path / "base", ["a prompt"])
    write_fake_adapters(tmp_path / "adapters")
    code, out, err = task_run(
        "evaluate", "--preset", "paper48", "--paper", paper, "--adapters", tmp_path / "adapters", "--base-model",
        tmp_path / "base", "--output", tmp_path / "out", "--prompts-per-task", 1, "--max-tokens", 2, "--no-times",
        "--no-curve", "--json", "--method", "oracle", "--method", "selection", "--method", "mixture",
    )  # fmt: skip
    assert code == 0, err
    assert len(json.loads(out)["tasks"]["mixture"]["iid"]) == len(TASKS)
    assert "(61." in (tmp_path / "out" / "report.md").read_text()
