"""The command line's samples, feedback, encoder and tenants: what is printed, and how it ends."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraretriever.pool import Pool
from tiny import TINY_BASE, TINY_SPEC, write_peft_folder

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(cli_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("LORARETRIEVER_POOL", str(tmp_path / "pool"))
    return cli_run


@pytest.fixture
def pool(run: Run, tmp_path: Path) -> Path:
    """A pool with two adapters, of one sample each."""
    with Pool.create(tmp_path / "pool", TINY_BASE, spec=TINY_SPEC) as pool:
        for seed, (name, sample) in enumerate({"sql": "write a query", "german": "translate"}.items()):
            pool.add(write_peft_folder(tmp_path / name, seed=seed), samples=[sample])
    return tmp_path / "pool"


def objects(result: tuple[int, str, str]) -> list[dict[str, Any]]:
    code, out, _ = result
    assert code == 0
    return [json.loads(line) for line in out.splitlines()]


def test_samples(run: Run, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("pool", "samples", "add", "sql", "select it", "write a query")[:2] == (0, "sql: 1 samples added\n")
    assert objects(run("pool", "samples", "add", "sql", "say hello", "--counter", "--json")) == [
        {"adapter": "sql", "added": [{"text": "say hello", "source": "given", "counter": True}]}
    ]
    (tmp_path / "more.jsonl").write_text('{"inputs": "count rows", "x": 1}\n{"inputs": "sing", "counter": true}\n')
    assert run("pool", "samples", "add", "sql", "--input", tmp_path / "more.jsonl")[1] == "sql: 2 samples added\n"
    monkeypatch.setattr("sys.stdin", io.StringIO('{"inputs": "from a pipe"}\n'))
    assert run("pool", "samples", "add", "sql", "--input", "-")[0] == 0
    assert run("pool", "samples", "list", "sql")[1].splitlines() == [
        "1\tsample\tgiven\twrite a query",
        "2\tsample\tgiven\tselect it",
        "3\tsample\tgiven\tcount rows",
        "4\tsample\tgiven\tfrom a pipe",
        "5\tcounter\tgiven\tsay hello",
        "6\tcounter\tgiven\tsing",
    ]
    assert objects(run("pool", "samples", "list", "sql", "--json"))[4] == {
        "number": 5,
        "text": "say hello",
        "source": "given",
        "counter": True,
    }
    assert run("pool", "samples", "remove", "sql", 5, 1, 5)[1] == "sql: 2 samples removed\n"
    assert objects(run("pool", "samples", "remove", "sql", 1, "--json")) == [
        {"adapter": "sql", "removed": [{"text": "select it", "source": "given", "counter": False}]}
    ]
    shown = objects(run("pool", "show", "sql", "--json"))[0]
    assert [each["text"] for each in shown["samples"]] == ["count rows", "from a pipe"]
    assert [each["text"] for each in shown["counter_samples"]] == ["sing"]
    assert "[not: given] sing" in run("pool", "show", "sql")[1]


def test_feedback(run: Run, pool: Path) -> None:
    assert run("feedback", "give", "how many users?", "--right", "sql", "--wrong", "german")[:2] == (
        0,
        "1\tpending\tsql\tgerman\thow many users?\n",
    )
    (given,) = objects(run("feedback", "give", "good day", "--right", "german", "--json"))
    assert (given["id"], given["right"], given["wrong"], given["state"]) == (2, "german", None, "pending")
    run("feedback", "give", "nonsense", "--wrong", "sql")
    assert [each["id"] for each in objects(run("feedback", "list", "--json"))] == [1, 2, 3]
    assert run("feedback", "reject", 3)[:2] == (0, "3\trejected\t-\tsql\tnonsense\n")
    assert objects(run("feedback", "approve", 1, "--json"))[0]["state"] == "approved"
    assert run("feedback", "approve", "--all")[1] == "2\tapproved\tgerman\t-\tgood day\n"
    assert run("feedback", "list")[:2] == (0, "")
    assert [each["id"] for each in objects(run("feedback", "list", "--state", "all", "--json"))] == [1, 2, 3]
    assert [each["id"] for each in objects(run("feedback", "list", "--state", "rejected", "--json"))] == [3]
    assert run("feedback", "approve", "--all")[:2] == (0, "")
    run("feedback", "give", "more", "--right", "sql")
    assert run("feedback", "reject", "--all")[1] == "4\trejected\tsql\t-\tmore\n"
    with Pool.open(pool) as opened:
        assert [sample.text for sample in opened.samples("sql")] == ["write a query", "how many users?"]
        assert [sample.text for sample in opened.counter_samples("german")] == ["how many users?"]


def test_the_encoder(run: Run, pool: Path) -> None:
    assert run("pool", "encoder")[:2] == (0, "none chosen: the default is used\n")
    assert run("pool", "encoder", "some/encoder")[:2] == (0, "some/encoder\n")
    assert objects(run("pool", "encoder", "--json")) == [{"pool": str(pool), "encoder": "some/encoder"}]
    assert objects(run("pool", "encoder", "--clear", "--json")) == [{"pool": str(pool), "encoder": None}]


def test_tenants(run: Run, pool: Path, tmp_path: Path) -> None:
    assert run("pool", "add", tmp_path / "sql", "--tenant", "acme")[0] == 0
    assert {each["name"]: each["tenant"] for each in objects(run("pool", "list", "--json"))} == {
        "german": None,
        "sql": "acme",
    }
    assert objects(run("pool", "show", "sql", "--json"))[0]["adapter"]["tenant"] == "acme"
    assert "acme" in run("pool", "show", "sql")[1]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("pool", "samples", "add", "nosuch", "x"), 1, "no adapter 'nosuch'"),
        (("pool", "samples", "add", "sql"), 2, "no prompts"),
        (("pool", "samples", "add", "sql", "write a query", "--counter"), 2, "is a sample and a counter sample"),
        (("pool", "samples", "remove", "sql", "0"), 2, "'sql' has no sample 0; expected a number from 1 to 1"),
        (("pool", "samples", "remove", "sql", "2"), 2, "'sql' has no sample 2; expected a number from 1 to 1"),
        (("pool", "samples", "remove", "sql", "1"), 2, "has no sample left"),
        (("pool", "samples", "list", "nosuch"), 1, "no adapter 'nosuch'"),
        (("feedback", "give", "p"), 2, "names no adapter"),
        (("feedback", "give", "p", "--right", "sql", "--wrong", "sql"), 2, "as right and as wrong"),
        (("feedback", "give", "p", "--right", "sq"), 1, "did you mean 'sql'"),
        (("feedback", "approve"), 2, "no feedback is named; expected ids"),
        (("feedback", "reject", "1", "--all"), 2, "ids and --all are both given"),
        (("feedback", "approve", "7"), 2, "there is no feedback 7"),
        (("feedback", "list", "--state", "open"), 2, "state is 'open'; expected one of"),
        (("pool", "encoder", "x", "--clear"), 2, "and --clear are both given"),
        (("pool", "encoder", ""), 2, "the encoder's name is empty"),
        (("pool", "add", "SQL", "--tenant", " x"), 2, "tenant is ' x'; expected"),
    ],
)
def test_errors(run: Run, pool: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    found, out, err = run(*(str(tmp_path / "sql") if each == "SQL" else each for each in arguments))
    assert (found, out) == (code, "")
    assert message in err
