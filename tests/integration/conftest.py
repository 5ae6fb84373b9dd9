"""What the tests of the command line share: tiny models, and a call that returns what a process would."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from loraretriever import cli
from tiny import write_peft_folder
from tiny_text import write_base_model, write_encoder

Run = Callable[..., tuple[int, str, str]]
TASKS = {"sql": "code", "bash": "code", "german": "translation", "math": "math"}  # task -> domain


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, a base model, and `encoder`, a sentence encoder."""
    folder = tmp_path_factory.mktemp("models")
    write_base_model(folder / "base")
    write_encoder(folder)
    return folder


@pytest.fixture
def cli_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line with these arguments: exit code, standard output, standard error."""
    monkeypatch.setenv("LORARETRIEVER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cli, "_quiet_libraries", lambda: None)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["loraretriever", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def task_run(cli_run: Run, models: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """As `cli_run`, with the tiny encoder."""
    monkeypatch.setenv("LORARETRIEVER_ENCODER", str(models / "encoder"))
    monkeypatch.setenv("LORARETRIEVER_PRECISION", "float32")
    monkeypatch.setenv("LORARETRIEVER_CACHE_MIB", "64")
    return cli_run


@pytest.fixture
def task_pool(tmp_path: Path, models: Path) -> Path:
    """A pool with an adapter for each of `TASKS`."""
    for seed, name in enumerate(TASKS):
        samples = [f"{name} sample {i}" for i in range(4)]
        write_peft_folder(tmp_path / "pool" / name, seed=seed, samples=samples, base_model=str(models / "base"))
    return tmp_path / "pool"


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder of task files: three splits of three examples for each of `TASKS`."""
    for split in ("train", "validation", "test"):
        (tmp_path / "tasks" / split).mkdir(parents=True)
        for name, domain in TASKS.items():
            rows = [
                {"inputs": f"{name} {split} {i}", "targets": "yes", "task": name, "domain": domain, "metric": "em"}
                for i in range(3)
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / "tasks" / split / f"{name}.jsonl").write_text(text)
    return tmp_path / "tasks"
