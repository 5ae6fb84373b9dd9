"""`loraretriever serve`: what it refuses, and a whole server in processes of its own."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from integration.conftest import Run
from loraretriever.pool import Pool
from tiny import TINY_SPEC, write_peft_folder

WAIT = 120.0
SAMPLES = {
    "sql": ["Write a query that counts the users.", "Write a query for all orders."],
    "german": ["Translate to German: good day.", "Translate to German: thank you."],
}


@pytest.fixture
def pool(tmp_path: Path, models: Path) -> Path:
    base = str(models / "base")
    with Pool.create(tmp_path / "pool", base, spec=TINY_SPEC) as created:
        for seed, (name, samples) in enumerate(SAMPLES.items()):
            created.add(write_peft_folder(tmp_path / name, seed=seed, base_model=base), samples=samples)
    return tmp_path / "pool"


@pytest.fixture
def settings(tmp_path: Path, models: Path, pool: Path) -> Path:
    """A settings file for the tiny pool."""
    file = tmp_path / "server.toml"
    file.write_text(f'pool = "pool"\nencoder = "{models / "encoder"}"\ncache_mib = 8\n[server]\nport = 0\n')
    return file


@contextmanager
def program(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "loraretriever", "serve", "--json", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=WAIT)


def chat(url: str, key: str | None = None) -> httpx.Response:
    body = {"model": "auto", "messages": [{"role": "user", "content": SAMPLES["sql"][0]}], "max_tokens": 4}
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.post(url + "/v1/chat/completions", json=body, headers=headers, timeout=WAIT, trust_env=False)


def test_serve_until_told_to_stop(settings: Path, pool: Path) -> None:
    with program("--config", settings) as process:
        told = json.loads(process.stdout.readline())
        assert told["pool"] == str(pool), "relative to the file"
        assert (told["workers"], told["keys"]) == (1, False)
        answer = chat(told["url"])
        assert answer.status_code == 200, answer.text
        assert answer.json()["lora"]["hits"][0]["adapter"] == "sql"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=WAIT)
        assert (process.returncode, out) == (0, ""), err
        assert all(json.loads(line)["level"] in ("info", "warning") for line in err.splitlines()), "JSON by default"


def found(url: str, key: str, prompt: str) -> set[str]:
    """What many requests at once, on connections of their own and thus by any worker, find first."""

    def route(_: int) -> str:
        headers = {"authorization": f"Bearer {key}"}
        answer = httpx.post(url + "/v1/route", json={"input": prompt}, headers=headers, timeout=WAIT, trust_env=False)
        return str(answer.json()["data"][0]["hits"][0]["adapter"])

    with ThreadPoolExecutor(16) as threads:
        return set(threads.map(route, range(32)))


@pytest.mark.slow
def test_workers_serve_one_pool_with_keys(settings: Path, pool: Path, models: Path, tmp_path: Path) -> None:
    with Pool.open(pool) as opened:
        secret, _ = opened.keys.create("tester", ["admin"])
    with program("--config", settings, "--workers", 2, "--host", "0.0.0.0") as process:
        told = json.loads(process.stdout.readline())
        assert (told["workers"], told["keys"]) == (2, True)
        url = told["url"].replace("0.0.0.0", "127.0.0.1")
        assert chat(url).status_code == 401
        for _ in range(6):
            assert chat(url, secret).status_code == 200
        folder = write_peft_folder(tmp_path / "math", seed=9, base_model=str(models / "base"))
        files = {"config": folder / "adapter_config.json", "weights": folder / "adapter_model.safetensors"}
        with httpx.Client(base_url=url, headers={"authorization": f"Bearer {secret}"}, timeout=WAIT) as client:
            upload = {part: file.read_bytes() for part, file in files.items()}
            details = {"name": "math", "samples": '{"inputs": "How much is 12 times 9?"}'}
            added = client.post("/v1/adapters?wait=true", files=upload, data=details)
            assert added.status_code == 201, added.text
            assert found(url, secret, "How much is 12 times 9?") == {"math"}
            assert client.delete("/v1/adapters/math").status_code == 200
            assert "math" not in found(url, secret, "How much is 12 times 9?")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=WAIT)
        assert process.returncode == 0, err
        assert "without TLS" in err


def test_models_that_cannot_be_loaded_end_the_server(settings: Path) -> None:
    with program("--config", settings, "--base-model", "/nowhere") as process:
        out, err = process.communicate(timeout=WAIT)
    assert (process.returncode, out) == (1, "")
    assert "error: " in err and "/nowhere" in err


def test_other_machines_are_not_served_without_keys(cli_run: Run, pool: Path) -> None:
    code, _, err = cli_run("serve", "--pool", pool, "--host", "0.0.0.0", "--port", 0)
    assert code == 2
    assert "no API keys" in err and "loraretriever keys create" in err and "127.0.0.1" in err


def test_a_port_in_use(cli_run: Run, pool: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = cli_run("serve", "--pool", pool, "--port", port)
    assert code == 1
    assert f"port {port}" in err and "--port" in err


def test_a_pool_must_be_named_and_be_there(cli_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORARETRIEVER_POOL", raising=False)
    code, _, err = cli_run("serve")
    assert code == 2
    assert "--pool" in err and "LORARETRIEVER_POOL" in err and "--config" in err
    code, _, err = cli_run("serve", "--pool", tmp_path / "nowhere")
    assert code == 1
    assert "nowhere" in err


def test_settings_are_checked_before_anything_else(cli_run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[server]\nprot = 80\n")
    code, _, err = cli_run("serve", "--pool", tmp_path, "--config", tmp_path / "a.toml")
    assert code == 2
    assert "a.toml" in err and "server.prot" in err
    code, _, err = cli_run("serve", "--pool", tmp_path, "--port", 70000)
    assert code == 2
    assert "port is 70000" in err


def test_the_missing_extra_is_named(cli_run: Run, pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    code, _, err = cli_run("serve", "--pool", pool)
    assert code == 1
    assert "loraretriever[serve]" in err
