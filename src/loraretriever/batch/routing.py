"""Which adapters, with which weights, each row of a batch uses: built once per batch, shared by all layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from loraretriever.batch.costs import CostModel, cost_model
from loraretriever.batch.gated import GatedPath, GatedRow
from loraretriever.batch.gates import GATES, check_gate
from loraretriever.batch.paths import DensePath, GatheredPath, GroupedPath, Path, SplitPath
from loraretriever.batch.slots import AdapterRef
from loraretriever.batch.stacks import GroupStack
from loraretriever.errors import InvalidInputError
from loraretriever.types import Gate, Mixer


@dataclass(frozen=True, slots=True)
class RowRoute:
    """The adapters of one row with their weights, and the mixer that joins them. No adapters: the base model.

    With a `gate`, the weights are those before a token is seen: see `gates.gate_weights`. The gate decides which form
    the adapters must have (`GateKind.form`), and whether it has a `router`, which takes a slot like an adapter.
    `outputs` says which output of a linear router belongs to each adapter; other gates have none.
    """

    adapters: tuple[AdapterRef, ...] = ()
    weights: tuple[float, ...] = ()
    mixer: Mixer = Mixer.OUTPUTS
    gate: Gate | None = None
    router: AdapterRef | None = None
    outputs: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.adapters) != len(self.weights):
            raise InvalidInputError(
                f"a row has {len(self.adapters)} adapters but {len(self.weights)} weights; give one weight per adapter."
            )
        if self.gate is not None:
            self._check_gate(self.gate)

    @property
    def refs(self) -> tuple[AdapterRef, ...]:
        """All that must have a slot: the adapters, and the router if there is one."""
        return self.adapters if self.router is None else (*self.adapters, self.router)

    def _check_gate(self, gate: Gate) -> None:
        check_gate(gate)
        lowest = min(self.weights, default=0.0)
        if not lowest >= 0 or self.mixer is not Mixer.OUTPUTS:
            raise InvalidInputError(
                f"a row with the gate {gate.kind} has the weight {lowest} and the mixer {self.mixer}; expected weights "
                f"of 0 or more, since their logarithms count, and the mixer {Mixer.OUTPUTS}."
            )
        if GATES[gate.kind].trained and self.router is None:
            raise InvalidInputError(f"a row has the gate {gate.kind} but no router; expected one of that kind.")
        if self.outputs and len(self.outputs) != len(self.adapters):
            raise InvalidInputError(
                f"a row has {len(self.adapters)} adapters but {len(self.outputs)} outputs of its router; expected one "
                "for each adapter, or none."
            )


BASE_ROW = RowRoute()

Pairs = list[tuple[int, float]]  # (slot, weight) of one row, slots distinct, weights not zero


class Routing:
    """The tensors that all layers share while a batch runs.

    A weight of zero removes an adapter from its row, and an adapter named twice counts with the sum of its
    weights: both mixers are linear in the weight of each factor, and gates' weights in those before a token is seen,
    so neither changes the result. An adapter that is alone behind a gate has the weight one.

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
        self._gated = [_gated(row, slot_of) for row in rows]
        self._is_gated = any(row is not None for row in self._gated)
        self._pairs = [
            _pairs(row, slot_of) if gated is None else list(gated.pairs)
            for row, gated in zip(rows, self._gated, strict=True)
        ]
        self._mixers = [row.mixer for row in rows]
        self._device = device
        self._costs = costs
        self.used_slots = frozenset(slot for pairs in self._pairs for slot, _ in pairs)
        self.is_empty = not self.used_slots
        self._paths: dict[tuple[type, torch.dtype], Path] = {}
        self._choices: dict[tuple[int, torch.dtype], Path] = {}
        self._gated_paths: dict[torch.dtype, GatedPath] = {}

    def parts(self, shape: torch.Size) -> Iterator[Part]:
        """How an input of this shape is cut up: not at all. The input may lie in memory in any way.

        Raises:
            InvalidInputError: the shape is not (rows, tokens, features) with as many rows as the routing has.
        """
        if len(shape) != 3 or shape[0] != self.rows:
            raise _misfit(shape, f"(rows, tokens, features) with {self.rows} rows, as many as the routing has")
        yield Part(0, self.rows, shape[1], self)

    def path(self, tokens: int, dtype: torch.dtype, stack: GroupStack) -> Path:
        """The cheapest way to apply this routing to inputs of `tokens` tokens per row, with the slots of a stack."""
        if self._is_gated:
            return self._gated_path(dtype).over(stack)
        key = (tokens, dtype)
        path = self._choices.get(key)
        if path is None:
            path = self._choices[key] = self._choose(tokens, dtype)
        return path

    def _gated_path(self, dtype: torch.dtype) -> GatedPath:
        path = self._gated_paths.get(dtype)
        if path is None:
            with torch.inference_mode(False):
                path = GatedPath(self._pairs, self._gated, self._parameters(), dtype, self._device)
            self._gated_paths[dtype] = path
        return path

    def _choose(self, tokens: int, dtype: torch.dtype) -> Path:
        counts = [0] * (max(self.used_slots) + 1)
        for pairs in self._pairs:
            for slot, _ in pairs:
                counts[slot] += 1
        parameters = self._parameters()
        width = max(len(pairs) for pairs in self._pairs)
        costs = self._costs or cost_model(self._device, dtype)
        kind = _path_class(costs.cheapest(self.rows, tokens, width, counts, parameters is None))
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


