"""The stacked factors of all slots for modules that share one input (q/k/v, gate/up, or one alone).

An adapter is prepared on any thread: checked, converted and put end to end in host memory. What is left for the
thread that decodes is to copy it into a slot.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from loraretriever.errors import InvalidInputError
from loraretriever.types import AdapterWeights, LoraPair


@dataclass(frozen=True, slots=True)
class Target:
    """What a linear module takes: its features, and the dtype of its weight."""

    out: int
    features: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """One module's factors as a slot holds them: a (rank, in), b (rank, out) with the scaling folded in."""

    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Factors of one dtype, end to end in one piece of memory: a single copy brings them to a device.

    `shapes` holds (rank, in, out) by module; `factors` are views of `memory`.
    """

    memory: torch.Tensor
    shapes: Mapping[str, tuple[int, int, int]]
    factors: Mapping[str, Factors]

    @classmethod
    def over(cls, memory: torch.Tensor, shapes: Mapping[str, tuple[int, int, int]]) -> Block:
        """The block of these shapes in this memory, which has as many numbers as they need."""
        sizes = [rank * width for rank, *widths in shapes.values() for width in widths]
        parts = iter(memory.split_with_sizes(sizes))
        factors = {
            name: Factors(next(parts).view(rank, features), next(parts).view(rank, out))
            for name, (rank, features, out) in shapes.items()
        }
        return cls(memory, shapes, factors)

    def to(self, device: torch.device) -> Block:
        """The block on a device: itself if it is there."""
        if self.memory.device == device:
            return self
        # Pinned memory goes without waiting; PyTorch does not use it again before the copy is done.
        return Block.over(self.memory.to(device, non_blocking=True), self.shapes)

    @property
    def nbytes(self) -> int:
        """Bytes that the memory takes; PyTorch gives pinned memory in powers of two."""
        size = self.memory.nbytes
        return 1 << (size - 1).bit_length() if self.memory.is_pinned() else size


@dataclass(frozen=True, slots=True, eq=False)
class PreparedAdapter:
    """An adapter in host memory, checked and converted for one base model: it only has to be copied into a slot."""

    name: str
    digest: str
    blocks: tuple[Block, ...]  # one per dtype
    nbytes: int

    @property
    def modules(self) -> list[str]:
        """Module paths, sorted."""
        return sorted(name for block in self.blocks for name in block.shapes)

    @property
    def rank(self) -> int:
        """The largest rank of its modules."""
        return max(rank for block in self.blocks for rank, _, _ in block.shapes.values())


def prepare_adapter(weights: AdapterWeights, targets: Mapping[str, Target], pinned: bool) -> PreparedAdapter:
    """Convert an adapter for modules of these kinds, in new memory, pinned if asked for. For any thread.

    Semantics: a = cast(A), b = cast(s B)^T; the scaling s is folded in in float32

    Raises:
        InvalidInputError: factors do not fit their module, or a number is infinite in the module's dtype.
    """
    shapes: dict[torch.dtype, dict[str, tuple[int, int, int]]] = {}
    for name, pair in weights.modules.items():
        target = targets[name]
        _check_shape(weights.name, name, pair, target)
        shapes.setdefault(target.dtype, {})[name] = (pair.a.shape[0], target.features, target.out)
    with torch.inference_mode(False), torch.no_grad():
        blocks = tuple(_fill_block(weights, dtype, shapes[dtype], pinned) for dtype in shapes)
    return PreparedAdapter(weights.name, weights.digest, blocks, sum(block.nbytes for block in blocks))


def _fill_block(
    weights: AdapterWeights, dtype: torch.dtype, shapes: Mapping[str, tuple[int, int, int]], pinned: bool
) -> Block:
    size = sum(rank * (features + out) for rank, features, out in shapes.values())
    block = Block.over(torch.empty(size, dtype=dtype, pin_memory=pinned), shapes)
    for name, factors in block.factors.items():
        pair = weights.modules[name]
        factors.a.copy_(pair.a)
        factors.b.copy_((pair.b.float() * pair.scaling).t())
    _check_finite(weights.name, block)
    return block


def _check_shape(adapter: str, module: str, pair: LoraPair, target: Target) -> None:
    out, features, rank = target.out, target.features, pair.a.shape[0]
    if rank == 0 or tuple(pair.a.shape) != (rank, features) or tuple(pair.b.shape) != (out, rank):
        raise InvalidInputError(
            f"adapter {adapter!r}, module {module!r}: A is {tuple(pair.a.shape)} and B is {tuple(pair.b.shape)}; "
            f"expected (r, {features}) and ({out}, r). Use an adapter that was trained for this base model."
        )


def _check_finite(adapter: str, block: Block) -> None:
    """Refuse numbers that are not finite in the block's dtype.

    An infinite number in one slot would turn the rows of other adapters into NaN, for 0 * inf is NaN.
    """
    if _is_finite(block.memory):
        return
    module = next(name for name, f in block.factors.items() if not (_is_finite(f.a) and _is_finite(f.b)))
    dtype = block.memory.dtype
    raise InvalidInputError(
        f"adapter {adapter!r}, module {module!r}: a number is infinite or above {torch.finfo(dtype).max:.3g}, the "
        f"largest that {dtype} holds; load the base model in bfloat16 or float32, or train the adapter again."
    )


def _is_finite(values: torch.Tensor) -> bool:
    # Both are NaN if any number is; one pass, many times faster than isfinite().all().
    low, high = values.aminmax()
    return math.isfinite(low.item()) and math.isfinite(high.item())


class GroupStack:
    """A of all members side by side, (slots, members, rank, in), and B of each, (slots, rank, out).

    Ranks below the slots' rank are padded with zeros. A slot whose adapter lacks a member has zeros there.
    """

    def __init__(self, slots: int, rank: int, members: Mapping[str, torch.Tensor], features: int) -> None:
        """`members` maps module paths to their base weights' outputs: an empty tensor (out, 0) of dtype and device."""
        first = next(iter(members.values()))
        self.slots, self.rank, self.features = slots, rank, features
        self.names = list(members)
        self.a = first.new_zeros(slots, len(members), rank, features)
        self.b = [like.new_zeros(slots, rank, like.shape[0]) for like in members.values()]
        # The rank of each member in the slots that are not all zeros; 0 where the adapter lacks it.
        self.filled: dict[int, tuple[int, ...]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the stacked tensors."""
        return self.a.nbytes + sum(b.nbytes for b in self.b)

    def copy_from(self, other: GroupStack) -> None:
        """Take over the slots of a stack with fewer slots or members, or a lower rank."""
        for i, name in enumerate(other.names):
            j = self.names.index(name)
            self.a[: other.slots, j, : other.rank] = other.a[:, i]
            self.b[j][: other.slots, : other.rank] = other.b[i]
        for slot, ranks in other.filled.items():
            by_name = dict(zip(other.names, ranks, strict=True))
            self.filled[slot] = tuple(by_name.get(name, 0) for name in self.names)

    def make_ready(
        self, slot: int, factors: Mapping[str, Factors], places: list[torch.Tensor], sources: list[torch.Tensor]
    ) -> None:
        """Zero what would stay of the slot's last adapter; append where the new one's factors go, and the factors."""
        before = self.filled.pop(slot, (0,) * len(self.names))
        members = zip(self.names, before, self.a.select(0, slot).unbind(), self.b, strict=True)
        ranks = []
        for name, last, a, stack in members:
            b, found = stack.select(0, slot), factors.get(name)
            rank = 0 if found is None else found.a.shape[0]
            if rank < last:
                a[rank:last] = 0
                b[rank:last] = 0
            if found is not None:
                places += (a, b) if rank == self.rank else (a[:rank], b[:rank])
                sources += (found.a, found.b)
            ranks.append(rank)
        if any(ranks):
            self.filled[slot] = tuple(ranks)

    def clear(self, slot: int) -> None:
        """Set a slot to zero, whatever it holds."""
        for stack in (self.a, *self.b):
            stack[slot] = 0
        self.filled.pop(slot, None)

    def exchange(self, one: int, other: int) -> None:
        """Let two slots change places."""
        if one not in self.filled and other not in self.filled:
            return
        for stack in (self.a, *self.b):
            kept = stack[one].clone()
            stack[one] = stack[other]
            stack[other] = kept
        moved = {one: other, other: one}
        self.filled = {moved.get(slot, slot): ranks for slot, ranks in self.filled.items()}


def write_slot(stacks: Iterable[GroupStack], slot: int, adapter: PreparedAdapter, device: torch.device) -> None:
    """Put an adapter into a slot of all stacks; members that it lacks become zero. Only copies are made.

    If it fails, the slot is not to be used before it is cleared.
    """
    factors = {name: each for block in adapter.blocks for name, each in block.to(device).factors.items()}
    places: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []
    for stack in stacks:
        stack.make_ready(slot, factors, places, sources)
    # One call for all: on a GPU a few kernels instead of one for each factor.
    torch._foreach_copy_(places, sources)
