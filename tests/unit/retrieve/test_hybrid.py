"""The hybrid retriever over a real pool, with a stand-in for the encoder."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loraretriever.errors import AdapterNotFoundError, InvalidInputError, ModelLoadError, PoolAwayError
from loraretriever.pool import Pool
from loraretriever.retrieve import HybridRetriever
from loraretriever.retrieve.encoder import Encoder, Vectors
from loraretriever.retrieve.follower import State
from loraretriever.retrieve.hybrid import _pieces
from loraretriever.retrieve.model import Member
from loraretriever.retrieve.snapshot import Snapshot
from loraretriever.types import AdapterFilter, Ranking
from tiny import TINY_BASE, TINY_SPEC, write_peft_folder
from tiny_text import WordEncoder

SAMPLES = {
    "sql": ["write a query", "query the table", "select rows from the table", "join two tables by a query"],
    "german": ["translate to german", "say it in german", "this text in german please", "what is german for house"],
    "math": ["add the numbers", "compute the sum", "what is the sum of these numbers", "multiply the numbers"],
    "poem": ["write a poem", "a short poem about rain", "rhyme a poem for me", "compose a poem on the sea"],
}
Add = Callable[..., None]


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with Pool.create(tmp_path / "pool", TINY_BASE, spec=TINY_SPEC) as pool:
        yield pool


@pytest.fixture
def add(pool: Pool, tmp_path: Path) -> Add:
    numbers = itertools.count()

    def add_(*names: str, **options: Any) -> None:
        for name in names:
            number = next(numbers)
            folder = write_peft_folder(tmp_path / f"source{number}", seed=number)
            pool.add(folder, name=name, samples=options.pop("samples", None) or SAMPLES[name], **options)

    return add_


class Gate:
    """Lets learning wait: `Snapshot.learnt` in the learning thread goes on when `open` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.open = threading.Event(), threading.Event()
        self.failure: Exception | None = None
        original = Snapshot.learnt.__func__  # type: ignore[attr-defined]

        def learnt(cls: type[Snapshot], *arguments: Any) -> Snapshot:
            if threading.current_thread().name == "loraretriever-learning":
                self.begun.set()
                assert self.open.wait(20)
                if self.failure:
                    raise self.failure
            return original(cls, *arguments)

        monkeypatch.setattr(Snapshot, "learnt", classmethod(learnt))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


def hybrid(pool: Pool, encoder: Encoder | None = None) -> HybridRetriever:
    encoder = encoder or WordEncoder()
    return HybridRetriever(pool, lambda name: encoder)


def names(retriever: HybridRetriever, prompt: str, k: int = 9, **wanted: Any) -> list[str]:
    return [hit.adapter for hit in retriever.rank([prompt], k, AdapterFilter(**wanted))[0].hits]


def assert_same(one: list[Ranking], other: list[Ranking]) -> None:
    for left, right in zip(one, other, strict=True):
        assert [hit.adapter for hit in left.hits] == [hit.adapter for hit in right.hits]
        for field in ("score", "logit"):
            values = [getattr(hit, field) for hit in right.hits]
            assert [getattr(hit, field) for hit in left.hits] == pytest.approx(values, abs=1e-9)
        assert (left.fit, left.threshold) == pytest.approx((right.fit, right.threshold))


# What is found


def test_the_adapter_with_like_samples_comes_first(pool: Pool, add: Add) -> None:
    add(*SAMPLES)
    retriever = hybrid(pool)
    prompts = ["a query over two tables", "in german please", "the sum of the numbers", "a poem about the sea"]
    rankings = retriever.rank(prompts, 2)
    assert [ranking.hits[0].adapter for ranking in rankings] == list(SAMPLES)
    for ranking in rankings:
        assert len(ranking.hits) == 2 and ranking.hits[0].score > ranking.hits[1].score
        assert sum(hit.score for hit in ranking.hits) <= ranking.fit + 1e-9 <= 1 + 1e-9
    (own, strange) = retriever.rank(["write a query", "entirely unheard syllables"], 2)
    assert own.fit >= own.threshold > strange.fit and len(strange.hits) == 2
    assert min(ranking.fit for ranking in rankings) > strange.fit


