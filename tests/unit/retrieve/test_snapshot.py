"""Model, block and snapshot together: what is found for a prompt in a pool of random clusters."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from retrieve_helpers import cluster, member, random_members, replaced, texts_of, tfidf, unit
from scipy import special
from test_dense import plain_distances, plain_excess
from test_head import plain_head

from loraretriever.retrieve import block, model, snapshot, sparse
from loraretriever.retrieve.dense import DenseModel, Moments
from loraretriever.retrieve.model import DENSE, SPARSE, Member, Parts, learn
from loraretriever.retrieve.snapshot import Ranked, Snapshot
from loraretriever.retrieve.vectors import ExactIndex, build
from loraretriever.types import AdapterFilter

ALL = AdapterFilter()


def ask(found: Snapshot, vectors: np.ndarray, texts: Sequence[str], **wanted: Any) -> list[Ranked]:
    fields = {
        name: frozenset(value) if name in {"exclude", "only", "tags"} else value for name, value in wanted.items()
    }
    return found.rank(vectors, texts, AdapterFilter(**fields))


def queries(count: int, dimension: int = 24, seed: int = 9) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(count, dimension)))


def like(members: Sequence[Member], name: str) -> tuple[np.ndarray, list[str]]:
    """A prompt like a member's samples."""
    (own,) = [each for each in members if each.name == name]
    return unit(own.vectors.astype(np.float32).mean(axis=0, keepdims=True)), [f"please {name}first {name}second now"]


