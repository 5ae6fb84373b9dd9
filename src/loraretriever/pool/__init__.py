"""The registry of adapters: admission, weights, samples, embeddings."""

from loraretriever.pool.adding import AddChange, AddResult
from loraretriever.pool.registry import Pool

__all__ = ["AddChange", "AddResult", "Pool"]