def test_an_empty_pool_finds_nothing_until_there_is_something(pool: Pool, add: Add) -> None:
    retriever = hybrid(pool)
    (ranking,) = retriever.rank(["hello"], 3)
    assert ranking.hits == () and ranking.fit == 0.0
    add("sql")
    assert names(retriever, "query") == ["sql"]
    pool.remove("sql")
    assert names(retriever, "query") == []
    retriever.settle()


def test_one_adapter(pool: Pool, add: Add) -> None:
    add("sql")
    (near, far) = hybrid(pool).rank(["write a query", "unheard syllables"], 3)
    assert near.fit >= near.threshold > far.fit
    assert near.hits[0].score == pytest.approx(near.fit) and len(near.hits) == 1


def test_all_disabled(pool: Pool, add: Add) -> None:
    add("sql", "math")
    retriever = hybrid(pool)
    assert len(names(retriever, "query")) == 2
    for name in ("sql", "math"):
        pool.set_enabled(name, False)
    assert names(retriever, "query") == []
    retriever.settle()
    assert names(retriever, "query", only=frozenset({"sql"})) == [], "a disabled adapter may be named"
    pool.set_enabled("math", True)
    assert names(retriever, "query") == ["math"]


@pytest.mark.parametrize(("prompts", "k"), [(["hello", " \n"], 3), ([""], 1), (["hello"], 0)])
def test_bad_requests(pool: Pool, prompts: list[str], k: int) -> None:
    for ask in (hybrid(pool).rank, hybrid(pool).explain):
        with pytest.raises(InvalidInputError, match="expected"):
            ask(prompts, k)


def test_unusual_requests(pool: Pool, add: Add) -> None:
    add(*SAMPLES)
    retriever = hybrid(pool)
    assert retriever.rank([], 3) == [] and retriever.explain([], 3) == []
    assert len(names(retriever, "hello", k=10**9)) == 4
    assert names(retriever, "table \ud800 query")[0] == "sql"
    assert names(retriever, "write a query " * 75_000)[0] == "sql", "a megabyte"
    assert names(retriever, "\0\u202e!") and names(retriever, "🙂")


def test_unknown_names_in_filters(pool: Pool, add: Add) -> None:
    add("sql")
    for wanted in ({"only": frozenset({"sqll"})}, {"exclude": frozenset({"sqll"})}):
        with pytest.raises(AdapterNotFoundError, match="did you mean 'sql'"):
            names(hybrid(pool), "hello", **wanted)


def test_tags_and_tenants(pool: Pool, add: Add) -> None:
    add("sql", tags=["data"], tenant="us")
    add("math", tags=["data"], tenant="them")
    add("poem")
    retriever = hybrid(pool)
    assert set(names(retriever, "a query", tags=frozenset({"data"}))) == {"sql", "math"}
    assert set(names(retriever, "a query", tenant="us")) == {"sql", "poem"}
    assert names(retriever, "a query", tenant="them", tags=frozenset({"data"})) == ["math"]
    assert names(retriever, "a query", base_model="another") == []


# Changes


