from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from loraretriever.errors import AdapterNotFoundError, InvalidInputError, PoolError
from loraretriever.pool import Pool, feedback, layout
from loraretriever.types import Feedback, Sample
from places import KINDS, make_place
from tiny import TINY_SPEC, write_peft_folder

NAMES = ("a", "b", "c")


@pytest.fixture(params=[*KINDS, "plain"])
def taught(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pool]:
    """A pool of any kind, with three adapters."""
    if request.param != "plain":
        with make_place(request, tmp_path, request.param).create() as pool:
            for seed, name in enumerate(NAMES):
                pool.add(write_peft_folder(tmp_path / name, seed=seed), samples=["x"])
            yield pool
        return
    for seed, name in enumerate(NAMES):
        write_peft_folder(tmp_path / "plain" / name, seed=seed, samples=["x"])
    with Pool.open(tmp_path / "plain") as pool:
        pool.check_shapes(TINY_SPEC)
        yield pool


def texts(pool: Pool) -> dict[str, tuple[list[str], list[str]]]:
    return {
        name: (
            [sample.text for sample in pool.samples(name)],
            [sample.text for sample in pool.counter_samples(name)],
        )
        for name in NAMES
    }


def test_what_is_given_is_kept(taught: Pool) -> None:
    change = taught.change
    given = taught.give_feedback("p", right="a", wrong="b")
    assert (given.prompt, given.right, given.wrong, given.state) == ("p", "a", "b", "pending")
    assert timedelta(0) <= datetime.now(UTC) - given.created < timedelta(minutes=1)
    others = [taught.give_feedback("q", right="a"), taught.give_feedback("r", wrong="b")]
    with Pool.open(taught.location) as again:
        assert again.feedback() == [given, *others]
    assert len({each.id for each in taught.feedback()}) == 3
    assert taught.feedback("approved") == taught.feedback("rejected") == []
    assert taught.feedback(None) == taught.feedback()
    assert taught.change == change, "it has no effect yet"
    with pytest.raises(InvalidInputError, match="state is 'open'; expected one of pending, approved, rejected"):
        taught.feedback("open")


