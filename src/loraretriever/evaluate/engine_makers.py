"""The contenders by name, and what it takes to make them."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import torch

from loraretriever.engine.local import LocalEngine
from loraretriever.engine.runner import check_model
from loraretriever.evaluate.engine_adapters import make_crowd, make_pool
from loraretriever.evaluate.engine_contenders import Contender, OurEngine, StaticBatches, load_peft
from loraretriever.evaluate.engine_vllm import Vllm, VllmSetUp
from loraretriever.evaluate.engine_workloads import REALISTIC, UNIFORM, Sizes
from loraretriever.models import BaseModel, resolve_base_model
from loraretriever.pool import Pool
from loraretriever.types import Adapter

_SLOTS = 32  # at least: the engine's default
_LEAST_CACHE_MIB = 16


@dataclass(slots=True)
class Workshop:
    """What contenders are made from. `versions` of what they brought with them is filled meanwhile."""

    folder: Path
    base: BaseModel
    dtype: str
    adapters: Sequence[Adapter]  # of the user's pool
    sizes: Sizes
    seed: int
    vllm: str | None
    versions: dict[str, str] = field(default_factory=dict)
    _pools: dict[int, Path] = field(default_factory=dict)

    def pool(self, count: int) -> Path:
        """A plain folder with `count` adapters, `a0`, `a1` ...; those of a smaller one are the first of a larger."""
        if count not in self._pools:
            self._pools[count] = self.folder / f"pool{count}"
            make_pool(self._pools[count], self.adapters, adapter_names(count), self.seed)
        return self._pools[count]

    def crowd(self, working: int, count: int) -> Path:
        """A plain folder with `working` adapters as in `pool`, and others, `count` in all."""
        target = self.folder / f"crowd{count}"
        make_crowd(target, [self.pool(working) / name for name in adapter_names(working)], count)
        return target

    def replica(self) -> BaseModel:
        """The base model with modules of its own and the same weights: what is done to it, others do not see."""
        model = self.base.model
        shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
        return BaseModel(self.base.name, copy.deepcopy(model, shared), self.base.tokenizer)


@dataclass(frozen=True, slots=True)
class Maker:
    """How to make a contender, and what it gets: jobs with `k` of `adapters` adapters, at these workloads.

    `registered`: how many adapters its pool has, where that is more.
    """

    build: Callable[[Workshop, Maker], Contender]
    adapters: int = 0
    k: int = 0
    registered: int = 0
    workloads: Sequence[str] = (UNIFORM, REALISTIC)
    quick_workloads: Sequence[str] = (UNIFORM,)

    def planned(self, workloads: Sequence[str], quick: bool) -> Maker:
        """With those workloads alone that are asked for, and that it has in a quick benchmark if this is one."""
        own = self.quick_workloads if quick else self.workloads
        return replace(self, workloads=[workload for workload in workloads if workload in own])


def adapter_names(count: int) -> list[str]:
    """Of the adapters in the pools that are made here. PEFT takes no dots in names; a user's may have them."""
    return [f"a{place}" for place in range(count)]


def _our_engine(shop: Workshop, maker: Maker) -> Contender:
    folder = shop.crowd(maker.adapters, maker.registered) if maker.registered else shop.pool(max(1, maker.adapters))
    pool = Pool.open(folder)
    base, slots = shop.replica(), max(_SLOTS, maker.adapters)
    engine = LocalEngine(base, pool, slots=slots, batch_size=shop.sizes.batch, cache_mib=_cache_mib(base, shop, maker))
    return OurEngine(engine, pool.close)


def _cache_mib(base: BaseModel, shop: Workshop, maker: Maker) -> int:
    """Memory for a full batch: several engines are there at once, and each reserves it.

    Twice the longest sequences, for the engine rounds their lengths up to powers of two.
    """
    shapes = check_model(base.model)
    token_bytes: int = base.model.dtype.itemsize * sum(shape.heads * (shape.key + shape.value) for shape in shapes)
    longest = shop.sizes.longest if REALISTIC in maker.workloads else shop.sizes.longest_uniform
    return max(_LEAST_CACHE_MIB, math.ceil(2 * shop.sizes.batch * longest * token_bytes / 2**20))


def _transformers(shop: Workshop, maker: Maker) -> Contender:
    return StaticBatches(shop.replica().model, shop.base.tokenizer, shop.sizes.batch, mixed=False)


def _peft(shop: Workshop, maker: Maker) -> Contender:
    shop.versions["peft"] = version("peft")
    model = load_peft(shop.replica(), shop.pool(maker.adapters), adapter_names(maker.adapters))
    return StaticBatches(model, shop.base.tokenizer, shop.sizes.batch, mixed=True)


def _vllm(shop: Workshop, maker: Maker) -> Contender:
    assert shop.vllm is not None, "left out otherwise"
    folder = shop.pool(maker.adapters)
    setup = VllmSetUp(
        python=shop.vllm,
        base_model=resolve_base_model(shop.base.name),
        dtype=shop.dtype,
        adapters={name: folder / name for name in adapter_names(maker.adapters)},
        rank=max(max(adapter.ranks) for adapter in shop.adapters),
        batch_size=shop.sizes.batch,
        max_length=shop.sizes.longest,
        threads=torch.get_num_threads(),
    )
    vllm = Vllm(setup, shop.folder)
    shop.versions["vllm"] = vllm.version
    return vllm


CONTENDERS: Mapping[str, Maker] = {
    "base": Maker(_our_engine, quick_workloads=(UNIFORM, REALISTIC)),
    "mixture_k3_n8": Maker(_our_engine, adapters=8, k=3),
    "mixture_k3_n48": Maker(_our_engine, adapters=48, k=3),
    "selection_k1_n8": Maker(_our_engine, adapters=8, k=1),
    "transformers": Maker(_transformers, quick_workloads=(UNIFORM, REALISTIC)),
    "peft_k1": Maker(_peft, adapters=8, k=1),
    "vllm_k1": Maker(_vllm, adapters=8, k=1),
    "registered_10": Maker(_our_engine, adapters=8, k=3, registered=10, workloads=(UNIFORM,)),
    "registered_1000": Maker(_our_engine, adapters=8, k=3, registered=1000, workloads=(UNIFORM,)),
}
