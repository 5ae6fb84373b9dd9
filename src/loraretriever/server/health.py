"""GET /health and /ready, and what a key may do."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from loraretriever.compose import strategy_names
from loraretriever.server.auth import Caller, require
from loraretriever.server.state import State

router = APIRouter(tags=["server"])


@router.get("/health")
async def health() -> dict[str, str]:
    """The process lives."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(state: State) -> dict[str, str]:
    """Requests are taken: the models are loaded, and the server is not stopping."""
    state.check_serving()
    return {"status": "ready"}


@router.get("/v1/keys/me")
async def own_key(
    state: State,
    caller: Annotated[Caller, Depends(require("generate", "route", "pool:read", "pool:write"))],
) -> dict[str, Any]:
    """What the caller may do, and with what. `open`: the server has no keys."""
    settings = state.retriever.settings
    return {
        "label": caller.label,
        "scopes": sorted(caller.scopes),
        "tenant": caller.tenant,
        "operator": caller.is_operator,
        "open": caller.key is None,
        "defaults": {"k": settings.k, "strategy": settings.strategy, "weighting": settings.weighting},
        "strategies": strategy_names(),
    }
