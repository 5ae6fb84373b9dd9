"""`loraretriever bench` on tiny models."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from loraretriever import console
from tiny import write_peft_folder

TOPICS = {
    "sql": "SELECT column FROM table",
    "german": "auf Deutsch: Satz",
    "math": "12 + 7 = ?",
    "poem": "rhyme, o verse",
}
Run = Callable[..., tuple[int, str, str]]


def write_rows(file: Path, rows: list[dict[str, object]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def texts(name: str, count: int, seed: int) -> list[str]:
    rng = random.Random(f"{name} {seed}")
    return [f"{TOPICS[name]} {rng.randrange(1000)}" for _ in range(count)]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    samples = [{"adapter": name, "inputs": text, "domain": name} for name in TOPICS for text in texts(name, 5, 0)]
    test = [{"task": name, "inputs": text} for name in TOPICS for text in texts(name, 3, 1)]
    off_topic: list[dict[str, object]] = [{"inputs": "good morning, how are you?"}]
    return [
        write_rows(tmp_path / "samples.jsonl", samples),
        write_rows(tmp_path / "test.jsonl", test),
        write_rows(tmp_path / "off.jsonl", off_topic),
    ]


@pytest.fixture
def run(cli_run: Run, models: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("LORARETRIEVER_ENCODER", str(models / "encoder"))
    monkeypatch.setenv("LORARETRIEVER_PRECISION", "float32")
    return partial(cli_run, "bench", "retrieval")


def test_the_json_report(run: Run, files: list[Path], models: Path) -> None:
    samples, test, off_topic = files
    code, out, err = run(
        "--samples", samples, "--test", test, "--off-topic", off_topic, "--trained", f"mine={models / 'encoder'}",
        "--latency-prompts", 4, "--robustness", "--json",
    )  # fmt: skip
    assert code == 0, err
    report = json.loads(out)
    assert report["default"] == "hybrid" and report["paper"] == "paper"
    counts = [report[key] for key in ("adapters", "samples", "test_prompts", "off_topic_prompts")]
    assert counts == [4, 20, 12, 1]
    assert sorted(report["methods"]) == [
        "dense", "dense+sparse", "hybrid", "mine", "mine+hybrid", "paper", "paper-no-instruction", "sparse",
        "sparse-centroid",
    ]  # fmt: skip
    assert report["methods"]["hybrid"].keys() == {
        "top1", "top3", "top5", "top8", "ms_p50", "ms_p99", "ms_batch32", "search_ms_p50",
    }  # fmt: skip
    assert report["methods"]["hybrid"]["top1"] == 100
    assert {"ece", "fit_auroc", "leave_adapters_out", "leave_domains_out"} <= report["calibration"].keys()
    assert len(report["calibration"]["leave_adapters_out"]["curve"][0]) == 2
    assert report["robustness"].keys() == {"hybrid", "paper"} and report["quoted"] is None
    assert report["setup"]["environment"]["threads"] >= 1


def test_the_table_fits_a_terminal(
    run: Run, files: list[Path], models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = console.Console(force_terminal=True, width=80, highlight=False, color_system=None)
    monkeypatch.setattr(console, "out", terminal)
    samples, test, off_topic = files
    code, out, err = run(
        "--samples", samples, "--test", test, "--off-topic", off_topic, "--robustness", "--latency-prompts", 2,
        "--trained", f"mine={models / 'encoder'}",
    )  # fmt: skip
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].split() == ["method", "top1", "top3", "top5", "top8", "p50", "p99", "b32", "find"]
    assert max(map(len, lines)) <= 80
    assert "4 adapters, 20 samples, 12 test prompts (0 are samples)" in out
    assert "of 1 off-topic ones" in out and "adapters left out: AUROC" in out and "half added, learnt" in out


def test_methods_can_be_chosen(run: Run, files: list[Path]) -> None:
    samples, test, _ = files
    code, out, _ = run("--samples", samples, "--test", test, "--methods", "sparse", "--latency-prompts", 0)
    assert code == 0
    assert out.splitlines()[0].split("\t")[0] == "sparse" and "\t-" in out.splitlines()[0]


def test_a_pools_samples(run: Run, files: list[Path], models: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(TOPICS):
        folder = tmp_path / "pool" / name
        write_peft_folder(folder, seed=seed, base_model=str(models / "base"), samples=texts(name, 5, 0))
    chosen = ("--methods", "hybrid", "--latency-prompts", 0, "--json")
    code, out, err = run("--pool", tmp_path / "pool", "--test", files[1], *chosen)
    assert code == 0, err
    code, other, _ = run("--samples", files[0], "--test", files[1], *chosen)
    assert code == 0
    found, expected = json.loads(out), json.loads(other)
    assert found["methods"] == expected["methods"] and found["samples"] == 20
    assert found["calibration"]["leave_domains_out"] is None
    code, out, _ = run("--pool", tmp_path / "pool", "--test", files[1], "--per-adapter", 2, *chosen)
    assert json.loads(out)["samples"] == 8


def test_bad_calls(run: Run, files: list[Path], tmp_path: Path) -> None:
    samples, test, _ = files
    assert "neither --pool nor --samples is given" in run("--test", test)[2]
    assert "both --pool and --samples are given" in run("--test", test, "--samples", samples, "--pool", "x")[2]
    code, _, err = run("--test", test, "--samples", samples, "--methods", "magic")
    assert code == 2 and "unknown method 'magic'; expected one of paper, paper-no-instruction, hybrid" in err
    for trained in ("mine", "=folder", f"mine={tmp_path / 'nothing'}", "mine="):
        code, _, err = run("--test", test, "--samples", samples, "--trained", trained)
        assert code == 2 and "expected NAME=FOLDER" in err
    code, _, err = run("--test", samples, "--samples", samples)
    assert code == 2 and "lacks 'task'" in err


@pytest.fixture
def engine_run(cli_run: Run, models: Path, tmp_path: Path) -> Run:
    for seed in range(2):
        write_peft_folder(tmp_path / "pool" / f"own.{seed}", seed=seed, base_model=str(models / "base"))
    return partial(cli_run, "bench", "engine", "--pool", tmp_path / "pool", "--quick", "--rounds", 1)


ENGINES = ("base", "mixture_k3_n8", "transformers", "peft_k1")


def test_the_engines_json_report(engine_run: Run, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    only = [argument for name in ENGINES for argument in ("--only", name)]
    code, out, err = engine_run(*only, "--output", file, "--json", "--seed", 3)
    assert code == 0, err
    report = json.loads(out)
    assert report == json.loads(file.read_text())
    assert report["ratios"].keys() == {
        "mixture_k3_n8_vs_base", "base_vs_transformers_uniform", "base_vs_transformers_realistic",
        "mixture_k3_n8_vs_peft_k1",
    }  # fmt: skip
    assert report["ratios"]["mixture_k3_n8_vs_base"].keys() == {"median", "min", "max", "values"}
    assert list(report["figures"]) == list(ENGINES)
    assert report["figures"]["base"].keys() == {"uniform", "realistic"}
    assert report["figures"]["peft_k1"]["uniform"]["first_token_seconds"].keys() == {"p50", "p95", "p99"}
    assert report["agreement"]["base_vs_transformers"] > 0.9
    set_up = report["set_up"]
    assert (set_up["adapters"], set_up["seed"], set_up["rounds"], set_up["rate_of"]) == (2, 3, 1, "base")
    assert set_up["sizes"]["prompt"] == [16, 448] and set_up["rate"] > 0
    assert {"torch", "transformers", "peft"} <= set_up["environment"]["versions"].keys()


@pytest.mark.parametrize("width", [80, 120])
def test_the_engines_tables_fit_a_terminal(engine_run: Run, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    terminal = console.Console(force_terminal=True, width=width, highlight=False, color_system=None)
    monkeypatch.setattr(console, "out", terminal)
    code, out, err = engine_run("--workload", "uniform", "--only", "base", "--only", "selection_k1_n8")
    assert code == 0, err
    lines = [line.rstrip() for line in out.splitlines()]
    assert lines[0].split() == ["uniform", "tokens/s", "ttft50", "95", "99", "tpot50", "95", "99"]
    assert max(map(len, lines)) <= width
    assert any(line.startswith("selection_k1_n8_vs_base") for line in lines)


def test_bad_engine_calls(engine_run: Run, tmp_path: Path) -> None:
    code, _, err = engine_run("--only", "magic")
    assert code == 2 and "unknown contender 'magic'; expected one of base" in err
    code, _, err = engine_run("--only", "base", "--output", tmp_path / "nothing" / "x.json")
    assert code == 2 and "expected a file that can be written" in err