BAD: list[tuple[Callable[[Pool], Feedback], type[Exception], str]] = [
    (lambda pool: pool.give_feedback("p"), InvalidInputError, "names no adapter; expected the right one"),
    (lambda pool: pool.give_feedback("p", "a", "a"), InvalidInputError, "'a' is given as right and as wrong"),
    (lambda pool: pool.give_feedback("p", "a", "nosuch"), AdapterNotFoundError, "no adapter 'nosuch'"),
    (lambda pool: pool.give_feedback("p", ""), AdapterNotFoundError, "no adapter ''"),
    (lambda pool: pool.give_feedback(" ", "a"), InvalidInputError, "prompt: the sample is ' '; expected some text"),
    (lambda pool: pool.give_feedback("x" * 20_001, "a"), InvalidInputError, "at most 20000"),
    (lambda pool: pool.give_feedback("\udc00", "a"), InvalidInputError, "not Unicode"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_feedback(pool: Pool, tmp_path: Path, call: Callable[[Pool], Feedback], error: type, message: str) -> None:
    pool.add(write_peft_folder(tmp_path / "a"), samples=["x"])
    with pytest.raises(error, match=message):
        call(pool)
    assert pool.feedback(None) == []


def test_approved_feedback_becomes_samples(taught: Pool) -> None:
    ids = [
        taught.give_feedback("p", right="a", wrong="b").id,
        taught.give_feedback("q", right="a").id,
        taught.give_feedback("q", right="a", wrong="c").id,
        taught.give_feedback("later", right="c").id,
    ]
    change = taught.change
    approved = taught.approve_feedback([*ids[:3], ids[0]])
    assert [(each.id, each.state) for each in approved] == [(number, "approved") for number in ids[:3]]
    assert texts(taught) == {"a": (["x", "p", "q"], []), "b": (["x"], ["p"]), "c": (["x"], ["q"])}
    assert taught.samples("a")[1:] == [Sample("p", "feedback"), Sample("q", "feedback")]
    assert taught.counter_samples("b") == [Sample("p", "feedback", counter=True)]
    assert (taught.change, taught.changes_since(change)) == (change + 1, {"a", "b", "c"})
    with Pool.open(taught.location) as again:
        assert (texts(again), again.change) == (texts(taught), change + 1)
        assert [each.id for each in again.feedback()] == ids[3:]
        assert again.feedback("approved") == approved
    with pytest.raises(InvalidInputError, match=f"feedback {ids[0]} is approved already; expected a pending one"):
        taught.approve_feedback([ids[3], ids[0]])
    with pytest.raises(InvalidInputError, match="there is no feedback 99. See all with"):
        taught.approve_feedback([ids[3], 99])
    assert taught.approve_feedback([]) == []
    again = taught.give_feedback("q", right="a")
    taught.approve_feedback([again.id])
    assert taught.change == change + 1, "the adapter has that sample"


def test_rejected_feedback_has_no_effect(taught: Pool) -> None:
    given, other = taught.give_feedback("p", right="a", wrong="b"), taught.give_feedback("q", right="a")
    before = texts(taught)
    (rejected,) = taught.reject_feedback([given.id])
    assert rejected.state == "rejected"
    assert taught.feedback("rejected") == [rejected]
    assert texts(taught) == before
    for call in (taught.approve_feedback, taught.reject_feedback):
        with pytest.raises(InvalidInputError, match=f"feedback {given.id} is rejected already"):
            call([other.id, given.id])
    assert taught.feedback() == [other]


def test_an_adapter_that_was_removed_meanwhile(taught: Pool) -> None:
    first, second = taught.give_feedback("p", right="a", wrong="b"), taught.give_feedback("q", right="a", wrong="c")
    taught.remove("c")
    change = taught.change
    with pytest.raises(AdapterNotFoundError, match=f"feedback {second.id} names 'c', which was removed: .*reject"):
        taught.approve_feedback([first.id, second.id])
    assert (taught.change, taught.feedback()) == (change, [first, second])
    assert [sample.text for sample in taught.samples("a")] == ["x"]
    taught.approve_feedback([first.id])
    taught.reject_feedback([second.id])
    assert taught.feedback() == []


def test_feedback_that_contradicts(taught: Pool) -> None:
    first, second = taught.give_feedback("p", right="a"), taught.give_feedback("p", right="b", wrong="a")
    with pytest.raises(InvalidInputError, match=f"feedback {second.id}: adapter 'a': 'p' is a sample and a counter"):
        taught.approve_feedback([first.id, second.id])
    assert texts(taught) == {name: (["x"], []) for name in NAMES}
    taught.approve_feedback([second.id])
    with pytest.raises(InvalidInputError, match=f"feedback {first.id}: .* at once"):
        taught.approve_feedback([first.id])
    taught.remove_samples("a", [1])
    taught.approve_feedback([first.id])
    assert texts(taught)["a"] == (["x", "p"], [])


def test_killed_between_two_files_it_can_be_approved_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    for seed, name in enumerate(NAMES):
        write_peft_folder(tmp_path / "plain" / name, seed=seed, samples=["x"])
    with Pool.open(tmp_path / "plain") as pool:
        given = pool.give_feedback("p", right="a", wrong="b")
        real, calls = feedback.store_samples, []

        def store(*args: object) -> None:
            if calls:
                raise Killed
            calls.append(1)
            real(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(feedback, "store_samples", store)
        with pytest.raises(Killed):
            pool.approve_feedback([given.id])
        monkeypatch.undo()
    monkeypatch.setenv("LORARETRIEVER_CACHE", str(tmp_path / "cache"))
    with Pool.open(tmp_path / "plain") as pool:
        assert texts(pool) == {"a": (["x", "p"], []), "b": (["x"], []), "c": (["x"], [])}
        assert pool.feedback() == [given]
        pool.approve_feedback([given.id])
        assert texts(pool) == {"a": (["x", "p"], []), "b": (["x"], ["p"]), "c": (["x"], [])}
        assert pool.problems == ()


def test_a_read_only_folder_takes_feedback_but_no_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "plain"
    write_peft_folder(folder / "a", samples=["x"])
    monkeypatch.setattr(layout, "is_writable", lambda path: not path.is_relative_to(folder))
    with Pool.open(folder) as pool:
        given = pool.give_feedback("p", right="a")
        with pytest.raises(PoolError, match="is read-only. Copy the pool"):
            pool.approve_feedback([given.id])
        assert pool.feedback() == [given]
        pool.reject_feedback([given.id])


def test_two_that_approve_the_same(taught: Pool) -> None:
    """One of two approves; the other one is told so."""
    ids = [taught.give_feedback(f"p{number}", right="a").id for number in range(6)]
    outcomes: list[str] = []
    start = threading.Barrier(2)

    def approve() -> None:
        with Pool.open(taught.location) as pool:
            start.wait(60)
            for number in ids:
                try:
                    pool.approve_feedback([number])
                    outcomes.append("approved")
                except InvalidInputError:
                    outcomes.append("refused")

    threads = [threading.Thread(target=approve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["approved"] * 6 + ["refused"] * 6
    assert texts(taught)["a"][0] == ["x", *(f"p{number}" for number in range(6))]
