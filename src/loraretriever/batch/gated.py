"""Rows whose weights a gate computes for every token, beside rows with weights of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from loraretriever.batch import lora
from loraretriever.batch.gates import GATES, Seen, gate_weights
from loraretriever.batch.paths import GatheredPath
from loraretriever.batch.stacks import GroupStack
from loraretriever.types import Gate

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class GatedRow:
    """What a gated row holds.

    `pairs`: (slot, weight) of its adapters, slots distinct, weights above 0; `outputs` of a linear router, one for each
    of them, else all 0; `router`: the slot of the trained router, if the gate has one.
    """

    gate: Gate
    pairs: tuple[tuple[int, float], ...]
    outputs: tuple[int, ...]
    router: int | None = None

    @property
    def slots(self) -> list[int]:
        """The slots in the order of the row's places: the router's is the first."""
        return ([] if self.router is None else [self.router]) + [slot for slot, _ in self.pairs]


class GatedPath:
    """Each row through copies of its own slots, as in `GatheredPath`, with weights for each token and module.

    It is made once for a routing and a dtype; `over` adds what depends on the stack of a group of modules.
    """

    def __init__(
        self,
        pairs: Sequence[Sequence[tuple[int, float]]],
        gated: Sequence[GatedRow | None],
        parameters: torch.Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`pairs` of each row without a gate: (slot, weight); `gated`: the other rows, None for those without."""
        held = [
            pair if row is None else [(slot, 0.0) for slot in row.slots] for pair, row in zip(pairs, gated, strict=True)
        ]
        self.base = GatheredPath(held, parameters, dtype, device)
        by_gate: dict[Gate, list[int]] = {}
        for n, row in enumerate(gated):
            if row is not None:
                by_gate.setdefault(row.gate, []).append(n)
        width = max(map(len, held))
        slots = self.base.slots.view(len(held), -1)
        self._parts = [
            _Part(gate, [row for n in places if (row := gated[n])], places, len(held), slots, width)
            for gate, places in by_gate.items()
        ]
        self._over: dict[GroupStack, GatedGroup] = {}

    def over(self, stack: GroupStack) -> GatedGroup:
        """The path for a group of modules, as long as its slots hold what they do now."""
        group = self._over.get(stack)
        if group is None:
            with torch.inference_mode(False):
                group = self._over[stack] = GatedGroup(self, stack, self._parts)
        return group


class GatedGroup:
    """A gated path over one stack: a `Path`."""

    def __init__(self, path: GatedPath, stack: GroupStack, parts: Sequence[_Part]) -> None:
        self._base = path.base
        self._b = stack.b
        self._parts = [(part, *part.priors_in(stack)) for part in parts]

    def hidden(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """(G, N, T, K, R)."""
        h = lora.shrink_gathered(x, a, self._base.slots)
        weights: torch.Tensor | None = None
        for part, priors, lacking in self._parts:
            found = part.weigh(h, self._b, priors, lacking)
            if part.rows is None:
                weights = found
            else:
                if weights is None:
                    weights = self._base.weights.expand(*h.shape[:4], 1).contiguous()
                weights.index_copy_(1, part.rows, found)
        assert weights is not None
        return lora.mix(h, weights, self._base.parameters)

    def add(self, y: torch.Tensor, h: torch.Tensor, member: int, b: torch.Tensor) -> None:
        """See `Path`."""
        self._base.add(y, h, member, b)


class _Part:
    """The rows of a routing that share a gate."""

    def __init__(
        self, gate: Gate, gated: Sequence[GatedRow], places: Sequence[int], count: int, slots: torch.Tensor, width: int
    ) -> None:
        """`places`: which of the routing's `count` rows they are; slots (count, width) of all rows."""
        self._gate, self._gated, self._width = gate, gated, width
        device = slots.device
        self.rows = torch.tensor(places, device=device) if len(places) < count else None  # None: all
        self._slots = slots if self.rows is None else slots.index_select(0, self.rows)
        outputs = [self._padded(row, row.outputs, 0) for row in gated]
        self._outputs = torch.tensor(outputs, device=device)
        logs = [self._padded(row, [math.log(weight) for _, weight in row.pairs], -math.inf) for row in gated]
        self._priors = torch.tensor(logs, device=device)[None, :, None]  # (1, n, 1, K)

    def priors_in(self, stack: GroupStack) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logarithms of the weights, -inf for adapters that lack a module of this stack.

        Returns (1 or G, n, 1, K), and where a row has no adapter for a module: (G, n, 1, 1) bool, None if nowhere.
        """
        none = (0,) * len(stack.names)
        ranks = [[stack.filled.get(slot, none) for slot, _ in row.pairs] for row in self._gated]
        if all(rank for row in ranks for each in row for rank in each):
            return self._priors, None
        absent = [
            [
                self._padded(row, [not each[member] for each in found], True)
                for row, found in zip(self._gated, ranks, strict=True)
            ]
            for member in range(len(stack.names))
        ]
        is_absent = torch.tensor(absent, device=self._priors.device)[:, :, None]
        lacking = is_absent.all(dim=-1, keepdim=True)
        priors = self._priors.masked_fill(is_absent, -math.inf).masked_fill(lacking, 0.0)
        return priors, lacking if bool(lacking.any()) else None

    def weigh(
        self, h: torch.Tensor, b: Sequence[torch.Tensor], priors: torch.Tensor, lacking: torch.Tensor | None
    ) -> torch.Tensor:
        """The weights of these rows, (G, n, T, K, 1), from the activations of all rows, (G, N, T, K, R)."""
        own = h if self.rows is None else h.index_select(1, self.rows)
        logits = GATES[self._gate.kind].logits(Seen(own, self._slots, self._outputs, b))
        weights = gate_weights(logits, priors, self._gate.top_k, self._gate.temperature)
        if lacking is not None:
            weights = weights.masked_fill(lacking, 0.0)
        return weights.to(h.dtype).unsqueeze(-1)

    def _padded(self, row: GatedRow, values: Sequence[_Value], filler: _Value) -> list[_Value]:
        """A value for each of the row's adapters, a filler for its router and for places that it does not use."""
        before = [filler] * (row.router is not None)
        return before + list(values) + [filler] * (self._width - len(before) - len(values))
