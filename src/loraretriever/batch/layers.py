"""`LoraLayers`: one base model whose rows may each use other adapters. The engine's door to this package."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import nn

from loraretriever.batch.inject import Active, LoraGroup, activated, group_of, linear_shape
from loraretriever.batch.routing import PackedRouting, Routing, RowRoute
from loraretriever.batch.slots import AdapterRef, SlotTable
from loraretriever.batch.stacks import GroupStack, PreparedAdapter, Target, prepare_adapter, write_slot
from loraretriever.errors import InvalidInputError
from loraretriever.types import AdapterWeights

_KEPT_ROUTINGS = 16


class LoraLayers:
    """A model's linear modules with room for `slots` adapters.

    Memory is bounded: slots x rank x (in + out) numbers for each targeted module, where rank is the largest that
    has been loaded; slots are made as adapters come. Adapters that are not needed leave when others need their slot.
    Not safe for several threads, but for `prepare`.

    Example:
        layers = LoraLayers(model, slots=8, load=lambda ref: load_weights(folder / ref.digest, ref.name, ref.digest))
        routing = layers.route([RowRoute((sql,), (1.0,)), RowRoute((sql, german), (0.7, 0.3)), BASE_ROW])
        with layers.use(routing):
            model(input_ids)  # three rows
    """

    def __init__(self, model: Any, slots: int, load: Callable[[AdapterRef], AdapterWeights | PreparedAdapter]) -> None:
        """`load` is called when an adapter needs a slot; what it has not prepared with `prepare` is prepared then."""
        self._table = SlotTable(slots)
        self._load = load
        self._modules: dict[str, nn.Module] = dict(model.named_modules())
        self.device: torch.device = next(model.parameters()).device
        self._groups: dict[str, LoraGroup] = {}
        self._targets: set[str] = set()
        self._rank = 0
        self._active = Active()
        self._epoch = 0
        self._held: frozenset[AdapterRef] = frozenset()
        self._routings: OrderedDict[tuple[RowRoute, ...], Routing] = OrderedDict()  # of this epoch, latest use last

    @property
    def slots(self) -> int:
        """The largest number of different adapters in one batch."""
        return self._table.capacity

    @property
    def resident(self) -> tuple[AdapterRef, ...]:
        """The adapters that are loaded, least recently used first."""
        return self._table.resident

    @property
    def slots_used(self) -> int:
        """How many adapters are loaded. Any thread may ask."""
        return len(self._table)

    def holds(self, ref: AdapterRef) -> bool:
        """Whether an adapter is loaded."""
        return ref in self._table

    @property
    def rank(self) -> int:
        """The rank of a slot: the largest of all adapters loaded so far."""
        return self._rank

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(group.stack.nbytes for group in self._groups.values() if group.stack is not None)

    def prepare(self, weights: AdapterWeights) -> PreparedAdapter:
        """Check an adapter and convert it for this model, in host memory, pinned if the model is on a GPU.

        May be called from any thread at any time, so that only a copy into a slot is left for `acquire`.

        Raises:
            InvalidInputError: the adapter does not fit the model.
        """
        if not weights.modules:
            raise InvalidInputError(f"adapter {weights.name!r} has no modules; expected at least one. Train it again.")
        targets = {name: self._target(weights.name, name) for name in weights.modules}
        return prepare_adapter(weights, targets, pinned=self.device.type == "cuda")

    def acquire(self, refs: Sequence[AdapterRef]) -> dict[AdapterRef, int]:
        """Load the adapters that are missing and return each one's slot; they stay until the next call.

        Call it with all adapters of a step before several `route` calls for parts of that step. Slots may move, so
        routings made earlier can become stale; `use` refuses those.

        Raises:
            InvalidInputError: more distinct adapters than slots, or an adapter that does not fit the model.
        """
        if self._active.routing is not None:
            raise RuntimeError("adapters cannot be loaded while a routing is in use; leave its block first.")
        wanted = frozenset(refs)
        if wanted == self._held:
            return {ref: self._table[ref] for ref in wanted}
        missing = self._table.touch(refs)
        self._held = frozenset()
        # Slots outlive the caller's inference mode, in which tensors made could not be written to later.
        with torch.inference_mode(False), torch.no_grad():
            for ref in missing:
                self._fill(ref, wanted)
            for one, other in self._table.compact(wanted):
                self._begin_epoch()
                for stack in self._stacks():
                    stack.exchange(one, other)
        self._held = wanted
        return {ref: self._table[ref] for ref in wanted}

    def route(self, rows: Sequence[RowRoute]) -> Routing:
        """The routing for the rows of the next forward pass, with all their adapters loaded.

        Rows of a recent call get the same routing again, so it may be called at every step.
        """
        key = tuple(rows)
        routing = self._routings.get(key)
        if routing is None or routing.epoch != self._epoch:
            refs = list(dict.fromkeys(ref for row in rows for ref in row.refs))
            if not self._held.issuperset(refs):
                self.acquire(refs)
            routing = Routing(rows, {ref: self._table[ref] for ref in refs}, self.device, self._epoch)
            self._routings[key] = routing
            if len(self._routings) > _KEPT_ROUTINGS:
                self._routings.popitem(last=False)
        self._routings.move_to_end(key)
        return routing

    def pack(
        self, singles: Sequence[RowRoute], runs: Sequence[tuple[RowRoute, int]], kept: Sequence[RowRoute]
    ) -> PackedRouting:
        """The routing for one packed row of tokens, (1, tokens, features), with all adapters loaded.

        Args:
            singles: the routes of the first tokens, one each.
            runs: routes of what follows, with the number of tokens of each.
            kept: the routes of those tokens that reach the output embeddings, in order.
        """
        refs = {ref: None for row in (*singles, *(row for row, _ in runs)) for ref in row.refs}
        if not self._held.issuperset(refs):
            self.acquire(list(refs))
        parts = [(self.route(singles), 1)] if singles else []
        for count, alike in groupby(runs, key=itemgetter(1)):  # runs of one length side by side are rows of one part
            parts.append((self.route([row for row, _ in alike]), count))
        head = PackedRouting([(self.route(kept), 1)], self._epoch) if runs and kept else None
        return PackedRouting(parts, self._epoch, head)

    def use(self, routing: Routing | PackedRouting) -> AbstractContextManager[None]:
        """Inside the block the model's forward passes follow the routing; outside, it is the base model.

        Raises:
            InvalidInputError: slots have changed since the routing was made.
        """
        if self._active.routing is not None:
            raise RuntimeError("another routing is in use; leave its block first.")
        if routing.epoch != self._epoch and not routing.is_empty:
            raise InvalidInputError(
                f"the routing is of epoch {routing.epoch}, but slots have changed since (epoch {self._epoch}); "
                "make it with route() right before the forward pass, or acquire() all adapters of the step first."
            )
        return activated(self._active, routing, iter(self._groups.values()))

    def eject(self) -> None:
        """Restore the model and drop all slots; the object can be used again."""
        for group in self._groups.values():
            group.eject()
        self._groups.clear()
        self._targets.clear()
        self._table = SlotTable(self._table.capacity)
        self._rank, self._held = 0, frozenset()
        self._begin_epoch()

    def _fill(self, ref: AdapterRef, keep: frozenset[AdapterRef]) -> None:
        """Load one adapter into a slot. Nothing has changed if it cannot be loaded."""
        loaded = self._load(ref)
        if loaded.digest != ref.digest:
            raise InvalidInputError(
                f"adapter {ref.name!r} was asked for with digest {ref.digest!r}, but {loaded.digest!r} was loaded; "
                "it has been replaced since, so look its digest up again."
            )
        adapter = loaded if isinstance(loaded, PreparedAdapter) else self.prepare(loaded)
        self._make_fit(max(self._rank, adapter.rank), adapter.modules)
        slot = self._table.make_room(keep)
        self._begin_epoch()
        try:
            write_slot(self._stacks(), slot, adapter, self.device)
        except BaseException:
            self._table.give_back(slot)
            for stack in self._stacks():
                stack.clear(slot)
            raise
        self._table.put(ref, slot)

    def _begin_epoch(self) -> None:
        """Slots change: routings made before are stale, and would keep stacks that have been replaced in memory."""
        self._epoch += 1
        self._routings.clear()

    def _target(self, adapter: str, name: str) -> Target:
        module = self._modules.get(name)
        if module is None:
            raise InvalidInputError(
                f"adapter {adapter!r} targets {name!r}, which the base model does not have; "
                "use an adapter that was trained for this base model."
            )
        out, features = linear_shape(name, module)
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        if not weight.dtype.is_floating_point:
            raise InvalidInputError(
                f"the base model's {name!r} is stored as {weight.dtype}; adapters need a base model in float32, "
                "bfloat16 or float16, not a quantised one."
            )
        return Target(out, features, weight.dtype)

    def _make_fit(self, rank: int, names: Sequence[str]) -> None:
        """Give the slots at least this rank, and the targeted modules adapters."""
        new = [name for name in names if name not in self._targets]
        by_group: dict[str, dict[str, nn.Module]] = {}
        for name in new:
            key = group_of(name, linear_shape(name, self._modules[name])[1])
            by_group.setdefault(key, {})[name] = self._modules[name]
        for key in {**self._groups, **by_group}:
            group = self._groups.setdefault(key, LoraGroup(self._active))
            if key in by_group or not group.has_room(self._table.size, rank):
                group.resize(self._table.size, rank, by_group.get(key, {}))
        self._targets.update(new)
        self._rank = rank

    def _stacks(self) -> Iterator[GroupStack]:
        return (group.stack for group in self._groups.values() if group.stack is not None)
