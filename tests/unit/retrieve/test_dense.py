from __future__ import annotations

import numpy as np
import pytest
from retrieve_helpers import cluster, unit

from loraretriever.retrieve import dense
from loraretriever.retrieve.dense import DenseModel, Moments, gram_matrix, halves


def data(sizes: list[int], dimension: int, seed: int = 0, spread: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    vectors = np.concatenate([cluster(rng, size, dimension, spread) for size in sizes])
    return vectors.astype(np.float64), np.repeat(np.arange(len(sizes)), sizes)


def scatter_of(x: np.ndarray, labels: np.ndarray, means: np.ndarray) -> np.ndarray:
    total = np.zeros((x.shape[1], x.shape[1]))
    for vector, label in zip(x, labels, strict=True):
        total += np.outer(vector - means[label], vector - means[label])
    return total


def means_of(x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.stack([x[labels == label].mean(axis=0) for label in range(labels.max() + 1)])


def prior_variance(x: np.ndarray, labels: np.ndarray) -> float:
    """σ²: the trace of the scatter, as if ten more samples had shown 0.4."""
    means = means_of(x, labels)
    return float((np.trace(scatter_of(x, labels, means)) + 4) / (len(x) - len(means) + 10) / x.shape[1])


def plain_distances(
    x: np.ndarray, labels: np.ndarray, queries: np.ndarray, variance: float | None = None
) -> np.ndarray:
    """(q - μ)ᵀ Σ⁻¹ (q - μ), written out. Shape: (queries, means)."""
    dimension = x.shape[1]
    means = means_of(x, labels)
    if variance is None:
        variance = prior_variance(x, labels)
    prior = dimension / 2 * variance * np.eye(dimension)
    covariance = (scatter_of(x, labels, means) + prior) / (len(x) - len(means) + dimension / 2)
    inverse = np.linalg.inv(covariance)
    return np.array([[(q - mean) @ inverse @ (q - mean) for mean in means] for q in queries])


SHAPES = [([8, 8, 8], 6), ([5, 3, 9, 4, 7], 20), ([12] * 10, 8), ([2, 30], 16), ([1, 1, 1, 1], 10)]


@pytest.mark.parametrize(("sizes", "dimension"), SHAPES)
def test_projected_distances_differ_as_the_plain_ones(sizes: list[int], dimension: int) -> None:
    x, labels = data(sizes, dimension)
    model = DenseModel(Moments.of(x, labels))
    queries = unit(np.random.default_rng(1).normal(size=(7, dimension))).astype(np.float64)
    gaps = model.project(queries)[:, None] - model.project(model.means)[None]
    found = (gaps.astype(np.float64) ** 2).sum(-1)
    expected = plain_distances(x, labels, queries)
    assert found - found[:, :1] == pytest.approx(expected - expected[:, :1], rel=1e-3, abs=2e-3 * expected.max())


@pytest.mark.parametrize(("sizes", "dimension"), SHAPES)
def test_left_out_is_a_fit_without_the_sample(sizes: list[int], dimension: int) -> None:
    """Equal to a new fit with the same σ² to rounding, for samples of means that have more than one."""
    x, labels = data(sizes, dimension, seed=2)
    found = DenseModel(Moments.of(x, labels)).leave_one_out(x.astype(np.float32), labels)
    variance = prior_variance(x, labels)
    for i in range(len(x)):
        if sizes[labels[i]] > 1:
            rest = np.arange(len(x)) != i
            expected = plain_distances(x[rest], labels[rest], x[[i]], variance)[0]
            assert found[i] == pytest.approx(expected, rel=1e-3, abs=1e-3)
        else:
            assert found[i, labels[i]] == pytest.approx(0, abs=1e-3), "its mean cannot do without it"
            assert np.isfinite(found[i]).all() and (np.delete(found[i], labels[i]) > 0).all()


def test_left_out_is_near_a_fit_that_makes_its_own_prior() -> None:
    """σ² moves with the sample too: of 60 samples in 12 dimensions, distances by less than 3 percent."""
    x, labels = data([10] * 6, 12, seed=3)
    found = DenseModel(Moments.of(x, labels)).leave_one_out(x.astype(np.float32), labels)
    for i in range(len(x)):
        rest = np.arange(len(x)) != i
        assert found[i] == pytest.approx(plain_distances(x[rest], labels[rest], x[[i]])[0], rel=0.03)


def test_one_mean() -> None:
    x, labels = data([5], 8)
    model = DenseModel(Moments.of(x, labels))
    assert model.project(x).shape == (5, 1)
    assert np.isfinite(model.leave_one_out(x.astype(np.float32), labels)).all()
    single = DenseModel(Moments.of(x[:1], labels[:1]))
    assert np.isfinite(single.project(x)).all()


@pytest.mark.parametrize(
    ("count", "dimension", "reduced"), [(4, 40, 3), (400, 20, 20), (270, 300, 256), (320, 300, 256)]
)
def test_the_space_is_as_small_as_the_means_allow(count: int, dimension: int, reduced: int) -> None:
    rng = np.random.default_rng(0)
    vectors = unit(rng.normal(size=(2 * count, dimension)))
    model = DenseModel(Moments.of(vectors, np.repeat(np.arange(count), 2)))
    assert model.project(vectors).shape == (2 * count, reduced) and reduced <= dense.MAX_DIMENSION
    assert model.project(vectors).dtype == np.float32


def test_the_cut_space_keeps_the_directions_in_which_the_means_differ_most(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = data([6] * 12, 10, seed=4)
    whole = DenseModel(Moments.of(x, labels))
    monkeypatch.setattr(dense, "MAX_DIMENSION", 3)
    cut = DenseModel(Moments.of(x, labels))
    assert cut.project(x).shape == (72, 3)
    kept, all_ = cut.project(cut.means).var(axis=0).sum(), whole.project(whole.means).var(axis=0)
    assert kept == pytest.approx(np.sort(all_)[-3:].sum(), rel=0.01)


def test_moments() -> None:
    x, labels = data([3, 4], 5)
    moments = Moments.of(x.astype(np.float16), labels)
    assert moments.counts.tolist() == [3, 4]
    assert moments.sums == pytest.approx(np.stack([x[:3].sum(0), x[3:].sum(0)]), abs=1e-2)
    assert moments.gram == pytest.approx(x.T @ x, abs=1e-2)
    assert gram_matrix([x[:2], x[2:]]) == pytest.approx(x.T @ x)


def test_samples_of_zeros_do_not_break_it() -> None:
    """Static encoders give them for texts without a known token."""
    x = np.zeros((6, 4))
    model = DenseModel(Moments.of(x, np.array([0, 0, 0, 1, 1, 1])))
    assert np.isfinite(model.project(x)).all()
    assert np.isfinite(model.leave_one_out(x.astype(np.float32), np.array([0, 0, 0, 1, 1, 1]))).all()


def test_halves_finds_two_clusters_whatever_the_order() -> None:
    rng = np.random.default_rng(5)
    vectors = np.concatenate([cluster(rng, 7, 16, 0.2), cluster(rng, 5, 16, 0.2)])
    true = np.repeat([0, 1], [7, 5])
    for _ in range(5):
        order = rng.permutation(12)
        found = halves(vectors[order])
        assert found[0] == 0, "the first sample's half is 0"
        assert (found == (true[order] != true[order][0])).all()
        assert (halves(vectors[order]) == found).all()


@pytest.mark.parametrize("sizes", [(9, 3), (3, 4), (1, 0), (20, 1)])
def test_halves_of_fewer_than_four_are_refused(sizes: tuple[int, int]) -> None:
    rng = np.random.default_rng(6)
    vectors = np.concatenate([cluster(rng, size, 16, 0.2) for size in sizes])
    assert halves(vectors).tolist() == [0] * sum(sizes)


def test_equal_samples_have_no_halves() -> None:
    assert not halves(np.tile(unit(np.ones(4)), (12, 1))).any()
