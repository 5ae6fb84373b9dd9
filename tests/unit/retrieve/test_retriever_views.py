"""What each view of a pool gets, and that it gets nothing of what it may not see."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loraretriever.errors import AdapterNotFoundError
from loraretriever.pool import Pool
from loraretriever.retrieve import HybridRetriever, PaperRetriever, QueueEncoder, Reader, Views, views
from loraretriever.retrieve.encoder import Vectors
from loraretriever.retrieve.snapshot import Snapshot
from loraretriever.types import AdapterFilter, Ranking
from tiny import TINY_BASE, TINY_SPEC, write_peft_folder
from tiny_text import WordEncoder

SHARED = {
    "sql": ["write a query", "query the table", "select rows from the table", "join two tables by a query"],
    "german": ["translate to german", "say it in german", "this text in german please", "what is german for house"],
    "math": ["add the numbers", "compute the sum", "what is the sum of these numbers", "multiply the numbers"],
}
POEM = ["write a poem", "a short poem about rain", "rhyme a poem for me", "compose a poem on the sea"]
CLEAN = ["clean a table of rows", "clean the query", "drop rows that are empty", "which rows are twice there"]
PROMPTS = ["a query over two tables", "rhyme a poem about rain", "the sum in german", "unheard syllables", "clean rows"]
Change = Callable[["Place"], None]


class Moody(WordEncoder):
    """A vector depends a little on all texts of its batch, as rounding may in reality."""

    def encode(self, texts: Sequence[str]) -> Vectors:
        vectors = super().encode(texts)
        vectors = vectors + 1e-3 * vectors.sum(axis=0)
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


class Place:
    """A pool with its views."""

    def __init__(self, folder: Path, encoder: WordEncoder | None = None) -> None:
        self.folder = folder
        self.encoder = encoder or Moody()
        self.pool = Pool.create(folder / "pool", TINY_BASE, spec=TINY_SPEC)
        self.views = Views(self.pool, self.load)
        self.loads = 0
        self._numbers = itertools.count()

    def load(self, reader: Reader) -> HybridRetriever:
        self.loads += 1
        queue = QueueEncoder(self.encoder)
        return HybridRetriever(reader, lambda name: queue, remembered=100)

    def add(self, name: str, samples: Sequence[str], tenant: str | None = None) -> None:
        number = next(self._numbers)
        folder = write_peft_folder(self.folder / f"source{number}", seed=number)
        self.pool.add(folder, name=name, samples=list(samples), tenant=tenant)

    def of(self, view: str | None) -> HybridRetriever:
        found = self.views.of(view)
        assert isinstance(found, HybridRetriever)
        return found

    def answers(self, view: str | None) -> list[Any]:
        """All that a view is told, to the last bit."""
        retriever = self.of(view)
        drawn = retriever.map(PROMPTS)
        told = [astuple(each) for each in (*retriever.rank(PROMPTS, 9), *retriever.explain(PROMPTS, 9))]
        points = (drawn.points, drawn.samples, drawn.sample_adapters, drawn.prompts)
        return [told, drawn.adapters, [array.tobytes() for array in points]]

    def names(self, view: str | None, prompt: str = "rhyme a poem about rain") -> list[str]:
        return [hit.adapter for hit in self.of(view).rank([prompt], 99)[0].hits]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Place]]:
    """Makes pools with the shared adapters."""
    made: list[Place] = []

    def make_(encoder: WordEncoder | None = None) -> Place:
        folder = tmp_path / f"place{len(made)}"
        folder.mkdir()
        made.append(Place(folder, encoder))
        for name, samples in SHARED.items():
            made[-1].add(name, samples)
        return made[-1]

    yield make_
    for thread in threading.enumerate():
        if thread.name == "loraretriever-learning":  # it would show up in what the next test has learnt
            thread.join()
    for place in made:
        place.pool.close()


@pytest.fixture
def learnt(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The adapters of each snapshot that is learnt from now on."""
    found: list[list[str]] = []
    original = Snapshot.learnt.__func__  # type: ignore[attr-defined]

    def note(cls: type[Snapshot], members: Sequence[Any], *arguments: Any) -> Snapshot:
        found.append(sorted(member.name for member in members))
        return original(cls, members, *arguments)

    monkeypatch.setattr(Snapshot, "learnt", classmethod(note))
    return found


# Isolation


def with_acme(place: Place) -> Place:
    place.add("acme:poem", POEM, tenant="acme")
    place.add("acme:sql", CLEAN, tenant="acme")
    return place


def with_globex(place: Place) -> Place:
    """Nearly the same adapters as acme's."""
    place.add("globex:poem", POEM, tenant="globex")
    place.add("globex:sql", [*CLEAN[1:], "clean tables"], tenant="globex")
    place.add("prose", [f"{text} in prose" for text in POEM], tenant="globex")
    return place


