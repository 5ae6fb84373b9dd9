"""From a prompt to ranked adapters."""

from loraretriever.retrieve.encoder import Encoder, SentenceEncoder
from loraretriever.retrieve.index import MeanIndex
from loraretriever.retrieve.retriever import PaperRetriever, Retriever

__all__ = ["Encoder", "MeanIndex", "PaperRetriever", "Retriever", "SentenceEncoder"]
