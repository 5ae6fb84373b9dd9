"""Which adapter is in which slot: least recently used first to go. Bookkeeping only; the tensors are in `stacks.py`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from loraretriever.errors import InvalidInputError

# Slots are moved to the front when the span to the highest one in use exceeds the slots in use by this factor:
# a guess, for the cost of moving has not been measured.
_SLACK = 1.25


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One revision of an adapter. The digest is its identity; the name serves messages only."""

    name: str = field(compare=False)
    digest: str


class SlotTable:
    """Maps adapters to slots 0 .. capacity - 1, in order of last use."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise InvalidInputError(f"the number of slots is {capacity}; expected at least 1.")
        self.capacity = capacity
        self.size = 0  # slots that exist so far; grows to the capacity as they are needed
        self._slot_of: dict[AdapterRef, int] = {}  # least recently used first
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._slot_of)

    def __contains__(self, ref: AdapterRef) -> bool:
        return ref in self._slot_of

    def __getitem__(self, ref: AdapterRef) -> int:
        return self._slot_of[ref]

    @property
    def resident(self) -> tuple[AdapterRef, ...]:
        """The adapters that have a slot, least recently used first."""
        return tuple(self._slot_of)

    def touch(self, refs: Sequence[AdapterRef]) -> list[AdapterRef]:
        """Mark resident adapters as just used and return the distinct ones that have no slot, in the given order.

        Raises:
            InvalidInputError: more distinct adapters than slots; nothing has changed then.
        """
        wanted = dict.fromkeys(refs)
        if len(wanted) > self.capacity:
            raise InvalidInputError(
                f"this batch uses {len(wanted)} different adapters, but there are {self.capacity} slots; "
                "raise the number of slots, or put fewer rows with different adapters into a batch."
            )
        for ref in wanted:
            if ref in self._slot_of:
                self._slot_of[ref] = self._slot_of.pop(ref)
        missing = [ref for ref in wanted if ref not in self._slot_of]
        self._grow(len(self._slot_of) + len(missing))
        return missing

    def _grow(self, wanted: int) -> None:
        """Let there be at least `wanted` slots, or as many as the capacity allows; sizes double."""
        size = max(self.size, 1)
        while size < min(wanted, self.capacity):
            size *= 2
        size = min(size, self.capacity)
        self._free[:0] = range(size - 1, self.size - 1, -1)
        self.size = size

    def make_room(self, keep: Collection[AdapterRef]) -> int:
        """A free slot, taken from the least recently used adapter outside `keep` if there is none."""
        if not self._free:
            victim = next(ref for ref in self._slot_of if ref not in keep)
            self._free.append(self._slot_of.pop(victim))
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        """Return a slot from `make_room` that was not filled after all."""
        self._free.append(slot)

    def put(self, ref: AdapterRef, slot: int) -> None:
        """Record that `slot`, from `make_room`, now holds `ref`."""
        self._slot_of[ref] = slot

    def compact(self, used: Collection[AdapterRef]) -> list[tuple[int, int]]:
        """Move the slots in use to the front if they are too spread out; return the pairs of slots to exchange."""
        slots = {self._slot_of[ref] for ref in used}
        if not slots or max(slots) + 1 <= _SLACK * len(slots):
            return []
        behind = [slot for slot in slots if slot >= len(slots)]
        before = [slot for slot in range(len(slots)) if slot not in slots]
        pairs = list(zip(before, behind, strict=True))
        other = {a: b for pair in pairs for a, b in (pair, pair[::-1])}
        self._slot_of = {ref: other.get(slot, slot) for ref, slot in self._slot_of.items()}
        self._free = [other.get(slot, slot) for slot in self._free]
        return pairs
