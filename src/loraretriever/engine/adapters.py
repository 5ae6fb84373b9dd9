"""From names to weights in host memory: which adapters a composition means, read from the pool, merged or decomposed.

A gate that is trained takes its router from those that the engine was given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from loraretriever.batch import AdapterRef, RowRoute
from loraretriever.batch.gates import GATES, check_gate
from loraretriever.batch.stacks import PreparedAdapter
from loraretriever.compose.merge import merge_adapters
from loraretriever.compose.merged import MergedStore, merged_digest, merged_name
from loraretriever.compose.routers import ROUTER_FILE, RouterSpec, read_router
from loraretriever.compose.spectral import spectral_digest, spectral_form
from loraretriever.engine.residency import HostStore
from loraretriever.errors import InvalidInputError
from loraretriever.pool.admission import same_base
from loraretriever.types import Adapter, AdapterWeights, Composition, Gate, Merge


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


@dataclass(frozen=True, slots=True)
class SpectralRef(AdapterRef):
    """An adapter in a form of `compose.spectral`, made when it is loaded. Its digest follows from the adapter's."""

    of: AdapterRef = field(compare=False)
    form: str = field(compare=False)


@dataclass(frozen=True, slots=True)
class RouterRef(AdapterRef):
    """A trained router, which takes a slot like an adapter."""

    spec: RouterSpec = field(compare=False)


Routers = Mapping[tuple[str, int | None], RouterRef]  # by kind and by the top k that they were trained for


def read_routers(folders: Sequence[Path], base_model: str) -> dict[tuple[str, int | None], RouterRef]:
    """The routers in these folders.

    Raises:
        InvalidInputError: a folder holds no router or one for another base model, or two are of one kind and top k.
        AdmissionError: its weights cannot be used.
    """
    routers: dict[tuple[str, int | None], RouterRef] = {}
    for folder in folders:
        spec = read_router(folder)
        if spec.base_model is not None and not same_base(spec.base_model, base_model):
            raise InvalidInputError(
                f"the router {folder} was trained for the base model {spec.base_model}; expected {base_model}. Train "
                f"another, or set base_model to null in its {ROUTER_FILE} where both are the same model."
            )
        key = spec.kind, spec.top_k
        if key in routers:
            raise InvalidInputError(
                f"the routers {routers[key].spec.folder} and {folder} are both of the kind {spec.kind}; expected "
                "one of each kind (and of a moe, of each top_k) at most. Leave one out."
            )
        routers[key] = RouterRef(f"router {spec.name}", spec.digest, spec)
    return routers


class Adapters:
    """Finds the adapters of compositions, and loads them in the background."""

    def __init__(
        self,
        source: AdapterSource,
        prepare: Callable[[AdapterWeights], PreparedAdapter],
        host_bytes: int,
        merged: MergedStore | None = None,
        on_ready: Callable[[], None] | None = None,
        routers: Routers | None = None,
    ) -> None:
        """Start loading threads; see `HostStore`.

        `prepare` makes weights ready for a slot; `routers`: see `read_routers`.
        """
        self._source = source
        self._prepare = prepare
        self._merged = merged
        self._routers = routers or {}
        self.store = HostStore(self._load, host_bytes, on_ready=on_ready)

    def route(self, composition: Composition, digests: Sequence[str] = ()) -> RowRoute:
        """The adapters of a composition, in the revisions with these digests, or else those of this moment.

        Raises:
            AdapterNotFoundError: one is not in the pool.
            InvalidInputError: the merge or the gate is unknown, an option out of its range, the engine has no router
                for the gate, or an adapter is none of the router's.
        """
        digests = digests or [self._source.get(name).digest for name in composition.adapters]
        refs = tuple(map(AdapterRef, composition.adapters, digests))
        if composition.gate is not None and composition.merge is None and refs:
            return self._gated(refs, composition, composition.gate)
        if composition.merge is None or not refs:
            return RowRoute(refs, composition.weights, composition.mixer)
        digest = merged_digest(
            [(ref.digest, weight) for ref, weight in zip(refs, composition.weights, strict=True)], composition.merge
        )
        merged = MergedRef(merged_name(composition), digest, refs, composition.weights, composition.merge)
        return RowRoute((merged,), (1.0,))

    def _gated(self, refs: tuple[AdapterRef, ...], composition: Composition, gate: Gate) -> RowRoute:
        check_gate(gate)
        kind = GATES[gate.kind]
        if kind.form is not None:
            refs = tuple(SpectralRef(ref.name, spectral_digest(ref.digest, kind.form), ref, kind.form) for ref in refs)
        router = self._router(gate) if kind.trained else None
        outputs = _outputs(router.spec, composition.adapters) if router is not None and router.spec.experts else ()
        return RowRoute(refs, composition.weights, composition.mixer, gate, router, outputs)

    def _router(self, gate: Gate) -> RouterRef:
        """The gate's router: of several of its kind the one that was trained for its top k, or else for any."""
        alike = {top_k: router for (kind, top_k), router in self._routers.items() if kind == gate.kind}
        if not alike:
            known = sorted({kind for kind, _ in self._routers})
            raise InvalidInputError(
                f"the strategy {gate.kind!r} needs a trained router of that kind, and this engine has "
                f"{', '.join(known) or 'none'}; train one with `loraretriever train-router` and name "
                "its folder in LORARETRIEVER_ROUTERS, or choose another strategy."
            )
        return alike.get(gate.top_k) or alike.get(None) or next(iter(alike.values()))

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
        if isinstance(ref, SpectralRef):
            return spectral_form(self._source.weights(ref.of.name, ref.of.digest), ref.form)
        if isinstance(ref, RouterRef):
            return _router_weights(ref)
        if not isinstance(ref, MergedRef):
            return self._source.weights(ref.name, ref.digest)

        def make() -> AdapterWeights:
            parts = [self._source.weights(part.name, part.digest) for part in ref.parts]
            return merge_adapters(parts, ref.weights, ref.merge)

        if self._merged is not None:
            return self._merged.get(ref.digest, ref.name, make)
        made = make()
        return AdapterWeights(ref.name, ref.digest, made.modules)


def _outputs(spec: RouterSpec, adapters: Sequence[str]) -> tuple[int, ...]:
    """Which of the router's outputs belongs to each adapter."""
    for name in adapters:
        if name not in spec.experts:
            raise InvalidInputError(
                f"adapter {name!r} is no expert of the router {spec.name!r}; expected one of "
                f"{', '.join(spec.experts)}. Name those alone, or train the router again."
            )
    return tuple(spec.experts.index(name) for name in adapters)


def _router_weights(ref: RouterRef) -> AdapterWeights:
    """A router as its gate wants it: the 1 / √r of RAMoLE's attention is in its scaling."""
    weights = replace(ref.spec.weights(), name=ref.name)
    if ref.spec.kind != "ramole":
        return weights
    scale = 1 / math.sqrt(ref.spec.rank)
    modules = {name: replace(pair, scaling=pair.scaling * scale) for name, pair in weights.modules.items()}
    return replace(weights, modules=modules)