def test_changes_are_in_force_at_the_next_call(pool: Pool, add: Add, gate: Gate) -> None:
    """Nothing is learnt meanwhile: the gate is shut."""
    add("sql", "german", "math")
    encoder = WordEncoder()
    retriever = hybrid(pool, encoder)
    names(retriever, "hello")
    encoded = len(encoder.encoded)
    add("poem")
    assert names(retriever, "a poem")[0] == "poem"
    assert encoder.encoded[encoded:] == [*SAMPLES["poem"], "a poem"], "only the new samples and the prompt"
    assert gate.begun.wait(20)
    pool.set_enabled("poem", False)
    assert "poem" not in names(retriever, "a poem")
    pool.set_enabled("poem", True)
    assert names(retriever, "a poem")[0] == "poem"
    pool.remove("german")
    assert sorted(names(retriever, "say it in german")) == ["math", "poem", "sql"]
    pool.add_samples("math", ["whistle a melody", "hum a melody", "sing a melody", "a melody of bells"])
    assert names(retriever, "a melody of whistle and bells")[0] == "math"
    add("sql", samples=["bake a cake", "cook a meal", "roast potatoes"])
    assert names(retriever, "roast a cake")[0] == "sql"
    gate.open.set()
    retriever.settle()
    assert names(retriever, "roast a cake")[0] == "sql"


def test_one_at_a_time_comes_to_the_same_as_all_at_once(pool: Pool, add: Add, tmp_path: Path) -> None:
    prompts = ["a query over two tables", "in german please", "the sum", "unheard syllables"]
    retriever = hybrid(pool)
    for name in ("poem", "math", "sql", "german"):
        add(name)
        retriever.rank(["hello"], 1)
    pool.add_samples("math", ["divide the numbers"])
    pool.add_samples("math", ["a poem of numbers"], counter=True)
    pool.remove("poem")
    retriever.rank(["hello"], 1)
    retriever.settle()
    assert_same(retriever.rank(prompts, 9), hybrid(pool).rank(prompts, 9))


def test_feedback_takes_effect_when_it_is_approved(pool: Pool, add: Add) -> None:
    add(*SAMPLES)
    retriever = hybrid(pool)
    prompt = "write a poem about numbers in a table"
    first = names(retriever, prompt)[0]
    right = next(name for name in SAMPLES if name not in {first, "german"})
    before = {hit.adapter: hit.score for hit in retriever.rank([prompt], 9)[0].hits}
    given = pool.give_feedback(prompt, right=right, wrong=first)
    assert {hit.adapter: hit.score for hit in retriever.rank([prompt], 9)[0].hits} == before
    pool.approve_feedback([given.id])
    for _ in range(2):
        assert names(retriever, prompt)[0] == right
        after = {hit.adapter: hit.score for hit in retriever.rank([prompt], 9)[0].hits}
        assert after[first] < before[first] / 2
        retriever.settle()


