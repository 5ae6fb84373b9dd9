"""From ranked adapters to a composition."""

from loraretriever.compose.canonical import format_composition, parse_composition
from loraretriever.compose.strategies import Strategy, compose_explicit, get_strategy, is_gate, strategy_names
from loraretriever.compose.weighting import PROBING, cover, round_weights, weigh

__all__ = [
    "PROBING",
    "Strategy",
    "compose_explicit",
    "cover",
    "format_composition",
    "get_strategy",
    "is_gate",
    "parse_composition",
    "round_weights",
    "strategy_names",
    "weigh",
]
