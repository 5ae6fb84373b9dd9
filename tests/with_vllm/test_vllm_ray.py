"""vLLM as the engine of a replica of Ray Serve, in vLLM's environment, where that has Ray."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.conftest import Cluster, run_cluster
from cluster.test_ray_cluster import until
from loraretriever.pipeline import LoraRetriever
from loraretriever.types import Sampling
from vllm_server import environment, vllm_python

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.slow]

PROMPT = "Where?"
TOKENS = 12
MIXTURE = {"sql": 0.5, "german": 0.3, "math": 0.2}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, wide: Path, tiny_pool: Path) -> Iterator[Cluster]:
    """One replica, with vLLM in it."""
    python = vllm_python()
    if subprocess.run([python, "-c", "import ray.serve, uvloop"], capture_output=True).returncode:
        pytest.skip("needs Ray in vLLM's environment: pip install 'loraretriever[ray,vllm]' there")
    variables = environment(LORARETRIEVER_VLLM_RANK="16", VLLM_PLUGINS="")
    options = "--engine", "vllm", "--dtype", "float32"
    folder = tmp_path_factory.mktemp("cluster")
    with run_cluster(tiny_pool, wide, folder, *options, python=python, environment=variables, replicas=1) as running:
        yield running


def ask(cluster: Cluster, **options: Any) -> str:
    messages = [{"role": "user", "content": PROMPT}]
    sent = {"messages": messages, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, **options}
    with cluster.client() as client:
        response = client.post("/v1/chat/completions", json=sent)
    assert response.status_code == 200, response.text
    if "stream" not in options:
        return str(response.json()["choices"][0]["message"]["content"])
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
    return "".join(json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines)


def local_texts(wide: Path, pool: Path) -> list[str]:
    sampling = Sampling(max_tokens=TOKENS, ignore_end=True)
    with LoraRetriever.open(pool, encoder=str(wide / "encoder"), cache_mib=64, dtype="float32") as opened:
        return [opened.generate([PROMPT], adapters=named, sampling=sampling)[0].text for named in (MIXTURE, {})]


def test_answers_are_those_of_the_local_engine(cluster: Cluster, wide: Path, tiny_pool: Path) -> None:
    mixture, base = local_texts(wide, tiny_pool)
    assert mixture and base and mixture != base
    assert ask(cluster, model="auto", lora={"adapters": MIXTURE}) == mixture
    assert ask(cluster, model="auto", lora={"adapters": MIXTURE}, stream=True) == mixture
    assert ask(cluster, model="base") == base
    assert ask(cluster, model="auto")


@pytest.mark.parametrize("victim", ["VLLM::EngineCore", "ServeReplica:loraretriever:Engine"])
def test_what_dies_is_replaced_and_nobody_sees_it(cluster: Cluster, victim: str) -> None:
    """The process of vLLM, without which the replica's is of no use; or the replica's, and vLLM goes with it."""
    before = ask(cluster, model="sql")
    old = [*cluster.processes("VLLM::"), *cluster.replicas()]
    (found,) = cluster.processes(victim)
    found.kill()
    assert ask(cluster, model="sql") == before
    psutil.wait_procs(old, timeout=60)
    assert not any(process.is_running() for process in old)
    until(lambda: len(cluster.replicas()) == 1, "one replica")
