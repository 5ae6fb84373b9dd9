"""The figures for programs: GET /metrics for Prometheus, GET /v1/stats for the page. Both show all tenants' figures."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.responses import PlainTextResponse

from loraretriever.server.auth import require_operator
from loraretriever.server.metrics import FAMILIES, PREFIX
from loraretriever.server.series import WINDOW_SECONDS, Family, Figures, Kind, cumulative, last_minute, quantile
from loraretriever.server.state import server_state

router = APIRouter(tags=["server"])


# Both are plain functions, which run in a thread: they read files and the pool's database.
@router.get("/v1/stats", dependencies=[Depends(require_operator)])
def stats(request: Request) -> dict[str, Any]:
    """All figures as JSON; histograms with their buckets and the quantiles of the last minute."""
    state = server_state(request)
    return to_json(state.metrics.figures(), state.started)


@router.get("/metrics", response_class=PlainTextResponse, dependencies=[Depends(require_operator)])
def metrics(request: Request, accept: Annotated[str, Header()] = "") -> Response:
    """All figures as Prometheus reads them: its text format, or OpenMetrics if `Accept` asks for it."""
    body, content_type = server_state(request).metrics.text(accept)
    return Response(body, headers={"content-type": content_type, "vary": "accept"})


def to_json(figures: Figures, started: float) -> dict[str, Any]:
    """The figures by kind and name, without the prefix. `time` and `started` are seconds since the epoch."""
    found: dict[str, Any] = {"object": "stats", "time": time.time(), "started": started, "window": WINDOW_SECONDS}
    for kind in Kind:
        found[kind + "s"] = {
            family.name.removeprefix(PREFIX): _series(figures, family) for family in FAMILIES if family.kind is kind
        }
    return found


def _series(figures: Figures, family: Family) -> list[dict[str, Any]]:
    shown = []
    for labels, numbers in figures.values.get(family.name, {}).items():
        entry: dict[str, Any] = {"labels": dict(zip(family.labels, labels, strict=True))}
        if family.kind is Kind.HISTOGRAM:
            counts = cumulative(numbers)
            recent = last_minute(figures.recent.get(family.name, {}).get(labels, {}), family)
            entry |= {
                "buckets": [list(pair) for pair in zip((*family.bounds, None), counts, strict=True)],  # None: no bound
                "count": counts[-1],
                "sum": numbers[-1],
                "recent": {
                    "count": sum(recent[:-1]),
                    "sum": recent[-1],
                    **{f"p{share}": quantile(recent, family.bounds, share / 100) for share in (50, 95, 99)},
                },
            }
        else:
            entry["value"] = numbers[0]
        shown.append(entry)
    return shown
