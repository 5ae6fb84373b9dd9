"""`loraretriever train-router`, and the routers that it makes in the product."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loraretriever.compose.routers import read_router

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("options", "strategy", "experts"),
    [
        (("--kind", "ramole", "--rank", 2), "ramole", ()),
        (("--kind", "moe", "--expert", "sql", "--expert", "math", "--top-k", 1), "moe;top_k=1", ("math", "sql")),
        (("--kind", "moe"), "moe;top_k=all", ("bash", "german", "math", "sql")),
    ],
)
def test_a_router_is_trained_and_used(
    task_run: Run,
    task_pool: Path,
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[object, ...],
    strategy: str,
    experts: tuple[str, ...],
) -> None:
    out = tmp_path / "router"
    code, text, err = task_run(
        "train-router", "--pool", task_pool, "--tasks", tasks, "--output", out, "--examples", 2, *options
    )
    assert code == 0, err
    assert " steps on 8 examples in " in text and f"--strategy {strategy}" in " ".join(err.split()).replace("'", "")
    spec = read_router(out)
    assert spec.experts == experts
    assert sum(float(tensor.abs().sum()) for tensor in load_file(out / "adapter_model.safetensors").values()) > 0
    monkeypatch.setenv("LORARETRIEVER_ROUTERS", str(out))
    named = [item for name in experts for item in ("--only", name)]
    code, text, err = task_run(
        "generate", "--pool", task_pool, "--strategy", strategy, "--threshold", 0, "--max-tokens", 2, "--json", *named,
        "sql train 1",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(text)["composition"]["gate"]["kind"] == spec.kind


def test_what_is_trained_is_the_same_again(task_run: Run, task_pool: Path, tasks: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        code, out, err = task_run(
            "train-router", "--pool", task_pool, "--tasks", tasks, "--output", tmp_path / name, "--json"
        )
        assert code == 0, err
        assert json.loads(out)["result"]["steps"] == 4  # 12 examples, two epochs, batches of eight
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--kind", "smear"), "--kind is 'smear'; expected ramole or moe"),
        (("--expert", "sql"), "--expert and --top-k are of a moe"),
        (("--kind", "moe", "--expert", "nobody"), "--expert is 'nobody'; expected an enabled adapter"),
        (("--tasks", "."), "has no task files"),
        (("--output", "OLD"), "holds a router"),
        (("--output", "FILE"), "is a file"),
    ],
)
def test_bad_requests(
    task_run: Run, task_pool: Path, tasks: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "router.json").write_text("{}")
    (tmp_path / "file").write_text("")
    places = {"OLD": str(tmp_path / "old"), "FILE": str(tmp_path / "file")}
    given = [places.get(argument, argument) for argument in arguments]
    code, _, err = task_run("train-router", "--pool", task_pool, "--tasks", tasks, "--output", tmp_path / "new", *given)
    assert code == 2 and message in " ".join(err.split())
    assert not (tmp_path / "new").exists()


def test_a_router_for_another_base_model_is_refused(
    task_run: Run, task_pool: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "router"
    assert task_run("train-router", "--pool", task_pool, "--tasks", tasks, "--output", out, "--examples", 1)[0] == 0
    values = json.loads((out / "router.json").read_text())
    (out / "router.json").write_text(json.dumps(values | {"base_model": "someone/else-7b"}))
    monkeypatch.setenv("LORARETRIEVER_ROUTERS", str(out))
    code, _, err = task_run("generate", "--pool", task_pool, "--strategy", "ramole", "a prompt")
    assert code == 2 and "trained for the base model someone/else-7b" in " ".join(err.split())
