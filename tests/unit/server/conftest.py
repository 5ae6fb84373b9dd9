"""A whole server on tiny models: the real retriever, the real engine, real HTTP."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from loraretriever.config import ServerSettings
from loraretriever.pipeline import LoraRetriever
from loraretriever.pool import Pool
from loraretriever.types import BaseModelSpec
from tiny import TINY_SPEC, lora_tensors, write_peft_folder
from tiny_text import write_base_model, write_encoder

SAMPLES = {
    "sql": ["Write a query that counts the users.", "Write a query for all orders.", "Select every customer by city."],
    "german": ["Translate to German: good day.", "Translate to German: thank you.", "Say this in German: bread."],
    "math": ["Add 3 and 4.", "How much is 12 times 9?", "Subtract 8 from 30."],
}


@dataclass(frozen=True)
class Served:
    """A server that runs."""

    url: str
    app: Any
    retriever: LoraRetriever

    def client(self, key: str | None = None, **options: Any) -> httpx.Client:
        """A client that must be closed."""
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, **options)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base model and a tiny sentence encoder."""
    folder = tmp_path_factory.mktemp("models")
    write_base_model(folder / "base")
    write_encoder(folder, layers=3)
    return folder


def make_pool(
    folder: Path, models: Path, names: tuple[str, ...] = tuple(SAMPLES), spec: BaseModelSpec = TINY_SPEC
) -> Path:
    """A pool of random adapters for the tiny model."""
    base = str(models / "base")
    with Pool.create(folder / "pool", base, spec=spec) as pool:
        for seed, name in enumerate(names):
            tensors = lora_tensors(seed=seed, spec=spec)
            adapter = write_peft_folder(folder / name, base_model=base, tensors=tensors)
            pool.add(adapter, samples=SAMPLES[name])
    return folder / "pool"


@contextmanager
def serving(pool: Path, models: Path, settings: ServerSettings | None = None, **options: Any) -> Iterator[Served]:
    """Serve a pool on a free port of this machine, in a thread."""
    options = {"encoder": str(models / "encoder"), "precision": "float32", "batch_size": 8, "slots": 4} | options
    with LoraRetriever.open(pool, **options) as retriever, serving_app(retriever, settings) as served:
        yield served


@contextmanager
def serving_app(retriever: LoraRetriever, settings: ServerSettings | None = None) -> Iterator[Served]:
    """Serve what is open already, as `serving`."""
    import uvicorn

    from loraretriever.server.app import create_app

    app = create_app(retriever, settings or ServerSettings(refresh_seconds=0.05))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="on"))
    thread = threading.Thread(target=server.run, name="uvicorn")
    thread.start()
    try:
        with httpx.Client(timeout=60) as client:
            url = _address(server, thread)
            _wait_until_ready(client, url)
            yield Served(url, app, retriever)
    finally:
        server.should_exit = True
        thread.join()


def _address(server: Any, thread: threading.Thread) -> str:
    started = threading.Event()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        started.wait(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    return f"http://127.0.0.1:{port}"


def _wait_until_ready(client: httpx.Client, url: str) -> None:
    pause = threading.Event()
    while True:
        response = client.get(f"{url}/ready")
        if response.status_code == 200:
            return
        assert response.json()["error"]["code"] == "loading", response.text
        pause.wait(0.05)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Served]:
    """A server without keys, over three adapters; tests of a module share it."""
    with serving(make_pool(tmp_path_factory.mktemp("pool"), models), models) as running:
        yield running


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    """A client of it."""
    with served.client() as client:
        yield client


@pytest.fixture
def serve(tmp_path: Path, models: Path) -> Callable[..., Any]:
    """Make servers of a test's own: `with serve() as served`, with fields of `Settings` and `ServerSettings`."""
    fields = {field.name for field in dataclasses.fields(ServerSettings)}

    def make(names: tuple[str, ...] = tuple(SAMPLES), **settings: Any) -> Any:
        pool = make_pool(tmp_path, models, names)
        own = {name: value for name, value in settings.items() if name in fields}
        options = {name: value for name, value in settings.items() if name not in fields}
        return serving(pool, models, ServerSettings(**{"refresh_seconds": 0.05} | own), **options)

    return make
