"""Admission: which adapters may enter a pool. Every refusal tells what was found, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loraretriever.errors import AdmissionError
from loraretriever.pool.peft_config import CONFIG_FILE, PeftConfig, read_config
from loraretriever.pool.weights import (
    DEFAULT_MAX_BYTES,
    DTYPES,
    KEY,
    Tensor,
    check_finite,
    check_size,
    digest_of,
    find_files,
    read_header,
)
from loraretriever.types import BaseModelSpec

MAX_RANK = 512
MAX_MATCHING_COST = 5_000_000_000  # some 20 s; real adapters stay far below


@dataclass(frozen=True, slots=True)
class Admission:
    """What admission found in a folder. `checked_shapes`: the base model's modules were known and compared."""

    config: PeftConfig
    digest: str
    ranks: tuple[int, ...]
    targets: tuple[str, ...]
    size: int
    checked_shapes: bool


def admit(
    folder: Path,
    base_model: str,
    spec: BaseModelSpec | None,
    *,
    allow_base_mismatch: bool = False,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> Admission:
    """Check that a PEFT folder is safe, whole, supported, and fits the base model.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`; nothing else in it is opened.
        base_model: the pool's base model.
        spec: the base model's linear modules; None leaves out the comparison of shapes.
        allow_base_mismatch: accept an adapter that names another base model.
        max_bytes: the largest weights file to accept.

    Raises:
        AdmissionError: the adapter is refused; the message tells why, and what to do.
    """
    config_file, weights_file = find_files(folder)
    config = read_config(config_file)
    if not allow_base_mismatch:
        _check_base(config, base_model, config_file)
    size = check_size(weights_file.stat().st_size, max_bytes, str(weights_file))
    pairs = _pairs(read_header(weights_file), weights_file)
    if config.matching_cost(pairs) > MAX_MATCHING_COST:
        raise AdmissionError(
            f"{config_file}: it would take too long to match rank_pattern and alpha_pattern with {len(pairs)} modules. "
            "Use fewer patterns, and fewer '*' and '+' in them."
        )
    for module, (a, b) in pairs.items():
        _check_pair(module, a, b, config, spec, weights_file)
    for module, tensors in pairs.items():
        for factor, tensor in zip("AB", tensors, strict=True):
            check_finite(tensor, f"{module}.lora_{factor}", weights_file)
    return Admission(
        config=config,
        digest=digest_of(config, weights_file),
        ranks=tuple(sorted({a.shape[0] for a, _ in pairs.values()})),
        targets=tuple(sorted({module.rpartition(".")[2] for module in pairs})),
        size=size,
        checked_shapes=spec is not None,
    )


def _check_base(config: PeftConfig, base_model: str, file: Path) -> None:
    if not same_base(config.base_model, base_model):
        raise AdmissionError(
            f"{file}: base_model_name_or_path is {config.base_model!r}; expected the pool's {base_model!r}. If the "
            "adapter was trained on that model or a copy of it, add it with --allow-base-mismatch."
        )


def same_base(one: str, other: str) -> bool:
    """Whether two names mean the same base model: equal but for case, or equal in the last part of the path."""
    last = [name.rstrip("/").rpartition("/")[2].casefold() for name in (one, other)]
    return last[0] == last[1] != ""


def _pairs(tensors: Mapping[str, Tensor], file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """The A and B of each module, in the order of the modules' names."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in sorted(tensors.items()):
        match = KEY.fullmatch(key)
        if match is None:
            raise AdmissionError(f"{file} holds {key!r}; {_explain_key(key)}")
        found.setdefault(match["module"], {})[match["factor"]] = tensor
    if not found:
        raise AdmissionError(f"{file} holds no tensors; expected lora_A and lora_B of at least one module.")
    for module, factors in found.items():
        if len(factors) < 2:
            there = next(iter(factors))
            raise AdmissionError(
                f"{file}: module {module!r} has lora_{there} only; expected lora_A and lora_B. Save the adapter again."
            )
    return {module: (factors["A"], factors["B"]) for module, factors in found.items()}


def _explain_key(key: str) -> str:
    if "lora_embedding_" in key:
        return "LoRA on embeddings cannot be served. Train the adapter on linear modules only."
    return (
        "expected only names like 'base_model.model.<module>.lora_A.weight', as PEFT writes for LoRA on linear "
        "modules. Train the adapter without modules_to_save, DoRA and biases, or save it again with PEFT."
    )


def _check_pair(module: str, a: Tensor, b: Tensor, config: PeftConfig, spec: BaseModelSpec | None, file: Path) -> None:
    for factor, tensor in (("A", a), ("B", b)):
        if tensor.dtype not in DTYPES:
            raise AdmissionError(
                f"{file}: lora_{factor} of {module!r} has dtype {tensor.dtype}; expected one of {', '.join(DTYPES)}. "
                "Convert the weights."
            )
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            raise AdmissionError(
                f"{file}: lora_{factor} of {module!r} has shape {list(tensor.shape)}; expected two dimensions, "
                "none of them 0. Gather sharded weights before saving."
            )
    if spec is not None:
        check_shape(module, (b.shape[0], a.shape[1]), spec, str(file))
    rank = config.rank_of(module)
    if (a.shape[0], b.shape[1]) != (rank, rank):
        raise AdmissionError(
            f"{file}: {module!r} has lora_A {list(a.shape)} and lora_B {list(b.shape)}; expected rank {rank}, as "
            f"{CONFIG_FILE} says. The two files are not of one adapter; save both again."
        )
    if rank > MAX_RANK:
        raise AdmissionError(f"{file}: {module!r} has rank {rank}; expected at most {MAX_RANK}. Train a smaller one.")


def check_shape(module: str, shape: tuple[int, int], spec: BaseModelSpec, where: str) -> None:
    """Compare a module's (out, in) features with the base model's.

    Raises:
        AdmissionError: the base model has no such linear module, or one of another shape.
    """
    expected = spec.linear.get(module)
    if expected is None:
        raise AdmissionError(
            f"{where}: the base model {spec.name!r} has no linear module {module!r}. Was the adapter trained on it?"
        )
    if expected != shape:
        raise AdmissionError(
            f"{where}: {module!r} has (out, in) features {shape}; expected {expected}, those of {spec.name!r}. "
            "Was the adapter trained on it?"
        )
