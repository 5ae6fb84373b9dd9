"""What a PEFT `adapter_config.json` says: which adapters can be served, and each module's rank and scaling."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraretriever.errors import AdmissionError

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_PATTERN_CHARACTERS = 256
MAX_REPETITIONS = 2

# Options of PEFT's LoraConfig (0.21) that say what this module reads, or that leave y += s·B·A·x as it is:
# training, initialisation, choice of modules (the weights file says which were chosen), book-keeping.
# fmt: off
_UNDERSTOOD = {
    "peft_type", "base_model_name_or_path", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias",
    "init_lora_weights",
}
_HARMLESS = {
    "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "target_modules", "exclude_modules",
    "lora_dropout", "fan_in_fan_out", "layers_to_transform", "layers_pattern", "megatron_core", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "velora_config", "qalora_group_size", "runtime_config",
}
# fmt: on
# These initialisations leave the base model's weights as they are. All others (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ)
# move a part of them into the adapter, which is then wrong on the unchanged base model.
_PLAIN_INITIALISATIONS = ("gaussian", "eva", "orthogonal", "mica")
# Names, '.', \d, \w and [0-9], each with '*' or '+' or without; '|', and a group that is not repeated.
# A hostile expression could take exponential time: of such as these, two repetitions and one group are harmless.
_SAFE_PATTERN = re.compile(r"\^?(?:(?:[\w.-]|\\[.\-dw]|\[\w+(?:-\w+)*\])[*+]?|[|()])*\$?")

Patterns = tuple[tuple[re.Pattern[str], float], ...]


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """A checked LoRA configuration. `base_model` is empty where the file does not name one."""

    base_model: str
    rank: int
    alpha: float
    rank_pattern: Patterns
    alpha_pattern: Patterns
    rslora: bool
    raw: Mapping[str, Any]

    def rank_of(self, module: str) -> int:
        """The rank of a module, as PEFT finds it: the first pattern that matches, else `r`."""
        return int(_find(self.rank_pattern, module, self.rank))

    def scaling_of(self, module: str) -> float:
        """The factor before B·A: alpha / rank, or alpha / √rank for rank-stabilised LoRA."""
        alpha = _find(self.alpha_pattern, module, self.alpha)
        rank = self.rank_of(module)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def matching_cost(self, modules: Collection[str]) -> int:
        """At most so many steps, of some 5 ns, it takes to find the rank and the scaling of all modules."""
        steps = [
            sum(64 + module.count(".") * len(module) ** repetitions for module in modules)
            for repetitions in range(MAX_REPETITIONS + 1)
        ]
        keys = [*(self.raw.get("rank_pattern") or ()), *(self.raw.get("alpha_pattern") or ())]
        return sum((1 + key.count("|")) * steps[_count_repetitions(key)] for key in keys)

    @property
    def canonical(self) -> bytes:
        """The configuration as bytes that do not depend on spacing or on the order of options."""
        # Only the outer keys are sorted: in rank_pattern and alpha_pattern the order has a meaning.
        return json.dumps(dict(sorted(self.raw.items())), separators=(",", ":")).encode()


def _find(patterns: Patterns, module: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(module)), default)


def read_config(file: Path) -> PeftConfig:
    """Read and check an `adapter_config.json`.

    Raises:
        AdmissionError: the file is not a configuration of a LoRA that can be served.
    """
    raw = _read_json(file)
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise AdmissionError(f"{file}: peft_type is {kind!r}; expected 'LORA'. Other PEFT methods cannot be served.")
    _refuse_unsupported(raw, file)
    base = raw.get("base_model_name_or_path") or ""
    if not isinstance(base, str) or not base.isprintable():
        raise AdmissionError(f"{file}: base_model_name_or_path is {base!r:.200}; expected the name of a model.")
    return PeftConfig(
        base_model=base,
        rank=_rank(raw.get("r", 8), "r", file),
        alpha=_number(raw.get("lora_alpha", 8), "lora_alpha", file),
        rank_pattern=_patterns(raw, "rank_pattern", _rank, file),
        alpha_pattern=_patterns(raw, "alpha_pattern", _number, file),
        rslora=bool(raw.get("use_rslora")),
        raw=raw,
    )


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():  # a pipe would wait for ever
        raise AdmissionError(f"{file} is not a regular file.")
    with file.open("rb") as handle:
        content = handle.read(MAX_CONFIG_BYTES + 1)
    if len(content) > MAX_CONFIG_BYTES:
        raise AdmissionError(f"{file} has too many bytes; expected at most {MAX_CONFIG_BYTES}. Is it the right file?")
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise AdmissionError(f"{file} is not valid JSON: {error}. Save the adapter again with PEFT.") from error
    if not isinstance(raw, dict):
        raise AdmissionError(f"{file} holds a {type(raw).__name__}; expected a JSON object as PEFT writes it.")
    return raw


def _refuse_unsupported(raw: Mapping[str, Any], file: Path) -> None:
    bias = raw.get("bias", "none")
    if bias not in (None, "none"):
        raise AdmissionError(f"{file}: bias is {bias!r}; expected 'none'. Train the adapter again with bias='none'.")
    start = raw.get("init_lora_weights", True)
    if not (start is None or isinstance(start, bool) or start in _PLAIN_INITIALISATIONS):
        raise AdmissionError(
            f"{file}: init_lora_weights is {start!r}, which changes the base model's weights as well; expected true, "
            f"false or one of {', '.join(_PLAIN_INITIALISATIONS)}. Convert the adapter to a plain LoRA: PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...) does so."
        )
    active = sorted(key for key in raw.keys() - _UNDERSTOOD - _HARMLESS if raw[key])
    if active:
        found = ", ".join(f"{key}={raw[key]!r}"[:120] for key in active)
        raise AdmissionError(
            f"{file}: unsupported options {found}; only plain LoRA (with rank_pattern, alpha_pattern, use_rslora) "
            "can be served. Train the adapter again without them."
        )


def _patterns(raw: Mapping[str, Any], name: str, check: Callable[[Any, str, Path], float], file: Path) -> Patterns:
    patterns = raw.get(name) or {}
    if not isinstance(patterns, dict):
        raise AdmissionError(f"{file}: {name} is {patterns!r:.200}; expected an object from module names to numbers.")
    return tuple(
        (_compiled(key, name, file), check(value, f"{name}[{key!r:.200}]", file)) for key, value in patterns.items()
    )


def _compiled(key: str, name: str, file: Path) -> re.Pattern[str]:
    """PEFT's `get_pattern_key`: a pattern matches a whole path or the end of one, from a dot on."""
    if (
        len(key) > MAX_PATTERN_CHARACTERS
        or not _SAFE_PATTERN.fullmatch(key)
        or _count_repetitions(key) > MAX_REPETITIONS
        or key.count("(") > 1
    ):
        raise AdmissionError(
            f"{file}: {name} has {key!r:.200}; expected the name of a module, or an expression of at most "
            f"{MAX_PATTERN_CHARACTERS} characters: of names, '.', \\d, \\w, [0-9], at most {MAX_REPETITIONS} "
            "repetitions ('*', '+'), and at most one group of alternatives, not repeated. Name the modules."
        )
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except re.error as error:
        raise AdmissionError(f"{file}: {name} has {key!r}, which is no regular expression: {error}.") from error


def _count_repetitions(pattern: str) -> int:
    return pattern.count("*") + pattern.count("+")


def _rank(value: Any, name: str, file: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise AdmissionError(f"{file}: {name} is {value!r}; expected a whole number of at least 1.")
    return value


def _number(value: Any, name: str, file: Path) -> float:
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise AdmissionError(f"{file}: {name} is {value!r:.200}; expected a finite number.")
    return number
