"""What retrievers read of a pool: all of it, or what one of its views may see."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from loraretriever.retrieve.encoder import Vectors
from loraretriever.types import Adapter, PoolEntry, Sample

Samples = list[Sample]  # inside the class, `list` is its method


class Reader(Protocol):
    """A `Pool` or a `PoolView`. A view hides adapters, and answers for hidden ones as if they were not there."""

    @property
    def change(self) -> int:
        """Grows with each change to the pool, of hidden adapters too."""
        ...

    @property
    def encoder(self) -> str | None:
        """The sentence encoder that the pool is to be read with; None: the reader's default."""
        ...

    @property
    def state_folder(self) -> Path:
        """Where what is derived from what this reader sees may be kept."""
        ...

    def changes_since(self, change: int) -> frozenset[str] | None:
        """Names that the changes after this one touched; None: read all."""
        ...

    def list(self, enabled_only: bool = False) -> Sequence[Adapter]:
        """The adapters, by name."""
        ...

    def get(self, name: str) -> Adapter:
        """One adapter.

        Raises:
            AdapterNotFoundError: there is none of that name to be seen.
        """
        ...

    def entries(self, encoder_tag: str, names: Collection[str] | None = None) -> tuple[int, dict[str, PoolEntry]]:
        """The change number and, by name, what retrieval reads of the enabled adapters."""
        ...

    def missing_embeddings(self, encoder_tag: str, names: Collection[str] | None = None) -> dict[str, Samples]:
        """By enabled adapter: the samples that this encoder has not embedded."""
        ...

    def store_embeddings(self, encoder_tag: str, vectors: Mapping[str, Vectors]) -> None:
        """Store vectors for what `missing_embeddings` gave this thread."""
        ...
