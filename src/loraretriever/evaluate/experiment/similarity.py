"""How alike adapters are: by their samples and by their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from loraretriever.evaluate.experiment.results import Similarity
from loraretriever.evaluate.experiment.setup import Setup
from loraretriever.types import AdapterWeights


def similarity(setup: Setup) -> Similarity:
    """Of all adapters of the pool."""
    pool, names = setup.lr.pool, setup.adapters
    means = []
    for name in names:
        texts = [sample.text for sample in pool.samples(name) if not sample.counter]
        vectors = setup.paper.encode(texts or [name])
        means.append(vectors.mean(axis=0))
    unit = np.stack(means).astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    weights = {name: pool.weights(name) for name in names}
    return Similarity(tuple(names), unit @ unit.T, weight_cosines(weights, names))


def weight_cosines(adapters: Mapping[str, AdapterWeights], names: Sequence[str]) -> NDArray[np.float64]:
    """Cosines of the updates, all modules together as one vector; the updates are not built.

    Shape: (len(names), len(names)).

    Semantics: c[p, q] = Σ_m <U_pm, U_qm> / (‖U_p‖ ‖U_q‖), U = s B A, <B A, B' A'> = Σ (Bᵀ B') ∘ (A A'ᵀ)
    """
    products = torch.zeros(len(names), len(names), dtype=torch.float64)
    modules = dict.fromkeys(module for adapter in adapters.values() for module in adapter.modules)
    for module in modules:
        having = [
            (i, adapters[name].modules[module]) for i, name in enumerate(names) if module in adapters[name].modules
        ]
        a = torch.cat([pair.a.double() * pair.scaling for _, pair in having])
        b = torch.cat([pair.b.double() for _, pair in having], dim=1)
        owner = torch.tensor([i for i, pair in having for _ in range(pair.a.shape[0])])
        both = (a @ a.T) * (b.T @ b)
        rows = torch.zeros(len(names), both.shape[1], dtype=torch.float64).index_add_(0, owner, both)
        products += torch.zeros_like(products).index_add_(1, owner, rows)
    norms = products.diagonal().clamp(min=0).sqrt().clamp(min=1e-30)
    return np.asarray((products / norms[:, None] / norms[None, :]).numpy())