def same(one: Ranked, other: Ranked) -> None:
    assert one.names == other.names and one.fit == pytest.approx(other.fit)
    for field in ("dense", "sparse", "penalty", "logits", "probabilities"):
        assert getattr(one, field) == pytest.approx(getattr(other, field), rel=1e-5, abs=1e-5), field


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven members are many, of which 10 rows are looked at; 3 rows are too many for exact search."""
    monkeypatch.setattr(block, "SCORE_ALL", 6)
    monkeypatch.setattr(block, "CANDIDATES", 10)
    monkeypatch.setattr(block, "build_or_load", lambda points, _: build(points, exact_limit=3 * points.shape[1]))


# Ranking


@pytest.mark.parametrize(
    "parts",
    [
        Parts(clusters=False),
        Parts(dense=False),
        Parts(sparse=False, clusters=False),
        Parts(dense=False, head=False),
        Parts(head=False, clusters=False),
    ],
    ids=["hybrid", "head", "dense", "centroids", "dense+centroids"],
)
def test_ranking_is_the_plain_formula(parts: Parts) -> None:
    rng = np.random.default_rng(3)
    sizes = [6, 1, 4, 12, 2, 9, 6]
    texts = [texts_of(rng, [f"m{i:03}first", f"m{i:03}second"], size) for i, size in enumerate(sizes)]
    members = [
        replaced(each, vectors=each.vectors[: len(own)], terms=sparse.count_terms(own))
        for each, own in zip(random_members(7, samples=12), texts, strict=True)
    ]
    samples = [text for own in texts for text in own]
    vectors = np.concatenate([each.vectors for each in members]).astype(np.float64)
    owners = np.repeat(np.arange(7), sizes)
    prompts = ["please m002first the text", "m004first m004second m001first", "answer this now", "unheard of"]
    points = queries(4)

    rows, terms = tfidf(samples, prompts)
    # scikit-learn leaves out what no sample has; here it makes the known terms weigh less, and the head keeps to 1/C.
    lengths = _known_share(samples, prompts)
    terms = terms * lengths[:, None]
    if parts.head:
        words = plain_head(rows, owners, 7, terms)
    else:
        sums = np.stack([rows[owners == owner].sum(axis=0) for owner in range(7)])
        words = terms @ (sums / np.linalg.norm(sums, axis=1, keepdims=True)).T
    expected = -DENSE / 2 * plain_distances(vectors, owners, points) if parts.dense else np.zeros((4, 7))
    if parts.sparse:
        expected = expected + SPARSE * words
    calibration = learn(members, parts).calibration
    expected = expected / calibration.temperature
    means = np.stack([vectors[owners == owner].mean(axis=0) for owner in range(7)])
    cosines = points @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T

    for row, found in enumerate(ask(Snapshot.learnt(members, parts), points, prompts)):
        order = [int(name[1:]) for name in found.names]
        assert sorted(order) == list(range(7))
        best = expected[row, order]
        assert (np.diff(best) <= 1e-3).all(), "best first"
        assert found.logits - found.logits[0] == pytest.approx(best - best[0], abs=5e-3)
        fit = special.expit(calibration.slope * (cosines[row].max() - calibration.middle))
        assert found.fit == pytest.approx(fit, abs=1e-3)
        assert found.probabilities == pytest.approx(fit * special.softmax(best), abs=1e-3)


def _known_share(samples: Sequence[str], prompts: Sequence[str]) -> np.ndarray:
    """The length of the known terms' part of each prompt's row."""
    counted = sparse.count_terms(samples)
    rows = sparse.TermWeights(counted)(sparse.count_terms(prompts)).toarray()
    known = np.unique(counted.indices)
    return np.asarray(np.linalg.norm(rows[:, known], axis=1))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_probabilities_share_out_the_fit(data: st.DataObject) -> None:
    """For any pool, parts, filter and prompt: sorted, in [0, 1], together no more than the fit."""
    count = data.draw(st.integers(1, 9), "members")
    members = random_members(count, 8, data.draw(st.integers(1, 9)), data.draw(st.integers(0, 99)))
    dense, with_sparse = data.draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    parts = Parts(dense, with_sparse, data.draw(st.booleans()), data.draw(st.booleans()))
    found = Snapshot.learnt(members, parts)
    new = random_members(data.draw(st.integers(0, 2)), 8, 3, 100, prefix="new")
    found = found.changed({each.name: each for each in new}, set()) or found
    text = data.draw(st.text(st.characters(), max_size=60), "text")
    scale = data.draw(st.sampled_from([0.0, 1.0]), "length of the prompt's vector")
    wanted = data.draw(st.sets(st.sampled_from([each.name for each in members])), "excluded")
    (ranked,) = ask(found, scale * queries(1, 8, data.draw(st.integers(0, 99))), [text], exclude=wanted)
    assert len(ranked.names) == len(set(ranked.names)) == count + len(new) - len(wanted)
    assert not wanted & set(ranked.names)
    assert 0 <= ranked.fit <= 1
    assert (ranked.probabilities >= 0).all() and ranked.probabilities.sum() <= ranked.fit + 1e-6
    assert (np.diff(ranked.probabilities) <= 1e-12).all() and (np.diff(ranked.logits) <= 0).all()
    assert ranked.logits == pytest.approx(ranked.dense + ranked.sparse - ranked.penalty, rel=1e-4, abs=1e-3)
    assert (ranked.penalty >= 0).all()


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_members_and_few_samples(count: int, samples: int) -> None:
    members = random_members(count, samples=samples, spread=0.2)
    found = Snapshot.learnt(members, Parts())
    for each in members:
        (ranked,) = ask(found, *like(members, each.name))
        assert ranked.names[0] == each.name and len(ranked.names) == count
        assert ranked.fit > 0.5, "its own samples are very near"
        assert np.isfinite(ranked.logits).all() and ranked.probabilities.sum() == pytest.approx(ranked.fit)
    assert 0 <= found.threshold(0.01, 0.07) <= 1


def test_no_members() -> None:
    found = Snapshot.learnt([], Parts())
    (ranked,) = ask(found, queries(1), ["hello"])
    assert ranked.names == [] and ranked.fit == 0.0
    assert found.changed({}, {"gone"}) is None


def test_the_order_in_which_members_come_does_not_matter() -> None:
    members = random_members(6)
    one = Snapshot.learnt(members, Parts())
    other = Snapshot.learnt(members[::-1], Parts())
    for first, second in zip(
        ask(one, queries(3), ["a", "b", "c"]), ask(other, queries(3), ["a", "b", "c"]), strict=True
    ):
        same(first, second)


# Two means


def test_an_adapter_of_two_tasks_gets_two_means_and_is_found_better() -> None:
    rng = np.random.default_rng(0)
    members = random_members(5, 24, 12, spread=0.4)
    tasks = [cluster(rng, 6, 24, 0.4), cluster(rng, 6, 24, 0.4)]
    two = member("two", np.concatenate(tasks), ["the text"] * 12)
    single = member("one", cluster(rng, 12, 24, 0.4), ["the text"] * 12)
    everything = [*members, single, two]
    learnt = learn(sorted(everything, key=lambda each: each.name), Parts(sparse=False))
    assert learnt.halved == {"two"}
    assert learnt.labels(two).tolist() == [0] * 6 + [1] * 6
    assert not learnt.labels(single).any()
    assert len(learnt.dense.means) == 8
    probabilities = {}
    for clusters in (False, True):
        found = Snapshot.learnt(everything, Parts(sparse=False, clusters=clusters))
        prompts = unit(np.stack([task.mean(axis=0) for task in tasks]))
        ranked = ask(found, prompts, ["a", "b"])
        probabilities[clusters] = [each.probabilities[each.names.index("two")] for each in ranked]
        if clusters:
            assert [each.names[0] for each in ranked] == ["two", "two"]
    assert min(np.array(probabilities[True]) - probabilities[False]) > 0.05, "the mean between them is near neither"


def test_a_members_score_is_that_of_its_nearest_mean() -> None:
    rng = np.random.default_rng(0)
    two = member("two", np.concatenate([cluster(rng, 6, 24, 0.4), cluster(rng, 6, 24, 0.4)]))
    members = [*random_members(5, 24, 12, spread=0.4), two]
    learnt = learn(members, Parts())
    assert learnt.halved == {"two"}
    means = np.stack([two.vectors[half : half + 6].mean(axis=0, dtype=np.float64) for half in (0, 6)])
    vectors = np.concatenate([each.vectors for each in members]).astype(np.float64)
    excess = plain_excess(vectors, np.repeat(np.arange(7), [12] * 5 + [6, 6]))
    for query in queries(4):
        point = learnt.dense.project(query[None])
        terms = learnt.weights.read("a")
        scored = block.Block(members, learnt).score(block.Query(query, point[0], terms), None)
        squares = ((learnt.dense.project(means) - point) ** 2).sum(axis=1) + excess * (1 - 1 / 6)
        assert scored.dense[5] == pytest.approx(-DENSE / 2 * squares.min(), rel=1e-4)
        assert scored.cosines[5] == pytest.approx((unit(means) @ query).max(), abs=1e-5)


# Filters


def placed(count: int = 40) -> list[Member]:
    """Every member has tags by its number; a fifth is shared, the others belong to one of four tenants."""
    return [
        replaced(
            each,
            tags=frozenset(f"by{n}" for n in (2, 3) if i % n == 0),
            tenant=None if i % 5 == 0 else f"t{i % 5}",
            base_model="large" if i % 4 == 0 else "base",
        )
        for i, each in enumerate(random_members(count, samples=3))
    ]


FILTERS: list[dict[str, Any]] = [
    {},
    {"exclude": {"m001", "m007"}},
    {"only": {"m001", "m007", "m030"}},
    {"only": set()},
    {"only": {"m001"}, "exclude": {"m001"}},
    {"tags": {"by2"}},
    {"tags": {"by2", "by3"}},
    {"tags": {"by2", "nothing has this"}},
    {"tenant": "t3"},
    {"tenant": "nobody"},
    {"tenant": ""},
    {"base_model": "large"},
    {"base_model": "unheard of"},
    {"tags": {"by3"}, "tenant": "t1", "base_model": "base", "exclude": {"m006"}},
    {"tags": {"by3"}, "tenant": "t1", "only": {"m006", "m009", "m021", "m000"}},
    {"only": {"no such name", "m003"}, "exclude": {"no such name either"}},
]


def passes(each: Member, wanted: dict[str, Any]) -> bool:
    return (
        each.name not in wanted.get("exclude", ())
        and each.name in wanted.get("only", {each.name})
        and set(wanted.get("tags", ())) <= each.tags
        and ("tenant" not in wanted or each.tenant in (None, wanted["tenant"]))
        and wanted.get("base_model") in (None, each.base_model)
    )


@pytest.mark.parametrize("wanted", FILTERS, ids=str)
@pytest.mark.parametrize("split", [0, 15], ids=["learnt", "some-added"])
def test_filters(wanted: dict[str, Any], split: int) -> None:
    members = placed()
    found = Snapshot.learnt(members[split:], Parts())
    if split:
        found = found.changed({each.name: each for each in members[:split]}, set()) or pytest.fail("not followed")
    for _ in range(2):  # the second time from what was remembered
        (ranked,) = ask(found, queries(1), ["m001first m007second"], **wanted)
        assert set(ranked.names) == {each.name for each in members if passes(each, wanted)}
        if ranked.names:
            assert ranked.probabilities.sum() == pytest.approx(ranked.fit)
        else:
            assert ranked.fit == 0.0


@pytest.mark.parametrize("wanted", FILTERS, ids=str)
def test_filters_apply_inside_the_search(many: None, wanted: dict[str, Any]) -> None:
    """Of many members: the ten nearest of those that pass, not those of the ten nearest that pass."""
    members = placed()
    allowed = [each for each in members if passes(each, wanted)]
    point = queries(1)
    (ranked,) = ask(Snapshot.learnt(members, Parts(sparse=False)), point, ["hello"], **wanted)
    if len(allowed) <= 10:
        assert set(ranked.names) == {each.name for each in allowed}
    else:
        assert len(ranked.names) == 10 and set(ranked.names) <= {each.name for each in allowed}


def test_a_tenant_with_three_adapters_among_many_gets_all_three(many: None) -> None:
    members = random_members(300, samples=2)
    own = {"m010", "m150", "m299"}
    members = [replaced(each, tenant="us" if each.name in own else "them") for each in members]
    found = Snapshot.learnt(members, Parts())
    for ranked in ask(found, queries(8), ["hello"] * 8, tenant="us"):
        assert set(ranked.names) == own
    for name in own:
        (ranked,) = ask(found, *like(members, name), tenant="us")
        assert ranked.names[0] == name


def test_many_filters_by_many_threads(many: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered of filters is forgotten while others read it."""
    monkeypatch.setattr(block._Places, "_REMEMBERED", 1)
    members = random_members(12, samples=2)
    found = block.Block(members, learn(members, Parts()))
    failures: list[BaseException] = []

    def work(start: int) -> None:
        try:
            for i in range(400):
                name = members[(start + i) % 12].name
                allowed = found.allowed(AdapterFilter(only=frozenset({name})))
                assert allowed is not None and allowed.tolist() == [(start + i) % 12]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# Many members


