"""A pool in two dimensions, for people to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraretriever.retrieve.encoder import Vectors
from loraretriever.retrieve.model import Member
from loraretriever.retrieve.snapshot import Snapshot

Points = NDArray[np.float32]
Vector = NDArray[Any]
MAX_SAMPLES = 2000


@dataclass(frozen=True, slots=True, eq=False)
class PoolMap:
    """Points of one plane. Near points are near in the space that the dense part of the hybrid retriever searches.

    Shape: points (adapters, 2), samples (m, 2), sample_adapters (m,), prompts (n, 2).
    """

    adapters: tuple[str, ...]
    points: Points  # of the adapters' means
    samples: Points  # of at most MAX_SAMPLES samples, taken evenly from all
    sample_adapters: NDArray[np.int64]  # places in `adapters`
    prompts: Points


class Plane:
    """The plane in which the adapters' means differ most (principal components in the whitened space).

    Each axis points to where the adapter that lies farthest out on it is, so that the same pool always looks the same.
    """

    def __init__(self, snapshot: Snapshot, members: Mapping[str, Member]) -> None:
        """Lay it through the members that the snapshot is of."""
        names = tuple(sorted(members))
        points = _whiten(snapshot, [members[name].vectors.mean(axis=0, dtype=np.float64) for name in names])
        self._snapshot = snapshot
        self._centre = points.mean(axis=0) if names else np.zeros(points.shape[1])
        self._axes = _main_axes(points - self._centre)
        samples, owners = _some_samples([members[name].vectors for name in names])
        self._map = PoolMap(names, self._flat(points), self._place(samples), owners, self._place([]))

    def map(self, vectors: Vectors | None = None) -> PoolMap:
        """The map with prompts on it. Shape: vectors (n, d), rows of length 1."""
        return self._map if vectors is None else replace(self._map, prompts=self._place(vectors))

    def _place(self, vectors: Sequence[Vector] | Vectors) -> Points:
        return self._flat(_whiten(self._snapshot, vectors))

    def _flat(self, points: NDArray[np.float64]) -> Points:
        return np.asarray((points - self._centre) @ self._axes, dtype=np.float32)


def _whiten(snapshot: Snapshot, vectors: Sequence[Vector] | Vectors) -> NDArray[np.float64]:
    """Shape: n vectors (d,) -> (n, reduced)."""
    return snapshot.whiten(np.asarray(vectors) if len(vectors) else np.zeros((0, 0)))


def _main_axes(centred: NDArray[np.float64]) -> NDArray[np.float64]:
    """The two directions of greatest variance, zeros where there are fewer. Shape: (n, reduced) -> (reduced, 2)."""
    axes = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :2] if centred.size else np.zeros((centred.shape[1], 0))
    if axes.shape[1]:
        along = centred @ axes
        axes = axes * np.where(along[np.abs(along).argmax(axis=0), np.arange(axes.shape[1])] < 0, -1, 1)
    return np.pad(axes, ((0, 0), (0, 2 - axes.shape[1])))


def _some_samples(vectors: Sequence[NDArray[Any]]) -> tuple[list[Vector], NDArray[np.int64]]:
    """At most MAX_SAMPLES rows, evenly from all, and of which of the arrays each is."""
    ends = np.cumsum([len(each) for each in vectors], dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    rows = np.arange(min(total, MAX_SAMPLES)) * total // max(min(total, MAX_SAMPLES), 1)
    owners = np.searchsorted(ends, rows, side="right")
    return [vectors[owner][row - ends[owner]] for owner, row in zip(owners, rows, strict=True)], owners
