"""The stacked factors of all slots for modules that share one input (q/k/v, gate/up, or one alone)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from loraretriever.errors import InvalidInputError
from loraretriever.types import LoraPair


class GroupStack:
    """A of all members side by side, (slots, members, rank, in), and B of each, (slots, rank, out).

    Ranks below the slots' rank are padded with zeros. The scaling is folded into B, in float32, before the cast
    to the base weight's dtype. A slot whose adapter lacks a member has zeros there.
    """

    def __init__(self, slots: int, rank: int, members: Mapping[str, torch.Tensor], features: int) -> None:
        """`members` maps module paths to their base weights' outputs: an empty tensor (out, 0) of dtype and device."""
        first = next(iter(members.values()))
        self.slots, self.rank, self.features = slots, rank, features
        self.names = list(members)
        self.a = first.new_zeros(slots, len(members), rank, features)
        self.b = [like.new_zeros(slots, rank, like.shape[0]) for like in members.values()]
        self.filled: set[int] = set()  # slots that are not all zeros

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
        self.filled = set(other.filled)

    def write(self, slot: int, modules: Mapping[str, LoraPair]) -> None:
        """Put one adapter's factors for these members into a slot; those it lacks become zero."""
        self.clear(slot)
        for i, name in enumerate(self.names):
            pair = modules.get(name)
            if pair is not None:
                rank = pair.a.shape[0]
                self.a[slot, i, :rank] = pair.a.to(self.a)
                self.b[i][slot, :rank] = (pair.b.float() * pair.scaling).t().to(self.b[i])
                self.filled.add(slot)

    def clear(self, slot: int) -> None:
        """Set a slot to zero."""
        if slot in self.filled:
            self.a[slot] = 0
            for b in self.b:
                b[slot] = 0
            self.filled.remove(slot)

    def exchange(self, one: int, other: int) -> None:
        """Let two slots change places."""
        if one not in self.filled and other not in self.filled:
            return
        for stack in (self.a, *self.b):
            kept = stack[one].clone()
            stack[one] = stack[other]
            stack[other] = kept
        moved = {one: other, other: one}
        self.filled = {moved.get(slot, slot) for slot in self.filled}


def check_fits(adapter: str, module: str, pair: LoraPair, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Refuse factors that do not fit a module of the given (out, in) features, or that overflow its dtype.

    An infinite number in one slot would turn the rows of other adapters into NaN, for 0 * inf is NaN.
    """
    out, features = shape
    rank = pair.a.shape[0]
    if tuple(pair.a.shape) != (rank, features) or tuple(pair.b.shape) != (out, rank):
        raise InvalidInputError(
            f"adapter {adapter!r}, module {module!r}: A is {tuple(pair.a.shape)} and B is {tuple(pair.b.shape)}; "
            f"expected (r, {features}) and ({out}, r). Use an adapter that was trained for this base model."
        )
    largest = torch.finfo(dtype).max
    for factor in (pair.a.float(), pair.b.float() * pair.scaling):
        # `not <=` also catches NaN.
        if not bool(factor.abs().amax() <= largest):
            raise InvalidInputError(
                f"adapter {adapter!r}, module {module!r}: a number is infinite or above {largest:.3g}, the largest "
                f"that {dtype} holds; load the base model in bfloat16 or float32, or train the adapter again."
            )
