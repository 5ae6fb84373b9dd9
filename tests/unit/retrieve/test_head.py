from __future__ import annotations

import numpy as np
import pytest

from loraretriever.retrieve import sparse
from loraretriever.retrieve.head import RidgeHead

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def rows_of(seed: int, sizes: list[int]) -> tuple[sparse.Rows, np.ndarray, sparse.TermWeights]:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    counted = sparse.count_terms([" ".join([*rng.choice(WORDS, 4), WORDS[label]]) for label in labels])
    weights = sparse.TermWeights(counted)
    return weights(counted), labels, weights


def relative_sizes(labels: np.ndarray) -> np.ndarray:
    """D: of each sample, how many samples its adapter has, divided by the mean of that over the samples."""
    sizes = np.array([(labels == label).sum() for label in labels])
    return np.asarray(sizes / sizes.mean())


def plain_head(
    rows: np.ndarray, labels: np.ndarray, count: int, queries: np.ndarray, relative: np.ndarray | None = None
) -> np.ndarray:
    """By scikit-learn: the smaller a sample's penalty, the greater its weight."""
    from sklearn.kernel_ridge import KernelRidge

    weights = 1 / (relative_sizes(labels) if relative is None else relative)
    ridge = KernelRidge(alpha=0.1, kernel="linear").fit(rows, np.eye(count)[labels] - 1 / count, weights)
    return np.asarray(ridge.predict(queries) + 1 / count)


@pytest.mark.parametrize("sizes", [[6, 6, 6], [1, 9, 4, 2], [1, 1], [5]])
def test_predictions_are_ridge_regressions(sizes: list[int]) -> None:
    rows, labels, weights = rows_of(0, sizes)
    texts = ["alpha beta", "gamma", "kappa iota alpha alpha", "unheard of", ""]
    queries = weights(sparse.count_terms(texts))
    head = RidgeHead(rows, labels, len(sizes))
    used = np.unique(np.concatenate([rows.indices, queries.indices]))
    expected = plain_head(rows.toarray()[:, used], labels, len(sizes), queries.toarray()[:, used])
    found = np.stack([head(weights.read(text)) for text in texts])
    assert found == pytest.approx(expected, abs=1e-5)
    assert found[3:] == pytest.approx(np.full((2, len(sizes)), 1 / len(sizes))), "unknown words decide nothing"


@pytest.mark.parametrize("sizes", [[6, 6, 6], [1, 9, 4, 2], [1, 1], [5]])
def test_left_out_is_a_fit_without_the_sample(sizes: list[int]) -> None:
    """With the penalties of all others as they were."""
    rows, labels, _ = rows_of(1, sizes)
    relative = relative_sizes(labels)
    found = RidgeHead(rows, labels, len(sizes)).leave_one_out
    table = rows.toarray()[:, np.unique(rows.indices)]
    for i in range(len(labels)):
        rest = np.arange(len(labels)) != i
        expected = plain_head(table[rest], labels[rest], len(sizes), table[[i]], relative[rest])[0]
        assert found[i] == pytest.approx(expected, abs=1e-5)
