"""Several adapters per request inside vLLM, without new adapters: the rank-space product on vLLM's own slots.

Off by default (`vllm_lanes`), and only for the versions of vLLM that it was tested with, because it takes the place of
parts that vLLM does not offer to plug-ins:

- `LanesPunica` for the platform's Punica wrapper: instead of one slot per token, a routing (`batch/routing.py`) of
  slots and weights. It multiplies with `lora_a_stacked` as it is, and with a transposed copy of `lora_b_stacked`.
- `LanesModelManager`, `LanesWorkerManager` for the worker's managers: a request's number stands for a composition
  (`compose/lanes.py`), slots hold its adapters, and those of a step are all there before it begins.
- `LanesScheduling` over the scheduler: vLLM counts compositions (`--max-loras`), this one also their adapters.

What needs no change: the input batch maps rows to requests' numbers, which are compositions now, and the prefix cache
is keyed by their names and paths, which are different for different compositions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
import vllm
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.platforms import current_platform

from loraretriever.batch import AdapterRef, RowRoute
from loraretriever.batch.routing import PackedRouting, Routing
from loraretriever.compose.lanes import Lane, folder_id, read_lane
from loraretriever.errors import InvalidInputError

VERSIONS = ("0.32.0",)
_WARM_UP = "warmup_"  # names of vLLM's own requests at the start, whose adapters are nowhere


def install(slots: int) -> None:
    """Let vLLM's processes use lanes. May be called several times.

    Args:
        slots: adapters in memory at once; 0: as many as vLLM's --max-loras.

    Raises:
        InvalidInputError: this vLLM is of another version, or not on a CPU.
    """
    from vllm.config.scheduler import SchedulerConfig
    from vllm.v1.worker import lora_model_runner_mixin

    if vllm.__version__ not in VERSIONS or not current_platform.is_cpu():
        raise InvalidInputError(
            f"vllm_lanes is set, and this is vLLM {vllm.__version__} on {current_platform.device_name}; expected vLLM "
            f"{' or '.join(VERSIONS)} on a CPU, with which lanes were tested. Unset LORARETRIEVER_VLLM_LANES: "
            "compositions become adapters then."
        )
    LanesModelManager.slots = slots
    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = LanesWorkerManager
    type(current_platform).get_punica_wrapper = classmethod(lambda cls: f"{__name__}.{LanesPunica.__name__}")
    original = SchedulerConfig.get_scheduler_cls
    if getattr(original, "has_lanes", False):
        return

    def with_lanes(config: Any) -> type:
        found: type = original(config)
        return type(f"Lanes{found.__name__}", (LanesScheduling, found), {})

    with_lanes.has_lanes = True  # type: ignore[attr-defined]
    SchedulerConfig.get_scheduler_cls = with_lanes


class LanesPunica(PunicaWrapperBase):
    """The rank-space product for a batch of lanes."""

    def __init__(
        self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any
    ) -> None:
        """As vLLM makes its own."""
        super().__init__(max_num_batched_tokens, max_batches, device)
        self._embeddings_indices.zero_()  # of embeddings' slots, which vLLM's modules read
        self.lanes: dict[int, Lane] = {}  # of the requests of this step, by number
        self._tokens = PackedRouting((), 0)
        self._sampled = PackedRouting((), 0)
        self._transposed: dict[int, torch.Tensor] = {}  # of a stack of B by its place: (slots, rank, out)
        self._used: dict[int, set[int]] = {}  # slots that are not empty, of a stack of A by its place

    def update_metadata(
        self, mapping: Any, lora_index_to_id: Sequence[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """Make the routings of a step: for all its tokens, and for those that are sampled."""
        slot_of = {_ref(number): slot for slot, number in enumerate(lora_index_to_id) if number is not None}
        rows = {number: _row(lane) for number, lane in self.lanes.items()} | {0: RowRoute()}
        self._tokens = _packed(mapping.index_mapping, rows, slot_of, torch.device(self.device))
        self._sampled = _packed(mapping.prompt_mapping, rows, slot_of, torch.device(self.device))

    def fill(self, module: Any, slot: int, is_empty: bool) -> None:
        """A module's slot has other factors now, or none."""
        stacked_a, stacked_b = module.lora_a_stacked, module.lora_b_stacked
        if isinstance(stacked_a, torch.Tensor):  # of the logits, and of embeddings
            stacked_a, stacked_b = (stacked_a,), (stacked_b,)
        for a, b in zip(stacked_a, stacked_b, strict=True):
            used = self._used.setdefault(a.data_ptr(), set())
            if is_empty:
                used.discard(slot)
                continue
            used.add(slot)
            transposed = self._transposed.get(b.data_ptr())
            if transposed is None:
                transposed = self._transposed[b.data_ptr()] = b.new_zeros(b.shape[0], b.shape[3], b.shape[2])
            transposed[slot].copy_(b[slot, 0].T)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        """Semantics: y[n, slice i] += Σ_p w[n, p] B[p, i] A[p, i] x[n], over the slots p of row n's lane, or fused."""
        start = 0
        for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            self._add(y[:, start : start + size], x, a, b, self._tokens)
            start += size

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        **kwargs: Any,
    ) -> None:
        """See `add_lora_linear`; y and x are those of the tokens that are sampled."""
        out = lora_b_stacked.shape[2]
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        self._add(y[:, :out], x, lora_a_stacked, lora_b_stacked, self._sampled)

    def add_lora_embedding(self, y: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Nothing: no adapter of a pool changes embeddings."""

    def _refuse(self, *args: Any, **kwargs: Any) -> None:
        """What lanes do not do: sharded adapters, and heads of classifiers."""
        raise NotImplementedError("lanes take adapters of generating models only, without --fully-sharded-loras.")

    add_shrink = add_expand = apply_lora_full_linear = _refuse

    def _add(self, y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, packed: PackedRouting) -> None:
        """Shapes: y (tokens, out), of any stride; x (tokens, in); a (slots, 1, rank, in); b (slots, 1, out, rank)."""
        if packed.is_empty or self._used.get(a.data_ptr(), set()).isdisjoint(packed.used_slots):
            return
        transposed = self._transposed[b.data_ptr()]
        for part in packed.parts(torch.Size((1, *x.shape))):
            stop = part.first + part.rows * part.tokens
            here = x[part.first : stop].view(part.rows, part.tokens, -1)
            path = part.routing.path(part.tokens, x.dtype, _NO_STACK)
            added = here.new_zeros(part.rows, part.tokens, b.shape[2])
            path.add(added, path.hidden(here, a), 0, transposed)
            y[part.first : stop] += added.view(-1, b.shape[2])


_NO_STACK: Any = None  # only gates look at it, and lanes have none


class LanesModelManager(LRUCacheLoRAModelManager):
    """vLLM's adapters in slots, whose number does not follow from that of the compositions."""

    slots = 0  # set by `install`

    @property
    def lora_slots(self) -> int:
        """Adapters in memory at once."""
        return self.slots or int(self.lora_config.max_loras)

    @property
    def capacity(self) -> int:
        """Adapters in host memory."""
        return max(int(self.lora_config.max_cpu_loras), self.lora_slots)

    @property
    def punica(self) -> LanesPunica:
        """What computes; all modules share it."""
        found: LanesPunica = next(iter(self.punica_wrapper_mapping.values()))
        return found

    def activate_adapter(self, lora_id: int) -> bool:
        """Put an adapter into a slot, if it is in none."""
        if not super().activate_adapter(lora_id):
            return False
        slot, adapter = self.lora_index_to_id.index(lora_id), self._registered_adapters[lora_id]
        for name, module in self.modules.items():
            self.punica.fill(module, slot, is_empty=not self._get_lora_layer_weights(adapter, name))
        return True


class LanesWorkerManager(LRUCacheWorkerLoRAManager):
    """vLLM's loading of adapters: a request brings several."""

    _manager_cls = LanesModelManager

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        """Refuse what lanes were not made for.

        Raises:
            InvalidInputError: the model would be compiled, or adapters are sharded.
        """
        super().__init__(vllm_config, *args, **kwargs)
        if not vllm_config.model_config.enforce_eager or self.lora_config.fully_sharded_loras:
            raise InvalidInputError(
                "vllm_lanes is set; expected --enforce-eager, without --fully-sharded-loras. Start vLLM so, or unset "
                "LORARETRIEVER_VLLM_LANES."
            )

    def add_dummy_lora(self, lora_request: Any, rank: int) -> bool:
        """Not needed: vLLM warms up with lanes that have no adapters."""
        return True

    def add_adapter(self, lora_request: Any) -> bool:
        """Load the adapters of a composition into host memory; a step brings them into slots."""
        self._load(_lane(lora_request).folders)
        return True

    def remove_adapter(self, adapter_id: int) -> bool:
        """Nothing: what a composition leaves behind is the adapters', which are used by others."""
        return True

    def _apply_adapters(self, lora_requests: Iterable[Any]) -> None:
        """Bring the adapters of a step's compositions into slots."""
        lanes = {request.lora_int_id: _lane(request) for request in lora_requests if request}
        manager = self._adapter_manager
        manager.punica.lanes = lanes
        folders = tuple(dict.fromkeys(folder for lane in lanes.values() for folder in lane.folders))
        if len(folders) > manager.lora_slots:
            raise RuntimeError(f"a step needs {len(folders)} adapters, and there are {manager.lora_slots} slots.")
        self._load(folders)
        numbers = sorted(map(folder_id, folders), key=lambda number: number not in manager._active_adapters)
        for number in numbers:  # those in slots first, so that none of them gives way to another
            manager.activate_adapter(number)

    def _load(self, folders: Sequence[str]) -> None:
        """Into host memory, where those that are there already stay."""
        manager = self._adapter_manager
        missing = [folder for folder in folders if manager.get_adapter(folder_id(folder)) is None]
        for folder in missing:
            loaded = self._load_adapter(LoRARequest(folder, folder_id(folder), folder))
            if len(manager) >= manager.capacity:
                manager.remove_oldest_adapter()
            manager.add_adapter(loaded)


class LanesScheduling:
    """Over a scheduler of vLLM's: the adapters of the requests that run fit into the slots."""

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Let those wait for which there would be no slots."""
        me: Any = self
        held = self._without_room()
        if not held:
            return super().schedule(*args, **kwargs)  # type: ignore[misc]
        order = {request: place for place, request in enumerate(me.waiting)}
        me.waiting.remove_requests(held)
        try:
            return super().schedule(*args, **kwargs)  # type: ignore[misc]
        finally:
            waiting = sorted([*me.waiting, *held], key=lambda request: order.get(request, -1))
            me.waiting.remove_requests(waiting)
            for request in waiting:
                me.waiting.add_request(request)

    def _without_room(self) -> list[Any]:
        """Waiting requests whose adapters do not fit beside those that run, and those that may join them first."""
        me: Any = self
        slots = LanesModelManager.slots or me.lora_config.max_loras
        taken = set(_folders(me.running))
        held = []
        for request in me.waiting:
            wanted = taken.union(_folders([request]))
            if len(wanted) > slots:
                held.append(request)
            else:
                taken = wanted
        return held


def _folders(requests: Iterable[Any]) -> Iterator[str]:
    for request in requests:
        if request.lora_request is not None:
            yield from _lane(request.lora_request).folders


def _lane(request: Any) -> Lane:
    return Lane() if request.lora_name.startswith(_WARM_UP) else read_lane(request.lora_path)


def _ref(number: int) -> AdapterRef:
    return AdapterRef("", str(number))  # which are told apart by digest


def _row(lane: Lane) -> RowRoute:
    return RowRoute(tuple(_ref(folder_id(folder)) for folder in lane.folders), lane.weights, lane.mixer)


def _packed(
    numbers: Sequence[int], rows: dict[int, RowRoute], slot_of: dict[AdapterRef, int], device: Any
) -> PackedRouting:
    """The routing of a row of tokens, each with its composition's number: runs of one number are a part each.

    Single tokens that follow each other, as those that are decoded, are one part.
    """
    parts: list[tuple[Routing, int]] = []
    single: list[RowRoute] = []

    def close() -> None:
        if single:
            parts.append((Routing(single, slot_of, device), 1))
            single.clear()

    for number, run in groupby(numbers):
        length = sum(1 for _ in run)
        if length == 1:
            single.append(rows[number])
        else:
            close()
            parts.append((Routing([rows[number]], slot_of, device), length))
    close()
    return PackedRouting(parts, 0)
