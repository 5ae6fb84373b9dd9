"""`loraretriever train-retriever`, in this process and in one that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loraretriever.pool import Pool
from tiny import write_peft_folder

SAMPLES = {
    "sql": [f"SELECT column {i} FROM table {i * 7}" for i in range(6)],
    "german": [f"translate to german: sentence {i * 3}" for i in range(6)],
    "math": [f"what is {i} plus {i * 5}?" for i in range(6)],
}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    file = tmp_path / "samples.jsonl"
    rows = [{"adapter": name, "inputs": text} for name, texts in SAMPLES.items() for text in texts]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def run(cli_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    return partial(cli_run, "train-retriever")


def small(models: Path) -> tuple[object, ...]:
    """Options of a training that takes a moment."""
    return "--encoder", models / "encoder", "--epochs", 2, "--batch-size", 3, "--max-tokens", 100


def test_a_file_of_samples_becomes_an_encoder(run: Run, models: Path, samples: Path, tmp_path: Path) -> None:
    code, out, err = run("--samples", samples, "--output", "out", "--held-out-tasks", "math", *small(models))
    assert code == 0
    first, before, now = out.splitlines()
    assert first.startswith(f"wrote {tmp_path / 'out'}: epoch ")
    assert before.startswith("before: trained tasks ") and now.startswith("now: trained tasks ")
    assert "; held-out tasks " in now and "(6 samples)" in now
    assert "before training: " in err and "epoch 2: " in err
    code, out, err = run("--samples", samples, "--output", "out", *small(models))
    assert (code, out) == (2, "") and "exists; expected a new folder" in err


def test_a_pool_is_trained_on_and_uses_the_encoder(run: Run, models: Path, tmp_path: Path) -> None:
    location = tmp_path / "pool"
    for seed, (name, texts) in enumerate(SAMPLES.items()):
        write_peft_folder(location / name, seed=seed, base_model=str(models / "base"), samples=texts)
    write_peft_folder(location / "bare", seed=9, base_model=str(models / "base"), samples=["only one"])
    options = ("--pool", location, "--output", "out", "--task-share", 1, "--activate", "--json", *small(models))
    code, out, err = run(*options)
    assert code == 2 and "'bare' has 1 different samples" in err and "pool disable bare" in err
    with Pool.open(location) as pool:
        pool.set_enabled("bare", False)
    code, out, err = run(*options)
    result: dict[str, Any] = json.loads(out)
    assert code == 0 and result["folder"] == str(tmp_path / "out")
    assert result["trained_tasks"] == ["german", "math", "sql"] and result["held_out_tasks"] == []
    assert result["epochs"][0]["epoch"] == 0 and result["epochs"][1]["trained"]["queries"] == 3
    with Pool.open(location) as pool:
        assert pool.encoder == str(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "neither --pool nor --samples is given; expected one of them"),
        (("--pool", "p", "--samples", "s"), "both --pool and --samples are given"),
        (("--samples", "s", "--activate"), "--activate is given without --pool"),
        (("--samples", "s", "--task-share", "0.5", "--held-out-tasks", "x"), "--task-share and --held-out-tasks"),
        (("--samples", "none.jsonl"), "cannot read none.jsonl"),
    ],
)
def test_options_that_do_not_fit(run: Run, options: tuple[str, ...], message: str) -> None:
    code, out, err = run("--output", "out", *options)
    assert (code, out) == (2, "") and message in err


def changed_since(part: Path, pattern: str, begin: float) -> bool:
    """Whether a file or folder of that name was made or changed after `begin`."""
    for path in part.glob(pattern):
        with suppress(FileNotFoundError):  # the trainer deletes old checkpoints
            if path.stat().st_mtime > begin:
                return True
    return False


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_encoder(models: Path, samples: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "from loraretriever.cli import main; main()",
        "train-retriever",
        "--samples",
        samples,
    ]
    command += ["--task-share", 1, "--json", "--patience", 4, *small(models), "--epochs", 4, "--output"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(output: str) -> subprocess.Popen[str]:
        arguments = [*map(str, command), str(tmp_path / output)]
        return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finish(output: str) -> dict[str, Any]:
        out, err = start(output).communicate()
        assert err == ""
        result: dict[str, Any] = json.loads(out)
        return result

    whole = finish("whole")
    part = tmp_path / "killed.part"
    for state in ("checkpoint-*", "checkpoint-*/trainer_state.json", "checkpoint-*/optimizer.pt"):
        begin = time.time()
        with start("killed") as process:
            while process.poll() is None and not changed_since(part, state, begin):
                time.sleep(0.001)
            process.kill()
        assert process.returncode == -signal.SIGKILL
        assert part.is_dir() and not (tmp_path / "killed").exists()
    killed = finish("killed")
    for one, other in zip(whole["epochs"], killed["epochs"], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not part.exists()