def test_samples_that_come_while_others_are_embedded_wait_for_the_next_call(
    pool: Pool, add: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between embedding what is missing and reading the pool, another process may add samples."""
    add("sql", "math")
    retriever = hybrid(pool)
    original = Pool.entries
    more = iter([("sql", ["bake a cake"], True), ("math", ["sing a song"], False)])

    def entries(self: Pool, *arguments: Any) -> Any:
        if (each := next(more, None)) is not None:
            self.add_samples(each[0], each[1], counter=each[2])
        return original(self, *arguments)

    monkeypatch.setattr(Pool, "entries", entries)
    assert names(retriever, "query") == ["math"], "sql has a counter sample without a vector"
    assert names(retriever, "query")[0] == "sql"
    retriever.settle()
    assert_same(retriever.rank(["a cake", "a song"], 9), hybrid(pool).rank(["a cake", "a song"], 9))


def test_readers_of_a_pool_whose_log_was_cut_read_all_of_it(
    pool: Pool, add: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    add("sql")
    retriever = hybrid(pool)
    names(retriever, "hello")
    add("math", "poem")
    monkeypatch.setattr(Pool, "changes_since", lambda self, change: None)
    assert sorted(names(retriever, "hello")) == ["math", "poem", "sql"]


# Learning


def test_readers_go_on_while_it_learns(pool: Pool, add: Add, gate: Gate) -> None:
    add("sql", "german", "math")
    retriever = hybrid(pool)
    names(retriever, "hello")
    add("poem")
    described = retriever.rank(["a poem", "a query"], 9)
    assert gate.begun.wait(20)
    assert_same(retriever.rank(["a poem", "a query"], 9), described)
    gate.open.set()
    retriever.settle()
    learnt = retriever.rank(["a poem", "a query"], 9)
    assert_same(learnt, hybrid(pool).rank(["a poem", "a query"], 9))
    assert learnt[1].hits[0].logit != pytest.approx(described[1].hits[0].logit), "it was not learnt before"


class Changing:
    """Changes a pool, and asks the retriever, while each of the first snapshots is learnt in the learning thread.

    `expected` are the snapshots that are to be in force when the next learning begins: what was learnt from the members
    at the beginning, with the later changes beside it. `found` are those that are in force then.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, retriever: HybridRetriever, changes: list[Callable[[], None]]):
        self.expected: list[Snapshot] = []
        self.found: list[Snapshot] = []
        self.states: list[State] = []  # the same moments as `found`
        self.failures: list[Exception] = []
        follower, left = retriever._follower, iter(changes)
        original = Snapshot.learnt.__func__  # type: ignore[attr-defined]

        def state() -> State:
            assert follower._state is not None
            return follower._state

        def learnt(cls: type[Snapshot], members: list[Member], *arguments: Any) -> Snapshot:
            made: Snapshot = original(cls, members, *arguments)
            if threading.current_thread().name != "loraretriever-learning":
                return made
            if len(self.found) < len(self.expected):
                self.found.append(state().snapshot)
                self.states.append(state())
            if (change := next(left, None)) is not None:
                change()
                retriever.rank(["hello"], 1)
                before, now = {member.name: member for member in members}, state().members
                after = made.changed(
                    {name: member for name, member in now.items() if before.get(name) is not member},
                    before.keys() - now.keys(),
                )
                assert after is not None
                self.expected.append(after)
            return made

        monkeypatch.setattr(Snapshot, "learnt", classmethod(learnt))


PROMPTS = ["a query over two tables", "in german please", "a poem of numbers", "roast a cake", "unheard syllables"]


def ranked(snapshot: Snapshot, encoder: Encoder) -> list[Any]:
    """All that a snapshot says, to the last bit."""
    told = snapshot.rank(encoder.encode(PROMPTS), PROMPTS, AdapterFilter())
    return [[each.names, each.logits.tolist(), each.probabilities.tolist(), each.fit] for each in told]


