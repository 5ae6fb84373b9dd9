"""Reads the files of a PEFT adapter: what is in them, for admission, and the weights, for the engine.

Only `load_weights` needs torch: the rest reads safetensors headers, and the numbers through numpy.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from loraretriever.errors import AdmissionError, PoolError
from loraretriever.pool.peft_config import CONFIG_FILE, PeftConfig, read_config
from loraretriever.types import AdapterWeights, LoraPair

WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
DEFAULT_MAX_BYTES = 2 << 30
KEY = re.compile(r"base_model\.model\.(?P<module>[\w.-]{1,128})\.lora_(?P<factor>[AB])\.weight")
# safetensors dtype -> (unsigned integer of the same width, bits of its exponent; all of them set: NaN or infinite)
DTYPES: Mapping[str, tuple[Any, int]] = {
    "F32": (np.uint32, 0x7F800000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
}
_CHUNK = 1 << 22  # numbers looked at in one go: bounds the memory that admission takes


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor in a safetensors file, as its header tells."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # place of its first byte in the file


def find_files(folder: Path) -> tuple[Path, Path]:
    """The real paths of the configuration and of the weights; both must be regular files that belong to the folder.

    Raises:
        AdmissionError: one is missing, is no regular file, or is a link to another place.
    """
    config, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    if not weights.exists():
        others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        found = f"found {', '.join(others)}, which may hold code and was not opened" if others else "it is missing"
        raise AdmissionError(
            f"{folder}: expected {WEIGHTS_FILE}; {found}. Save the adapter again with PEFT's "
            "save_pretrained(..., safe_serialization=True)."
        )
    if not config.exists():
        raise AdmissionError(f"{folder}: {CONFIG_FILE} is missing; expected a folder as PEFT saves it.")
    return real_file(config), real_file(weights)


def real_file(path: Path) -> Path:
    """The regular file behind a path: in its own folder, or a blob of the Hugging Face cache.

    Raises:
        AdmissionError: it is something else.
    """
    folder, real = path.parent.resolve(), path.resolve()
    # The cache's layout: models--owner--name/snapshots/<commit>/<file> links to models--owner--name/blobs/<hash>.
    in_hub_cache = folder.parent.name == "snapshots" and real.parent == folder.parent.parent / "blobs"
    if real.parent != folder and not in_hub_cache:
        raise AdmissionError(f"{path} is a link to {real}; expected a file of its own. Copy the file there.")
    if not real.is_file():
        raise AdmissionError(f"{path} is not a regular file.")
    return real


def optional_file(path: Path) -> Path | None:
    """As `real_file`; None where there is no such file."""
    return real_file(path) if path.exists() else None


def check_size(size: int, max_bytes: int, name: str) -> int:
    """The size, when it is not above the limit.

    Raises:
        AdmissionError: it is.
    """
    if size > max_bytes:
        raise AdmissionError(
            f"{name} has {size:,} bytes; expected at most {max_bytes:,}. Larger ones can be "
            "added from Python: pool.add(..., max_bytes=...)."
        )
    return size


def digest_of(config: PeftConfig, weights_file: Path) -> str:
    """SHA-256, in hexadecimal, of the canonical configuration followed by the weights file."""
    digest = hashlib.sha256(config.canonical)
    with weights_file.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest_in(folder: Path) -> str | None:
    """The digest of the files in a folder; None where they are missing or damaged."""
    try:
        config, weights = find_files(folder)
        return digest_of(read_config(config), weights)
    except (AdmissionError, OSError):
        return None


def load_weights(folder: Path, name: str, digest: str) -> AdapterWeights:
    """All factors of an admitted adapter as CPU tensors, mapped from its file, in the dtype they are stored in.

    Raises:
        PoolError: the files can no longer be read.
    """
    modules = {}
    try:
        config = read_config(folder / CONFIG_FILE)
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                match = KEY.fullmatch(key)
                if match and match["factor"] == "A":
                    a, b = file.get_tensor(key), file.get_tensor(_other_factor(key))
                    modules[match["module"]] = LoraPair(a, b, config.scaling_of(match["module"]))
    except (OSError, SafetensorError, AdmissionError, RuntimeError) as error:  # the last one is torch's
        raise PoolError(
            f"cannot read adapter {name!r} in {folder}: {error}. Look for damage with: loraretriever pool verify"
        ) from error
    return AdapterWeights(name, digest, modules)


def module_shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """The (out, in) features of each module of an admitted adapter, from its header alone."""
    tensors = read_header(folder / WEIGHTS_FILE)
    matches = [match for key in tensors if (match := KEY.fullmatch(key)) and match["factor"] == "A"]
    return {
        match["module"]: (tensors[_other_factor(match[0])].shape[0], tensors[match[0]].shape[1]) for match in matches
    }


def _other_factor(key: str) -> str:
    return key.removesuffix(".lora_A.weight") + ".lora_B.weight"


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name.

    Raises:
        AdmissionError: the file is damaged.
    """
    try:
        with safe_open(file, framework="numpy") as checked:  # refuses overlaps, gaps and offsets beyond the end
            names = set(checked.keys())
        with file.open("rb") as handle:
            header, start = _read_json_header(handle)
    except (OSError, SafetensorError, ValueError) as error:
        raise AdmissionError(f"{file} is not a whole safetensors file: {error}. Copy or download it again.") from error
    return {
        name: Tensor(header[name]["dtype"], tuple(header[name]["shape"]), start + header[name]["data_offsets"][0])
        for name in sorted(names)
    }


def _read_json_header(handle: BinaryIO) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(handle.read(8), "little")
    return json.loads(handle.read(length)), 8 + length


def check_finite(tensor: Tensor, name: str, file: Path) -> None:
    """Look at all numbers of a tensor.

    Raises:
        AdmissionError: one is NaN or infinite.
    """
    integer, exponent = DTYPES[tensor.dtype]
    numbers = np.memmap(file, dtype=integer, mode="r", offset=tensor.start, shape=(tensor.shape[0] * tensor.shape[1],))
    for chunk in _chunks(numbers):
        if ((chunk & exponent) == exponent).any():
            raise AdmissionError(f"{file}: {name} holds NaN or infinite numbers; expected finite ones. Train it again.")


def _chunks(numbers: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    for start in range(0, len(numbers), _CHUNK):
        yield numbers[start : start + _CHUNK]
