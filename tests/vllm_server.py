"""A real vLLM server with our plug-in, started by the tests and stopped by them.

vLLM needs an environment of its own: `make test-vllm` makes it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY_OPTIONS = ("--max-loras", "4", "--max-lora-rank", "16", "--max-model-len", "512")  # for tests/tiny.py's models
_SECONDS = 300  # to start
_LOG_LINES = 40


def vllm_python() -> str:
    """The interpreter of vLLM's environment; without one the test is skipped, but not where CI is set."""
    python = ROOT / os.environ.get("VLLM_VENV", ".venv-vllm") / "bin" / "python"
    if not python.exists():
        if os.environ.get("CI"):
            pytest.fail(f"there is no {python}; make it with: make test-vllm")
        pytest.skip("needs vLLM in an environment of its own: make test-vllm")
    return str(python)


@dataclass
class VllmServer:
    """A server that runs."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def get(self, path: str) -> Any:
        response = httpx.get(self.url + path, timeout=60)
        response.raise_for_status()
        return response.json()

    def kill(self) -> None:
        """End all its processes at once, as a crash does."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def environment(**more: str) -> dict[str, str]:
    """Of vLLM's process, without what is meant for ours."""
    values = {name: value for name, value in os.environ.items() if not name.startswith("LORARETRIEVER_")}
    values |= {
        "VLLM_PLUGINS": "loraretriever",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        **more,
    }
    openmp = Path(vllm_python()).parent.parent / "lib" / "libiomp5.so"  # what its CPU build asks for
    return values | ({"LD_PRELOAD": str(openmp)} if openmp.exists() else {})


@contextmanager
def vllm_server(
    folder: Path, model: str, pool: str, *options: str, port: int | None = None, **variables: str
) -> Iterator[VllmServer]:
    """Serve a model and a pool on a free port of this machine; `variables` are added to the environment."""
    python, port = vllm_python(), port or free_port()
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "base-model",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--enable-lora",
        "--max-num-seqs", "16", "--enable-prompt-tokens-details", "--disable-uvicorn-access-log", *options,
    ]  # fmt: skip
    variables = {"LORARETRIEVER_POOL": pool, "LORARETRIEVER_CACHE": str(folder / "cache")} | variables
    log = folder / f"vllm-{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment(**variables), start_new_session=True, cwd=folder
        )
    server = VllmServer(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait(server)
        yield server
    finally:
        if process.poll() is None:
            server.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(server: VllmServer) -> None:
    pause = Event()
    for _ in range(_SECONDS * 5):
        if server.process.poll() is not None:
            break
        try:
            if httpx.get(f"{server.url}/loraretriever").status_code == 200:
                return
        except httpx.TransportError:
            pass
        pause.wait(0.2)
    tail = "\n".join(server.log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
    pytest.fail(f"the vLLM server did not start:\n{tail}")
