"""vLLM's endpoints to load and unload adapters, as its clients use them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from loraretriever.config import ServerSettings
from tiny import write_peft_folder
from unit.server.conftest import Served, make_pool, serving


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    write_peft_folder(root / "cook", seed=9, base_model="base", samples=["Bake a loaf of bread.", "Cook a soup."])
    write_peft_folder(root / "broken", base_model="base", config={"r": 0})
    return root


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, models: Path, root: Path) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("vllm")
    with serving(make_pool(folder, models, ("sql",)), models, ServerSettings(adapter_root=root)) as served:
        yield served


@pytest.fixture
def client(server: Served) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def load(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/v1/load_lora_adapter", json=body)


def unload(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/v1/unload_lora_adapter", json=body)


def error_of(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    return str(answer.json()["error"]["message"])


def test_an_adapter_is_loaded_used_replaced_and_unloaded(client: httpx.Client, root: Path) -> None:
    answer = load(client, lora_name="cook", lora_path=str(root / "cook"))
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'cook' added successfully.")
    assert "cook" in [model["id"] for model in client.get("/v1/models").json()["data"]]
    body = {"model": "cook", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    assert client.post("/v1/chat/completions", json=body).json()["model"] == "cook"
    message = error_of(load(client, lora_name="cook", lora_path="cook"), 400)
    assert message.startswith("The lora adapter 'cook' has already been loaded.") and "load_inplace" in message
    assert load(client, lora_name="cook", lora_path="./cook", load_inplace=True).status_code == 200
    answer = unload(client, lora_name="cook", lora_int_id=3)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'cook' removed successfully.")
    assert "cook" not in client.get("/v1/models").text
    assert error_of(unload(client, lora_name="cook"), 404) == "The lora adapter 'cook' cannot be found."
    assert (root / "cook").is_dir(), "what it was loaded from stays"


def test_what_cannot_be_loaded(client: httpx.Client, root: Path) -> None:
    path = str(root / "missing")
    message = error_of(load(client, lora_name="new", lora_path=path), 404)
    assert message == f"Loading lora new failed: No adapter found for {path}"
    for body in ({"lora_name": "", "lora_path": "cook"}, {"lora_name": "new", "lora_path": ""}):
        assert error_of(load(client, **body), 400) == "Both 'lora_name' and 'lora_path' must be provided."
    error_of(load(client, lora_name="new"), 400)
    error_of(load(client, lora_name="new", lora_path="/etc"), 403)
    error_of(load(client, lora_name="new", lora_path="cook/../.."), 403)
    message = error_of(load(client, lora_name="new", lora_path="./broken"), 422)
    assert message.startswith("adapter_config.json: r is 0")
    assert error_of(unload(client, lora_name=""), 400).startswith("'lora_name' needs to be provided")
    assert "new" not in client.get("/v1/models").text


def test_tenants_load_and_unload_their_own_alone(serve: Callable[..., Any], root: Path) -> None:
    with serve(names=("sql",), adapter_root=root) as served:
        store = served.retriever.pool.keys
        keys = [store.create(each or "operator", ["pool:write"], each)[0] for each in ("acme", None)]
        with served.client(keys[0]) as acme, served.client(keys[1]) as shared:
            error_of(load(acme, lora_name="cook", lora_path="./cook"), 403)
            error_of(unload(acme, lora_name="sql"), 403)
            assert load(shared, lora_name="cook", lora_path="./cook").status_code == 200
            served.retriever.pool.add(root / "cook", name="acme:cook", tenant="acme")
            assert unload(acme, lora_name="cook").status_code == 200
            error_of(unload(acme, lora_name="cook"), 403)  # it is the shared one now
            assert unload(shared, lora_name="cook").status_code == 200