@pytest.mark.parametrize("parts", [Parts(), Parts(head=False), Parts(dense=False)], ids=["head", "centroids", "words"])
def test_many_are_scored_as_few(monkeypatch: pytest.MonkeyPatch, parts: Parts) -> None:
    """Of many members those nearest in the dense space, and these exactly as if there were few."""
    rng = np.random.default_rng(2)
    members = random_members(30)
    two = np.concatenate([cluster(rng, 6, 24, 0.3), cluster(rng, 6, 24, 0.3)])
    counters = cluster(rng, 2, 24)
    members += [member("two", two), replaced(members[3], name="c", counter_vectors=counters.astype(np.float16),
                                             counter_terms=sparse.count_terms(["a text", "the answer"]))]  # fmt: skip
    points, texts = queries(5), ["m003first the text", "answer this", "now", "m010second", "please"]
    few = ask(Snapshot.learnt(members, parts), points, texts)
    monkeypatch.setattr(block, "SCORE_ALL", 6)
    monkeypatch.setattr(block, "CANDIDATES", 10)
    built = []
    monkeypatch.setattr(block, "build_or_load", lambda vectors, _: built.append(ExactIndex(vectors)) or built[-1])
    some = ask(Snapshot.learnt(members, parts), points, texts)
    assert len(built) == 1 and built[0].rows in (32, 33)
    for whole, part in zip(few, some, strict=True):
        assert 9 <= len(part.names) <= 10
        places = [whole.names.index(name) for name in part.names]
        for field in ("sparse", "penalty", "logits", "dense"):
            assert getattr(part, field) == pytest.approx(getattr(whole, field)[places], rel=1e-3, abs=1e-3), field
        assert part.probabilities.sum() == pytest.approx(part.fit)
        if parts.dense:
            nearest = np.argsort(-whole.dense, kind="stable")[: len(part.names)]
            assert set(part.names) == {whole.names[i] for i in nearest}