CHANGES: list[Change] = [
    lambda place: place.add("globex:verse", POEM, tenant="globex"),
    lambda place: place.add("globex:poem", [*POEM, "unheard syllables"], tenant="globex"),
    lambda place: place.add("globex:german", SHARED["german"], tenant="globex"),
    lambda place: place.pool.set_enabled("globex:poem", False),
    lambda place: place.pool.add_samples("globex:sql", PROMPTS),
    lambda place: place.pool.add_samples("globex:sql", ["a poem about rain for all"], counter=True),
    lambda place: place.pool.remove("globex:sql"),
    lambda place: place.add("initech:math", SHARED["math"], tenant="initech"),
]


def test_what_a_view_is_told_does_not_depend_on_other_tenants(
    make: Callable[..., Place], learnt: list[list[str]]
) -> None:
    alone, crowded = with_acme(make()), with_acme(with_globex(make()))
    told = {}
    for view in ("acme", ""):
        alone.of(view).settle()
        told[view] = alone.answers(view)
        crowded.of(None).settle()
        crowded.of("globex").settle()
        crowded.of(view).settle()
        assert crowded.answers(view) == told[view]
    assert told["acme"] != told[""]
    before = len(learnt)
    for change in CHANGES:
        change(crowded)
        for view in ("acme", ""):
            assert crowded.answers(view) == told[view]
    assert len(learnt) == before, "others' changes are no reason to learn"
    for view in (None, "globex"):
        crowded.of(view).settle()
    for view in ("acme", ""):
        crowded.of(view).settle()
        assert crowded.answers(view) == told[view]
        fresh = HybridRetriever(crowded.pool.view(view), lambda name: Moody())
        assert fresh.rank(PROMPTS, 9) == crowded.of(view).rank(PROMPTS, 9)


def test_a_view_that_is_asked_after_the_others_changes_is_told_the_same(make: Callable[..., Place]) -> None:
    alone, crowded = with_acme(make()), make()
    for each in (with_globex, with_acme):
        each(crowded)
    for change in CHANGES:
        change(crowded)
    alone.of("acme").settle()
    crowded.of("acme").settle()
    assert crowded.answers("acme") == alone.answers("acme")


