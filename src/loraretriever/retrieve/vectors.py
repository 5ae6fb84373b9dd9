"""Nearest neighbours among row vectors: exact for few rows, approximate for many, and kept on disk."""

from __future__ import annotations

import hashlib
import mmap
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from loraretriever.errors import InvalidInputError
from loraretriever.pool.files import locked, sync_folder, write_file
from loraretriever.retrieve.approximate import ApproximateIndex
from loraretriever.retrieve.nearest import (
    DENSE,
    QUERIES,
    ROUNDING,
    Floats,
    Ints,
    best,
    candidates,
    check_allowed,
    check_queries,
    check_vectors,
    distances,
    no_results,
    products,
)

# Rows x dimension up to which exact search answers one query in about a millisecond on one core.
EXACT_LIMIT = 8_000_000
STAMP_FILE = "vectors.json"
_MAX_STAMP_BYTES = 1 << 16
_ALIGN = 64


class VectorIndex(Protocol):
    """Anything that finds nearest rows; immutable, and safe to search from several threads."""

    @property
    def rows(self) -> int:
        """How many vectors it holds."""
        ...

    @property
    def dimension(self) -> int:
        """Their length."""
        ...

    def search(self, queries: NDArray[Any], k: int, allowed: NDArray[Any] | None = None) -> tuple[Ints, Floats]:
        """Rows and squared distances, best first; -1 and infinity where fewer are allowed.

        Shape: queries (q, dimension) -> (q, k), (q, k). `allowed` is a mask of shape (rows,) or an ascending array of
        row numbers; None allows all. Equal distances are in the order of row numbers.
        """
        ...


class ExactIndex:
    """Looks at every row. The vectors are not copied where they are float32 already: do not change them."""

    kind: Literal["exact"] = "exact"

    def __init__(self, vectors: NDArray[Any]) -> None:
        """Keep the vectors, shape (n, d).

        Raises:
            InvalidInputError: the shape does not fit, or a number is not finite.
        """
        self._vectors, squares = check_vectors(vectors)
        self._halves = squares / 2
        self._largest = float(squares.max(initial=0.0))

    @property
    def rows(self) -> int:
        """How many vectors it holds."""
        return len(self._vectors)

    @property
    def dimension(self) -> int:
        """Their length."""
        return int(self._vectors.shape[1])

    def search(self, queries: NDArray[Any], k: int, allowed: NDArray[Any] | None = None) -> tuple[Ints, Floats]:
        """See `VectorIndex.search`.

        Semantics: |x|²/2 - x·q, which has the order of |x - q|², finds candidates; |x - q|² itself then orders them.

        Raises:
            InvalidInputError: a shape does not fit, or a number is not finite.
        """
        queries = check_queries(queries, self.dimension, k)
        some = check_allowed(allowed, self.rows)
        found_rows, found = no_results(len(queries), k)
        if some is not None and some.count < DENSE * self.rows:
            positions = some.rows()
            for i, query in enumerate(queries):
                self._fill(positions, query, k, found_rows[i], found[i])
            return found_rows, found
        hidden = None if some is None or some.count == self.rows else ~some.mask()
        for start in range(0, len(queries), QUERIES):
            block = queries[start : start + QUERIES]
            for i, (query, product) in enumerate(zip(block, products(self._vectors, block).T, strict=True), start):
                scores = self._halves - product
                if hidden is not None:
                    scores[hidden] = np.inf
                margin = ROUNDING * (self._largest + float(query @ query))
                self._fill(candidates(scores, k, margin), query, k, found_rows[i], found[i])
        return found_rows, found

    def _fill(self, positions: Ints, query: Floats, k: int, rows: Ints, found: Floats) -> None:
        near, distance = best(positions, distances(self._vectors, positions, query), k)
        rows[: len(near)], found[: len(near)] = near, distance

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What `save` writes and `restore` reads."""
        return {"vectors": self._vectors}

    @classmethod
    def restore(cls, arrays: dict[str, NDArray[Any]]) -> ExactIndex:
        """From what `arrays` gave."""
        return cls(arrays["vectors"])


def build(vectors: NDArray[Any], exact_limit: int = EXACT_LIMIT, seed: int = 0) -> ExactIndex | ApproximateIndex:
    """An index over vectors of shape (n, d): exact up to n x d = `exact_limit`, approximate above.

    Raises:
        InvalidInputError: the shape does not fit, or a number is not finite.
    """
    found = np.asarray(vectors)
    if found.ndim != 2 or found.size <= exact_limit or not found.size:
        return ExactIndex(found)
    return ApproximateIndex.build(found, seed)


class _Array(BaseModel):
    """Where an array lies in the file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    dtype: Literal["<f4", "<i8"]
    shape: list[int] = Field(max_length=2)
    offset: int = Field(ge=0, multiple_of=_ALIGN)

    @classmethod
    def of(cls, array: NDArray[Any], offset: int) -> _Array:
        return cls(dtype="<f4" if array.dtype == np.float32 else "<i8", shape=list(array.shape), offset=offset)

    def read(self, data: NDArray[np.uint8]) -> NDArray[Any]:
        dtype = np.dtype(self.dtype)
        size = dtype.itemsize
        for length in self.shape:
            if length < 0:
                raise ValueError(f"a length of {length}")
            size *= length
        if self.offset + size > len(data):
            raise ValueError("the array goes beyond the file")
        return data[self.offset : self.offset + size].view(dtype).reshape(self.shape)


