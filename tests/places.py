"""Where the pools of tests are: in folders with SQLite, and in PostgreSQL with a storage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraretriever.pool import Pool
from tiny import TINY_BASE, TINY_SPEC


@dataclass(frozen=True)
class Place:
    """A place for one pool."""

    location: Path | str
    content: Path  # the folder with the adapters' files
    storage: str | None = None

    @property
    def is_shared(self) -> bool:
        return self.storage is not None

    def create(self, base_model: str = TINY_BASE, **options: Any) -> Pool:
        return Pool.create(self.location, base_model, storage=self.storage, **{"spec": TINY_SPEC, **options})

    def contents(self) -> set[str]:
        """The digests of the adapters whose files are there."""
        return {folder.name for folder in self.content.iterdir()} if self.content.exists() else set()


def folder_place(folder: Path) -> Place:
    return Place(folder / "pool", folder / "pool/adapters")


def shared_place(url: str, folder: Path) -> Place:
    return Place(url, folder / "storage/adapters", f"file://{folder / 'storage'}")
