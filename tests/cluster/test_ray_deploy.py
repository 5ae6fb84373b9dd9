"""`serve deploy` with the example's file, on a Ray that runs: the application, a change of it, and its end."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil
import pytest
import yaml

from cluster.conftest import WAIT
from cluster.test_ray_cluster import body, until
from unit.server.conftest import make_pool
from vllm_server import free_port

pytestmark = [pytest.mark.ray, pytest.mark.slow]
EXAMPLE = Path(__file__).parents[2] / "examples" / "ray-serve.yaml"
Serve = Callable[..., str]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Ray's command `serve`, for a Ray of this test's own."""
    port, dashboard = free_port(), free_port()
    environment = os.environ | {
        "LORARETRIEVER_CACHE": str(tmp_path / "cache"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }

    def run(module: str, *arguments: object) -> str:
        command = [sys.executable, "-m", module, *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WAIT)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    with TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:  # sockets' paths must be short
        cpus = 3  # Ray starts as many processes beforehand
        options = "--port", port, "--dashboard-port", dashboard, "--temp-dir", folder, "--num-cpus", cpus
        try:
            run("ray.scripts.scripts", "start", "--head", *options)
            yield lambda *arguments: run("ray.serve.scripts", *arguments)
        finally:
            _end_processes(folder)


def _end_processes(folder: str) -> None:
    """Those of the Ray with its files there; `ray stop` would end those of others, too."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(folder in argument for argument in process.info["cmdline"] or ()):
            found += [process, *process.children(recursive=True)]
    for process in found:
        if process.is_running():
            process.kill()
    psutil.wait_procs(found, timeout=30)


def test_the_example_is_deployed_changed_and_shut_down(serve: Serve, tmp_path: Path, cluster_models: Path) -> None:
    """While it changes, requests wait for new replicas, and none is refused."""
    schema: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    port, file = free_port(), tmp_path / "serve.yaml"
    url = f"http://127.0.0.1:{port}"
    schema["http_options"] = {"host": "127.0.0.1", "port": port}
    (application,) = schema["applications"]
    application["args"] |= {
        "pool": str(make_pool(tmp_path, cluster_models)),
        "encoder": str(cluster_models / "encoder"),
    }
    application["args"] |= {"replicas": 1, "max_replicas": 2, "replica_gpus": 0, "device": "cpu", "ingresses": 1}
    application["args"] |= {"cache_mib": 8, "precision": "float32", "shutdown_seconds": 5}

    def deploy(**args: Any) -> None:
        application["args"] |= args
        file.write_text(yaml.safe_dump(schema))
        serve("deploy", file)

    def tokens() -> int:
        """Of an answer whose request names no number."""
        sent = body("sql", ignore_eos=True)
        del sent["max_tokens"]
        response = httpx.post(f"{url}/v1/chat/completions", json=sent, timeout=WAIT, trust_env=False)
        assert response.status_code == 200, response.text
        return int(response.json()["usage"]["completion_tokens"])

    def keep_asking() -> None:
        while not has_changed.is_set():
            seen.append(tokens())

    def is_ready() -> bool:
        try:
            return httpx.get(f"{url}/ready", timeout=WAIT, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    deploy(default_tokens=5)
    until(is_ready, "the application runs")
    assert tokens() == 5
    seen: list[int] = []
    has_changed = threading.Event()
    caller = threading.Thread(target=keep_asking)
    caller.start()
    try:
        deploy(default_tokens=7)
        until(lambda: seen[-1:] == [7] or not caller.is_alive(), "the change")
    finally:
        has_changed.set()
        caller.join(WAIT)
    assert set(seen) == {5, 7} and sorted(seen) == seen
    serve("shutdown", "--yes")
    until(lambda: not yaml.safe_load(serve("status"))["applications"], "the end")
