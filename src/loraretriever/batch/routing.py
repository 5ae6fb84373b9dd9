"""Which adapters, with which weights, each row of a batch uses: built once per batch, shared by all layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from loraretriever.batch.costs import CostModel, cost_model
from loraretriever.batch.paths import DensePath, GatheredPath, GroupedPath, Path, SplitPath
from loraretriever.batch.slots import AdapterRef
from loraretriever.errors import InvalidInputError
from loraretriever.types import Mixer


@dataclass(frozen=True, slots=True)
class RowRoute:
    """The adapters of one row with their weights, and the mixer that joins them. No adapters: the base model."""

    adapters: tuple[AdapterRef, ...] = ()
    weights: tuple[float, ...] = ()
    mixer: Mixer = Mixer.OUTPUTS

    def __post_init__(self) -> None:
        if len(self.adapters) != len(self.weights):
            raise InvalidInputError(
                f"a row has {len(self.adapters)} adapters but {len(self.weights)} weights; give one weight per adapter."
            )


BASE_ROW = RowRoute()

Pairs = list[tuple[int, float]]  # (slot, weight) of one row, slots distinct, weights not zero


class Routing:
    """The tensors that all layers share while a batch runs.

    A weight of zero removes an adapter from its row, and an adapter named twice counts with the sum of its
    weights: both mixers are linear in the weight of each factor, so neither changes the result.

    `epoch` is the state of the slots that the routing was made for; a routing of another epoch is stale.
    """

    def __init__(
        self,
        rows: Sequence[RowRoute],
        slot_of: Mapping[AdapterRef, int],
        device: torch.device,
        epoch: int = 0,
        costs: CostModel | None = None,
    ) -> None:
        self.rows = len(rows)
        self.epoch = epoch
        self._pairs = [_pairs(row, slot_of) for row in rows]
        self._mixers = [row.mixer for row in rows]
        self._device = device
        self._costs = costs
        self.used_slots = frozenset(slot for pairs in self._pairs for slot, _ in pairs)
        self.is_empty = not self.used_slots
        self._paths: dict[tuple[type, torch.dtype], Path] = {}
        self._choices: dict[tuple[int, torch.dtype], Path] = {}

    def path(self, tokens: int, dtype: torch.dtype) -> Path:
        """The cheapest way to apply this routing to inputs of `tokens` tokens per row."""
        key = (tokens, dtype)
        path = self._choices.get(key)
        if path is None:
            path = self._choices[key] = self._choose(tokens, dtype)
        return path

    def _choose(self, tokens: int, dtype: torch.dtype) -> Path:
        kinds: dict[str, type[DensePath | GatheredPath | GroupedPath | SplitPath]] = {
            "dense": DensePath,
            "gathered": GatheredPath,
            "grouped": GroupedPath,
            "split": SplitPath,
        }
        counts = [0] * (max(self.used_slots) + 1)
        for pairs in self._pairs:
            for slot, _ in pairs:
                counts[slot] += 1
        parameters = self._parameters()
        width = max(len(pairs) for pairs in self._pairs)
        costs = self._costs or cost_model(self._device, dtype)
        kind = kinds[costs.cheapest(self.rows, tokens, width, counts, parameters is None)]
        path = self._paths.get((kind, dtype))
        if path is None:
            with torch.inference_mode(False):  # inference tensors could not serve a later pass with gradients
                path = kind(self._pairs, parameters, dtype, self._device)
            self._paths[kind, dtype] = path
        return path

    def _parameters(self) -> torch.Tensor | None:
        """(rows,) bool: which rows average parameters; None if no row does."""
        flags = [
            mixer is Mixer.PARAMETERS and bool(pairs) for mixer, pairs in zip(self._mixers, self._pairs, strict=True)
        ]
        return torch.tensor(flags, device=self._device) if any(flags) else None


def _pairs(row: RowRoute, slot_of: Mapping[AdapterRef, int]) -> Pairs:
    weights: dict[int, float] = {}
    for adapter, weight in zip(row.adapters, row.weights, strict=True):
        slot = slot_of[adapter]
        weights[slot] = weights.get(slot, 0.0) + weight
    return [(slot, weight) for slot, weight in weights.items() if weight != 0.0]
