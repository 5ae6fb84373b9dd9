"""The command line on tiny models: what it prints, and how it ends."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loraretriever import __version__
from loraretriever.engine.local import LocalEngine
from loraretriever.errors import PoolError
from tiny import write_peft_folder

SAMPLES = {"sql": ["write a query"], "german": ["translate to german"], "math": ["add the numbers"]}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(cli_run: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("LORARETRIEVER_ENCODER", str(models / "encoder"))
    monkeypatch.setenv("LORARETRIEVER_POOL", str(tmp_path / "pool"))
    monkeypatch.setenv("LORARETRIEVER_THRESHOLD", "-1")
    return cli_run


@pytest.fixture
def pool(run: Run, models: Path, tmp_path: Path) -> Path:
    """A plain folder with three adapters."""
    for seed, (name, samples) in enumerate(SAMPLES.items()):
        folder = tmp_path / "pool" / name
        write_peft_folder(folder, seed=seed, base_model=str(models / "base"), samples=samples)
    return tmp_path / "pool"


def objects(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def test_version_and_help(run: Run) -> None:
    assert run("--version") == (0, f"{__version__}\n", "")
    code, out, _ = run("--help")
    assert code == 0 and all(command in out for command in ("demo", "pool", "route", "generate"))


def test_a_pool_from_init_to_remove(run: Run, models: Path, tmp_path: Path) -> None:
    source = write_peft_folder(tmp_path / "sql", base_model=str(models / "base"))
    assert run("pool", "init", "--base-model", models / "base")[0] == 0
    assert "there is a pool" in run("pool", "init", "--base-model", models / "base")[2]
    code, out, _ = run("pool", "add", source, "--sample", "write a query", "--sample", "query the table", "--tag", "db")
    assert (code, out) == (0, "added: sql revision 1, 2 samples\n")
    code, out, _ = run("pool", "add", source, "--sample", "write a query", "--sample", "query the table", "--json")
    assert objects(out)[0]["change"] == "unchanged"
    assert run("pool", "list")[1].split("\t")[:3] == ["sql", "1", "yes"]
    assert run("pool", "disable", "sql")[1] == "disabled: sql\n"
    assert objects(run("pool", "list", "--json")[1])[0]["enabled"] is False
    assert objects(run("route", "a query", "--json")[1])[0]["hits"] == []
    run("pool", "enable", "sql")
    shown = objects(run("pool", "show", "sql", "--json")[1])[0]
    assert [sample["text"] for sample in shown["samples"]] == ["write a query", "query the table"]
    assert "write a query" in run("pool", "show", "sql")[1]
    assert run("pool", "verify")[:2] == (0, "1 adapters, 0 problems\n")
    assert run("pool", "remove", "sql")[1] == "removed: sql\n"
    code, _, err = run("pool", "remove", "sql")
    assert code == 1 and "no adapter 'sql'" in err


def test_verify_fails_on_a_damaged_adapter(run: Run, pool: Path) -> None:
    assert run("pool", "verify")[0] == 0
    weights = pool / "sql" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    code, out, err = run("pool", "verify", "--json")
    assert code == 1 and "sql" in objects(out)[0]["problems"][0]


def test_route_passes_fields_through(run: Run, pool: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"inputs": "a query", "task": "sql", "id": 7}\n\n{"inputs": "say it in german"}\n')
    code, out, err = run("route", "--input", file, "--k", "2", "--json")
    assert (code, err) == (0, "")
    first, second = objects(out)
    assert first["inputs"] == "a query" and first["task"] == "sql" and first["id"] == 7
    assert first["fallback"] is False and "task" not in second
    for row in (first, second):
        assert len(row["hits"]) == 2
        assert all(set(hit) == {"adapter", "score", "logit"} and hit["adapter"] in SAMPLES for hit in row["hits"])
        assert row["hits"][0]["score"] >= row["hits"][1]["score"]


def test_route_filters_and_falls_back(run: Run, pool: Path) -> None:
    (row,) = objects(run("route", "write a query", "--exclude", "sql", "--json")[1])
    assert {hit["adapter"] for hit in row["hits"]} == {"german", "math"}
    (row,) = objects(run("route", "write a query", "--only", "math", "--threshold", "1.1", "--json")[1])
    assert [hit["adapter"] for hit in row["hits"]] == ["math"] and row["fallback"] is True
    assert "-> base model" in run("route", "write a query", "--threshold", "1.1")[1]


def test_route_says_why(run: Run, pool: Path) -> None:
    code, out, err = run("route", "write a query", "add\nnumbers", "--explain", "--json")
    assert (code, err) == (0, "")
    for row in objects(out):
        assert [why["adapter"] for why in row["why"]] == [hit["adapter"] for hit in row["hits"]]
        assert [why["probability"] for why in row["why"]] == [hit["score"] for hit in row["hits"]]
        for why, hit in zip(row["why"], row["hits"], strict=True):
            assert set(why) == {"adapter", "probability", "dense", "sparse", "penalty", "samples", "terms"}
            parts = why["dense"] + why["sparse"] - why["penalty"]
            first = row["why"][0]["sparse"] - row["why"][0]["penalty"]
            assert parts - first == pytest.approx(hit["logit"] - row["hits"][0]["logit"], abs=1e-3)
            assert [sample["text"] for sample in why["samples"]] == SAMPLES[why["adapter"]]
    assert "why" not in objects(run("route", "a query", "--json")[1])[0]
    _, out, _ = run("route", "write a query", "--explain", "--k", "1")
    lines = out.splitlines()
    assert lines[0] == "write a query" and lines[1].startswith("  sql ") and "(fit " in lines[1]
    assert lines[2].startswith("  sql: probability ") and "from meaning and form" in lines[2]
    assert lines[3].startswith("    words    ") and "'query' +" in lines[3]
    assert lines[4] == "    sample   1.000 write a query" and len(lines) == 5


def test_route_by_another_retriever(run: Run, pool: Path) -> None:
    for name in ("dense", "sparse", "dense+sparse", "hybrid"):
        (row,) = objects(run("route", "write a query", "--retriever", name, "--json")[1])
        assert row["hits"][0]["adapter"] == "sql" and 0 <= row["fit"] <= 1
    (row,) = objects(run("route", "write a query", "--retriever", "paper", "--json")[1])
    assert row["hits"][0]["adapter"] == "sql" and row["hits"][0]["score"] == pytest.approx(1, abs=1e-4)
    assert row["hits"][0]["score"] == row["fit"]


def test_the_threshold_is_the_retrievers_unless_given(run: Run, pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORARETRIEVER_THRESHOLD")
    (row,) = objects(run("route", "write a query", "--retriever", "paper", "--json")[1])
    assert row["threshold"] == 0.5 and row["fallback"] is False
    (row,) = objects(run("route", "write a query", "--json")[1])
    assert 0 < row["threshold"] < 1 and row["fallback"] == (row["fit"] < row["threshold"])
    (row,) = objects(run("route", "write a query", "--threshold", "0", "--json")[1])
    assert row["threshold"] == 0 and row["fallback"] is False


def test_route_by_tag_and_tenant(run: Run, models: Path, tmp_path: Path) -> None:
    run("pool", "init", "--base-model", models / "base")
    for seed, (name, tenant) in enumerate({"sql": "us", "german": "them", "math": ""}.items()):
        source = write_peft_folder(tmp_path / name, seed=seed, base_model=str(models / "base"))
        tags = ("--tag", name, "--tag", "all", *(("--tenant", tenant) if tenant else ()))
        assert run("pool", "add", source, "--sample", SAMPLES[name][0], *tags)[0] == 0

    def found(*options: str) -> set[str]:
        (row,) = objects(run("route", "write a query", *options, "--json")[1])
        assert row["hits"] or row["fallback"]
        return {hit["adapter"] for hit in row["hits"]}

    assert found() == found("--tag", "all") == {"sql", "german", "math"}
    assert found("--tag", "all", "--tag", "sql") == {"sql"}
    assert found("--tag", "german", "--tag", "sql") == set()
    assert found("--tenant", "us") == {"sql", "math"}
    assert found("--tenant", "them", "--tag", "sql") == set()
    options = ("--tenant", "them", "--max-tokens", "2", "--weighting", "uniform", "--json")
    (row,) = objects(run("generate", "write a query", *options)[1])
    assert set(row["composition"]["adapters"]) == {"german", "math"}


def test_route_reads_standard_input(run: Run, pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('{"inputs": "write a query"}\n'))
    assert objects(run("route", "--input", "-", "--json")[1])[0]["hits"]


def test_generate(run: Run, pool: Path, tmp_path: Path) -> None:
    options = ("--max-tokens", "5", "--strategy", "fusion", "--k", "2", "--weighting", "uniform")
    code, out, err = run("generate", "write a query", "add the numbers", *options, "--json")
    assert (code, err) == (0, "")
    rows = objects(out)
    assert [row["inputs"] for row in rows] == ["write a query", "add the numbers"]
    for row in rows:
        assert row["composition"]["strategy"] == "fusion" and row["composition"]["weights"] == [0.5, 0.5]
        assert row["finish_reason"] in {"stop", "length"} and row["completion_tokens"] <= 5
        assert row["retrieval_seconds"] > 0 and row["generation_seconds"] > 0
    target = tmp_path / "answers.jsonl"
    code, out, _ = run("generate", "write a query", "add the numbers", *options, "--output", target)
    assert (code, out) == (0, "")
    assert [row["text"] for row in objects(target.read_text())] == [row["text"] for row in rows]
    assert list(tmp_path.glob("*.part")) == []
    assert "fusion: 0.50" in run("generate", "write a query", *options)[1]


def test_answers_that_were_made_before_an_error_are_kept(
    run: Run, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LocalEngine.run

    def fail_after_one(engine: LocalEngine, requests: Any) -> Iterator[Any]:
        yield next(original(engine, requests))
        raise PoolError("the disk is gone")

    monkeypatch.setattr(LocalEngine, "run", fail_after_one)
    target = tmp_path / "answers.jsonl"
    code, _, err = run("generate", "one", "two", "--max-tokens", "2", "--output", target)
    assert code == 1 and "the disk is gone" in err and "answers.jsonl.part" in err
    assert not target.exists() and len(objects((tmp_path / "answers.jsonl.part").read_text())) == 1


def test_generate_with_named_adapters(run: Run, pool: Path) -> None:
    (row,) = objects(run("generate", "hi", "--adapters", "sql=0.7,german=0.3", "--max-tokens", "2", "--json")[1])
    assert row["composition"]["adapters"] == ["sql", "german"] and row["composition"]["weights"] == [0.7, 0.3]
    (row,) = objects(run("generate", "hi", "--adapters", "base", "--max-tokens", "2", "--json")[1])
    assert row["composition"]["adapters"] == [] and row["fallback"] is False


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("route",), 2, "no prompts"),
        (("route", " "), 2, "is empty"),
        (("route", "hi", "--k", "0"), 2, "k is 0"),
        (("route", "hi", "--k", "many"), 2, "unable to parse string as an integer"),
        (("route", "hi", "--exclude", "sqll"), 1, "did you mean 'sql'"),
        (("route", "hi", "--pool", "/nowhere"), 1, "/nowhere"),
        (("route", "hi", "--encoder", "/nowhere"), 1, "cannot load the encoder"),
        (("route", "hi", "--retriever", "best"), 2, "unknown retriever 'best'"),
        (("route", "hi", "--retriever", "paper", "--explain"), 2, "cannot explain"),
        (("route", "--input", "/nowhere.jsonl"), 2, "cannot read"),
        (("generate", "hi", "--temperature", "-1"), 2, "temperature is -1"),
        (("generate", "hi", "--strategy", "blend"), 2, "unknown strategy"),
        (("generate", "hi", "--adapters", "sql=much"), 2, "name=weight"),
        (("generate", "hi", "--adapters", "nosuch"), 1, "no adapter 'nosuch'"),
        (("generate", "hi", "--base-model", "/nowhere"), 1, "cannot load the base model"),
        (("generate", "hi", "--dtype", "int4"), 1, "unknown dtype"),
        (("generate", "hi", "--device", "nowhere"), 1, "cannot load the"),
        (("generate", "hi", "--output", "/nowhere/answers.jsonl"), 2, "cannot write"),
        (("generate", "hi", "--output", "."), 2, "it is a folder"),
        (("pool", "add", "/nowhere"), 2, "/nowhere"),
        (("pool", "show", "nosuch"), 1, "no adapter 'nosuch'"),
        (("conquer",), 2, "No such command"),
    ],
)
def test_mistakes_end_with_a_message_and_no_traceback(
    run: Run, pool: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    result, out, err = run(*arguments)
    assert (result, out) == (code, "")
    assert message in " ".join(err.replace("│", " ").split()) and "Traceback" not in err


def test_a_bad_line_is_named(run: Run, pool: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    for line in ("not json", "[]", '{"prompt": "hi"}', '{"inputs": 3}'):
        file.write_text('{"inputs": "hi"}\n' + line + "\n")
        code, out, err = run("route", "--input", file)
        assert (code, out) == (2, "") and "prompts.jsonl:2" in err