def test_both_means_of_a_member_are_looked_at_among_many(many: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    tasks = [cluster(rng, 6, 24, 0.4), cluster(rng, 6, 24, 0.4)]
    members = [*random_members(14, 24, 12, spread=0.4), member("m000two", np.concatenate(tasks))]
    assert learn(sorted(members, key=lambda each: each.name), Parts()).halved == {"m000two"}
    prompts = unit(np.stack([task.mean(axis=0) for task in tasks]))
    some = ask(Snapshot.learnt(members, Parts()), prompts, ["a", "b"], exclude={"m003"})
    monkeypatch.setattr(block, "SCORE_ALL", 100)
    whole = ask(Snapshot.learnt(members, Parts()), prompts, ["a", "b"], exclude={"m003"})
    for part, all_ in zip(some, whole, strict=True):
        assert part.names[0] == all_.names[0] == "m000two" and "m003" not in part.names
        assert part.logits == pytest.approx(all_.logits[[all_.names.index(name) for name in part.names]], abs=1e-3)


def test_many_samples_are_learnt_from_without_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    members = random_members(20, samples=5)
    monkeypatch.setattr(model, "MAX_SAMPLES", 99)
    captured = []
    monkeypatch.setattr(model, "calibrate", lambda *scores: captured.append(scores) or model.Calibration())
    learnt = learn(members, Parts())
    vectors = np.concatenate([each.vectors for each in members]).astype(np.float32)
    owners = np.repeat(np.arange(20), 5)
    whole = DenseModel(Moments.of(vectors, owners))
    gaps = whole.project(whole.means)
    assert learnt.head is None and learnt.halved == frozenset()
    assert learnt.dense.means == pytest.approx(whole.means, abs=1e-6)
    found = learnt.dense.project(learnt.dense.means)
    assert (found - found[0]) @ (found - found[0]).T == pytest.approx((gaps - gaps[0]) @ (gaps - gaps[0]).T, rel=1e-2)
    ((logits, own, cosines),) = captured
    chosen = np.unique(own)
    assert len(chosen) == 9 and logits.shape == cosines.shape == (45, 20), (
        "nine members of five make 49 samples at most"
    )
    rows = np.isin(owners, chosen)
    assert (own == owners[rows]).all()
    assert cosines == pytest.approx(model.left_out_cosines(vectors, owners, 20)[rows], abs=2e-3)
    without_words = learn(members, Parts(sparse=False)) and captured[-1][0]
    points = learnt.dense.project(vectors[rows])
    squares = ((points - learnt.dense.project(learnt.dense.means)[own]) ** 2).sum(axis=1)
    # The mean of the other four is that much further away, and placed as the mean of four.
    squares = squares * (5 / 4) ** 2 + plain_excess(vectors.astype(np.float64), owners) * (1 - 1 / 4)
    expected = -DENSE / 2 * squares
    assert without_words[np.arange(45), own] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    for each in members[::4]:
        assert ask(Snapshot.learnt(members, Parts()), *like(members, each.name))[0].names[0] == each.name


def test_left_out_cosines_are_the_plain_formula() -> None:
    rng = np.random.default_rng(4)
    vectors = np.concatenate([cluster(rng, size, 10) for size in (3, 5, 2)])
    owners = np.repeat([0, 1, 2], [3, 5, 2])
    found = model.left_out_cosines(vectors, owners, 3)
    for i, vector in enumerate(vectors):
        for owner in range(3):
            mean = vectors[(owners == owner) & (np.arange(10) != i)].mean(axis=0)
            assert found[i, owner] == pytest.approx(vector @ mean / np.linalg.norm(mean), abs=1e-5)


def test_left_out_cosines_are_cosines_even_of_strange_samples() -> None:
    """In half precision a sample's length is not quite 1, and what it leaves may have no length at all."""
    x = unit(np.random.default_rng(0).normal(size=(50, 33)))
    for scale in (0.999, 1.001):
        vectors = np.concatenate([scale * x, np.zeros_like(x)]).astype(np.float32)
        owners = np.tile(np.arange(50), 2)
        assert np.abs(model.left_out_cosines(vectors, owners, 50)).max() <= 1


# Changes


@pytest.mark.parametrize("parts", [Parts(), Parts(head=False)], ids=["head", "centroids"])
def test_a_change_is_seen_at_once_and_learnt_later(parts: Parts) -> None:
    members = {each.name: each for each in random_members(8)}
    found = Snapshot.learnt(list(members.values()), parts)

    def change(new: Sequence[Member], gone: Sequence[str]) -> None:
        nonlocal found
        changed = found.changed({each.name: each for each in new}, set(gone))
        assert changed is not None
        found = changed
        for name in gone:
            del members[name]
        members.update({each.name: each for each in new})
        for name in members:
            (ranked,) = ask(found, *like(list(members.values()), name))
            assert ranked.names[0] == name and sorted(ranked.names) == sorted(members)
            assert ranked.probabilities.sum() == pytest.approx(ranked.fit)

    new = random_members(3, seed=7, prefix="n")
    change(new, [])
    change([], ["m001", "n001"])
    moved = random_members(1, seed=8, prefix="m")[0]
    change([replaced(moved, name="m002", terms=members["m002"].terms)], [])
    change([replaced(new[1], tags=frozenset({"back"}))], ["m003"])
    assert ask(found, queries(1), ["hello"], tags={"back"})[0].names == ["n001"]
    assert ask(found, queries(1), ["hello"], only={"m001", "m002", "n000"}, exclude={"n000"})[0].names == ["m002"]
    again = Snapshot.learnt(list(members.values()), parts)
    other = Snapshot.learnt(sorted(members.values(), key=lambda each: each.name), parts)
    for one, two in zip(ask(again, queries(2), ["a", "b"]), ask(other, queries(2), ["a", "b"]), strict=True):
        same(one, two)


def test_until_it_is_learnt_anew_centroids_speak_for_all() -> None:
    """The head knows nothing of what was added: old members must not have it either. What is removed leaves it."""
    members = random_members(6)
    (with_head,), (with_centroids,) = (
        ask(Snapshot.learnt(members, parts), queries(1), ["m001first m004first"])
        for parts in (Parts(clusters=False), Parts(head=False, clusters=False))
    )
    temperatures = [learn(members, Parts(clusters=False, head=head)).calibration.temperature for head in (True, False)]
    found = Snapshot.learnt(members, Parts(clusters=False))
    added = found.changed({"new": replaced(random_members(1, seed=5)[0], name="new")}, set())
    removed = found.changed({}, {"m005"})
    assert added is not None and removed is not None
    (after,), (less,) = (ask(each, queries(1), ["m001first m004first"]) for each in (added, removed))
    for name in with_head.names[:5]:
        plain = with_centroids.sparse[with_centroids.names.index(name)] * temperatures[1]
        assert after.sparse[after.names.index(name)] * temperatures[0] == pytest.approx(plain, abs=1e-4)
        if name != "m005":
            headed = with_head.sparse[with_head.names.index(name)]
            assert less.sparse[less.names.index(name)] == pytest.approx(headed, abs=1e-5)


def test_the_old_snapshot_stays_as_it_was() -> None:
    found = Snapshot.learnt(random_members(5), Parts())
    before = ask(found, queries(1), ["m001first"])[0]
    found.changed({"new": random_members(1, seed=5)[0]}, {"m001"})
    same(ask(found, queries(1), ["m001first"])[0], before)


def test_too_many_changes_must_be_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "MAX_ADDED", 3)
    found = Snapshot.learnt(random_members(5), Parts())
    new = {each.name: each for each in random_members(4, prefix="n")}
    assert found.changed(new, set()) is None
    first = found.changed(dict(list(new.items())[:3]), set())
    assert first is not None
    assert first.changed(dict(list(new.items())[2:3]), set()) is not None, "revised, not one more"
    assert first.changed(dict(list(new.items())[3:]), set()) is None
    assert first.changed(dict(list(new.items())[3:]), {"n000"}) is not None
    assert found.changed({}, {f"m00{i}" for i in range(5)}) is None, "nothing is left"


