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


def plain_covariance(x: np.ndarray, labels: np.ndarray, variance: float | None = None) -> np.ndarray:
    """Σ = (W + ν σ² I) / (n - C + ν) with ν = d/2."""
    dimension = x.shape[1]
    means = means_of(x, labels)
    if variance is None:
        variance = prior_variance(x, labels)
    prior = dimension / 2 * variance * np.eye(dimension)
    return np.asarray((scatter_of(x, labels, means) + prior) / (len(x) - len(means) + dimension / 2))


def plain_excess(x: np.ndarray, labels: np.ndarray) -> float:
    """t: the trace of Σ⁻¹ W / (n - C), and that of the identity where no sample shows a W."""
    means = means_of(x, labels)
    if len(x) == len(means):
        return float(x.shape[1])
    within = scatter_of(x, labels, means) / (len(x) - len(means))
    return float(np.trace(np.linalg.inv(plain_covariance(x, labels)) @ within))


def plain_distances(
    x: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    variance: float | None = None,
    excess: float | None = None,
) -> np.ndarray:
    """(q - μ)ᵀ Σ⁻¹ (q - μ) + t (1 - 1/m), written out. Shape: (queries, means)."""
    means, counts = means_of(x, labels), np.bincount(labels)
    inverse = np.linalg.inv(plain_covariance(x, labels, variance))
    if excess is None:
        excess = plain_excess(x, labels)
    return np.array(
        [
            [(q - mean) @ inverse @ (q - mean) + excess * (1 - 1 / m) for mean, m in zip(means, counts, strict=True)]
            for q in queries
        ]
    )


SHAPES = [([8, 8, 8], 6), ([5, 3, 9, 4, 7], 20), ([12] * 10, 8), ([2, 30], 16), ([1, 1, 1, 1], 10)]


@pytest.mark.parametrize(("sizes", "dimension"), SHAPES)
def test_projected_distances_differ_as_the_plain_ones(sizes: list[int], dimension: int) -> None:
    x, labels = data(sizes, dimension)
    model = DenseModel(Moments.of(x, labels))
    queries = unit(np.random.default_rng(1).normal(size=(7, dimension))).astype(np.float64)
    points, places = model.project(queries), model.place(model.means, np.array(sizes, dtype=np.float64))
    assert (points[:, -1] == 0).all() and points.shape[1] == places.shape[1]
    gaps = points[:, None] - places[None]
    found = (gaps.astype(np.float64) ** 2).sum(-1)
    expected = plain_distances(x, labels, queries)
    assert found - found[:, :1] == pytest.approx(expected - expected[:, :1], rel=1e-3, abs=2e-3 * expected.max())


@pytest.mark.parametrize(("sizes", "dimension"), SHAPES)
def test_what_places_add_to_distances(sizes: list[int], dimension: int) -> None:
    """t (1 - 1/m) for any means and numbers of samples, whether the model was learnt from them or not; 0 for one."""
    x, labels = data(sizes, dimension)
    model = DenseModel(Moments.of(x, labels))
    vectors = unit(np.random.default_rng(1).normal(size=(4, dimension)))
    points, places = model.project(vectors), model.place(vectors, np.array([1.0, 2.0, 5.0, 1000.0]))
    assert (places[:, :-1] == points[:, :-1]).all() and places.dtype == np.float32
    expected = plain_excess(x, labels) * np.array([0, 1 / 2, 4 / 5, 999 / 1000])
    assert places[:, -1].astype(np.float64) ** 2 == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("sizes", "dimension"), SHAPES)
def test_the_excess_is_the_plain_trace(sizes: list[int], dimension: int) -> None:
    x, labels = data(sizes, dimension, seed=7)
    assert DenseModel(Moments.of(x, labels)).excess == pytest.approx(plain_excess(x, labels), rel=1e-9)


