"""`loraretriever plan`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]
COSTS = {"step": 0.02, "row": 0.004, "prompt": 0.002, "adapter": 0.001, "write": 0.003, "load": 0.05}


@pytest.fixture
def costs(tmp_path: Path) -> Path:
    file = tmp_path / "costs.json"
    file.write_text(json.dumps({"costs": COSTS, "footprint": {"weights": 10**9, "adapter": 10**6, "token": 10**4}}))
    return file


def test_the_json_report_says_what_the_options_ask_for(cli_run: Run, costs: Path, tmp_path: Path) -> None:
    code, out, err = cli_run(
        "plan", "--costs", costs, "--arrival-rate", 4, "--requests", 400, "--adapters", 40, "--k", 2, "--replicas", 2,
        "--slots", 8, "--host-mib", 20, "--prompt-tokens", 16, "--answer-tokens", "4-16", "--policy", "random",
        "--target-p95", 2, "--warm-up", 0.25, "--plot", tmp_path / "plan.png", "--json",
    )  # fmt: skip
    assert code == 0, err
    report = json.loads(out)
    assert report["deployment"]["replicas"] == 2
    assert report["deployment"]["policy"] == "random"
    assert report["deployment"]["sizes"]["slots"] == 8
    assert report["deployment"]["sizes"]["host"] == 20
    assert report["figures"]["requests"] == 300
    assert report["adapters"] <= 40
    assert report["recommended"]["figures"]["seconds"]["p95"] <= 2
    assert (tmp_path / "plan.png").is_file()


def test_the_table(cli_run: Run, costs: Path) -> None:
    code, out, err = cli_run("plan", "--costs", costs, "--requests", 200, "--target-p95", 0.001)
    assert code == 0, err
    rows = dict(line.split("\t", 1) for line in out.splitlines() if "\t" in line)
    assert rows["slots"] == "32"
    assert rows["answered, refused"] == "180, 0"
    assert "no number of replicas answers 95 % of the requests in 0.001 s" in out


def test_a_trace_stands_in_for_drawn_requests(cli_run: Run, costs: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    row = {"composition": "sql", "prompt_tokens": 9, "completion_tokens": 5}
    trace.write_text("".join(json.dumps(row | {"time": float(second)}) + "\n" for second in range(11)))
    code, out, err = cli_run("plan", "--costs", costs, "--trace", trace, "--arrival-rate", 2, "--warm-up", 0, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["rate"] == pytest.approx(2.0)
    assert report["adapters"] == 1
    assert report["figures"]["requests"] == 11


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ((), "neither --costs nor --measure is given"),
        (("--costs", "nowhere.json"), "cannot read the costs in nowhere.json"),
        (("--costs", "COSTS", "--measure", "x"), "both --costs and --measure are given"),
        (("--costs", "COSTS", "--prompt-tokens", "few"), "--prompt-tokens is 'few'; expected a number"),
        (("--costs", "COSTS", "--weighting", "magic"), "--weighting is 'magic'; expected score or uniform"),
        (("--costs", "COSTS", "--target-p95", "0"), "--target-p95 is 0.0; expected seconds above 0"),
        (("--costs", "COSTS", "--strategy", "magic"), "strategy is 'magic'"),
        (("--costs", "COSTS", "--plot", "nowhere/plan.png"), "--plot is 'nowhere/plan.png'"),
        (("--costs", "COSTS", "--trace", "nowhere.jsonl"), "cannot read nowhere.jsonl"),
    ),
)
def test_what_cannot_be_planned_is_refused(cli_run: Run, costs: Path, arguments: tuple[str, ...], message: str) -> None:
    given = [costs if argument == "COSTS" else argument for argument in arguments]
    code, _, err = cli_run("plan", *given)
    assert code != 0
    assert message in err
