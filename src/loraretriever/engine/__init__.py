"""Running compositions: from requests to generations."""

from loraretriever.engine.base import Engine

__all__ = ["Engine"]
