"""GET /v1/models: what a request's `model` may be, besides compositions."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from loraretriever.pool import public_name
from loraretriever.server.auth import Caller, require
from loraretriever.server.schemas import LoraOptions
from loraretriever.server.state import ServerState, State
from loraretriever.server.targets import AUTO, BASE, Names, find_target
from loraretriever.types import Adapter

router = APIRouter(tags=["answers"])
Reading = Annotated[Caller, Depends(require("generate", "route", "pool:read"))]


@router.get("/v1/models")
async def models(state: State, caller: Reading) -> dict[str, Any]:
    """`auto`, the base model, and the adapters that are enabled."""
    adapters = await state.run(lambda: state.retriever.pool.view(caller.view).list(enabled_only=True))
    own = [_own(state, AUTO), _own(state, BASE)]
    return {"object": "list", "data": [*own, *(_adapter(state, caller, adapter) for adapter in adapters)]}


@router.get("/v1/models/{name:path}")
async def model(name: str, state: State, caller: Reading) -> dict[str, Any]:
    """One of them, or a composition of adapters that are there."""
    names = Names(state, caller)
    target = await state.run(find_target, state, names, name, LoraOptions.model_validate({}))
    if not target.adapters or target.strategy is not None:
        return {**_own(state, name), "parent": BASE}
    return _adapter(state, caller, await state.run(names.adapter, name, "model"))


def _own(state: ServerState, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(state.started), "owned_by": "loraretriever"}


def _adapter(state: ServerState, caller: Caller, adapter: Adapter) -> dict[str, Any]:
    name = public_name(adapter.name, caller.view)
    created = int(adapter.created.timestamp())
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "loraretriever",
        "root": name,
        "parent": BASE,
        "description": adapter.description,
        "revision": adapter.revision,
    }
