"""Running compositions: from requests to generations."""

from loraretriever.engine.base import Answers, Engine

__all__ = ["Answers", "Engine"]
