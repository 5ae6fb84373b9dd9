"""From names to weights in host memory: which adapters a composition means, read from the pool or merged."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from loraretriever.batch import AdapterRef, RowRoute
from loraretriever.batch.stacks import PreparedAdapter
from loraretriever.compose.merge import merge_adapters
from loraretriever.compose.merged import MergedStore, merged_digest, merged_name
from loraretriever.engine.residency import HostStore
from loraretriever.types import Adapter, AdapterWeights, Composition, Merge


class AdapterSource(Protocol):
    """Where adapters come from; `Pool` is one. `weights` is called by other threads than the caller's."""

    def get(self, name: str) -> Adapter:
        """The current revision of an adapter."""
        ...

    def weights(self, name: str, digest: str | None = None) -> AdapterWeights:
        """The factors of the revision with that digest, even if it is no longer the current one."""
        ...


@dataclass(frozen=True, slots=True)
class MergedRef(AdapterRef):
    """An adapter that is made of others. Its digest follows from theirs, the weights and the merge."""

    parts: tuple[AdapterRef, ...] = field(compare=False)
    weights: tuple[float, ...] = field(compare=False)
    merge: Merge = field(compare=False)


class Adapters:
    """Finds the adapters of compositions, and loads them in the background."""

    def __init__(
        self,
        source: AdapterSource,
        prepare: Callable[[AdapterWeights], PreparedAdapter],
        host_bytes: int,
        merged: MergedStore | None = None,
        on_ready: Callable[[], None] | None = None,
    ) -> None:
        """Start loading threads; see `HostStore`. `prepare` makes weights ready for a slot."""
        self._source = source
        self._prepare = prepare
        self._merged = merged
        self.store = HostStore(self._load, host_bytes, on_ready=on_ready)

    def route(self, composition: Composition) -> RowRoute:
        """The adapters of a composition, in the revisions of this moment.

        Raises:
            AdapterNotFoundError: one is not in the pool.
            InvalidInputError: the merge is unknown, or an option out of its range.
        """
        refs = tuple(AdapterRef(name, self._source.get(name).digest) for name in composition.adapters)
        if composition.merge is None or not refs:
            return RowRoute(refs, composition.weights, composition.mixer)
        digest = merged_digest(
            [(ref.digest, weight) for ref, weight in zip(refs, composition.weights, strict=True)], composition.merge
        )
        merged = MergedRef(merged_name(composition), digest, refs, composition.weights, composition.merge)
        return RowRoute((merged,), (1.0,))

    def prefetch(self, refs: Iterable[AdapterRef]) -> None:
        """Load adapters in the background."""
        for ref in refs:
            self.store.prefetch(ref)

    def close(self) -> None:
        """Stop loading."""
        self.store.close()

    def _load(self, ref: AdapterRef) -> PreparedAdapter:
        return self._prepare(self._read(ref))

    def _read(self, ref: AdapterRef) -> AdapterWeights:
        if not isinstance(ref, MergedRef):
            return self._source.weights(ref.name, ref.digest)

        def make() -> AdapterWeights:
            parts = [self._source.weights(part.name, part.digest) for part in ref.parts]
            return merge_adapters(parts, ref.weights, ref.merge)

        if self._merged is not None:
            return self._merged.get(ref.digest, ref.name, make)
        made = make()
        return AdapterWeights(ref.name, ref.digest, made.modules)
