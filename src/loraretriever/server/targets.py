"""What a request asks for: from the field `model` and the `lora` fields to adapters, in the names of the pool."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import PurePath

from loraretriever.compose.canonical import parse_composition
from loraretriever.errors import AdapterNotFoundError, InvalidInputError
from loraretriever.pool import PoolView, public_name
from loraretriever.server.auth import Caller
from loraretriever.server.errors import ApiError
from loraretriever.server.schemas import LoraOptions, RouteOptions
from loraretriever.server.state import ServerState
from loraretriever.types import Adapter, Composition, Hit

AUTO, BASE = "auto", "base"


@dataclass(frozen=True, slots=True)
class Target:
    """How a request is to be answered. `adapters` None: retrieve; empty: the base model. Names are the pool's."""

    view: str | None
    strategy: str | None
    adapters: dict[str, float] | None
    exclude: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None


class Names:
    """The names of adapters as one caller knows them."""

    def __init__(self, state: ServerState, caller: Caller, tenant: str | None = None) -> None:
        """`tenant`: for an operator, whose names to use.

        Raises:
            ApiError: somebody else names a tenant that is not the caller's own.
        """
        if tenant is not None and not caller.is_operator and tenant != caller.tenant:
            raise ApiError(403, "only operators may name a tenant; leave it out.", param="tenant")
        self.view = caller.view if tenant is None else tenant
        self._pool_view: PoolView = state.retriever.pool.view(self.view)

    def adapter(self, name: str, param: str) -> Adapter:
        """The adapter that this caller means.

        Raises:
            ApiError: there is none that this caller may see.
        """
        try:
            return self._pool_view.find(name)
        except AdapterNotFoundError as error:
            raise ApiError(404, str(error), code="adapter_not_found", param=param) from error

    def find(self, name: str, param: str) -> str:
        """The pool's name for an adapter that is to be used.

        Raises:
            ApiError: there is none that this caller may see, or it is disabled.
        """
        adapter = self.adapter(name, param)
        if not adapter.enabled:
            raise ApiError(400, f"adapter {name!r} is disabled.", code="adapter_disabled", param=param)
        return adapter.name

    def find_all(self, names: Iterable[str], param: str) -> tuple[str, ...]:
        """The pool's names for adapters, disabled ones among them."""
        return tuple(self.adapter(name, param).name for name in names)

    def public(self, name: str) -> str:
        """What this caller calls an adapter of the pool."""
        return public_name(name, self.view)

    def public_hits(self, hits: Iterable[Hit]) -> list[dict[str, object]]:
        """Hits as clients see them."""
        return [{"adapter": self.public(hit.adapter), "score": hit.score} for hit in hits]

    def public_composition(self, composition: Composition) -> Composition:
        """A composition in the caller's names."""
        return Composition(
            composition.strategy,
            tuple(map(self.public, composition.adapters)),
            composition.weights,
            composition.mixer,
            composition.merge,
        )


def base_names(state: ServerState) -> Collection[str]:
    """What the base model may be called: `base`, its name, or the last part of it."""
    name = state.retriever.settings.base_model or state.retriever.pool.base_model
    return (BASE, name, PurePath(name).name)


def find_target(state: ServerState, names: Names, model: str, options: LoraOptions) -> Target:
    """What a request asks for.

    Raises:
        ApiError: the model or an adapter is unknown to the caller, or the fields contradict each other.
    """
    adapters = _named_adapters(options)
    if model == AUTO:
        exclude, only = filters(names, options)
        if adapters is not None:
            adapters = {names.find(name, "lora.adapters"): weight for name, weight in adapters.items()}
        return Target(names.view, options.strategy, adapters, exclude, only)
    if adapters is not None:
        raise ApiError(400, "both model and lora.adapters name adapters; set model to 'auto'.", param="lora.adapters")
    if model in base_names(state):
        return Target(names.view, options.strategy, {})
    try:
        strategy, weights = parse_composition(model)
        found = {names.find(name, "model"): weight for name, weight in weights.items()}
    except InvalidInputError as error:
        raise ApiError(400, f"model: {error}", param="model") from error
    except ApiError as error:
        code = "model_not_found" if error.status == 404 else error.code
        raise ApiError(error.status, f"model {model!r:.200}: {error.message}", code=code, param="model") from error
    return Target(names.view, strategy or options.strategy, found)


def filters(names: Names, options: RouteOptions) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """What may not be found, and what alone may, in the pool's names."""
    only = None if options.only is None else names.find_all(options.only, "lora.only")
    return names.find_all(options.exclude, "lora.exclude"), only


def _named_adapters(options: LoraOptions) -> dict[str, float] | None:
    if options.adapters is None:
        if options.weights is not None:
            raise ApiError(400, "lora.weights comes without lora.adapters; name those, too.", param="lora.weights")
        return None
    if isinstance(options.adapters, dict):
        if options.weights is not None:
            raise ApiError(400, "lora.adapters has weights already; leave lora.weights out.", param="lora.weights")
        return dict(options.adapters)
    names = options.adapters
    if len(set(names)) != len(names):
        raise ApiError(400, "lora.adapters names an adapter twice.", param="lora.adapters")
    weights = options.weights if options.weights is not None else [1 / max(1, len(names))] * len(names)
    if len(weights) != len(names):
        message = f"lora.weights has {len(weights)} numbers for {len(names)} adapters; expected one each."
        raise ApiError(400, message, param="lora.weights")
    return dict(zip(names, weights, strict=True))
