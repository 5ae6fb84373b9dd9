"""A linear head over the sparse rows: ridge regression onto the adapters, for pools with few samples."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from loraretriever.retrieve.sparse import Rows, TermVector, products

MAX_SAMPLES = 3000  # the fit inverts a matrix of this size: about three seconds on two cores
_PENALTY = 0.1


class RidgeHead:
    """Learns which terms tell the adapters apart, where centroids only know how often a term is used.

    Semantics: f(x) = 1/C + k(x)ᵀ (K + λD)⁻¹ (Y - 1/C), with the rows' inner products K and Y one where a sample
    belongs to an adapter. D is diagonal, the number of samples of a sample's adapter relative to the mean: adapters
    with few samples are not outvoted. Words that no sample has leave f at 1/C for all adapters, so that they decide
    nothing.
    """

    def __init__(self, rows: Rows, labels: NDArray[np.int64], count: int) -> None:
        """Fit. Shape: rows (n, BUCKETS) of length 1, labels (n,) below `count`."""
        by_term = rows.T.tocsr()
        kernel = products(rows, by_term).astype(np.float64)
        sizes = np.bincount(labels, minlength=count)[labels]
        penalties = _PENALTY * sizes / sizes.mean()
        inverse = linalg.inv(kernel + np.diag(penalties), overwrite_a=True, check_finite=False)
        wanted = np.eye(count)[labels] - 1 / count
        solution = inverse @ wanted
        self.offset = 1 / count
        self.coefficients = solution.astype(np.float32)  # (n, count)
        self.rows_by_term = by_term
        # The residual of a sample that was left out of the fit, in closed form.
        self.leave_one_out = np.eye(count)[labels] - solution / np.diag(inverse)[:, None]

    def __call__(self, query: TermVector) -> NDArray[np.float32]:
        """The value of each adapter. Shape: (count,)."""
        values = query.times_columns(self.rows_by_term) @ self.coefficients + np.float32(self.offset)
        return np.asarray(values, dtype=np.float32)