def test_an_adapter_with_one_sample_is_found_among_adapters_with_twenty() -> None:
    """Its mean misses the true one by more; without the correction the others get most of its prompts."""
    sizes, prompts = np.array([1, *[20] * 29]), 20
    labels, asked = np.repeat(np.arange(30), sizes), np.repeat(np.arange(30), prompts)
    found: dict[str, list[np.ndarray]] = {"before": [], "after": [], "own": []}  # of each round, for each adapter
    for seed in range(20):
        rng = np.random.default_rng(seed)
        tasks = [cluster(rng, size + prompts, 24, 1.0) for size in sizes]
        x = np.concatenate([task[:size] for task, size in zip(tasks, sizes, strict=True)]).astype(np.float64)
        model = DenseModel(Moments.of(x, labels))
        points = model.project(np.concatenate([task[size:] for task, size in zip(tasks, sizes, strict=True)]))
        gaps = points[:, None] - model.place(model.means, sizes.astype(np.float64))
        before, after = (gaps[..., :-1] ** 2).sum(-1), (gaps**2).sum(-1)
        own = after[np.arange(len(asked)), asked]
        for name, values in [("before", before.argmin(1) == asked), ("after", after.argmin(1) == asked), ("own", own)]:
            found[name].append(values.reshape(30, prompts).mean(axis=1))
    rates, better, distances = (np.mean(found[name], axis=0) for name in ("before", "after", "own"))
    assert better[0] > rates[0] + 0.3, "it gets its prompts"
    assert better[1:].mean() > rates[1:].mean() - 0.02, "and hardly any of the others'"
    assert distances[0] == pytest.approx(distances[1:].mean(), rel=0.1), (
        "prompts are as far from one sample as from many"
    )


@pytest.mark.parametrize(("sizes", "dimension"), SHAPES)
def test_left_out_is_a_fit_without_the_sample(sizes: list[int], dimension: int) -> None:
    """Equal to a new fit with the same σ² and t to rounding, for samples of means that have more than one."""
    x, labels = data(sizes, dimension, seed=2)
    found = DenseModel(Moments.of(x, labels)).leave_one_out(x.astype(np.float32), labels)
    variance, excess = prior_variance(x, labels), plain_excess(x, labels)
    for i in range(len(x)):
        if sizes[labels[i]] > 1:
            rest = np.arange(len(x)) != i
            expected = plain_distances(x[rest], labels[rest], x[[i]], variance, excess)[0]
            assert found[i] == pytest.approx(expected, rel=1e-3, abs=1e-3)
        else:
            assert found[i, labels[i]] == pytest.approx(0, abs=1e-3), "its mean cannot do without it"
            assert np.isfinite(found[i]).all() and (np.delete(found[i], labels[i]) > 0).all()


def test_left_out_is_near_a_fit_that_makes_its_own_prior() -> None:
    """σ² and t move with the sample too: of 60 samples in 12 dimensions, distances by less than 3 percent."""
    x, labels = data([10] * 6, 12, seed=3)
    found = DenseModel(Moments.of(x, labels)).leave_one_out(x.astype(np.float32), labels)
    for i in range(len(x)):
        rest = np.arange(len(x)) != i
        assert found[i] == pytest.approx(plain_distances(x[rest], labels[rest], x[[i]])[0], rel=0.03)


def test_one_mean() -> None:
    x, labels = data([5], 8)
    model = DenseModel(Moments.of(x, labels))
    assert model.project(x).shape == (5, 2)
    assert np.isfinite(model.leave_one_out(x.astype(np.float32), labels)).all()
    single = DenseModel(Moments.of(x[:1], labels[:1]))
    assert np.isfinite(single.project(x)).all()
    assert np.isfinite(single.place(x, np.arange(1.0, 6.0))).all()


@pytest.mark.parametrize(
    ("count", "dimension", "reduced"), [(4, 40, 3), (400, 20, 20), (270, 300, 256), (320, 300, 256)]
)
def test_the_space_is_as_small_as_the_means_allow(count: int, dimension: int, reduced: int) -> None:
    rng = np.random.default_rng(0)
    vectors = unit(rng.normal(size=(2 * count, dimension)))
    model = DenseModel(Moments.of(vectors, np.repeat(np.arange(count), 2)))
    assert model.project(vectors).shape == (2 * count, reduced + 1) and reduced <= dense.MAX_DIMENSION
    assert model.project(vectors).dtype == np.float32


def test_the_cut_space_keeps_the_directions_in_which_the_means_differ_most(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = data([6] * 12, 10, seed=4)
    whole = DenseModel(Moments.of(x, labels))
    monkeypatch.setattr(dense, "MAX_DIMENSION", 3)
    cut = DenseModel(Moments.of(x, labels))
    assert cut.project(x).shape == (72, 4)
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
    assert np.isfinite(model.place(model.means, np.array([3.0, 3.0]))).all()
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
