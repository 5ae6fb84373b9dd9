from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families as parse

from loraretriever.config import ServerSettings
from loraretriever.pool import Pool
from loraretriever.server import errors, stats
from loraretriever.server.metrics import FAMILIES, Metrics
from loraretriever.server.state import ServerState
from loraretriever.types import Generation
from tiny import TINY_SPEC

PATHS = ("/metrics", "/v1/stats")


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with Pool.create(tmp_path / "pool", "base", spec=TINY_SPEC) as made:
        yield made


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def client(pool: Pool, metrics: Metrics) -> Iterator[TestClient]:
    app = FastAPI()
    nothing: Any = None
    retriever: Any = SimpleNamespace(pool=pool)
    state = ServerState(retriever, ServerSettings(), metrics, nothing, nothing)
    app.state.server = state
    app.include_router(stats.router)
    errors.install(app)
    with TestClient(app) as made:
        yield made
    state.close()


@pytest.mark.parametrize("path", PATHS)
def test_figures_are_for_operators_only(client: TestClient, pool: Pool, path: str) -> None:
    assert client.get(path).status_code == 200  # this server has no keys
    operator, _ = pool.keys.create("operator", ["admin"])
    tenant_admin, _ = pool.keys.create("tenant", ["admin"], "acme")
    user, _ = pool.keys.create("user", ["generate", "route", "pool:read", "pool:write"])
    status = {
        key: client.get(path, headers={"authorization": f"Bearer {key}"} if key else {}).status_code
        for key in ("", user, tenant_admin, operator)
    }
    assert list(status.values()) == [401, 403, 403, 200]


def test_prometheus_reads_what_was_counted(client: TestClient, metrics: Metrics) -> None:
    metrics.rejected("overloaded")
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert response.headers["vary"] == "accept"
    names = {family.name for family in parse(response.text)}
    assert {family.name.removesuffix("_total") for family in FAMILIES} <= names


def test_open_metrics_on_demand(client: TestClient) -> None:
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
    response = client.get("/metrics", headers={"accept": accept})
    assert response.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert response.text.endswith("# EOF\n")


def test_the_same_figures_as_json(client: TestClient, metrics: Metrics) -> None:
    metrics.rejected("overloaded")
    for seconds in (0.3, 0.3, 0.3, 700.0):
        metrics.answered(Generation("text", "stop", 10, 5, seconds, first_token_seconds=0.04))
    found = client.get("/v1/stats").json()
    assert found["object"] == "stats"
    assert found["time"] >= found["started"]
    assert found["counters"]["requests_rejected_total"] == [{"labels": {"reason": "overloaded"}, "value": 1}]
    assert found["gauges"]["num_requests_running"] == [{"labels": {}, "value": 0}]
    (latency,) = found["histograms"]["e2e_request_latency_seconds"]
    assert latency["count"] == 4
    assert latency["sum"] == pytest.approx(700.9)
    assert dict(map(tuple, latency["buckets"]))[0.25] == 0
    assert dict(map(tuple, latency["buckets"]))[0.5] == 3
    assert latency["buckets"][-1] == [None, 4]
    assert latency["recent"]["count"] == 4
    assert 0.25 < latency["recent"]["p50"] <= 0.5
    assert latency["recent"]["p95"] == 600.0  # the last bound: nothing is known above it
    (nothing,) = found["histograms"]["retrieval_seconds"]
    assert nothing["recent"] == {"count": 0, "sum": 0, "p50": None, "p95": None, "p99": None}


def test_all_metrics_are_in_the_json(client: TestClient) -> None:
    found = client.get("/v1/stats").json()
    names = {name for kind in ("counters", "gauges", "histograms") for name in found[kind]}
    assert names == {family.name.removeprefix("loraretriever:") for family in FAMILIES}
