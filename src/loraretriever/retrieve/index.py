"""The adapters' vectors and exact search over them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from loraretriever.retrieve.encoder import Vectors
from loraretriever.types import Hit


class MeanIndex:
    """One vector per adapter: the mean of its samples' embeddings. Immutable: a changed pool gets a new one."""

    def __init__(self, embeddings: Mapping[str, Vectors]) -> None:
        """Build the index.

        Args:
            embeddings: for each adapter, its samples' unit vectors, shape (samples, dimension), samples >= 1.

        Semantics: E(φ) = (1/m) Σ_i E(I ⊕ x_i), scaled to length 1 (LoraRetriever, equation 2).
        """
        self.names = tuple(sorted(embeddings))
        self._row = {name: row for row, name in enumerate(self.names)}
        means = [embeddings[name].mean(axis=0) for name in self.names]
        self._vectors = np.stack([mean / max(float(np.linalg.norm(mean)), 1e-12) for mean in means]) if means else None

    def search(
        self, queries: Vectors, k: int, exclude: Collection[str] = (), only: Collection[str] | None = None
    ) -> list[tuple[Hit, ...]]:
        """The k nearest adapters of each query, best first; fewer when fewer are allowed.

        Shape: queries (n, dimension), rows of length 1.
        Semantics: s(x, φ) = cos(E(I ⊕ x), E(φ)) (LoraRetriever, equation 3). Equal scores keep the names' order.
        """
        allowed = [row for name, row in self._row.items() if name not in exclude and (only is None or name in only)]
        if self._vectors is None or not allowed:
            return [() for _ in queries]
        scores = queries @ self._vectors[allowed].T
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return [
            tuple(Hit(self.names[allowed[column]], float(row_scores[column])) for column in columns)
            for row_scores, columns in zip(scores, best, strict=True)
        ]
