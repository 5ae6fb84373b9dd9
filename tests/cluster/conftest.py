"""A real cluster on this machine: `loraretriever serve --cluster` with two tiny engines, in processes of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tiny_text import write_base_model, write_encoder
from unit.server.conftest import Served, make_pool

WAIT = 120.0
REPLICAS = 2
ROWS = 8  # of each replica's batch
SLOTS = 4


@dataclass(frozen=True)
class Cluster:
    """A cluster that runs."""

    url: str
    pool: Path
    models: Path
    process: subprocess.Popen[str]
    log: Path

    def client(self, **options: Any) -> httpx.Client:
        """A client that must be closed."""
        return httpx.Client(base_url=self.url, timeout=WAIT, trust_env=False, **options)

    def figures(self) -> dict[str, float]:
        """What the metrics say, by their names without the prefix; sums over labels."""
        with self.client() as client:
            lines = client.get("/metrics").text.splitlines()
        found: dict[str, float] = {}
        for line in lines:
            if line.startswith("loraretriever:"):
                name, value = line.removeprefix("loraretriever:").rsplit(" ", 1)
                name = name.partition("{")[0]
                found[name] = found.get(name, 0.0) + float(value)
        return found

    def replicas(self) -> list[psutil.Process]:
        """The processes of the engines."""
        return self.processes("ServeReplica:loraretriever:Engine")

    def processes(self, name: str) -> list[psutil.Process]:
        """Ray's processes of that name, below the program's own."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if name in " ".join(_command(child))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has just ended
        return []


@contextmanager
def run_cluster(
    pool: Path,
    models: Path,
    folder: Path,
    *options: object,
    python: str = sys.executable,
    environment: Mapping[str, str] = os.environ,
    **cluster: Any,
) -> Iterator[Cluster]:
    """Run the command, until the end of the block."""
    settings = folder / "cluster.toml"
    written = "".join(f"{name} = {json.dumps(value)}\n" for name, value in ({"replicas": REPLICAS} | cluster).items())
    settings.write_text(
        f'pool = "{pool}"\nencoder = "{models / "encoder"}"\nprecision = "float32"\ncache_mib = 8\n'
        f"batch_size = {ROWS}\nslots = {SLOTS}\n[server]\nport = 0\nrefresh_seconds = 0.05\n[cluster]\n{written}"
    )
    command = [python, "-m", "loraretriever", "serve", "--cluster", "--json", "--config", str(settings)]
    log = folder / "cluster.log"
    environment = {**environment, "LORARETRIEVER_CACHE": str(folder / "cache")}
    with (
        log.open("w") as err,
        subprocess.Popen(
            [*command, *map(str, options)], stdout=subprocess.PIPE, stderr=err, text=True, env=environment
        ) as process,
    ):
        try:
            assert process.stdout is not None
            told = process.stdout.readline()
            assert told, log.read_text()
            yield Cluster(json.loads(told)["url"], pool, models, process, log)
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT) == 0, log.read_text()


@pytest.fixture(scope="session")
def cluster_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base model and a tiny sentence encoder."""
    folder = tmp_path_factory.mktemp("models")
    write_base_model(folder / "base")
    write_encoder(folder, layers=3)
    return folder


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, cluster_models: Path) -> Iterator[Cluster]:
    """One cluster, which all tests share."""
    folder = tmp_path_factory.mktemp("cluster")
    with run_cluster(make_pool(folder, cluster_models), cluster_models, folder) as running:
        yield running


@pytest.fixture(scope="session")
def served(cluster: Cluster) -> Served:
    """The cluster, as the server's own tests know one."""
    return Served(cluster.url, None, None)  # type: ignore[arg-type]


@pytest.fixture
def client(cluster: Cluster) -> Iterator[httpx.Client]:
    """A client of it."""
    with cluster.client() as client:
        yield client
