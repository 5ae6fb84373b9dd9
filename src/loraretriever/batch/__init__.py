"""Many compositions in one forward pass."""

from loraretriever.batch.layers import LoraLayers
from loraretriever.batch.routing import BASE_ROW, Routing, RowRoute
from loraretriever.batch.slots import AdapterRef, SlotTable

__all__ = ["BASE_ROW", "AdapterRef", "LoraLayers", "Routing", "RowRoute", "SlotTable"]
