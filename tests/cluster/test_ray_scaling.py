"""Replicas that come under load and go after it, in a real cluster."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.conftest import SLOTS, WAIT, Cluster, run_cluster
from cluster.test_ray_cluster import answer, until
from unit.server.conftest import make_pool

pytestmark = pytest.mark.ray
CALLERS = 6


@pytest.fixture
def scaled(tmp_path: Path, cluster_models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """One replica, and two where more than one request runs."""
    monkeypatch.setenv("RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "0.5")
    settings = {"replicas": 1, "max_replicas": 2, "target_requests": 1, "upscale_seconds": 1, "downscale_seconds": 2}
    with run_cluster(make_pool(tmp_path, cluster_models), cluster_models, tmp_path, **settings) as running:
        yield running


def test_a_second_replica_comes_with_the_load_and_goes_with_it(scaled: Cluster) -> None:
    """No request is lost by either."""
    has_ended = threading.Event()

    def keep_asking() -> int:
        count = 0
        with scaled.client() as client:
            while not has_ended.is_set():
                answer(client, model="sql", max_tokens=200, ignore_eos=True)
                count += 1
        return count

    assert len(scaled.replicas()) == 1
    with ThreadPoolExecutor(CALLERS) as threads:
        callers = [threads.submit(keep_asking) for _ in range(CALLERS)]
        try:
            until(lambda: scaled.figures()["adapter_slots"] == 2 * SLOTS, "a second replica that has loaded its model")
        finally:
            has_ended.set()
        assert all(caller.result(WAIT) for caller in callers)
    with scaled.client() as client:
        until(lambda: len(scaled.replicas()) == 1, "one replica is left")
        answer(client, model="sql")