def test_before_anything_is_learnt_a_view_is_told_the_same_too(
    make: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraretriever.retrieve.follower.Follower._begin_learning", lambda self: None)
    alone, crowded = make(), with_globex(make())
    for place in (alone, crowded):
        place.answers("")
        with_acme(place)
    assert crowded.answers("acme") == alone.answers("acme")
    for change in CHANGES:
        change(crowded)
        assert crowded.answers("acme") == alone.answers("acme")


def test_the_same_when_the_log_of_changes_was_cut(make: Callable[..., Place], monkeypatch: pytest.MonkeyPatch) -> None:
    place = with_acme(with_globex(make()))
    place.of("acme").settle()
    told = place.answers("acme")
    CHANGES[0](place)
    monkeypatch.setattr("loraretriever.pool.reading.PoolReader.changes_since", lambda self, change: None)
    assert place.answers("acme") == told


def test_the_papers_formula_keeps_tenants_apart_too(make: Callable[..., Place]) -> None:
    rankings: list[list[Ranking]] = []
    for place in (with_acme(make()), with_acme(with_globex(make()))):
        found = Views(place.pool, lambda reader: PaperRetriever(reader, Moody()))
        assert len(found.of(None).rank(["a poem"], 99)[0].hits) == len(place.pool.list())
        rankings.append(found.of("acme").rank(PROMPTS, 9))
        CHANGES[0](place)
        assert found.of("acme").rank(PROMPTS, 9) == rankings[-1]
    assert rankings[0] == rankings[1]


def test_names_of_others_are_as_unknown_as_names_that_nobody_has(make: Callable[..., Place]) -> None:
    alone, crowded = with_acme(make()), with_acme(with_globex(make()))
    for view, name, part in itertools.product(("acme", ""), ("globex:poem", "prose", "nothing"), ("only", "exclude")):
        errors = []
        for place in (alone, crowded):
            with pytest.raises(AdapterNotFoundError) as error:
                place.of(view).rank(["a poem"], 3, AdapterFilter(**{part: frozenset({name})}))  # type: ignore[arg-type]
            errors.append(str(error.value))
        assert errors[0] == errors[1]


# What is found


def test_each_view_finds_what_it_may_see(make: Callable[..., Place]) -> None:
    place = with_acme(with_globex(make()))
    own = {"acme:poem", "acme:sql"}
    assert set(place.names("acme")) == own | {"german", "math"}, "its own sql hides the shared one"
    assert place.names("acme")[0] == "acme:poem"
    assert set(place.names("")) == set(place.names("nobody")) == set(SHARED)
    assert set(place.names(None)) == own | set(SHARED) | {"globex:poem", "globex:sql", "prose"}
    place.pool.remove("acme:sql")
    assert set(place.names("acme")) == {"acme:poem", "sql", "german", "math"}
    place.pool.remove("acme:poem")
    assert set(place.names("acme")) == set(SHARED)


def test_a_tenants_first_adapter_is_found_at_once(make: Callable[..., Place], learnt: list[list[str]]) -> None:
    """By what is known of the shared ones, before anything is learnt: no request has to wait for that."""
    place = make(WordEncoder())
    assert place.names("acme") and learnt == [sorted(SHARED)]
    with place.of("")._follower._shared.turn:  # nothing is learnt meanwhile
        place.add("acme:poem", POEM, tenant="acme")
        assert place.names("acme")[0] == "acme:poem" and place.names(None)[0] == "acme:poem"
        assert "acme:poem" not in place.names("")
    for view in ("acme", None):
        place.of(view).settle()
        fresh = HybridRetriever(place.pool.view(view), lambda name: WordEncoder())
        assert place.of(view).rank(PROMPTS, 9) == fresh.rank(PROMPTS, 9)
    assert learnt.count(sorted(SHARED)) == 1, "the shared adapters are as they were"


# What is shared


def test_views_of_the_same_adapters_share_all_but_the_prompts_they_remember(make: Callable[..., Place]) -> None:
    place = make(WordEncoder())
    samples = [text for texts in SHARED.values() for text in texts]
    everybody = (None, "", "acme", "globex")
    for view in everybody:
        place.names(view, "a query")
    assert sorted(place.encoder.encoded) == sorted(samples + ["a query"] * 4)
    assert place.loads == 1 and len({id(place.of(view)._follower) for view in everybody}) == 1
    for view in everybody:
        place.names(view, "a query")
        place.of(view).explain(["a query"], 3)
    assert len(place.encoder.encoded) == len(samples) + 4


def test_shared_samples_are_embedded_once(make: Callable[..., Place]) -> None:
    place = with_acme(with_globex(make(WordEncoder())))
    for view in ("acme", "globex", None, ""):
        place.of(view).rank([], 1)
        place.of(view).settle()
    assert len(place.encoder.encoded) == sum(adapter.samples for adapter in place.pool.list())
    assert place.loads == 1


def test_a_new_encoder_is_loaded_once(make: Callable[..., Place]) -> None:
    place = with_acme(with_globex(make()))
    asked: list[str | None] = []

    def load(name: str | None) -> WordEncoder:
        asked.append(name)
        return WordEncoder(str(name))

    found = Views(place.pool, lambda reader: HybridRetriever(reader, load))
    for encoder in (None, "tests/another"):
        place.pool.set_encoder(encoder)
        for view in ("acme", "globex", None, ""):
            retriever = found.of(view)
            assert isinstance(retriever, HybridRetriever)
            retriever.settle()
            assert retriever.rank(["rhyme a poem"], 1) == HybridRetriever(
                place.pool.view(view), lambda name: WordEncoder(str(name))
            ).rank(["rhyme a poem"], 1)
    assert asked == [None, "tests/another"]


def test_the_views_used_last_are_kept(make: Callable[..., Place], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "MAX_VIEWS", 2)
    place = with_acme(with_globex(make()))
    acme, globex = place.of("acme"), place.of("globex")
    assert place.of("acme") is acme
    place.of("")
    assert place.of("acme") is acme and place.of("globex") is not globex
    assert set(place.names("globex")) >= {"globex:poem", "prose"}


def test_a_retriever_that_knows_nothing_of_views_is_made_for_each(make: Callable[..., Place]) -> None:
    class Plain:
        def __init__(self, reader: Reader) -> None:
            self.reader = reader

        def rank(self, prompts: Sequence[str], k: int, wanted: AdapterFilter = AdapterFilter()) -> list[Ranking]:  # noqa: B008
            return []

    place = make()
    found = Views(place.pool, Plain)
    assert found.of(None) is found.of("") is found.of("acme")
    with_acme(place)
    assert len({id(found.of(view)) for view in (None, "", "acme")}) == 3
    assert found.of("globex") is found.of("")
    acme = found.of("acme")
    assert isinstance(acme, Plain) and {each.name for each in acme.reader.list()} >= {"acme:poem", "acme:sql"}


# Threads


def test_many_threads_ask_for_many_views_while_adapters_come_and_go(make: Callable[..., Place]) -> None:
    place = with_acme(with_globex(make()))
    done = threading.Event()
    failures: list[BaseException] = []
    visible = {"acme": {"acme:", ""}, "globex": {"globex:", ""}, "": {""}, None: {"acme:", "globex:", "initech:", ""}}
    counts = dict.fromkeys(itertools.product(visible, range(2)), 0)

    def read(key: tuple[str | None, int]) -> None:
        try:
            while not done.is_set() or not counts[key]:
                for prompt in PROMPTS:
                    found = place.names(key[0], f"{prompt} {counts[key]}")
                    assert {name.rpartition(":")[0] + ":" * (":" in name) for name in found} <= visible[key[0]]
                    assert ("prose" in found) == (key[0] in (None, "globex"))
                counts[key] += 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read, args=(key,), daemon=True) for key in counts]
    for thread in threads:
        thread.start()
    for change in CHANGES:
        change(place)
    place.add("acme:math", SHARED["math"], tenant="acme")
    place.pool.add_samples("sql", ["a query for ever"])
    done.set()
    for thread in threads:
        thread.join(60)
    assert failures == [] and not any(thread.is_alive() for thread in threads) and min(counts.values()) > 0
    for view in visible:
        place.of(view).settle()
