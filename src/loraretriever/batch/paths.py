"""Ways to apply one routing; each binds the functions of `lora.py` to the routing's tensors.

dense: all rows through all slots up to the highest in use. gathered: each row's slots copied side by side.
grouped: rows collected by slot. split: grouped in two passes, for slots of unequal popularity.
All give the same result; `costs.py` says when which is the cheapest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch

from loraretriever.batch import lora

RowPairs = Sequence[Sequence[tuple[int, float]]]  # per row: (slot, weight), slots distinct


class Path(Protocol):
    """One way to apply a routing to a group of modules that share their input."""

    def hidden(self, x: torch.Tensor, a: torch.Tensor) -> Any:
        """Mixed rank-space activations of x (N, T, in) under a (S, G, R, in), in the path's own layout."""
        ...

    def add(self, y: torch.Tensor, h: Any, member: int, b: torch.Tensor) -> None:
        """Add the update of the group's module `member` to y (N, T, out): h from `hidden`, b (S, R, out)."""
        ...


class DensePath:
    """All rows through slots [0, span)."""

    def __init__(
        self, pairs: RowPairs, parameters: torch.Tensor | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.span = 1 + max(slot for row in pairs for slot, _ in row)
        weights = torch.zeros(len(pairs), 1, self.span, 1)
        for n, row in enumerate(pairs):
            for slot, weight in row:
                weights[n, 0, slot, 0] = weight
        self._weights = weights.to(device, dtype)
        self._parameters = None if parameters is None else parameters.view(-1, 1, 1, 1)

    def hidden(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """(G, N, T, span, R)."""
        return lora.mix(lora.shrink_dense(x, a[: self.span]), self._weights, self._parameters)

    def add(self, y: torch.Tensor, h: torch.Tensor, member: int, b: torch.Tensor) -> None:
        """See `Path`."""
        lora.expand_dense(y, h[member], b[: self.span])


class GatheredPath:
    """Each row through copies of its own slots; rows with fewer slots than others are padded with weight zero."""

    def __init__(
        self, pairs: RowPairs, parameters: torch.Tensor | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        width = max(len(row) for row in pairs)
        # Padding repeats a slot that is in use, so that no other slot's numbers can enter.
        spare = next(slot for row in pairs for slot, _ in row)
        slots = [[slot for slot, _ in row] + [spare] * (width - len(row)) for row in pairs]
        weights = [[weight for _, weight in row] + [0.0] * (width - len(row)) for row in pairs]
        self.slots = torch.tensor(slots, device=device).view(-1)
        self.weights = torch.tensor(weights).view(len(pairs), 1, width, 1).to(device, dtype)
        self.parameters = None if parameters is None else parameters.view(-1, 1, 1, 1)

    def hidden(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """(G, N, T, K, R)."""
        return lora.mix(lora.shrink_gathered(x, a, self.slots), self.weights, self.parameters)

    def add(self, y: torch.Tensor, h: torch.Tensor, member: int, b: torch.Tensor) -> None:
        """See `Path`."""
        lora.expand_gathered(y, h[member], b, self.slots)


class GroupedPath:
    """Each slot over the rows that use it; slots with fewer rows than others have empty places of weight zero.

    `slots` restricts it to some slots, whose factors are then copied; otherwise it runs over [0, span) in place.
    """

    def __init__(
        self,
        pairs: RowPairs,
        parameters: torch.Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
        slots: Sequence[int] | None = None,
    ) -> None:
        self.span = 1 + max(slot for row in pairs for slot, _ in row)
        self._slots = None if slots is None else torch.tensor(slots, device=device)
        order = {slot: i for i, slot in enumerate(range(self.span) if slots is None else slots)}
        by_slot: list[list[tuple[int, float]]] = [[] for _ in order]
        held: list[list[tuple[int, int]]] = [[] for _ in pairs]  # per row: (slot's index, place within it)
        for n, row in enumerate(pairs):
            for slot, weight in row:
                held[n].append((order[slot], len(by_slot[order[slot]])))
                by_slot[order[slot]].append((n, weight))
        most = max(len(rows) for rows in by_slot)
        padded = [rows + [(0, 0.0)] * (most - len(rows)) for rows in by_slot]
        self._places = torch.tensor([[n for n, _ in rows] for rows in padded], device=device).view(-1)
        self._weights = torch.tensor([[w for _, w in rows] for rows in padded]).view(-1, 1).to(device, dtype)
        taken = [i * most + place for places in held for i, place in places]
        self._taken = torch.tensor(taken, device=device)
        self._offsets = torch.tensor([0, *accumulate(len(places) for places in held)][:-1], device=device)
        self._parameters = None if parameters is None else parameters.index_select(0, self._places).view(-1, 1)

    def _select(self, stack: torch.Tensor) -> torch.Tensor:
        return stack[: self.span] if self._slots is None else stack.index_select(0, self._slots)

    def hidden(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """(slots, M * T, G * R)."""
        h = lora.shrink_grouped(x, self._select(a), self._places)
        flat = h.view(self._places.shape[0], -1)
        mixed = lora.mix_grouped(flat, self._weights, self._parameters, self._places, self._taken, self._offsets)
        return mixed.view(h.shape)

    def add(self, y: torch.Tensor, h: torch.Tensor, member: int, b: torch.Tensor) -> None:
        """See `Path`."""
        rank = b.shape[1]
        part = h[:, :, member * rank : (member + 1) * rank]
        lora.expand_grouped(y, part, self._select(b), self._taken, self._offsets)


class SplitPath:
    """Grouped, with at most `NARROW` rows for a slot in the first pass and the rest of popular slots in a second.

    Without it, one slot that many rows use would make every slot as wide. Only for rows that add outputs: those
    are sums over pairs of row and slot, which may be split in any way; averaged parameters are not.
    """

    def __init__(
        self, pairs: RowPairs, parameters: torch.Tensor | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        assert parameters is None
        seen: Counter[int] = Counter()
        first: list[list[tuple[int, float]]] = [[] for _ in pairs]
        rest: list[list[tuple[int, float]]] = [[] for _ in pairs]
        for n, row in enumerate(pairs):
            for slot, weight in row:
                (first if seen[slot] < lora.NARROW else rest)[n].append((slot, weight))
                seen[slot] += 1
        popular = sorted({slot for row in rest for slot, _ in row})
        self._parts = [GroupedPath(first, None, dtype, device)]
        if popular:
            self._parts.append(GroupedPath(rest, None, dtype, device, popular))

    def hidden(self, x: torch.Tensor, a: torch.Tensor) -> list[torch.Tensor]:
        """The activations of each pass."""
        return [part.hidden(x, a) for part in self._parts]

    def add(self, y: torch.Tensor, h: Sequence[torch.Tensor], member: int, b: torch.Tensor) -> None:
        """See `Path`."""
        for part, activations in zip(self._parts, h, strict=True):
            part.add(y, activations, member, b)
