"""POST /v1/route and GET /v1/map: retrieval alone, for those who generate elsewhere, and for the page."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends

from loraretriever.compose import format_composition
from loraretriever.retrieve import Explanation
from loraretriever.server import auth
from loraretriever.server.auth import Caller, require
from loraretriever.server.errors import ApiError
from loraretriever.server.schemas import RouteBody
from loraretriever.server.state import ServerState, State
from loraretriever.server.targets import Names, filters
from loraretriever.server.wire import explanation_json
from loraretriever.types import Route

router = APIRouter(tags=["retrieval"])


@router.post("/v1/route")
async def route(body: RouteBody, state: State, caller: Annotated[Caller, Depends(require("route"))]) -> dict[str, Any]:
    """The adapters that fit each prompt, and the composition that would answer it."""
    state.check_serving()
    await state.run(auth.admit, state, caller)
    if len(body.texts) > state.settings.max_prompts:
        message = f"input has {len(body.texts)} prompts; expected at most {state.settings.max_prompts}."
        raise ApiError(400, message, param="input")
    names = Names(state, caller, body.tenant)
    start = time.perf_counter()
    routes, reasons, points = await state.run(_route, state, names, body)
    seconds = time.perf_counter() - start
    for found in routes:
        state.metrics.routed(found, seconds)

    def rows() -> list[dict[str, Any]]:
        return [
            _route_json(state, names, body, index, found, reason, point)
            for index, (found, reason, point) in enumerate(zip(routes, reasons, points, strict=True))
        ]

    data = await state.run(rows)  # composing may look up adapters
    return {"object": "list", "data": data, "milliseconds": round(seconds * 1000, 3)}


@router.get("/v1/map")
async def pool_map(state: State, caller: Annotated[Caller, Depends(require("pool:read"))]) -> dict[str, Any]:
    """The adapters and their samples in two dimensions: what lies near is alike to the retriever."""
    state.check_serving()
    found = await state.run(state.retriever.map, caller.view)
    names = Names(state, caller)
    return {
        "adapters": [
            {"name": names.public(name), "x": float(x), "y": float(y)}
            for name, (x, y) in zip(found.adapters, found.points, strict=True)
        ],
        "samples": [
            {"adapter": names.public(found.adapters[owner]), "x": float(x), "y": float(y)}
            for owner, (x, y) in zip(found.sample_adapters, found.samples, strict=True)
        ],
    }


def _route(
    state: ServerState, names: Names, body: RouteBody
) -> tuple[list[Route], Sequence[Explanation | None], Sequence[Any]]:
    exclude, only = filters(names, body)
    texts, view = body.texts, names.view
    retriever = state.retriever
    routes = retriever.route(
        texts, k=body.k, threshold=body.threshold, exclude=exclude, only=only, tags=body.tags, tenant=view
    )
    reasons: Sequence[Explanation | None] = [None] * len(texts)
    if body.explain:
        reasons = retriever.explain(texts, k=body.k, exclude=exclude, only=only, tags=body.tags, tenant=view)
    points: Sequence[Any] = [None] * len(texts)
    if body.map:
        points = list(retriever.map(view, texts).prompts)
    return routes, reasons, points


def _route_json(
    state: ServerState,
    names: Names,
    body: RouteBody,
    index: int,
    found: Route,
    reason: Explanation | None,
    point: Any,
) -> dict[str, Any]:
    composition = state.retriever.compose(found, strategy=body.strategy, weighting=body.weighting)
    public = names.public_composition(composition)
    pairs = zip(public.adapters, public.weights, strict=True)
    row: dict[str, Any] = {
        "index": index,
        "hits": names.public_hits(found.hits),
        "fallback": found.fallback,
        "fit": found.fit,
        "threshold": found.threshold,
        "composition": format_composition(public),
        "strategy": public.strategy,
        "adapters": [{"name": name, "weight": weight} for name, weight in pairs],
    }
    if reason is not None:
        row["why"] = explanation_json(reason, names)
    if point is not None:
        row["point"] = [float(point[0]), float(point[1])]
    return row
