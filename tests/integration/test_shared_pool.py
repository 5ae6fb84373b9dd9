"""A pool in PostgreSQL with its files in S3: the command line, and gateways on several hosts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from integration.conftest import Run
from loraretriever.pool import Pool
from postgres_server import SECRET, SECRET_USER, PostgresServer
from s3_server import BUCKET, S3Server
from tiny import TINY_SPEC, write_peft_folder

pytestmark = pytest.mark.postgres
WAIT = 120.0
SAMPLES = {
    "sql": ["Write a query that counts the users.", "Write a query for all orders."],
    "german": ["Translate to German: good day.", "Translate to German: thank you."],
    "math": ["Add 3 and 4.", "How much is 12 times 9?"],
}


@pytest.fixture
def storage(s3: S3Server, tmp_path: Path) -> str:
    return f"s3://{BUCKET}/{tmp_path.name}"


def make_adapter(folder: Path, models: Path, name: str) -> Path:
    seed = list(SAMPLES).index(name)
    return write_peft_folder(folder / name, seed=seed, base_model=str(models / "base"), samples=SAMPLES[name])


def test_everything_by_the_url_alone(
    task_run: Run,
    models: Path,
    postgres: PostgresServer,
    storage: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = postgres.new_database(migrated=False)
    shown = url.replace("tests@", f"{SECRET_USER}@")
    password = SECRET.replace("/", "%2F").replace("@", "%40")
    monkeypatch.setenv("LORARETRIEVER_POOL", shown.replace(SECRET_USER, f"{SECRET_USER}:{password}"))
    said = []

    def run(*arguments: object, code: int = 0) -> str:
        found, out, err = task_run(*arguments)
        said.append(out + err)
        assert found == code, err
        return out

    assert run("pool", "list", code=1) == ""
    made = json.loads(run("pool", "init", "--base-model", models / "base", "--storage", storage, "--json"))
    assert (made["pool"], made["storage"]) == (shown, storage)
    run("pool", "init", "--base-model", models / "base", "--storage", storage, code=1)
    for name in SAMPLES:
        run("pool", "add", make_adapter(tmp_path, models, name))
    run("pool", "remove", "math")
    assert [json.loads(line)["name"] for line in run("pool", "list", "--json").splitlines()] == ["german", "sql"]
    assert json.loads(run("pool", "show", "sql", "--json"))["samples"][0]["text"] == SAMPLES["sql"][0]
    route = json.loads(run("route", SAMPLES["sql"][1], "--json"))
    assert route["hits"][0]["adapter"] == "sql"
    answer = json.loads(run("generate", SAMPLES["german"][1], "--max-tokens", "4", "--json"))
    assert answer["composition"]["adapters"] == ["german"]
    assert run("pool", "verify") == "2 adapters, 0 problems\n"
    run("pool", "encoder", "some/encoder")
    assert json.loads(run("pool", "encoder", "--json"))["pool"] == shown
    run("serve", "--host", "0.0.0.0", "--port", "0", code=2)
    assert all(SECRET not in text and password not in text for text in said)


@contextmanager
def gateway(url: str, host: Path, models: Path) -> Iterator[str]:
    """A server in a process of its own, with a cache folder of its own, as on another host; its address."""
    environment = os.environ | {
        "LORARETRIEVER_CACHE": str(host),
        "LORARETRIEVER_ENCODER": str(models / "encoder"),
        "LORARETRIEVER_CACHE_MIB": "8",
        "LORARETRIEVER_ADAPTER_ROOT": str(host.parent),
    }
    command = [sys.executable, "-m", "loraretriever", "serve", "--json", "--port", "0", "--pool", url]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.terminate()
        process.communicate(timeout=WAIT)


def post(url: str, path: str, body: Any) -> httpx.Response:
    return httpx.post(url + path, json=body, timeout=WAIT, trust_env=False)


def used(url: str, prompt: str) -> str | None:
    """The adapter that answers a prompt."""
    body = {"model": "auto", "messages": [{"role": "user", "content": prompt}], "max_tokens": 4}
    answer = post(url, "/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    hits = answer.json()["lora"]["hits"]
    return hits[0]["adapter"] if hits else None


def add(url: str, folder: Path) -> httpx.Response:
    return post(url, "/v1/adapters?wait=true", {"source": str(folder), "name": folder.name})


def until(found: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(1200):
        if found():
            return
        pause.wait(0.05)
    raise AssertionError("it did not happen within 60 s")


def test_gateways_on_two_hosts(postgres: PostgresServer, storage: str, models: Path, tmp_path: Path) -> None:
    """What is added at one answers at the other; both answer while the database is away, and go on when it is back."""
    url = postgres.new_database()
    folders = {name: make_adapter(tmp_path, models, name) for name in SAMPLES}
    with Pool.create(url, str(models / "base"), storage=storage, spec=TINY_SPEC) as pool:
        pool.add(folders["sql"])
    sql, german, math = (SAMPLES[name][0] for name in SAMPLES)
    with gateway(url, tmp_path / "one", models) as one, gateway(url, tmp_path / "two", models) as two:
        for each in (one, two):
            assert used(each, sql) == "sql"
        assert add(one, folders["german"]).status_code == 201
        assert used(one, german) == "german"
        until(lambda: used(two, german) == "german")
        postgres.stop()
        try:
            for each in (one, two):
                for prompt, expected in ((sql, "sql"), (german, "german")):
                    assert used(each, prompt) == expected, "what is known stays in force"
            refused = add(one, folders["math"])
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "pool_away")
        finally:
            postgres.start()
        assert used(one, sql) == "sql"
        assert add(two, folders["math"]).status_code == 201
        until(lambda: used(one, math) == "math")
