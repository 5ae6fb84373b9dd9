"""Merged adapters: what identifies one, and a store on disk, so that each is made once."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from loraretriever.compose.merge import VERSION, check_merge
from loraretriever.errors import InvalidInputError, LoraRetrieverError
from loraretriever.pool.cache import make_room, size_of
from loraretriever.pool.files import discard, file_errors, locked, rename, staging_folder
from loraretriever.pool.peft_config import CONFIG_FILE, read_config
from loraretriever.pool.weights import WEIGHTS_FILE, digest_of, load_weights
from loraretriever.types import AdapterWeights, Composition, LoraPair, Merge

CHECK_FILE = "sha256"  # of an entry: the digest of its configuration and weights
_THREAD_LOCKS = 32


def merged_digest(parts: Sequence[tuple[str, float]], merge: Merge) -> str:
    """SHA-256, in hexadecimal, of what a merged adapter is made of.

    Args:
        parts: digest and weight of each adapter, in any order: no merge depends on it.
        merge: the method and its options.

    Raises:
        InvalidInputError: the method is unknown, or an option out of its range.
    """
    check_merge(merge)
    options = asdict(merge) | {"density": float(merge.density).hex()}
    adapters = sorted((digest, float(weight).hex()) for digest, weight in parts)
    canonical = json.dumps({"version": VERSION, "adapters": adapters, "merge": options}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def merged_name(composition: Composition) -> str:
    """A short name to read, which does not identify: such as ties(sql=0.7,german=0.3)."""
    method = composition.merge.method if composition.merge else composition.strategy
    adapters = zip(composition.adapters, composition.weights, strict=True)
    return f"{method}({','.join(f'{name}={weight:.3g}' for name, weight in adapters)})"


class MergedStore:
    """A folder of merged adapters, each a PEFT folder named by its digest; the least recently used give way.

    Any number of threads and processes may share a folder. What cannot be read is made again, and what cannot be
    written is not kept: neither is an error.
    """

    def __init__(self, folder: Path, max_bytes: int, keep_seconds: float = 0.0) -> None:
        """Use a folder, made when something is first written to it.

        Args:
            folder: of this store's own.
            max_bytes: of all adapters together. The newest stays even if it alone is larger.
            keep_seconds: how long what was used stays in any case, for those who read the files themselves.

        Raises:
            InvalidInputError: `max_bytes` is negative.
        """
        if max_bytes < 0:
            raise InvalidInputError(f"the store's max_bytes is {max_bytes}; expected 0 (keep the newest) or more.")
        self._folder = folder
        self._max_bytes = max_bytes
        self._keep_seconds = keep_seconds
        # Threads that want the same adapter wait for the first of them; others may, if their digests share a lock.
        self._locks = tuple(threading.Lock() for _ in range(_THREAD_LOCKS))

    def get(self, digest: str, name: str, make: Callable[[], AdapterWeights]) -> AdapterWeights:
        """The merged adapter of that digest, read or else made and written.

        Args:
            digest: of `merged_digest`.
            name: that the adapter has from then on.
            make: called where the folder does not have it; what it raises is raised. It must not ask this store.

        Returns:
            CPU tensors mapped from the file, or what `make` returned under the given name and digest.
        """
        with self._locks[int(digest[:8], 16) % _THREAD_LOCKS]:
            found = self._read(digest, name)
            if found is None:
                found = replace(make(), name=name, digest=digest)
                with suppress(OSError, SafetensorError):
                    self._write(found)
            return found

    def place(self, digest: str, make: Callable[[], AdapterWeights]) -> Path:
        """The folder of the merged adapter of that digest, intact: found there, or else made and written.

        Raises:
            PoolError: it cannot be written. What `make` raises is raised.
        """
        with self._locks[int(digest[:8], 16) % _THREAD_LOCKS]:
            if self._read(digest, digest) is None:
                made = replace(make(), name=digest, digest=digest)
                with file_errors(f"keep a composed adapter in {self._folder}"):
                    try:
                        self._write(made)
                    except SafetensorError as error:  # how its writer tells that the disk is full
                        raise OSError(str(error)) from error
            return self._folder / digest

    def touch(self, digest: str) -> bool:
        """Note that an adapter is used now; whether it is there. Its files are not looked at."""
        try:
            os.utime(self._folder / digest)
        except OSError:
            return False
        return True

    def _read(self, digest: str, name: str) -> AdapterWeights | None:
        entry = self._folder / digest
        try:
            # The files are not flushed to the disk when they are written: a crash may leave zeros in them.
            if _content_digest(entry) != (entry / CHECK_FILE).read_text(encoding="ascii"):
                return None
            weights = load_weights(entry, name, digest)
        except (OSError, ValueError, LoraRetrieverError):  # missing, damaged, or removed by another process meanwhile
            return None
        with suppress(OSError):
            os.utime(entry)  # used now
        return weights

    def _write(self, weights: AdapterWeights) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with staging_folder(self._folder) as staging:  # sweeps what killed processes left
            staged = staging / weights.digest
            staged.mkdir()
            write_peft(staged, weights.modules)
            (staged / CHECK_FILE).write_text(_content_digest(staged), encoding="ascii")
            with locked(self._folder):
                entry = self._folder / weights.digest
                if self._read(weights.digest, weights.name) is not None:  # another process was faster
                    return
                if os.path.lexists(entry):
                    discard(entry, self._folder)
                make_room(self._folder, self._folder, self._max_bytes - size_of(staged), self._keep_seconds)
                rename(staged, entry)


def write_peft(folder: Path, modules: Mapping[str, LoraPair]) -> None:
    """Write factors, in their dtype, into an existing folder as PEFT does.

    The scaling becomes each module's alpha; neither base model nor task is named.

    Raises:
        OSError, SafetensorError: the files cannot be written.
    """
    ranks = {module: pair.a.shape[0] for module, pair in modules.items()}
    alphas = {module: ranks[module] * pair.scaling for module, pair in modules.items()}
    rank = max(ranks.values())
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(modules),
        "rank_pattern": _exceptions(ranks, rank),
        "alpha_pattern": _exceptions(alphas, rank),
        "bias": "none",
        "inference_mode": True,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1), encoding="utf-8")
    tensors = {
        f"base_model.model.{module}.lora_{factor}.weight": tensor.cpu().contiguous()
        for module, pair in modules.items()
        for factor, tensor in (("A", pair.a), ("B", pair.b))
    }
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def _exceptions(values: Mapping[str, float], default: float) -> dict[str, float]:
    """PEFT's patterns, which are regular expressions: one for each module that has another value."""
    return {"^" + module.replace(".", r"\."): value for module, value in values.items() if value != default}


def _content_digest(entry: Path) -> str:
    return digest_of(read_config(entry / CONFIG_FILE), entry / WEIGHTS_FILE)