def test_all_old_members_may_go_when_there_are_new_ones(many: None) -> None:
    for count in (5, 12):
        members = random_members(count)
        new = {each.name: each for each in random_members(2, seed=3, prefix="n")}
        found = Snapshot.learnt(members, Parts()).changed(new, {each.name for each in members})
        assert found is not None
        assert sorted(ask(found, queries(1), ["hello"])[0].names) == ["n000", "n001"]


# Counter samples


@pytest.mark.parametrize("parts", [Parts(), Parts(sparse=False), Parts(dense=False), Parts(head=False)], ids=str)
def test_a_counter_sample_pushes_its_adapter_down_for_that_prompt(parts: Parts) -> None:
    members = random_members(6)
    one, other = (like(members, name)[0] for name in ("m002", "m004"))
    vector, texts = unit(0.6 * one + 0.5 * other), ["m002first please m004first answer"]
    found = Snapshot.learnt(members, parts)
    members[2] = replaced(
        members[2], counter_vectors=vector.astype(np.float16), counter_terms=sparse.count_terms(texts)
    )
    after = Snapshot.learnt(members, parts)
    (before,), (ranked,) = ask(found, vector, texts), ask(after, vector, texts)
    place = ranked.names.index("m002")
    assert before.names[0] == "m002" and ranked.names[0] == "m004" and ranked.probabilities[place] < 0.4 * ranked.fit
    assert (np.delete(ranked.penalty, place) == 0).all(), "the others lose nothing"
    rest = [name for name in before.names if name != "m002"]
    assert [name for name in ranked.names if name != "m002"] == rest
    for name in rest:
        logits = before.logits[before.names.index(name)], ranked.logits[ranked.names.index(name)]
        assert logits[0] == pytest.approx(logits[1], abs=1e-4)
    far, words = like(members, "m004")
    (before,), (ranked,) = ask(found, far, words), ask(after, far, words)
    assert before.names[0] == ranked.names[0] == "m004", "other prompts are as they were"
    assert before.probabilities[0] == pytest.approx(ranked.probabilities[0], abs=0.1)


