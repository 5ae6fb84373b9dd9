"""Samples that are added and removed, in a pool made by `create` and in a plain folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loraretriever.errors import AdapterNotFoundError, InvalidInputError, PoolError
from loraretriever.pool import AddChange, Pool, editing, layout
from loraretriever.types import Sample
from places import KINDS, make_place
from tiny import TINY_SPEC, write_peft_folder


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Pool]:
    folder = tmp_path / "plain"
    write_peft_folder(folder / "a", samples=["x", "y"])
    write_peft_folder(folder / "derived", seed=1, card="Does this.\n")
    with Pool.open(folder) as pool:
        pool.check_shapes(TINY_SPEC)
        yield pool


@pytest.fixture(params=[*KINDS, "plain"])
def any_pool(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pool]:
    """A pool of any kind: adapter a with samples x and y, adapter derived with one from its card."""
    if request.param == "plain":
        yield request.getfixturevalue("plain")
        return
    with make_place(request, tmp_path, request.param).create() as pool:
        pool.add(write_peft_folder(tmp_path / "a"), samples=["x", "y"])
        pool.add(write_peft_folder(tmp_path / "derived", seed=1, card="Does this.\n"))
        yield pool


def lines(pool: Pool, name: str) -> list[dict[str, Any]]:
    text = (pool.location / name / "samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def reopened(pool: Pool) -> tuple[list[Sample], list[Sample]]:
    with Pool.open(pool.location) as again:
        assert again.change == pool.change, "the database follows the file at once"
        return again.samples("a"), again.counter_samples("a")


def test_adding_and_removing(any_pool: Pool) -> None:
    pool = any_pool
    assert pool.add_samples("a", ["new", "x", "new"]) == [Sample("new")]
    assert pool.add_samples("a", ["x"]) == []
    assert pool.add_samples("a", ["not me"], counter=True, source="feedback") == [
        Sample("not me", "feedback", counter=True)
    ]
    assert pool.add_samples("a", ("last",), source="feedback") == [Sample("last", "feedback")]
    positive = [Sample("x"), Sample("y"), Sample("new"), Sample("last", "feedback")]
    counter = [Sample("not me", "feedback", counter=True)]
    assert (pool.samples("a"), pool.counter_samples("a")) == (positive, counter)
    assert pool.get("a").samples == 4
    assert reopened(pool) == (positive, counter)
    pool.remove_samples("a", [4, 0, 2])
    assert reopened(pool) == ([positive[1], positive[3]], [])
    assert pool.verify() == []


def test_replacing_all_samples(any_pool: Pool) -> None:
    pool = any_pool
    pool.add_samples("a", ["fed"], source="feedback")
    pool.add_samples("a", ["no"], counter=True, source="feedback")
    change = pool.change
    no = Sample("no", "feedback", counter=True)
    new = [Sample("x"), Sample("fed", "feedback"), Sample("z"), no]
    assert pool.replace_samples("a", ["fed", "z", "z", "x"]) == new, "what stays keeps its place and source"
    assert (pool.change, pool.changes_since(change)) == (change + 1, {"a"})
    assert reopened(pool) == (new[:3], [no])
    assert pool.replace_samples("a", ["z", "x", "fed"]) == new
    assert pool.change == change + 1, "the same again changes nothing"
    assert pool.replace_samples("a", iter(["one"]), iter(["two", "no"])) == [
        Sample("one"), no, Sample("two", counter=True),
    ]  # fmt: skip
    assert pool.replace_samples("a", ["no"], []) == [Sample("no")], "a counter sample may become a sample"
    assert reopened(pool) == ([Sample("no")], [])
    pool.replace_samples("a", ["b", "no", "a"])
    pool.remove_samples("a", [0])  # refused where a plain folder's file has another order
    assert reopened(pool) == ([Sample("b"), Sample("a")], [])
    assert pool.replace_samples("derived", ["given"]) == [Sample("given")]
    assert pool.verify() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "there is no sample"),
        (([" "],), "expected some text"),
        ((["no"],), "is a sample and a counter sample at once"),
        ((["x"], ["x"]), "is a sample and a counter sample at once"),
        (("text",), "samples is the string 'text'; expected a list"),
        ((["x"], "text"), "samples is the string 'text'; expected a list"),
    ],
)
def test_bad_replacements_change_nothing(any_pool: Pool, arguments: tuple[Any, ...], message: str) -> None:
    any_pool.add_samples("a", ["no"], counter=True)
    change = any_pool.change
    with pytest.raises(InvalidInputError, match=message):
        any_pool.replace_samples("a", *arguments)
    with pytest.raises(AdapterNotFoundError):
        any_pool.replace_samples("nothing", ["x"])
    assert any_pool.change == change
    assert reopened(any_pool) == ([Sample("x"), Sample("y")], [Sample("no", counter=True)])


def test_replaced_samples_keep_their_embeddings(any_pool: Pool) -> None:
    vectors = {"a": np.array([[1.0], [2.0]], np.float32)}
    any_pool.missing_embeddings("e")
    any_pool.store_embeddings("e", vectors)
    any_pool.replace_samples("a", ["new", "y"])
    assert any_pool.missing_embeddings("e")["a"] == [Sample("new")]


def test_describing_an_adapter_anew(any_pool: Pool) -> None:
    pool = any_pool
    before = pool.get("a")
    change = pool.change
    described = pool.update("a", description=" Writes SQL.\x1b ", tags=["t", "t", "u"])
    assert (described.description, described.tags) == ("Writes SQL.", ("t", "u"))
    assert (described.revision, described.digest, described.samples) == (before.revision, before.digest, 2)
    assert (pool.get("a"), pool.changes_since(change)) == (described, {"a"})
    assert pool.samples("a") == [Sample("x"), Sample("y")], "given samples stay"
    assert pool.update("a") == pool.update("a", description="Writes SQL.", tags=("t", "u")) == described
    assert pool.change == change + 1
    assert pool.update("a", tags=[]).tags == ()
    assert pool.update("a", description="").description == ""
    with Pool.open(pool.location) as again:
        assert (again.change, again.get("a").description) == (pool.change, "")
    with pytest.raises(AdapterNotFoundError):
        pool.update("nothing", description="x")


def test_samples_from_a_description_follow_it(any_pool: Pool) -> None:
    any_pool.add_samples("derived", ["no"], counter=True)
    described = any_pool.update("derived", description="Does that.")
    assert described.samples == 2
    card, new = Sample("Does this.", "model_card"), Sample("Does that.", "description")
    with Pool.open(any_pool.location) as again:
        assert again.samples("derived") == [card, new]
        assert again.counter_samples("derived") == [Sample("no", counter=True)]
        assert again.update("derived", description="").samples == 2, "there must be some"


def test_the_last_sample_stays(any_pool: Pool) -> None:
    any_pool.add_samples("a", ["no"], counter=True)
    with pytest.raises(InvalidInputError, match="'a' has no sample left; expected at least one"):
        any_pool.remove_samples("a", [0, 1])
    any_pool.remove_samples("a", [2, 1])
    assert (any_pool.samples("a"), any_pool.counter_samples("a")) == ([Sample("x")], [])


def test_derived_samples_stay(any_pool: Pool) -> None:
    derived = Sample("Does this.", "model_card")
    any_pool.add_samples("derived", ["no"], counter=True)
    any_pool.add_samples("derived", ["given"])
    with Pool.open(any_pool.location) as again:
        assert again.samples("derived") == [derived, Sample("given")]
        assert again.counter_samples("derived") == [Sample("no", counter=True)]
        again.remove_samples("derived", [0])
    with Pool.open(any_pool.location) as again:
        assert again.samples("derived") == [Sample("given")]


BAD: list[tuple[Callable[[Pool], object], type[Exception], str]] = [
    (lambda pool: pool.add_samples("b", ["x"]), AdapterNotFoundError, "no adapter 'b'"),
    (lambda pool: pool.remove_samples("b", [0]), AdapterNotFoundError, "no adapter 'b'"),
    (lambda pool: pool.add_samples("a", []), InvalidInputError, "there is no sample"),
    (lambda pool: pool.add_samples("a", "text"), InvalidInputError, "expected a list of strings"),
    (lambda pool: pool.add_samples("a", ["fine", " "]), InvalidInputError, "sample 2: the sample is ' '"),
    (lambda pool: pool.add_samples("a", ["x" * 20_001]), InvalidInputError, "at most 20000"),
    (lambda pool: pool.add_samples("a", [str(n) for n in range(999)]), InvalidInputError, "1001 samples; expected"),
    (lambda pool: pool.add_samples("a", ["z"], source="web"), InvalidInputError, "source is 'web'; expected one of"),
    (lambda pool: pool.add_samples("a", ["x"], counter=True), InvalidInputError, "'a': 'x' is a sample and a counter"),
    (lambda pool: pool.remove_samples("a", []), InvalidInputError, "no position is given; expected 0 to 1"),
    (lambda pool: pool.remove_samples("a", [2]), InvalidInputError, "none at 2; expected 0 to 1"),
    (lambda pool: pool.remove_samples("a", [-1]), InvalidInputError, "none at -1; expected 0 to 1"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(any_pool: Pool, call: Callable[[Pool], object], error: type[Exception], message: str) -> None:
    change = any_pool.change
    with pytest.raises(error, match=message):
        call(any_pool)
    assert any_pool.change == change
    assert reopened(any_pool) == ([Sample("x"), Sample("y")], [])


def test_counter_samples_stay_when_an_adapter_is_added_again(pool: Pool, tmp_path: Path) -> None:
    source = write_peft_folder(tmp_path / "a")
    pool.add(source, samples=["x"])
    pool.add_samples("a", ["no", "never"], counter=True)
    never = [Sample("never", counter=True)]
    assert pool.add(source, samples=["y", "no"]).change is AddChange.SAMPLES_UPDATED
    assert (pool.samples("a"), pool.counter_samples("a")) == ([Sample("y"), Sample("no")], never)
    assert pool.add(write_peft_folder(tmp_path / "a", seed=1)).change is AddChange.REVISED
    assert (pool.samples("a"), pool.counter_samples("a")) == ([Sample("y"), Sample("no")], never)
    (tmp_path / "s.jsonl").write_text('{"inputs": "z"}\n{"inputs": "other", "counter": true}\n')
    pool.add(tmp_path / "a", samples_file=tmp_path / "s.jsonl")
    assert (pool.samples("a"), pool.counter_samples("a")) == ([Sample("z")], [Sample("other", counter=True)])


def test_feedback_keeps_the_samples_of_a_revision(pool: Pool, tmp_path: Path) -> None:
    pool.add(write_peft_folder(tmp_path / "a", card="Does this.\n"))
    pool.add_samples("a", ["p"], source="feedback")
    pool.add(write_peft_folder(tmp_path / "a", seed=1, card="Does that.\n"))
    assert pool.samples("a") == [Sample("Does this.", "model_card"), Sample("p", "feedback")]


def test_counter_samples_alone_do_not_keep_what_was_derived(pool: Pool, tmp_path: Path) -> None:
    pool.add(write_peft_folder(tmp_path / "a", card="Does this.\n"))
    pool.add_samples("a", ["no"], counter=True)
    pool.add(write_peft_folder(tmp_path / "a", seed=1, card="Does that.\n"))
    assert pool.samples("a") == [Sample("Does that.", "model_card")]
    assert pool.counter_samples("a") == [Sample("no", counter=True)]


def test_a_plain_folders_lines_keep_their_fields(plain: Pool) -> None:
    file = plain.location / "a/samples.jsonl"
    file.write_text('{"prompt": "x", "targets": ["t"], "id": 3}\n{"text": "y"}\n{"inputs": "no", "counter": true}\n')
    plain.refresh()
    plain.add_samples("a", ["z"])
    plain.add_samples("a", ["never"], counter=True)
    plain.remove_samples("a", [1])
    assert lines(plain, "a") == [
        {"prompt": "x", "targets": ["t"], "id": 3},
        {"inputs": "no", "counter": True},
        {"inputs": "z", "source": "given"},
        {"inputs": "never", "source": "given", "counter": True},
    ]
    assert sorted(path.name for path in file.parent.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "samples.jsonl",
    ]


def test_a_file_that_was_edited_meanwhile_is_the_truth(plain: Pool) -> None:
    file = plain.location / "a/samples.jsonl"
    file.write_text('{"inputs": "edited", "n": 1}\n{"inputs": "z"}\n')
    with pytest.raises(PoolError, match=r"a/samples\.jsonl has changed meanwhile. Open the pool again"):
        plain.remove_samples("a", [0])
    assert plain.add_samples("a", ["z", "new"]) == [Sample("new")]
    assert plain.samples("a") == [Sample("edited"), Sample("z"), Sample("new")]
    assert reopened(plain) == (plain.samples("a"), [])
    file.write_text("{")
    with pytest.raises(InvalidInputError, match=r"samples\.jsonl:1 is not JSON"):
        plain.add_samples("a", ["more"])
    file.unlink()
    assert plain.add_samples("a", ["more"]) == [Sample("more")]
    assert [line["inputs"] for line in lines(plain, "a")] == ["edited", "z", "new", "more"], "what the database has"


def test_other_changes_outside_are_still_found(plain: Pool) -> None:
    """Writing the samples must not hide that the weights have changed."""
    write_peft_folder(plain.location / "a", seed=5)
    file = plain.location / "a/adapter_model.safetensors"
    os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns + 1_000_000_000))
    plain.add_samples("a", ["z"])
    plain.refresh()
    assert (plain.get("a").revision, plain.samples("a")[-1]) == (2, Sample("z"))


def test_embeddings_survive_an_edited_file(plain: Pool) -> None:
    import numpy as np

    plain.store_embeddings("e", {"a": np.array([[1], [2]], np.float32)})
    (plain.location / "a/samples.jsonl").write_text('{"inputs": "y"}\n{"inputs": "new"}\n{"inputs": "x"}\n')
    plain.refresh()
    assert plain.missing_embeddings("e", ["a"]) == {"a": [Sample("new")]}
    plain.store_embeddings("e", {"a": np.array([[3]], np.float32)})
    assert plain.embeddings("e")["a"].tolist() == [[2], [3], [1]]
    assert plain.samples("a") == [Sample("y"), Sample("new"), Sample("x")]


def test_a_folder_that_may_not_be_written(plain: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "is_writable", lambda path: not path.is_relative_to(plain.location))
    with Pool.open(plain.location) as pool:
        for call in (lambda: pool.add_samples("a", ["z"]), lambda: pool.remove_samples("a", [0])):
            with pytest.raises(PoolError, match="is read-only. Copy the pool"):
                call()
    monkeypatch.undo()

    def full(file: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(editing, "write_file", full)
    with pytest.raises(PoolError, match="cannot change the samples of 'a': .*No space left"):
        plain.add_samples("a", ["z"])
    assert plain.samples("a") == [Sample("x"), Sample("y")]


def test_a_link_in_the_place_of_the_file_is_not_followed(plain: Pool, tmp_path: Path) -> None:
    from loraretriever.errors import AdmissionError

    victim = tmp_path / "victim.jsonl"
    victim.write_text('{"inputs": "secret"}\n')
    (plain.location / "a/samples.jsonl").unlink()
    (plain.location / "a/samples.jsonl").symlink_to(victim)
    with pytest.raises(AdmissionError, match="is a link to"):
        plain.add_samples("a", ["z"])
    assert victim.read_text() == '{"inputs": "secret"}\n'


def test_killed_between_the_file_and_the_database(plain: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def killed(*args: object) -> None:
        raise Killed

    monkeypatch.setattr("loraretriever.pool.editing.records.replace_samples", killed)
    with pytest.raises(Killed):
        plain.add_samples("a", ["z"])
    monkeypatch.undo()
    assert plain.samples("a") == [Sample("x"), Sample("y")]
    with Pool.open(plain.location) as again:
        assert again.samples("a") == [Sample("x"), Sample("y"), Sample("z")]
        assert again.problems == ()


def test_an_adapter_whose_folder_is_gone(plain: Pool) -> None:
    shutil.rmtree(plain.location / "a")
    with pytest.raises(PoolError, match="cannot change the samples of 'a'"):
        plain.add_samples("a", ["z"])


ADD = """
import sys
from loraretriever.pool import Pool
with Pool.open(sys.argv[1]) as pool:
    for number in range(8):
        pool.add_samples("a", [f"{sys.argv[2]} {number}", "shared"])
        pool.add_samples("a", [f"not {sys.argv[2]} {number}"], counter=True)
