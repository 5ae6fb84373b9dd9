"""A tiny model behind a real vLLM server, and our server in front of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tiny import WIDE, tiny_spec
from tiny_text import write_base_model, write_encoder
from unit.server.conftest import Served, make_pool, serving
from vllm_server import TINY_OPTIONS, VllmServer, vllm_server


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base model that vLLM takes, and a tiny sentence encoder."""
    folder = tmp_path_factory.mktemp("wide")
    write_base_model(folder / "base", WIDE)
    write_encoder(folder, layers=3)
    return folder


@pytest.fixture(scope="session")
def tiny_pool(tmp_path_factory: pytest.TempPathFactory, wide: Path) -> Path:
    """Three adapters for it."""
    return make_pool(tmp_path_factory.mktemp("pool"), wide, spec=tiny_spec(WIDE))


@pytest.fixture(scope="session")
def tiny_server(tmp_path_factory: pytest.TempPathFactory, wide: Path, tiny_pool: Path) -> Iterator[VllmServer]:
    """vLLM with both."""
    with vllm_server(tmp_path_factory.mktemp("vllm"), str(wide / "base"), str(tiny_pool), *TINY_OPTIONS) as running:
        yield running


@pytest.fixture(scope="session")
def gateway(wide: Path, tiny_pool: Path, tiny_server: VllmServer) -> Iterator[Served]:
    """Our server in front of it."""
    with serving(tiny_pool, wide, engine="vllm", vllm_urls=[tiny_server.url]) as running:
        yield running