@dataclass(frozen=True, slots=True)
class Part:
    """`rows` x `tokens` consecutive tokens of a flattened input, from `first` on, that one routing serves."""

    first: int
    rows: int
    tokens: int
    routing: Routing

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """This part of an input or output. Shapes: x (..., features), contiguous; returns (rows, tokens, features)."""
        features, count = x.shape[-1], self.rows * self.tokens
        if x.numel() == count * features:
            return x.view(self.rows, self.tokens, features)
        return x.view(-1, features)[self.first : self.first + count].view(self.rows, self.tokens, features)


class PackedRouting:
    """Routings for parts of one packed row of tokens: an input of shape (1, tokens, features).

    Some modules, such as the output embeddings, see only some of the tokens: `kept` is their routing.
    """

    def __init__(self, parts: Sequence[tuple[Routing, int]], epoch: int, kept: PackedRouting | None = None) -> None:
        """`parts`: each routing with the number of tokens of each of its rows."""
        self._parts: list[Part] = []
        self.tokens = 0
        for routing, tokens in parts:
            if not routing.is_empty:
                self._parts.append(Part(self.tokens, routing.rows, tokens, routing))
            self.tokens += routing.rows * tokens
        self.epoch = epoch
        self._kept = kept
        self.used_slots = frozenset[int]().union(*(part.routing.used_slots for part in self._parts))
        self.is_empty = not self.used_slots

    def parts(self, shape: torch.Size) -> Sequence[Part]:
        """How an input of this shape is cut up; parts that use no adapter are left out.

        Raises:
            InvalidInputError: the shape is not (1, tokens, features) with as many tokens as the routing has.
        """
        if len(shape) == 3 and shape[0] == 1:
            if shape[1] == self.tokens:
                return self._parts
            if self._kept is not None and shape[1] == self._kept.tokens:
                return self._kept.parts(shape)
        raise _misfit(shape, f"(1, tokens, features) with {self.tokens} tokens, as many as the routing has")


def _path_class(name: str) -> type[DensePath | GatheredPath | GroupedPath | SplitPath]:
    if name == "kernels":
        from loraretriever.batch.kernels.gathered import KernelPath

        return KernelPath
    kinds: dict[str, type[DensePath | GatheredPath | GroupedPath | SplitPath]] = {
        "dense": DensePath,
        "gathered": GatheredPath,
        "grouped": GroupedPath,
        "split": SplitPath,
    }
    return kinds[name]


def _misfit(shape: torch.Size, expected: str) -> InvalidInputError:
    return InvalidInputError(
        f"an input has the shape {tuple(shape)}; expected {expected}. Models that flatten rows and tokens or send "
        "only some of them through a module (mixture of experts) cannot have adapters there."
    )


def _gated(row: RowRoute, slot_of: Mapping[AdapterRef, int]) -> GatedRow | None:
    """None: its weights do not depend on the tokens."""
    pairs = _summed(row, slot_of)
    if row.gate is None or len(pairs) < 2:
        return None
    outputs = {slot_of[ref]: output for ref, output in zip(row.adapters, row.outputs, strict=False)}
    router = None if row.router is None else slot_of[row.router]
    return GatedRow(row.gate, tuple(pairs), tuple(outputs.get(slot, 0) for slot, _ in pairs), router)


def _pairs(row: RowRoute, slot_of: Mapping[AdapterRef, int]) -> Pairs:
    pairs = _summed(row, slot_of)
    return pairs if row.gate is None else [(slot, 1.0) for slot, _ in pairs]


def _summed(row: RowRoute, slot_of: Mapping[AdapterRef, int]) -> Pairs:
    weights: dict[int, float] = {}
    for adapter, weight in zip(row.adapters, row.weights, strict=True):
        slot = slot_of[adapter]
        weights[slot] = weights.get(slot, 0.0) + weight
    return [(slot, weight) for slot, weight in weights.items() if weight != 0.0]