"""


def test_processes_that_add_at_once(any_pool: Pool) -> None:
    command = [sys.executable, "-c", ADD, str(any_pool.location)]
    workers = [subprocess.Popen([*command, name]) for name in ("p", "q")]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    assert len(any_pool.samples("a")) == 2 + 2 * 8 + 1
    assert len(any_pool.counter_samples("a")) == 16
    positive, counter = reopened(any_pool)
    assert (len(positive), len(counter)) == (19, 16)


def test_threads_that_add_at_once(any_pool: Pool) -> None:
    def add(name: str) -> None:
        for number in range(5):
            any_pool.add_samples("a", [f"{name} {number}"])

    threads = [threading.Thread(target=add, args=name) for name in "pqr"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(any_pool.samples("a")) == 17


def test_the_demo_pools_samples_can_be_edited_in_a_copy(tmp_path: Path) -> None:
    source = Path(__file__).parents[3] / "demo/pool/banking77"
    before = (source / "samples.jsonl").read_bytes()
    shutil.copytree(source, tmp_path / "demo/banking77", ignore=shutil.ignore_patterns(".*"))
    with Pool.open(tmp_path / "demo") as pool:
        pool.add_samples("banking77", ["Is my card on its way?"])
        pool.remove_samples("banking77", [20])
    assert (tmp_path / "demo/banking77/samples.jsonl").read_bytes() == before
    assert (source / "samples.jsonl").read_bytes() == before
