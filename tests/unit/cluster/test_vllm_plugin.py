"""The plug-in's own parts, without vLLM; tests/with_vllm has it in real servers."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loraretriever.cluster.vllm_plugin import RecentNames


class Resolver:
    """A stand-in for the real one: names, and which files are there."""

    def __init__(self, *names: str) -> None:
        self.names = set(names)
        self.there = set("abcdefgh")
        self.touched: list[str] = []

    def touch(self, path: str) -> bool:
        self.touched.append(path)
        return path in self.there


def request(path: str) -> Any:
    return SimpleNamespace(lora_path=path)


def add(names: RecentNames, resolver: Resolver, *new: str) -> None:
    for name in new:
        resolver.names.add(name)
        names[name] = request(name)


def test_the_names_used_last_stay() -> None:
    resolver, locks = Resolver(), {name: asyncio.Lock() for name in "xabcd"}
    names = RecentNames(resolver, 3, {"x": request("static")}, locks)  # type: ignore[arg-type]
    add(names, resolver, "a", "b", "c")
    assert "a" in names
    add(names, resolver, "d")
    assert list(names) == ["x", "c", "a", "d"], "vLLM's own name is never let go"
    assert "b" not in names
    assert sorted(locks) == ["a", "c", "d", "x"]
    assert names["a"].lora_path == "a"


def test_a_name_is_known_as_long_as_its_files_are_there() -> None:
    resolver = Resolver()
    names = RecentNames(resolver, 3, {"x": request("nowhere")}, {})  # type: ignore[arg-type]
    add(names, resolver, "a")
    assert "a" in names and resolver.touched == ["a"]
    resolver.there.clear()
    assert "a" not in names and "a" not in list(names) and not resolver.names
    assert "x" in names


def test_a_lock_that_is_held_is_kept() -> None:
    async def hold() -> None:
        resolver, lock = Resolver(), asyncio.Lock()
        names = RecentNames(resolver, 1, {}, locks := {"a": lock})  # type: ignore[arg-type]
        add(names, resolver, "a")
        async with lock:
            add(names, resolver, "b")
            assert list(names) == ["b"] and locks == {"a": lock}

    asyncio.run(hold())


@pytest.mark.parametrize(
    ("group", "value"),
    [
        ("vllm.general_plugins", "loraretriever.cluster.vllm_plugin:register"),
        ("vllm.endpoint_plugins", "loraretriever.cluster.vllm_plugin:Endpoint"),
    ],
)
def test_vllm_finds_the_plug_in(group: str, value: str) -> None:
    (found,) = entry_points(group=group, name="loraretriever")
    assert found.value == value
    assert callable(found.load())


def test_its_import_is_light(tmp_path: Path) -> None:
    heavy = ("torch", "sqlalchemy", "transformers", "numpy", "pydantic", "vllm")
    code = f"import sys, loraretriever.cluster.vllm_plugin; print(*(set({heavy}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == []
