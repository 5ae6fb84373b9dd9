"""The dense view: means of embeddings under a covariance that all share (linear discriminant analysis)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraretriever.retrieve.encoder import Vectors

Floats = NDArray[np.float64]

MAX_DIMENSION = 256  # of the space that is searched, without the coordinate that `place` adds
_PRIOR_VARIANCE, _PRIOR_COUNT = 0.4, 10  # of unit vectors around their mean, summed over dimensions


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums over the samples from which means and covariance follow; those of two sets add up.

    Shape: sums (means, d), counts (means,), gram (d, d) = Σ x xᵀ over all samples.
    """

    sums: Floats
    counts: Floats
    gram: Floats

    @classmethod
    def of(cls, vectors: NDArray[Any], labels: NDArray[np.int64], gram: Floats | None = None) -> Moments:
        """Shape: vectors (n, d), labels (n,) from 0 on; the gram matrix where the caller has it already."""
        sums = np.zeros((int(labels.max()) + 1, vectors.shape[1]))
        np.add.at(sums, labels, vectors)
        counts = np.bincount(labels).astype(np.float64)
        return cls(sums, counts, gram_matrix([vectors]) if gram is None else gram)


def gram_matrix(parts: Iterable[NDArray[Any]]) -> Floats:
    """Semantics: Σ x xᵀ over the rows of all parts. Shape: (n, d) each -> (d, d)."""
    return np.asarray(sum(part.T @ part for part in (each.astype(np.float64) for each in parts)))


class DenseModel:
    """Whitens embeddings by the covariance within the adapters, so that squared distances are log-likelihoods.

    Semantics: ln p(x | a) = -½ (x - μ_a)ᵀ Σ⁻¹ (x - μ_a) + const, Σ = (W + ν σ² I) / (n - C + ν): the scatter W of the
    samples around their means, drawn towards a sphere as if ν = d/2 samples had shown it. Few samples: nearly the
    Euclidean distance; many: Fisher's discriminant.

    The mean of m samples misses the true one, which makes it look t / m further away than it is, t being the trace of
    Σ⁻¹ and the covariance W / (n - C); this is taken off, so that adapters with few samples are not at a disadvantage.
    """

    def __init__(self, moments: Moments) -> None:
        """Fit. The space is cut to the at most `MAX_DIMENSION` directions in which the means differ most."""
        self.means = moments.sums / moments.counts[:, None]
        count, dimension = self.means.shape
        scatter = moments.gram - (self.means * moments.counts[:, None]).T @ self.means
        freedom = max(moments.counts.sum() - count, 0.0)
        within = max(np.trace(scatter), 0.0) + _PRIOR_COUNT * _PRIOR_VARIANCE
        variance = within / (freedom + _PRIOR_COUNT) / dimension
        self._strength = freedom + dimension / 2
        covariance = (scatter + dimension / 2 * variance * np.eye(dimension)) / self._strength
        self._whiten = np.linalg.inv(np.linalg.cholesky(covariance)).T  # x @ whiten has unit covariance
        self._counts = moments.counts
        shrunk = self._strength * dimension - dimension / 2 * variance * float((self._whiten**2).sum())
        self.excess = max(shrunk / freedom, 0.0) if freedom else float(dimension)  # t
        self._basis = (self._whiten @ _main_directions(self.means @ self._whiten)).astype(np.float32)

    @property
    def dimension(self) -> int:
        """Of the space that is searched, without the coordinate that `place` adds."""
        return int(self._basis.shape[1])

    def project(self, vectors: Vectors | Floats) -> Vectors:
        """Prompts, into the space where squared distances are searched. Shape: (n, d) -> (n, reduced + 1)."""
        points = np.zeros((len(vectors), self._basis.shape[1] + 1), dtype=np.float32)
        np.matmul(vectors, self._basis, out=points[:, :-1], casting="same_kind")
        return points

    def place(self, means: Vectors | Floats, counts: Floats) -> Vectors:
        """Means of so many samples each, into the same space. Shape: (n, d), (n,) -> (n, reduced + 1).

        The last coordinate, which is 0 for prompts, makes all distances greater by t - t / m.
        """
        points = self.project(means)
        points[:, -1] = np.sqrt(self.excess * (1 - 1 / counts))
        return points

    def leave_one_out(self, vectors: Vectors, labels: NDArray[np.int64]) -> Floats:
        """Each sample's squared distance to all placed means, as if it had not been among the samples.

        Shape: vectors (n, d), labels (n,) -> (n, means). Exact but for σ² and t, which are kept: the mean of m samples
        moves by (μ - x) / (m - 1), the inverse covariance by a product of rank one (Sherman and Morrison). A mean of a
        single sample stays as it is.
        """
        z, means = vectors @ self._whiten, self.means @ self._whiten
        own = np.arange(len(labels)), labels
        counts = np.bincount(labels, minlength=len(means))[labels]
        grow = np.where(counts > 1, counts / np.maximum(counts - 1, 1), 1.0)
        squares = (z * z).sum(1)[:, None] + (means * means).sum(1) - 2 * z @ means.T
        squares[own] *= grow**2
        step = (z - means[labels]) * np.sqrt(grow / self._strength)[:, None]
        along = (step * z).sum(1)[:, None] - step @ means.T
        along[own] *= grow
        left = 1 - (step * step).sum(1)
        squares = (squares + along**2 / left[:, None]) * (self._strength - 1) / self._strength
        fewer = np.broadcast_to(self._counts, squares.shape).copy()
        fewer[own] = np.maximum(counts - 1, 1)
        return np.asarray(squares + self.excess * (1 - 1 / fewer))


def _main_directions(means: Floats) -> Floats:
    """Orthonormal columns that span the differences of the means, at most `MAX_DIMENSION`. Shape: (d, reduced)."""
    centred = means - means.mean(axis=0)
    if len(means) > means.shape[1]:
        _, vectors = np.linalg.eigh(centred.T @ centred)
        return vectors[:, ::-1][:, :MAX_DIMENSION]
    _, _, rows = np.linalg.svd(centred, full_matrices=False)
    return np.asarray(rows[: min(max(len(means) - 1, 1), MAX_DIMENSION)].T)


_LEAST_MEMBERS, _ROUNDS = 4, 10


def halves(vectors: Vectors) -> NDArray[np.int64]:
    """The better of two clusters for each of an adapter's samples (2-means): 0 or 1.

    All 0 where a half would have fewer than four samples. The same samples always give the same halves.
    """
    x = vectors.astype(np.float64)
    one = np.zeros(len(x), dtype=np.int64)
    if len(x) < 2 * _LEAST_MEMBERS:
        return one
    first = x[((x - x.mean(0)) ** 2).sum(1).argmax()]
    centres = np.stack([first, x[((x - first) ** 2).sum(1).argmax()]])
    for _ in range(_ROUNDS):
        second = ((x - centres[1]) ** 2).sum(1) < ((x - centres[0]) ** 2).sum(1)
        if not _LEAST_MEMBERS <= second.sum() <= len(x) - _LEAST_MEMBERS:
            return one
        centres = np.stack([x[~second].mean(0), x[second].mean(0)])
    return np.where(second == second[0], 0, 1).astype(np.int64)
