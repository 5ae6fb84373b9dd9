"""A vLLM server whose cache's disk is full, and one whose pool's database is away, as clients see them."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_vllm_server import complete, pinned

from loraretriever.pool import Pool
from places import Place
from postgres_server import PostgresServer
from tiny import WIDE, lora_tensors, tiny_spec, write_peft_folder
from vllm_server import TINY_OPTIONS, VllmServer, vllm_server

pytestmark = pytest.mark.vllm


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def until(found: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(600):
        if found():
            return
        pause.wait(0.1)
    raise AssertionError("it did not happen within a minute")


def text(server: VllmServer, model: str) -> str:
    response = complete(server, model)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def test_a_full_disk_is_told_and_leaves_nothing_behind(
    tmp_path: Path, wide: Path, tiny_pool: Path, small_disk: Path
) -> None:
    with Pool.open(tiny_pool) as pool:
        first, second = pinned(pool, sql=0.3, german=0.7), pinned(pool, sql=0.6, german=0.4)
    options = (tmp_path / "vllm", str(wide / "base"), str(tiny_pool), *TINY_OPTIONS)
    with vllm_server(*options, LORARETRIEVER_CACHE=str(small_disk)) as server:
        expected = text(server, first)
        filler = small_disk / "filler"
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(4096))
        before = {path for path in small_disk.rglob("*") if path.is_file()}
        response = complete(server, second)
        assert response.status_code == 503 and "No space left" in response.text
        assert {path for path in small_disk.rglob("*") if path.is_file()} == before
        assert text(server, first) == expected
        filler.unlink()
        assert text(server, second) == text(server, second)


@pytest.mark.postgres
def test_a_pool_whose_database_is_away(tmp_path: Path, wide: Path, postgres: PostgresServer) -> None:
    place = Place(postgres.new_database(), f"file://{tmp_path / 'storage'}")
    with place.create(str(wide / "base"), spec=tiny_spec(WIDE)) as pool:
        for seed, name in enumerate(("sql", "german")):
            tensors = lora_tensors(seed=seed, spec=tiny_spec(WIDE))
            folder = write_peft_folder(tmp_path / name, base_model=pool.base_model, tensors=tensors)
            pool.add(folder, samples=[f"Something in {name}."])
        known, new = pinned(pool, sql=0.3, german=0.7), pinned(pool, sql=0.6, german=0.4)
    with vllm_server(tmp_path / "vllm", str(wide / "base"), str(place.location), *TINY_OPTIONS) as server:
        expected = text(server, known)
        postgres.stop()
        try:
            assert text(server, known) == expected
            response = complete(server, new)
            assert response.status_code == 503 and "cannot be used" in response.text
        finally:
            postgres.start()
        until(lambda: complete(server, new).status_code == 200)
        assert text(server, known) == expected
