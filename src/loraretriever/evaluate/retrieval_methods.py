"""The product's retrievers over an in-memory pool, by the names under which they are measured."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from loraretriever.config import DEFAULT_ENCODER, Settings
from loraretriever.errors import AdapterNotFoundError, InvalidInputError
from loraretriever.evaluate.retrieval_data import TaskSamples
from loraretriever.pool import Pool
from loraretriever.retrieve import CachingEncoder, Encoder, HybridRetriever, PaperRetriever, Parts, Retriever
from loraretriever.retrieve.encoder import Vectors
from loraretriever.retrieve.loading import PARTS, hybrid_encoder, paper_encoder
from loraretriever.types import PoolEntry, Sample

DEFAULT, PAPER = "hybrid", "paper"
_NO_LIMIT = 1 << 40  # of the vectors that are remembered where accuracy is measured


class _Listed(NamedTuple):
    name: str


class MemoryPool:
    """What retrievers use of a `Pool`, without files: an adapter is its samples. Each change is logged."""

    encoder: str | None = None

    def __init__(self, samples: Mapping[str, TaskSamples]) -> None:
        self._samples = dict(samples)
        self._vectors: dict[str, dict[str, Vectors]] = {}  # by encoder and adapter: samples, then counter samples
        self._log: list[str] = []

    def add(self, name: str, samples: TaskSamples) -> None:
        """Add or revise an adapter."""
        self._samples[name] = samples
        for vectors in self._vectors.values():
            vectors.pop(name, None)
        self._log.append(name)

    @property
    def change(self) -> int:
        """Grows by one with each change."""
        return len(self._log)

    def changes_since(self, change: int) -> frozenset[str] | None:
        """Names of the adapters that the changes after this one touched."""
        return frozenset(self._log[change:])

    def get(self, name: str) -> _Listed:
        """One adapter."""
        if name not in self._samples:
            raise AdapterNotFoundError(f"no adapter {name!r} among {len(self._samples)}.")
        return _Listed(name)

    def missing_embeddings(self, encoder_tag: str, names: Collection[str] | None = None) -> dict[str, list[Sample]]:
        """All samples of each adapter that this encoder has not embedded."""
        known = self._vectors.get(encoder_tag, {})
        return {
            name: [*(Sample(text) for text in mine.texts), *(Sample(text, counter=True) for text in mine.counter_texts)]
            for name, mine in self._samples.items()
            if name not in known and (names is None or name in names)
        }

    def store_embeddings(self, encoder_tag: str, vectors: Mapping[str, Vectors]) -> None:
        """Keep vectors for what `missing_embeddings` gave."""
        self._vectors.setdefault(encoder_tag, {}).update(vectors)

    def entries(self, encoder_tag: str, names: Collection[str] | None = None) -> tuple[int, dict[str, PoolEntry]]:
        """The change number, and by name what retrieval reads."""
        known = self._vectors.get(encoder_tag, {})
        found = [name for name in sorted(self._samples) if names is None or name in names]
        return self.change, {name: _entry(name, self._samples[name], known.get(name)) for name in found}

    def list(self, enabled_only: bool = False) -> list[_Listed]:
        """All adapters by name."""
        return [_Listed(name) for name in sorted(self._samples)]


def _entry(name: str, samples: TaskSamples, vectors: Vectors | None) -> PoolEntry:
    own, counter = (None, None) if vectors is None else np.split(vectors, [len(samples.texts)])
    sources = ("given",) * len(samples.texts)
    return PoolEntry(name, (), None, "", samples.texts, sources, samples.counter_texts, own, counter)


class ColdEncoder:
    """The encoder with the product's cache around it, which can be emptied."""

    def __init__(self, encoder: Encoder, is_caching: bool) -> None:
        self._encoder, self._is_caching = encoder, is_caching
        self.forget()

    @property
    def tag(self) -> str:
        """The wrapped encoder's."""
        return self._encoder.tag

    def forget(self) -> None:
        """Empty the cache."""
        self._current = CachingEncoder(self._encoder) if self._is_caching else self._encoder

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Shape: (len(texts), dimension), rows of length 1."""
        return self._current.encode(texts)


@dataclass(frozen=True, slots=True)
class Source:
    """An encoder and how it is read. `instruction` None: as the product chooses."""

    is_paper: bool
    encoder: str | None
    instruction: str | None = None


@dataclass(frozen=True, slots=True)
class Method:
    """A way to rank. `parts` None: the paper's formula."""

    name: str
    source: Source
    parts: Parts | None


def known_methods(encoder: str | None, trained: Mapping[str, Path] | None = None) -> dict[str, Method]:
    """All methods by name: the paper's formula, the hybrid and its parts, and both with each trained encoder.

    Raises:
        InvalidInputError: a trained encoder has the name of a method.
    """
    paper, hybrid = Source(True, encoder), Source(False, encoder)
    found = [Method(PAPER, paper, None), Method(f"{PAPER}-no-instruction", replace(paper, instruction=""), None)]
    found += [Method(name, hybrid, parts) for name, parts in PARTS.items()]
    for name, folder in (trained or {}).items():
        found.append(Method(name, Source(True, str(folder)), None))
        found.append(Method(f"{name}+{DEFAULT}", Source(False, str(folder)), PARTS[DEFAULT]))
    methods = {method.name: method for method in found}
    if len(methods) < len(found):
        names = [method.name for method in found]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidInputError(f"--trained gives the name {twice!r}, which a method has already; choose another.")
    return methods


@dataclass(slots=True)
class Workbench:
    """Makes retrievers; each encoder is loaded once, and each text encoded once but where time is taken."""

    settings: Settings
    _encoders: dict[Source, Encoder] = field(default_factory=dict)
    _recorded: dict[Source, CachingEncoder] = field(default_factory=dict)

    def recorded(self, method: Method, pool: MemoryPool) -> Retriever:
        """A retriever that encodes no text a second time."""
        if method.source not in self._recorded:
            self._recorded[method.source] = CachingEncoder(self._encoder(method.source), size=_NO_LIMIT)
        return self._retriever(method, pool, self._recorded[method.source])

    def cold(self, method: Method, pool: MemoryPool) -> tuple[Retriever, Callable[[], None]]:
        """A retriever with a cache of its own, and what empties the cache."""
        encoder = ColdEncoder(self._encoder(method.source), is_caching=not method.source.is_paper)
        return self._retriever(method, pool, encoder), encoder.forget

    @property
    def tags(self) -> tuple[str, ...]:
        """Of the encoders that are loaded."""
        return tuple(sorted(encoder.tag for encoder in self._encoders.values()))

    def _encoder(self, source: Source) -> Encoder:
        """Without the cache around it."""
        if source not in self._encoders:
            instruction = self.settings.instruction if source.instruction is None else source.instruction
            load = paper_encoder if source.is_paper else hybrid_encoder
            settings = replace(self.settings, instruction=instruction)
            self._encoders[source] = load(source.encoder or DEFAULT_ENCODER, settings)
        return self._encoders[source]

    def _retriever(self, method: Method, pool: MemoryPool, encoder: Encoder) -> Retriever:
        """As `load_retriever` makes it."""
        stand_in = cast(Pool, pool)  # has the methods that retrievers call
        if method.parts is None:
            return PaperRetriever(stand_in, encoder)
        rates = self.settings.false_fallback, self.settings.drift
        return HybridRetriever(stand_in, lambda _: encoder, method.parts, *rates)
