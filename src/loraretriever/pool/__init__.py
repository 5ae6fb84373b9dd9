"""The registry of adapters: admission, weights, samples, embeddings; tenants, API keys, jobs."""

from loraretriever.pool.adding import AddChange, AddResult
from loraretriever.pool.jobs import Job, JobError, JobStore
from loraretriever.pool.keys import SCOPES, Key, KeyStore
from loraretriever.pool.layout import shown_location
from loraretriever.pool.names import public_name, qualified_name
from loraretriever.pool.reading import PoolView
from loraretriever.pool.registry import Pool

__all__ = [
    "SCOPES",
    "AddChange",
    "AddResult",
    "Job",
    "JobError",
    "JobStore",
    "Key",
    "KeyStore",
    "Pool",
    "PoolView",
    "public_name",
    "qualified_name",
    "shown_location",
]
