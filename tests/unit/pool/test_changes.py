from __future__ import annotations

import threading
from pathlib import Path

import pytest
from sqlalchemy import event, text

from loraretriever.errors import AdapterNotFoundError, InvalidInputError, PoolError
from loraretriever.pool import Pool, changes
from places import Place
from tiny import write_peft_folder


@pytest.fixture
def filled(pool: Pool, tmp_path: Path) -> Pool:
    for seed, name in enumerate(["a", "b"]):
        pool.add(write_peft_folder(tmp_path / name, seed=seed), samples=["x"])
    return pool


def test_every_change_names_what_it_touched(filled: Pool, tmp_path: Path) -> None:
    def touched_by(change: object) -> frozenset[str] | None:
        return filled.changes_since(before)

    steps = [
        ({"a"}, lambda: filled.add(write_peft_folder(tmp_path / "a", seed=3))),
        ({"a"}, lambda: filled.add(tmp_path / "a", samples=["y"])),
        ({"a"}, lambda: filled.add(tmp_path / "a", description="d", tags=["t"])),
        ({"a"}, lambda: filled.add(tmp_path / "a", tenant="acme")),
        ({"c"}, lambda: filled.add(tmp_path / "a", name="c")),
        ({"b"}, lambda: filled.set_enabled("b", False)),
        ({"b"}, lambda: filled.set_enabled("b", True)),
        ({"b"}, lambda: filled.add_samples("b", ["more"])),
        ({"b"}, lambda: filled.add_samples("b", ["not"], counter=True)),
        ({"b"}, lambda: filled.remove_samples("b", [0])),
        ({"a", "b"}, lambda: filled.approve_feedback([filled.give_feedback("p", right="a", wrong="b").id])),
        (set(), lambda: filled.set_encoder("some/encoder")),
        ({"c"}, lambda: filled.remove("c")),
    ]
    first = filled.change
    for number, (names, step) in enumerate(steps):
        before = filled.change
        assert touched_by(step()) == names, number
        assert filled.change == before + 1
    assert filled.changes_since(first) == {"a", "b", "c"}
    assert filled.changes_since(0) == {"a", "b", "c"}
    assert filled.changes_since(filled.change) == frozenset()
    nothing = [
        lambda: filled.set_enabled("b", True),
        lambda: filled.add_samples("b", ["more"]),
        lambda: filled.set_encoder("some/encoder"),
        lambda: filled.give_feedback("q", right="a"),
        lambda: filled.reject_feedback([filled.feedback()[0].id]),
        lambda: filled.add(tmp_path / "a"),
    ]
    before = filled.change
    for step in nothing:
        step()
    assert filled.change == before


def test_a_plain_folders_changes(tmp_path: Path) -> None:
    for seed, name in enumerate(["a", "b"]):
        write_peft_folder(tmp_path / "plain" / name, seed=seed, samples=["x"])
    with Pool.open(tmp_path / "plain") as pool:
        assert pool.changes_since(0) == {"a", "b"}
        before = pool.change
        (tmp_path / "plain/b/samples.jsonl").write_text('{"inputs": "yes"}\n')
        pool.refresh()
        assert pool.changes_since(before) == {"b"}


def test_changes_that_are_not_known(filled: Pool) -> None:
    assert filled.changes_since(filled.change + 1) is None
    assert filled.changes_since(-1) is None
    with filled._database.write() as session:
        session.execute(text("UPDATE pool SET change = change + 1"))  # by a version that has no log
    number = filled.change
    assert filled.changes_since(number) == frozenset()
    assert filled.changes_since(number - 1) is None
    filled.set_enabled("a", False)
    assert filled.changes_since(number) == {"a"}
    assert filled.changes_since(number - 1) is None


def test_the_log_is_kept_short(filled: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "KEPT_ROWS", 5)
    for number in range(8):
        filled.set_enabled("a", number % 2 == 1)
        with filled._database.write() as session:
            changes.count_change(session, "a", "b")
    now = filled.change
    assert filled.changes_since(now - 3) == {"a", "b"}
    assert filled.changes_since(now - 4) is None, "the fourth last began before the last five rows"
    with filled._database.read() as session:
        assert session.execute(text("SELECT count(*) FROM changes")).scalar() == 5
    with filled._database.write() as session:
        changes.count_change(session, *"abcdefg")
    assert filled.changes_since(now) is None, "a change of more rows than are kept"
    assert filled.changes_since(now + 1) == frozenset()


def test_a_change_that_fails_is_not_in_the_log(filled: Pool) -> None:
    before = filled.change
    with pytest.raises(InvalidInputError):
        filled.remove_samples("a", [0])
    with pytest.raises(PoolError), filled._database.write() as session:
        changes.count_change(session, "a")
        raise PoolError("stop")
    assert (filled.change, filled.changes_since(before)) == (before, frozenset())


def test_a_reader_can_follow_writers(filled: Pool) -> None:
    """What a reader has read by the log is what the pool holds in the end."""

    def write(name: str) -> None:
        with Pool.open(filled.location) as pool:
            for number in range(10):
                pool.add_samples(name, [f"{name} {number}"])
                pool.set_enabled(name, number % 3 != 0)

    change, known = filled.entries("e")
    writers = [threading.Thread(target=write, args=name) for name in "ab"]
    for writer in writers:
        writer.start()
    while True:
        is_last = not any(writer.is_alive() for writer in writers)
        now = filled.change  # first: what changes while this reads is read again
        names = filled.changes_since(change)
        assert names is not None
        change = now
        if names:
            _, found = filled.entries("e", names)
            for name in names:
                known.pop(name, None)
            known |= found
        if is_last and change == filled.change:
            break
    _, entries = filled.entries("e")
    assert {name: entry.texts for name, entry in known.items()} == {name: each.texts for name, each in entries.items()}


def test_what_is_remembered_is_what_a_new_reader_finds(filled: Pool, tmp_path: Path) -> None:
    filled.watch()
    steps = [
        lambda: filled.add(write_peft_folder(tmp_path / "a", seed=3)),
        lambda: filled.add_samples("a", ["more"]),
        lambda: filled.add(tmp_path / "a", description="d", tags=["t"], tenant="acme"),
        lambda: filled.set_enabled("a", False),
        lambda: filled.set_encoder("some/encoder"),
    ]
    for step in steps:
        filled.get("a"), filled.encoder
        step()
        with Pool.open(filled.location) as other:
            assert (filled.get("a"), filled.encoder) == (other.get("a"), other.encoder)
            assert filled.view("acme").find("a") == other.view("acme").find("a")
    filled.remove("a")
    with pytest.raises(AdapterNotFoundError):
        filled.get("a")


def test_of_a_file_another_process_s_changes_are_read_at_once(tmp_path: Path) -> None:
    with Place(tmp_path / "pool").create() as pool, Pool.open(pool.location) as other:
        other.watch()
        pool.add(write_peft_folder(tmp_path / "a"), samples=["x"])
        first = other.get("a")
        seen: list[str] = []
        event.listen(other._database._backend.reading, "before_cursor_execute", lambda *args: seen.append(args[2]))
        assert other.get("a") is first and seen == []
        pool.set_enabled("a", False)
        assert not other.get("a").enabled and seen
