"""From ranked adapters to a composition."""

from loraretriever.compose.strategies import Strategy, compose_explicit, get_strategy, strategy_names
from loraretriever.compose.weighting import cover, weigh

__all__ = ["Strategy", "compose_explicit", "cover", "get_strategy", "strategy_names", "weigh"]
