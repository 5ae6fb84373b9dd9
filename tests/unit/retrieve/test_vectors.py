from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from loraretriever.errors import InvalidInputError
from loraretriever.retrieve import approximate, vectors
from loraretriever.retrieve.approximate import ApproximateIndex
from loraretriever.retrieve.nearest import Floats, Ints
from loraretriever.retrieve.vectors import STAMP_FILE, ExactIndex, VectorIndex, build, load, save

DIMENSION = 24
SIZES = (0, 1, 5, 1000)
MASKS = ("all", "none", "one", "few", "half", "most")


def clustered(rows: int, seed: int = 0, topics: int = 20) -> Floats:
    """Rows around topics, as adapters are."""
    rng = np.random.default_rng(seed)
    centres = 3 * np.random.default_rng(7).normal(size=(topics, DIMENSION))
    drawn = centres[rng.integers(topics, size=rows)] + 0.7 * rng.normal(size=(rows, DIMENSION))
    return drawn.astype(np.float32)


def mask_of(kind: str, rows: int) -> np.ndarray:
    share = {"all": 1.0, "none": 0.0, "one": 0.0, "few": 0.03, "half": 0.5, "most": 0.9}[kind]
    mask = np.random.default_rng(3).random(rows) < share
    if kind == "one" and rows:
        mask[rows // 2] = True
    return mask


def plain_formula(rows: Floats, queries: Floats, k: int, mask: np.ndarray) -> tuple[Ints, Floats]:
    """Every difference in float64, a stable sort, and what is left over filled up."""
    found = np.full((len(queries), k), -1, dtype=np.int64)
    distance = np.full((len(queries), k), np.inf, dtype=np.float32)
    allowed = np.flatnonzero(mask)
    for i, query in enumerate(queries.astype(np.float64)):
        squares = ((rows[allowed] - query) ** 2).sum(axis=1)
        order = np.argsort(squares, kind="stable")[:k]
        found[i, : len(order)], distance[i, : len(order)] = allowed[order], squares[order]
    return found, distance


def recall(found: Ints, expected: Ints) -> float:
    hits = [len(set(a) & set(b)) / max(1, len(set(b))) for a, b in zip(found.tolist(), expected.tolist(), strict=True)]
    return float(np.mean(hits))


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousand rows then take the ways of a million: lists chosen by rank, candidates cut."""
    monkeypatch.setattr(approximate, "LEAST", 120)
    monkeypatch.setattr(approximate, "PER_RESULT", 8)
    monkeypatch.setattr(approximate, "MOST", 500)


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("batch", [1, 3, 40])
@pytest.mark.parametrize("k", [1, 8, 64])
def test_exact_is_the_plain_formula(rows: int, kind: str, batch: int, k: int) -> None:
    stored, queries, mask = clustered(rows), clustered(batch, seed=1), mask_of(kind, rows)
    expected, expected_distance = plain_formula(stored, queries, k, mask)
    index = ExactIndex(stored)
    for allowed in (mask, np.flatnonzero(mask), *([None] if kind == "all" else [])):
        found, distance = index.search(queries, k, allowed)
        assert found.dtype == np.int64 and distance.dtype == np.float32
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(distance, expected_distance, rtol=1e-5)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("k", [1, 8, 64, 700])
def test_approximate_is_near_to_exact_and_complete(rows: int, kind: str, k: int) -> None:
    stored, queries, mask = clustered(rows), clustered(30, seed=1), mask_of(kind, rows)
    expected, expected_distance = ExactIndex(stored).search(queries, k, mask)
    index = ApproximateIndex.build(stored)
    for allowed in (mask, np.flatnonzero(mask), *([None] if kind == "all" else [])):
        found, distance = index.search(queries, k, allowed)
        assert ((found >= 0) == (expected >= 0)).all(), "k results wherever k rows are allowed"
        assert mask[found[found >= 0]].all()
        assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in found)
        assert (np.diff(np.where(np.isinf(distance), np.float32(3e38), distance)) >= 0).all()
        assert recall(found, expected) >= 0.95
        same = (found == expected) & (found >= 0)
        np.testing.assert_allclose(distance[same], expected_distance[same], rtol=1e-6)


@pytest.mark.usefixtures("small_steps")
def test_allowed_rows_far_from_the_query_are_found() -> None:
    """All allowed rows are of topics that the nearest lists do not hold, and they are too many to be gathered."""
    stored = clustered(2000)
    query = stored[:1]
    order = np.argsort(((stored - query) ** 2).sum(axis=1))
    far = np.sort(order[-600:])
    found, _ = ApproximateIndex.build(stored).search(query, 8, far)
    assert set(found[0]) <= set(far.tolist())
    assert recall(found, ExactIndex(stored).search(query, 8, far)[0]) >= 0.8


@pytest.mark.parametrize("batch", [1, 20])
@pytest.mark.parametrize("make", [ExactIndex, ApproximateIndex.build], ids=["exact", "approximate"])
def test_ties_are_in_the_order_of_rows(make, batch: int) -> None:
    pair = clustered(2)
    stored = np.tile(pair, (400, 1))
    found, distance = make(stored).search(np.repeat(pair[:1], batch, axis=0), 6)
    assert (found == [0, 2, 4, 6, 8, 10]).all()
    assert (distance == 0).all()


def test_distances_far_from_the_origin_do_not_cancel() -> None:
    """|x|² - 2xq + |q|² alone would be off by more than the distances are."""
    stored = clustered(500, topics=1) + np.float32(1000)
    queries = clustered(5, seed=1, topics=1) + np.float32(1000)
    expected, expected_distance = plain_formula(stored, queries, 8, np.ones(500, dtype=bool))
    for index in (ExactIndex(stored), ApproximateIndex.build(stored)):
        found, distance = index.search(queries, 8)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(distance, expected_distance, rtol=1e-3)


def test_build_chooses_by_size() -> None:
    stored = clustered(100)
    assert isinstance(build(stored), ExactIndex)
    assert isinstance(build(stored, exact_limit=stored.size), ExactIndex)
    assert isinstance(build(stored, exact_limit=stored.size - 1), ApproximateIndex)
    assert isinstance(build(stored[:0], exact_limit=0), ExactIndex)


def test_same_seed_same_index() -> None:
    stored, queries = clustered(1000), clustered(9, seed=1)
    one, two = (build(stored, exact_limit=0, seed=5) for _ in range(2))
    for key, array in one.arrays().items():
        np.testing.assert_array_equal(array, two.arrays()[key])
    np.testing.assert_array_equal(one.search(queries, 5)[0], two.search(queries, 5)[0])


def test_float64_and_strided_input() -> None:
    wide = np.repeat(clustered(50).astype(np.float64), 2, axis=0)
    found, _ = ExactIndex(wide[::2]).search(wide[::2][:3], 1)
    assert found[:, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("make", [ExactIndex, ApproximateIndex.build], ids=["exact", "approximate"])
class TestRefused:
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
    def test_vectors_that_are_not_finite(self, make, value: float) -> None:
        stored = clustered(9)
        stored[4, 2] = value
        with pytest.raises(InvalidInputError, match="vector 4 holds NaN"):
            make(stored)

    @pytest.mark.parametrize("stored", [np.zeros(3), np.zeros((3, 0)), np.zeros((2, 3, 4)), np.array([["a"]])])
    def test_vectors_that_are_no_matrix(self, make, stored: np.ndarray) -> None:
        with pytest.raises(InvalidInputError, match="expected numbers of shape"):
            make(stored)

    @pytest.mark.parametrize("queries", [np.zeros(DIMENSION), np.zeros((2, DIMENSION + 1)), np.zeros((1, 1))])
    def test_queries_of_another_shape(self, make, queries: np.ndarray) -> None:
        with pytest.raises(InvalidInputError, match=rf"expected numbers of shape \(queries, {DIMENSION}\)"):
            make(clustered(9)).search(queries, 1)

    def test_queries_that_are_not_finite(self, make) -> None:
        with pytest.raises(InvalidInputError, match="a query holds NaN"):
            make(clustered(9)).search(np.full((1, DIMENSION), np.nan), 1)

    def test_k(self, make) -> None:
        with pytest.raises(InvalidInputError, match="k is 0"):
            make(clustered(9)).search(clustered(1), 0)

    @pytest.mark.parametrize(
        "allowed",
        [np.ones(8, bool), np.array([3, 2]), np.array([2, 2]), np.array([-1, 3]), np.array([9]), np.array([0.5])],
        ids=["short mask", "descending", "twice", "negative", "too large", "no number of a row"],
    )
    def test_allowed(self, make, allowed: np.ndarray) -> None:
        with pytest.raises(InvalidInputError, match="expected a mask of shape"):
            make(clustered(9)).search(clustered(1), 1, allowed)


@pytest.mark.parametrize("exact_limit", [0, 10**9], ids=["approximate", "exact"])
class TestKept:
    @pytest.mark.parametrize("rows", [1, 5, 1000])
    def test_comes_back(self, tmp_path: Path, exact_limit: int, rows: int) -> None:
        index, queries = build(clustered(rows), exact_limit), clustered(7, seed=1)
        save(index, tmp_path / "new" / "folder", tag="a")
        again = load(tmp_path / "new" / "folder", tag="a")
        assert type(again) is type(index)
        assert (again.rows, again.dimension) == (rows, DIMENSION)
        for one, two in zip(index.search(queries, 8), again.search(queries, 8), strict=True):
            np.testing.assert_array_equal(one, two)

    def test_another_tag_or_nothing_kept(self, tmp_path: Path, exact_limit: int) -> None:
        assert load(tmp_path) is None
        assert load(tmp_path / "missing") is None
        save(build(clustered(20), exact_limit), tmp_path, tag="a")
        assert load(tmp_path, tag="b") is None
        assert load(tmp_path, tag="a") is not None

    def test_the_next_one_replaces_it(self, tmp_path: Path, exact_limit: int) -> None:
        save(build(clustered(20), exact_limit), tmp_path)
        first = load(tmp_path)
        (tmp_path / "other.bin").touch()
        (tmp_path / "vectors-0123456789abcdef.bin").write_bytes(b"of a process that was killed")
        save(build(clustered(30), exact_limit), tmp_path)
        assert load(tmp_path).rows == 30
        assert first.search(clustered(1), 3)[0].shape == (1, 3), "who has mapped the old one keeps it"
        assert len(list(tmp_path.glob("vectors-*.bin"))) == 1
        assert (tmp_path / "other.bin").exists()

    def test_killed_while_saving(self, tmp_path: Path, exact_limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
        save(build(clustered(20), exact_limit), tmp_path)

        def die(*_: object) -> None:
            raise OSError("no space left")

        monkeypatch.setattr(vectors, "write_file", die)
        with pytest.raises(OSError, match="no space left"):
            save(build(clustered(30), exact_limit), tmp_path)
        assert load(tmp_path).rows == 20
        assert len(list(tmp_path.glob("vectors-*.bin"))) == 1

    def test_damaged_data(self, tmp_path: Path, exact_limit: int) -> None:
        save(build(clustered(60), exact_limit), tmp_path)
        (file,) = tmp_path.glob("vectors-*.bin")
        whole = file.read_bytes()
        flipped = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in (0, len(whole) // 2, len(whole) - 1)]
        for content in (b"", whole[:-1], whole[: len(whole) // 2], whole + b"\0", *flipped):
            file.write_bytes(content)
            assert load(tmp_path) is None
        file.write_bytes(whole)
        assert load(tmp_path) is not None
        file.unlink()
        assert load(tmp_path) is None
        os.mkfifo(file)
        assert load(tmp_path) is None

    @pytest.mark.parametrize(
        "change",
        [
            {"version": 2},
            {"version": "1"},
            {"format": "another"},
            {"kind": "graph"},
            {"file": "../vectors-0000000000000000.bin"},
            {"bytes": 1},
            {"sha256": "0" * 64},
            {"unknown": 1},
            {"arrays": {}},
            {"arrays": {"vectors": {"dtype": "<f4", "shape": [1 << 40, 1 << 40], "offset": 0}}},
            {"arrays": {"vectors": {"dtype": "<f4", "shape": [-1, 4], "offset": 0}}},
            {"arrays": {"vectors": {"dtype": "O", "shape": [1, 4], "offset": 0}}},
        ],
        ids=str,
    )
    def test_another_stamp(self, tmp_path: Path, exact_limit: int, change: dict[str, object]) -> None:
        save(build(clustered(60), exact_limit), tmp_path)
        stamp = json.loads((tmp_path / STAMP_FILE).read_text())
        (tmp_path / STAMP_FILE).write_text(json.dumps(stamp | change))
        assert load(tmp_path) is None

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 5000, b"null", b'{"format": "x"}'])
    def test_a_stamp_that_is_none(self, tmp_path: Path, exact_limit: int, content: bytes) -> None:
        save(build(clustered(20), exact_limit), tmp_path)
        (tmp_path / STAMP_FILE).write_bytes(content)
        assert load(tmp_path) is None


@pytest.mark.parametrize("name", ["vectors", "squares", "rows", "centroids", "starts"])
def test_arrays_that_do_not_belong_together(tmp_path: Path, name: str) -> None:
    """A file may be whole and still not be an index."""
    index = ApproximateIndex.build(clustered(60))
    arrays = index.arrays()
    arrays[name] = arrays[name][:-1] if name != "rows" else np.zeros_like(arrays[name])
    with pytest.raises(InvalidInputError, match="do not belong together"):
        ApproximateIndex.restore(arrays)


def test_an_empty_index_is_kept_too(tmp_path: Path) -> None:
    save(build(clustered(0)), tmp_path)
    index = load(tmp_path)
    assert (index.rows, index.dimension) == (0, DIMENSION)
    assert index.search(clustered(2), 3)[0].tolist() == [[-1] * 3] * 2


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("exact_limit", [0, 10**9], ids=["approximate", "exact"])
def test_threads_get_what_one_gets(exact_limit: int) -> None:
    index: VectorIndex = build(clustered(1000), exact_limit)
    queries = clustered(64, seed=1)
    masks = [None, mask_of("half", 1000), np.arange(0, 1000, 50)]
    jobs = [(queries[i : i + 1 + i % 12], masks[i % 3]) for i in range(48)]
    alone = [index.search(query, 8, mask) for query, mask in jobs]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda job: index.search(job[0], 8, job[1]), jobs))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])


def test_an_approximate_index_is_kept_and_taken_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.random.default_rng(0).normal(size=(600, 8)).astype(np.float32)
    monkeypatch.setattr(vectors, "EXACT_LIMIT", 100)
    monkeypatch.setattr(vectors, "build", lambda points: ApproximateIndex.build(points))
    first = vectors.build_or_load(rows, tmp_path)
    assert isinstance(first, ApproximateIndex) and any(tmp_path.iterdir())
    monkeypatch.setattr(vectors, "build", None)  # nothing is built for the same vectors
    again = vectors.build_or_load(rows, tmp_path)
    assert np.array_equal(again.search(rows[:5], 3)[0], first.search(rows[:5], 3)[0])
    built: list[int] = []
    monkeypatch.setattr(vectors, "build", lambda points: built.append(1) or ApproximateIndex.build(points))
    next(tmp_path.glob("vectors-*.bin")).write_bytes(b"damaged")
    assert vectors.build_or_load(rows, tmp_path).rows == 600 and built, "a damaged one is built anew"
    vectors.build_or_load(rows + 1, tmp_path)
    assert len(built) == 2, "other vectors need another index"