def test_what_was_learnt_is_used_although_the_pool_changes_during_each_learning(
    pool: Pool, add: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    add("sql", "german", "math")
    encoder = WordEncoder()
    retriever = hybrid(pool, encoder)
    names(retriever, "hello")
    changes: list[Callable[[], None]] = [
        lambda: add("cake", samples=["bake a cake", "cook a meal", "roast potatoes"]),
        lambda: pool.remove("german"),
        lambda: pool.add_samples("math", ["divide the numbers", "a poem of numbers"]),
        lambda: pool.add_samples("sql", ["a poem of numbers"], counter=True),
        lambda: (pool.remove("cake"), add("cake", samples=["a cake in german"]))[0],
    ]
    changing = Changing(monkeypatch, retriever, changes)
    add("poem")
    retriever.settle()
    assert len(changing.found) == len(changing.expected) == len(changes)
    for found, expected in zip(changing.found, changing.expected, strict=True):
        assert ranked(found, encoder) == ranked(expected, encoder)
    assert not any(state.is_learnt for state in changing.states), "the changes are still to be learnt"
    assert ["german" in ranked(each, encoder)[0][0] for each in changing.found] == [True] + [False] * 4
    assert_same(retriever.rank(PROMPTS, 9), hybrid(pool, encoder).rank(PROMPTS, 9))


def test_what_was_learnt_is_used_where_only_the_number_of_the_change_is_another(
    pool: Pool, add: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is learnt a second time then."""
    add("sql", "german", "math")
    retriever = hybrid(pool)
    names(retriever, "hello")
    changing = Changing(monkeypatch, retriever, [lambda: add("sql")])
    add("poem")
    retriever.settle()
    assert len(changing.expected) == 1 and not changing.found
    assert_same(retriever.rank(PROMPTS, 9), hybrid(pool).rank(PROMPTS, 9))


def test_what_a_request_had_to_learn_meanwhile_is_kept(
    pool: Pool, add: Add, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is learnt from later members."""
    monkeypatch.setattr("loraretriever.retrieve.snapshot.MAX_ADDED", 1)
    add("sql", "german")
    retriever = hybrid(pool)
    names(retriever, "hello")
    add("math")
    names(retriever, "hello")
    assert gate.begun.wait(20)
    add("poem")  # one too many
    pool.remove("german")
    names(retriever, "hello")
    state = retriever._follower._state
    assert state is not None and state.is_learnt
    gate.open.set()
    retriever.settle()
    assert retriever._follower._state is state
    assert sorted(names(retriever, "hello")) == ["math", "poem", "sql"]


def test_an_adapter_that_was_removed_while_it_was_learnt_does_not_come_back(
    pool: Pool, add: Add, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither from what was learnt, nor where the pool cannot be asked just then."""
    add("sql", "german", "math")
    retriever = hybrid(pool)
    names(retriever, "hello")
    add("poem")
    names(retriever, "hello")
    assert gate.begun.wait(20)
    pool.remove("german")
    assert sorted(names(retriever, "in german")) == ["math", "poem", "sql"]
    thread, follower = retriever._follower._thread, retriever._follower
    before = follower._state
    assert thread is not None and before is not None

    def away(self: Pool, *arguments: Any, **options: Any) -> Any:
        raise PoolAwayError("the database is away")

    with monkeypatch.context() as patch:
        for method in ("changes_since", "entries", "missing_embeddings", "list"):
            patch.setattr(Pool, method, away)
        patch.setattr(follower, "_is_settled", lambda state: True)
        gate.open.set()
        thread.join(20)
        assert not thread.is_alive() and follower._failure is None
        state = follower._state
        assert state is not None and state.learnt_at > before.learnt_at, "what was learnt is in force"
        patch.setattr(Pool, "change", property(away))
        assert sorted(names(retriever, "in german")) == ["math", "poem", "sql"], "it needs nothing of the pool"
    follower._away_until = 0.0
    retriever.settle()
    assert_same(retriever.rank(PROMPTS, 9), hybrid(pool).rank(PROMPTS, 9))


def test_a_failure_to_learn_is_told_once_and_tried_again(pool: Pool, add: Add, gate: Gate) -> None:
    add("sql", "math")
    retriever = hybrid(pool)
    names(retriever, "hello")
    add("poem")
    described = retriever.rank(["a poem"], 9)
    gate.failure = ValueError("no memory")
    gate.open.set()
    for _ in range(2):
        with pytest.raises(ValueError, match="no memory"):
            retriever.settle()
        assert_same(retriever.rank(["a poem"], 9), described)
    gate.failure = None
    retriever.settle()
    assert_same(retriever.rank(["a poem"], 9), hybrid(pool).rank(["a poem"], 9))
    retriever.settle()


def test_a_failure_is_forgotten_when_the_pool_changes_and_all_goes_well(pool: Pool, add: Add, gate: Gate) -> None:
    add("sql", "math")
    retriever = hybrid(pool)
    names(retriever, "hello")
    add("poem")
    gate.failure = ValueError("no memory")
    names(retriever, "hello")
    thread = retriever._follower._thread
    gate.open.set()
    if thread is not None:
        thread.join()
    gate.failure = None
    add("german")
    assert names(retriever, "in german")[0] == "german"
    retriever.settle()


def test_a_pool_that_cannot_be_read_ends_the_learning(
    pool: Pool, add: Add, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    add("sql", "math")
    retriever = hybrid(pool)
    names(retriever, "hello")
    add("poem")
    names(retriever, "hello")
    thread = retriever._follower._thread
    assert thread is not None and gate.begun.wait(20)

    def fail(self: Pool) -> str:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Pool, "encoder", property(fail))
        gate.open.set()
        thread.join(20)
        assert not thread.is_alive()
    with pytest.raises(OSError, match="the disk is gone"):
        retriever.settle()
    retriever.settle()


# Another encoder


class Encoders:
    """Loads an encoder by its name, and notes which."""

    def __init__(self) -> None:
        self.asked: list[str | None] = []
        self.made: dict[str | None, WordEncoder] = {}
        self.open = threading.Event()
        self.open.set()

    def __call__(self, name: str | None) -> Encoder:
        self.asked.append(name)
        if name == "broken":
            raise ModelLoadError("cannot load the encoder 'broken'")
        assert self.open.wait(20)
        return self.made.setdefault(name, WordEncoder(str(name)))


def test_the_pools_encoder_can_be_changed_while_the_old_one_serves(pool: Pool, add: Add) -> None:
    add(*SAMPLES)
    encoders = Encoders()
    retriever = HybridRetriever(pool, encoders)
    before = retriever.rank(["a query"], 9)
    assert encoders.asked == [None]
    encoders.open.clear()
    pool.set_encoder("tests/another")
    assert_same(retriever.rank(["a query"], 9), before)
    assert encoders.made.keys() == {None}
    encoders.open.set()
    retriever.settle()
    assert encoders.asked[1:] == ["tests/another"]
    other = encoders.made["tests/another"]
    assert sorted(other.encoded) == sorted(text for texts in SAMPLES.values() for text in texts)
    old = len(encoders.made[None].encoded)
    fresh = HybridRetriever(pool, Encoders()).rank(["a query"], 9)
    assert_same(retriever.rank(["a query"], 9), fresh)
    assert len(encoders.made[None].encoded) == old
    pool.set_encoder(None)
    retriever.settle()
    assert_same(retriever.rank(["a query"], 9), before)
    assert len(encoders.made[None].encoded) == old + 1, "its vectors were still in the pool"


def test_a_change_during_the_change_of_encoder(pool: Pool, add: Add) -> None:
    add("sql", "german", "math")
    encoders = Encoders()
    retriever = HybridRetriever(pool, encoders)
    names(retriever, "hello")
    encoders.open.clear()
    pool.set_encoder("tests/another")
    names(retriever, "hello")
    add("poem")
    assert names(retriever, "a poem")[0] == "poem", "by the old encoder"
    encoders.open.set()
    retriever.settle()
    assert_same(retriever.rank(["a poem"], 9), HybridRetriever(pool, Encoders()).rank(["a poem"], 9))


def test_a_new_encoder_comes_into_force_although_the_pool_changes_during_each_learning(
    pool: Pool, add: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is added while it is learnt for the new encoder is embedded before the lock is taken."""
    add("sql", "german", "math")
    encoders = Encoders()
    retriever = HybridRetriever(pool, encoders)
    names(retriever, "hello")
    locked: dict[str, bool] = {}

    class Watched(WordEncoder):
        def encode(self, texts: Sequence[str]) -> Vectors:
            locked.update(dict.fromkeys(texts, retriever._follower._lock.locked()))
            return super().encode(texts)

    encoders.made["tests/another"] = Watched("tests/another")
    changes: list[Callable[[], None]] = [lambda: add("poem"), lambda: pool.remove("german"), lambda: add("german")]
    original = Snapshot.learnt.__func__  # type: ignore[attr-defined]
    left, tags = iter(changes), []

    def learnt(cls: type[Snapshot], *arguments: Any) -> Snapshot:
        if threading.current_thread().name == "loraretriever-learning":
            state = retriever._follower._state
            assert state is not None
            tags.append(state.encoder.tag)
            if (change := next(left, None)) is not None:
                change()
                retriever.rank(["hello"], 1)
        return original(cls, *arguments)

    monkeypatch.setattr(Snapshot, "learnt", classmethod(learnt))
    pool.set_encoder("tests/another")
    retriever.settle()
    old, new = (encoders.made[name].tag for name in (None, "tests/another"))
    assert tags == [old, new, new, new], "the first that was learnt is in force"
    assert not locked["write a poem"]
    assert_same(retriever.rank(PROMPTS, 9), HybridRetriever(pool, Encoders()).rank(PROMPTS, 9))


def test_another_name_for_the_same_encoder(pool: Pool, add: Add) -> None:
    add("sql", "german")
    retriever = hybrid(pool)
    before = retriever.rank(PROMPTS, 9)
    pool.set_encoder("tests/another")
    retriever.settle()
    state = retriever._follower._state
    assert state is not None and state.encoder_name == "tests/another"
    assert_same(retriever.rank(PROMPTS, 9), before)


def test_what_changes_just_before_a_new_encoder_comes_into_force_is_read_with_it(
    pool: Pool, add: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the thread has read what came while it learnt, and before it has the lock."""
    add("sql", "german", "math")
    encoders = Encoders()
    retriever = HybridRetriever(pool, encoders)
    follower = retriever._follower
    names(retriever, "hello")
    original = follower._learnt_from
    changes: Iterator[Callable[[], None]] = iter([lambda: (pool.remove("german"), add("poem"))[1]])
    states, landed = [], []
    land = follower._brought_up

    def brought_up(learnt: State) -> State:
        landed.append(land(learnt))
        return landed[-1]

    def learnt_from(state: State) -> State:
        states.append(state)
        learnt = original(state)
        if (change := next(changes, None)) is not None:
            change()
            assert sorted(names(retriever, "hello")) == ["math", "poem", "sql"]
        return learnt

    monkeypatch.setattr(follower, "_brought_up", brought_up)
    monkeypatch.setattr(follower, "_learnt_from", learnt_from)
    pool.set_encoder("tests/another")
    retriever.settle()
    assert [each.encoder_name for each in states] == [None, "tests/another"]
    assert sorted(landed[0].members) == ["math", "poem", "sql"] and not landed[0].is_learnt
    assert "write a poem" in encoders.made["tests/another"].encoded
    assert_same(retriever.rank(PROMPTS, 9), HybridRetriever(pool, Encoders()).rank(PROMPTS, 9))


def test_an_encoder_that_cannot_be_loaded_leaves_the_old_one(pool: Pool, add: Add) -> None:
    add(*SAMPLES)
    encoders = Encoders()
    retriever = HybridRetriever(pool, encoders)
    before = retriever.rank(["a query"], 9)
    pool.set_encoder("broken")
    for _ in range(2):
        with pytest.raises(ModelLoadError, match="broken"):
            retriever.settle()
    assert_same(retriever.rank(["a query"], 9), before)
    pool.set_encoder(None)
    retriever.settle()
    pool.set_encoder("broken")
    with pytest.raises(ModelLoadError, match="broken"):
        HybridRetriever(pool, encoders).rank(["a query"], 1)


def test_an_encoder_of_another_dimension(pool: Pool, add: Add) -> None:
    class Short(WordEncoder):
        def encode(self, texts: Any) -> Vectors:
            vectors = super().encode(texts)[:, :20]
            return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))

    add(*SAMPLES)
    retriever = HybridRetriever(pool, lambda name: Short("short") if name else WordEncoder())
    names(retriever, "hello")
    pool.set_encoder("tests/short")
    assert names(retriever, "a query")[0] == "sql"
    retriever.settle()
    assert names(retriever, "a query")[0] == "sql"


# Threads


def test_many_threads_rank_while_adapters_come_and_go(pool: Pool, add: Add) -> None:
    add("sql", "german")
    retriever = hybrid(pool)
    done = threading.Event()
    failures: list[BaseException] = []
    counts = [0] * 4

    def read(number: int) -> None:
        try:
            while not done.is_set() or not counts[number]:
                for wanted in (AdapterFilter(), AdapterFilter(exclude=frozenset({"german"}))):
                    query, german = retriever.rank(["a query", "in german"], 9, wanted)
                    assert query.hits[0].adapter == "sql"
                    found = [hit.adapter for hit in german.hits]
                    assert (found[0] == "german") == (not wanted.exclude)
                    assert len(found) == len(set(found))
                counts[number] += 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for name in ("math", "poem"):
        add(name)
        pool.add_samples(name, [f"{name} for ever"])
        pool.set_enabled(name, False)
    pool.set_enabled("math", True)
    done.set()
    for thread in threads:
        thread.join(30)
    assert failures == [] and min(counts) > 0
    retriever.settle()
    assert sorted(names(retriever, "hello")) == ["german", "math", "sql"]
    assert_same(retriever.rank(["hello"], 9), hybrid(pool).rank(["hello"], 9))


def test_the_question_before_or_after_a_long_document_is_read() -> None:
    views = _pieces
    assert views("short") == ("short",)
    document, question = "lorem ipsum dolor " * 400, "translate this to german please"
    for prompt in (f"{document}\n{question}", f"{question}\n{document}"):
        assert views(prompt)[0] == prompt
        assert any(question in view and len(view) <= 320 for view in views(prompt)[1:])
    assert views("a" + " " * 9000) == ("a" + " " * 9000, "a" + " " * 159, "a" + " " * 319), "no view is blank"


# What is the same as before


def test_what_does_not_change_an_adapters_samples_is_no_reason_to_learn(pool: Pool, add: Add, gate: Gate) -> None:
    add(*SAMPLES)
    encoder = WordEncoder()
    retriever = hybrid(pool, encoder)
    before = retriever.rank(["a query", "a poem"], 9)
    add("sql")
    pool.set_enabled("math", False)
    pool.set_enabled("math", True)
    assert retriever.rank(["a query", "a poem"], 9) == before
    assert retriever._follower._thread is None and not gate.begun.is_set()
    assert [text for text in encoder.encoded if text in SAMPLES["sql"]] == 2 * SAMPLES["sql"], "a new revision's"
    add("sql", tags=["data"])
    assert names(retriever, "a query", tags=frozenset({"data"})) == ["sql"]
    assert gate.begun.wait(20)


def test_each_adapters_samples_are_encoded_by_themselves(pool: Pool, add: Add) -> None:
    batches: list[list[str]] = []

    class Noting(WordEncoder):
        def encode(self, texts: Any) -> Vectors:
            batches.append(list(texts))
            return super().encode(texts)

    add(*SAMPLES)
    hybrid(pool, Noting()).rank([], 1)
    assert sorted(batches) == sorted(SAMPLES.values())


def test_prompts_are_remembered_until_the_encoder_changes(pool: Pool, add: Add) -> None:
    add(*SAMPLES)
    encoders = Encoders()
    retriever = HybridRetriever(pool, encoders, remembered=2)
    for prompts in (["a query"], ["a query", "a poem"], ["in german"], ["a query"]):
        retriever.rank(prompts, 1)
    samples = sum(map(len, SAMPLES.values()))
    assert encoders.made[None].encoded[samples:] == ["a query", "a poem", "in german", "a query"]
    pool.set_encoder("tests/another")
    retriever.settle()
    before = retriever.rank(["a query"], 9)
    assert encoders.made["tests/another"].encoded[samples:] == ["a query"]
    assert before == HybridRetriever(pool, Encoders()).rank(["a query"], 9)


def test_texts_and_their_tokens(pool: Pool) -> None:
    retriever = hybrid(pool)
    assert retriever.encode(["a query"]).tolist() == WordEncoder().encode(["a query"]).tolist()
    assert retriever.count_tokens(["a query", "german"]) == 3, "words, where the encoder cannot tell"
    with pytest.raises(InvalidInputError, match="empty"):
        retriever.encode([""])
