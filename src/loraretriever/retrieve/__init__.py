"""From a prompt to ranked adapters."""

from loraretriever.retrieve.caching import CachingEncoder, QueueEncoder
from loraretriever.retrieve.encoder import Encoder, SentenceEncoder
from loraretriever.retrieve.explain import Explanation
from loraretriever.retrieve.hybrid import HybridRetriever
from loraretriever.retrieve.index import MeanIndex
from loraretriever.retrieve.map import PoolMap
from loraretriever.retrieve.model import Parts
from loraretriever.retrieve.reader import Reader
from loraretriever.retrieve.retriever import ExplainingRetriever, PaperRetriever, Retriever
from loraretriever.retrieve.views import Views

__all__ = [
    "CachingEncoder",
    "Encoder",
    "ExplainingRetriever",
    "Explanation",
    "HybridRetriever",
    "MeanIndex",
    "PaperRetriever",
    "Parts",
    "PoolMap",
    "QueueEncoder",
    "Reader",
    "Retriever",
    "SentenceEncoder",
    "Views",
]