def test_the_penalty_is_the_formula() -> None:
    """logit' = logit - ln(1 + exp(max_c logit_c - logit)), a counter sample scored as an adapter of one sample."""
    members = random_members(5)
    counters = cluster(np.random.default_rng(0), 3, 24)
    texts = ["m001first the text", "answer", "please m001second"]
    members[1] = replaced(
        members[1], counter_vectors=counters.astype(np.float16), counter_terms=sparse.count_terms(texts)
    )
    learnt = learn(members, Parts())
    point, prompt = queries(1), ["m001first please answer"]
    (ranked,) = ask(Snapshot.learnt(members, Parts()), point, prompt)
    gaps = learnt.dense.project(counters.astype(np.float16).astype(np.float32)) - learnt.dense.project(point)
    rows = learnt.weights(sparse.count_terms(prompt)), learnt.weights(sparse.count_terms(texts))
    against = -DENSE / 2 * (gaps**2).sum(axis=1) + SPARSE * sparse.products(rows[0], rows[1].T.tocsr())[0]
    place, temperature = ranked.names.index("m001"), learnt.calibration.temperature
    logit = (ranked.dense + ranked.sparse)[place] * temperature
    assert ranked.penalty[place] * temperature == pytest.approx(np.log1p(np.exp(against.max() - logit)), rel=1e-3)


def test_the_very_prompt_of_a_counter_sample_is_refused_however_typical_it_is() -> None:
    members = random_members(6)
    vector, texts = like(members, "m002")
    assert ask(Snapshot.learnt(members, Parts()), vector, texts)[0].names[0] == "m002"
    members[2] = replaced(
        members[2], counter_vectors=vector.astype(np.float16), counter_terms=sparse.count_terms(list(texts))
    )
    (ranked,) = ask(Snapshot.learnt(members, Parts()), vector, texts)
    assert ranked.names[0] != "m002"
