"""LoraRetriever: retrieve the LoRA adapters that fit each prompt, compose them, answer mixed prompts in one batch."""

from typing import TYPE_CHECKING, Any

from loraretriever.types import Adapter, Completion, Composition, Hit, Piece, Route, Sample, Sampling

if TYPE_CHECKING:
    from loraretriever.pipeline import LoraRetriever
    from loraretriever.pool import Pool

__all__ = [
    "Adapter",
    "Completion",
    "Composition",
    "Hit",
    "LoraRetriever",
    "Piece",
    "Pool",
    "Route",
    "Sample",
    "Sampling",
    "__version__",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what brings a database or models along only when it is asked for."""
    if name == "LoraRetriever":
        from loraretriever.pipeline import LoraRetriever

        return LoraRetriever
    if name == "Pool":
        from loraretriever.pool import Pool

        return Pool
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
