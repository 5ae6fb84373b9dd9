"""Compositions as PEFT folders, for engines that read an adapter from a folder and know it by a name."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from loraretriever.compose.canonical import BASE
from loraretriever.compose.lanes import Lane
from loraretriever.compose.merged import MergedStore
from loraretriever.compose.pinned import Pinned, parse_pinned, pinned_name
from loraretriever.compose.single import VERSION, check_single, single_adapter, single_rank
from loraretriever.config import cache_folder
from loraretriever.errors import AdapterNotFoundError, InvalidInputError
from loraretriever.types import Adapter, AdapterWeights, Composition, LoraPair, Merge

_KEEP_SECONDS = 600.0  # an engine that cannot read a folder that it was told of may end


class Revisions(Protocol):
    """Where adapters come from; `Pool` is one."""

    def get(self, name: str) -> Adapter:
        """The current revision of an adapter."""
        ...

    def weights(self, name: str, digest: str | None = None) -> AdapterWeights:
        """The factors of the revision with that digest, even if it is no longer the current one."""
        ...

    def find_digest(self, name: str, beginning: str) -> str:
        """The digest of a revision that begins so."""
        ...

    def content_folder(self, digest: str) -> Path | None:
        """The folder with this content, where its files never change."""
        ...

    def list(self) -> Sequence[Adapter]:
        """All adapters."""
        ...


class AdapterFolders:
    """Names compositions, and makes the folders of named ones. For any thread, and beside other processes."""

    def __init__(self, source: Revisions, folder: Path, max_bytes: int) -> None:
        """Keep what is made in a folder.

        Args:
            source: the adapters.
            folder: of these folders' own; other processes may share it.
            max_bytes: of all that is made together; the least recently used gives way.
        """
        self._source = source
        self._store = MergedStore(folder, max_bytes, _KEEP_SECONDS)

    def name(
        self,
        composition: Composition,
        max_rank: int,
        reduce: bool = False,
        lanes: bool = False,
        digests: Sequence[str] = (),
    ) -> str:
        """The pinned name of a composition of adapters in the revisions with these digests, or else the current ones.

        Args:
            max_rank: the largest rank that the engine takes.
            reduce: a mixture of a larger rank becomes its best approximation of that rank (the merge `svd`).
            lanes: the engine takes adapters one by one, and composes them itself.

        Raises:
            AdapterNotFoundError: an adapter is not in the pool.
            InvalidInputError: the composition is no single adapter, or its rank is too large.
        """
        adapters = [self._source.get(name) for name in composition.adapters]
        if not lanes:
            composition = fitting(composition, [max(each.ranks) for each in adapters], max_rank, reduce)
        elif adapters:
            check_single(composition)
        return pinned_name(composition, digests or [each.digest for each in adapters])

    def pinned(self, composition: Composition) -> str:
        """The pinned name, whatever its rank.

        Raises:
            AdapterNotFoundError: an adapter is not in the pool.
        """
        return pinned_name(composition, [self._source.get(name).digest for name in composition.adapters])

    def folder(self, name: str, max_rank: int | None = None) -> Path:
        """The folder of the adapter of a pinned name, of that rank at most.

        One adapter alone lies in the pool itself, where its files never change.

        Raises:
            InvalidInputError: the name is none, its composition is no single adapter, or its rank is too large.
            AdapterNotFoundError: the pool no longer has an adapter's revision.
            PoolError: the files cannot be read or written.
        """
        pinned = parse_pinned(name)
        composition = pinned.composition
        if not composition.adapters:
            return self._zero()
        check_single(composition)
        digests = self._digests(pinned)
        if len(digests) == 1 and composition.merge is None and composition.weights == (1.0,):
            found = self._source.content_folder(digests[0])
            if found is not None:
                return found

        def make() -> AdapterWeights:
            return single_adapter(parts, composition)

        parts = [self._source.weights(*pair) for pair in zip(composition.adapters, digests, strict=True)]
        if max_rank is not None:
            fitting(composition, [_rank(part) for part in parts], max_rank, reduce=False)

        return self._store.place(_made_digest(name, digests), make)

    def lane(self, name: str, slots: int | None = None) -> Lane:
        """The lane of a pinned name. What is no mixer of adapters has one adapter, its folder.

        Args:
            slots: the most adapters that it may have; None: any number.

        Raises:
            InvalidInputError, AdapterNotFoundError, PoolError: as `folder`; or it has too many adapters.
        """
        pinned = parse_pinned(name)
        composition = pinned.composition
        if not composition.adapters or composition.merge is not None:
            return Lane((str(self.folder(name)),), (1.0,))
        check_single(composition)
        if slots is not None and len(composition.adapters) > slots:
            raise InvalidInputError(
                f"a {composition.strategy} of {len(composition.adapters)} adapters needs as many slots, and vLLM has "
                f"{slots} (vllm_slots); choose fewer adapters."
            )
        alone = [f"{name}@{digest}" for name, digest in zip(composition.adapters, pinned.digests, strict=True)]
        return Lane(tuple(str(self.folder(each)) for each in alone), composition.weights, composition.mixer)

    def touch(self, folder: Path) -> bool:
        """Note that a folder that `folder` gave is used; whether it is still there."""
        return self._store.touch(folder.name) or folder.is_dir()

    def _digests(self, pinned: Pinned) -> list[str]:
        pairs = zip(pinned.composition.adapters, pinned.digests, strict=True)
        return [self._source.find_digest(*pair) for pair in pairs]

    def _zero(self) -> Path:
        """An adapter that changes nothing, of rank 1, in one module that adapters of this base model have."""
        adapters = self._source.list()
        if not adapters:
            raise InvalidInputError("the pool has no adapters, and the base model needs no name; use vLLM's own.")
        modules = self._source.weights(adapters[0].name, adapters[0].digest).modules
        module, pair = min(modules.items())
        ins, outs = pair.a.shape[1], pair.b.shape[0]

        def make() -> AdapterWeights:
            return AdapterWeights("", "", {module: LoraPair(torch.zeros(1, ins), torch.zeros(outs, 1), 1.0)})

        return self._store.place(_made_digest(f"{BASE} {module} {ins} {outs}", ()), make)


def open_folders(pool: Revisions, cache_mib: int) -> AdapterFolders:
    """Those in the cache folder of this machine."""
    return AdapterFolders(pool, cache_folder() / "single", cache_mib << 20)


def reduced(source: Revisions, composition: Composition, max_rank: int) -> Composition:
    """What an engine that reduces to this rank runs in place of a composition: see `AdapterFolders.name`.

    What it refuses stays as it is.
    """
    try:
        ranks = [max(source.get(name).ranks) for name in composition.adapters]
        return fitting(composition, ranks, max_rank, reduce=True)
    except (AdapterNotFoundError, InvalidInputError):
        return composition


def fitting(composition: Composition, ranks: Sequence[int], max_rank: int, reduce: bool) -> Composition:
    """The composition itself where its single adapter's rank is not too large, or else reduced.

    Args:
        ranks: the largest of each adapter.

    Raises:
        InvalidInputError: it is too large, and `reduce` is not set or cannot help.
    """
    if not composition.adapters:
        return composition
    rank = single_rank(ranks, composition)
    if rank <= max_rank:
        return composition
    if reduce and composition.merge is None and max_rank >= 1:
        return Composition("svd", composition.adapters, composition.weights, merge=Merge("svd", rank=max_rank))
    raise InvalidInputError(
        f"the {composition.strategy} of {', '.join(composition.adapters)} has the rank {rank} as one adapter, and the "
        f"engine takes {max_rank} at most; choose fewer adapters (k), the strategy svd;rank={max_rank}, let mixtures "
        "be reduced (vllm_reduce), or start vLLM with a larger --max-lora-rank."
    )


def _rank(weights: AdapterWeights) -> int:
    return max(pair.a.shape[0] for pair in weights.modules.values())


def _made_digest(name: str, digests: Sequence[str]) -> str:
    return hashlib.sha256(f"single {VERSION} {name} {' '.join(digests)}".encode()).hexdigest()
