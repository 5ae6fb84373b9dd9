"""Where the pools of tests are: in folders with SQLite, and in PostgreSQL with a storage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from loraretriever.pool import Pool
from tiny import TINY_BASE, TINY_SPEC


@dataclass(frozen=True)
class Place:
    """A place for one pool."""

    location: Path | str
    storage: str | None = None

    def create(self, base_model: str = TINY_BASE, **options: Any) -> Pool:
        return Pool.create(self.location, base_model, storage=self.storage, **{"spec": TINY_SPEC, **options})


KINDS = ("sqlite", pytest.param("postgres", marks=pytest.mark.postgres))  # parameters of fixtures


def make_place(request: pytest.FixtureRequest, folder: Path, kind: str) -> Place:
    """A place for a pool of a kind; `request` gives the server."""
    if kind == "sqlite":
        return Place(folder / "pool")
    return Place(request.getfixturevalue("postgres").new_database(), f"file://{folder / 'storage'}")


def contents(pool: Pool) -> set[str]:
    """The digests of the adapters whose files the pool has."""
    return {folder.name for folder in _content(pool).glob("*")}


def stored(pool: Pool, digest: str) -> Path:
    """The folder where the pool has an adapter's files."""
    return _content(pool) / digest


def _content(pool: Pool) -> Path:
    storage = pool._layout.storage
    return (pool._layout.root if storage is None else Path(storage.removeprefix("file://"))) / "adapters"
