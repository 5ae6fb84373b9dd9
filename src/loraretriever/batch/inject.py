"""Gives the linear modules of a transformers model their adapters, and takes them away again.

A module keeps its place, its weights and its name: only the `forward` of the targeted ones is replaced, so tied
embeddings, `state_dict` and hooks see the model they know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from loraretriever.batch.paths import Path
from loraretriever.batch.routing import PackedRouting, Part, Routing
from loraretriever.batch.stacks import GroupStack
from loraretriever.errors import InvalidInputError

# Modules below one parent that read the same input in the models known to us. A wrong guess costs time, not
# correctness: a member that gets another input computes its own activations.
_SHARED_INPUT = (
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"query", "key", "value"}),
    frozenset({"gate_proj", "up_proj"}),
    frozenset({"w1", "w3"}),
)


def group_of(name: str, features: int) -> str:
    """The name of the group of a module with so many input features: members may share their input."""
    parent, _, leaf = name.rpartition(".")
    family = next((sorted(family) for family in _SHARED_INPUT if leaf in family), [leaf])
    return f"{parent}.{'+'.join(family)}:{features}"


def linear_shape(name: str, module: nn.Module) -> tuple[int, int]:
    """(out, in) features of a linear module.

    Raises:
        InvalidInputError: the module is of another kind.
    """
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    weight = getattr(module, "weight", None)
    # GPT-2's linear layer, which holds its weight transposed.
    if type(module).__name__ == "Conv1D" and isinstance(weight, torch.Tensor):
        return weight.shape[1], weight.shape[0]
    raise InvalidInputError(
        f"an adapter targets {name!r}, which is a {type(module).__name__}; only linear modules can have adapters. "
        "Use an adapter that targets linear modules."
    )


class Active:
    """The routing that the model's next forward pass uses, shared by all groups; None: no adapters."""

    def __init__(self) -> None:
        self.routing: Routing | PackedRouting | None = None


class LoraGroup:
    """Modules that may share one input, with the stacked factors of all slots.

    The first member called computes the activations for all. Another member uses them only if it gets the very
    same, unchanged tensor; both are let go once every member has had them.
    """

    def __init__(self, active: Active) -> None:
        self._active = active
        self._modules: dict[str, nn.Module] = {}
        self._replaced: dict[str, Any] = {}  # forwards that were instance attributes before us
        self.stack: GroupStack | None = None
        # What the last member called has left for the others: its input, the activations, who has had them.
        self._x: torch.Tensor | None = None
        self._x_version = -1
        self._parts: list[tuple[Part, Path, Any]] = []  # each with its path and its activations
        self._served: set[int] = set()

    @property
    def names(self) -> list[str]:
        """Module paths of the members."""
        return list(self._modules)

    def has_room(self, slots: int, rank: int) -> bool:
        """Whether there are this many slots of this rank."""
        return self.stack is not None and self.stack.slots >= slots and self.stack.rank >= rank

    def resize(self, slots: int, rank: int, modules: Mapping[str, nn.Module]) -> None:
        """Take in these modules too, and give the slots this rank; what the slots hold stays."""
        members = {**self._modules, **modules}
        shapes = {name: linear_shape(name, module) for name, module in members.items()}
        like = {name: _weight(module).new_empty(shapes[name][0], 0) for name, module in members.items()}
        stack = GroupStack(slots, rank, like, next(iter(shapes.values()))[1])
        if self.stack is not None:
            stack.copy_from(self.stack)
        self.eject()
        self._modules, self.stack = members, stack
        for i, (name, module) in enumerate(members.items()):
            if "forward" in vars(module):
                self._replaced[name] = vars(module)["forward"]
            module.forward = partial(self._forward, i, name, module.forward)

    def eject(self) -> None:
        """Give the modules their own forward back."""
        for name, module in self._modules.items():
            del module.forward
            if name in self._replaced:
                module.forward = self._replaced.pop(name)
        self._modules = {}
        self.forget()

    def _forward(self, member: int, name: str, base: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Semantics: y = base(x) + the update of the row's adapters."""
        y = base(x)
        routing, stack = self._active.routing, self.stack
        if routing is None or stack is None or routing.used_slots.isdisjoint(stack.filled):
            return y
        if x is not self._x or _version(x) != self._x_version:
            self._remember(routing, stack, name, x)
        if not y.is_contiguous():
            y = y.contiguous()
        for part, path, h in self._parts:
            path.add(part.of(y), h, member, stack.b[member])
        self._served.add(member)
        if len(self._served) == len(stack.b):
            self.forget()
        return y

    def _remember(self, routing: Routing | PackedRouting, stack: GroupStack, name: str, x: torch.Tensor) -> None:
        self._parts = []
        try:
            parts = routing.parts(x.shape)
        except InvalidInputError as error:
            raise InvalidInputError(f"module {name!r}: {error}") from None
        whole = x if x.is_contiguous() else x.contiguous()
        for part in parts:
            if not part.routing.used_slots.isdisjoint(stack.filled):
                path = part.routing.path(part.tokens, x.dtype, stack)
                self._parts.append((part, path, path.hidden(part.of(whole), stack.a)))
        self._x, self._x_version, self._served = x, _version(x), set()

    def forget(self) -> None:
        """Let the remembered input and its activations go."""
        self._x, self._parts, self._served = None, [], set()


def _version(x: torch.Tensor) -> int:
    """Counts changes in place; inference tensors do not count them."""
    return 0 if x.is_inference() else x._version


def _weight(module: nn.Module) -> torch.Tensor:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight


@contextmanager
def activated(active: Active, routing: Routing | PackedRouting, groups: Iterator[LoraGroup]) -> Iterator[None]:
    """Use a routing inside the block, and let all remembered inputs go at its end."""
    active.routing = routing
    try:
        yield
    finally:
        active.routing = None
        for group in groups:
            group.forget()
