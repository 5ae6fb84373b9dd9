"""`loraretriever evaluate` on tiny models: a pool with task files, and the preset with stand-ins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from loraretriever.evaluate.experiment.paper48_tables import TASKS
from paper_fakes import write_fake_adapters, write_fake_base, write_fake_paper
from tiny import write_peft_folder

Run = Callable[..., tuple[int, str, str]]
NAMES = {"sql": "code", "bash": "code", "german": "translation", "math": "math"}


@pytest.fixture
def run(cli_run: Run, models: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("LORARETRIEVER_ENCODER", str(models / "encoder"))
    monkeypatch.setenv("LORARETRIEVER_PRECISION", "float32")
    monkeypatch.setenv("LORARETRIEVER_CACHE_MIB", "64")
    return cli_run


@pytest.fixture
def pool(tmp_path: Path, models: Path) -> Path:
    for seed, name in enumerate(NAMES):
        samples = [f"{name} sample {i}" for i in range(4)]
        write_peft_folder(tmp_path / "pool" / name, seed=seed, samples=samples, base_model=str(models / "base"))
    return tmp_path / "pool"


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    for split in ("train", "validation", "test"):
        (tmp_path / "tasks" / split).mkdir(parents=True)
        for name, domain in NAMES.items():
            rows = [
                {"inputs": f"{name} {split} {i}", "targets": "yes", "task": name, "domain": domain, "metric": "em"}
                for i in range(3)
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / "tasks" / split / f"{name}.jsonl").write_text(text)
    return tmp_path / "tasks"


@pytest.mark.slow
def test_every_method_on_a_pool_of_ones_own(run: Run, pool: Path, tasks: Path, tmp_path: Path) -> None:
    arguments = (
        "evaluate", "--pool", pool, "--tasks", tasks, "--output", tmp_path / "out", "--prompts-per-task", 2, "--quick",
        "--json",
    )  # fmt: skip
    code, out, err = run(*arguments)
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
    code, again, err = run(*arguments)
    assert code == 0, err
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == answers  # nothing was answered twice
    assert json.loads(again)["methods"] == found["methods"]
    keys = {(row["prompt"], row["composition"]) for row in map(json.loads, answers.decode().splitlines())}
    for line in (tmp_path / "out" / "choices.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert (row["prompt"], row["composition"]) in keys  # every choice can be scored again


def test_some_methods_as_text(run: Run, pool: Path, tasks: Path, tmp_path: Path) -> None:
    code, out, err = run(
        "evaluate", "--pool", pool, "--tasks", tasks, "--output", tmp_path / "out", "--prompts-per-task", 1,
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
    run: Run, pool: Path, tasks: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    given = [str(tasks) if argument == "TASKS" else argument for argument in arguments]
    code, _, err = run("evaluate", "--pool", pool, "--output", tmp_path / "out", *given)
    assert code == 2 and message in " ".join(err.split())


@pytest.mark.slow
def test_the_preset_prints_published_figures_beside_its_own(run: Run, tmp_path: Path) -> None:
    paper = write_fake_paper(tmp_path / "paper", samples=2, prompts=1)
    write_fake_base(tmp_path / "base", ["a prompt"])
    write_fake_adapters(tmp_path / "adapters")
    code, out, err = run(
        "evaluate", "--preset", "paper48", "--paper", paper, "--adapters", tmp_path / "adapters", "--base-model",
        tmp_path / "base", "--output", tmp_path / "out", "--prompts-per-task", 1, "--max-tokens", 2, "--no-times",
        "--no-curve", "--json", "--method", "oracle", "--method", "selection", "--method", "mixture",
    )  # fmt: skip
    assert code == 0, err
    assert len(json.loads(out)["tasks"]["mixture"]["iid"]) == len(TASKS)
    assert "(61." in (tmp_path / "out" / "report.md").read_text()