class _Stamp(BaseModel):
    """The small file that makes a data file the current one."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal["loraretriever-vectors"]
    version: Literal[1]
    kind: Literal["exact", "approximate"]
    tag: str
    file: str = Field(pattern=r"\Avectors-[0-9a-f]{16}\.bin\z")
    bytes: int
    sha256: str
    arrays: dict[str, _Array]


def build_or_load(vectors: NDArray[Any], folder: Path | None) -> VectorIndex:
    """As `build`; an approximate index is kept in the folder, and taken from there if it is of these vectors."""
    if folder is None or vectors.size <= EXACT_LIMIT:
        return build(vectors)
    tag = hashlib.sha256(np.ascontiguousarray(vectors).data).hexdigest()
    found: VectorIndex | None = load(folder, tag)
    if found is not None:
        return found
    index = build(vectors)
    if isinstance(index, ApproximateIndex):
        with suppress(OSError):  # a folder that cannot be written to: it is built anew each time
            save(index, folder, tag)
    return index


def save(index: ExactIndex | ApproximateIndex, folder: Path, tag: str = "") -> None:
    """Keep an index in a folder, in place of what was kept there: whole or not at all, whenever the process dies.

    The data file gets a new name; renaming the stamp makes it current. Whoever has mapped the old one keeps it.

    Args:
        index: what to keep.
        folder: is made if it is missing; files of other names in it stay.
        tag: what the vectors were made of; `load` gives an index back only for the same tag.

    Raises:
        OSError: the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"vectors-{secrets.token_hex(8)}.bin"
    with locked(folder):
        try:
            described, size, digest = _write_arrays(index.arrays(), folder / name)
            stamp = _Stamp(
                format="loraretriever-vectors",
                version=1,
                kind=index.kind,
                tag=tag,
                file=name,
                bytes=size,
                sha256=digest,
                arrays=described,
            )
            sync_folder(folder)
            write_file(folder / STAMP_FILE, stamp.model_dump_json(indent=1) + "\n")
        except BaseException:
            (folder / name).unlink(missing_ok=True)
            raise
        for old in folder.glob("vectors-*.bin"):
            if old.name != name:
                old.unlink(missing_ok=True)


def _write_arrays(arrays: dict[str, NDArray[Any]], file: Path) -> tuple[dict[str, _Array], int, str]:
    described, size, digest = {}, 0, hashlib.sha256()
    with file.open("xb") as handle:
        for key, array in arrays.items():
            described[key] = _Array.of(array, size)
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            content = np.ascontiguousarray(little).reshape(-1).view(np.uint8).data
            padding = bytes(-len(content) % _ALIGN)
            for part in (content, padding):
                handle.write(part)
                digest.update(part)
            size += len(content) + len(padding)
        handle.flush()
        os.fsync(handle.fileno())
    return described, size, digest.hexdigest()


def load(folder: Path, tag: str = "") -> ExactIndex | ApproximateIndex | None:
    """The index kept in a folder, its vectors mapped into memory; None: none of this tag and version, or damaged.

    The whole file is read once to compare its SHA-256, so that nothing is searched that was not written.
    """
    for _ in range(2):  # between the two reads another process may have replaced both files
        try:
            return _load_once(folder, tag)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, InvalidInputError):
            return None
    return None


def _load_once(folder: Path, tag: str) -> ExactIndex | ApproximateIndex | None:
    with _open_file(folder / STAMP_FILE) as handle:
        stamp = _Stamp.model_validate_json(handle.read(_MAX_STAMP_BYTES))
    if stamp.tag != tag:
        return None
    with _open_file(folder / stamp.file) as handle:
        size = os.fstat(handle.fileno()).st_size
        if size != stamp.bytes or hashlib.file_digest(handle, "sha256").hexdigest() != stamp.sha256:
            return None
        mapped = mmap.mmap(handle.fileno(), size, access=mmap.ACCESS_READ) if size else b""
    data = np.frombuffer(mapped, dtype=np.uint8)
    arrays = {name: array.read(data) for name, array in stamp.arrays.items()}
    return (ExactIndex if stamp.kind == "exact" else ApproximateIndex).restore(arrays)


def _open_file(file: Path) -> Any:
    if file.exists() and not file.is_file():  # opening a pipe would wait for ever
        raise ValueError(f"{file} is not a file")
    return file.open("rb")
