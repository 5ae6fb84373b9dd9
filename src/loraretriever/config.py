"""Settings. The environment is read here; only the command line's `--pool` names its own variable."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from loraretriever.errors import InvalidInputError

ENVIRONMENT_PREFIX = "LORARETRIEVER_"
_OTHER_VARIABLES = (ENVIRONMENT_PREFIX + "POOL", ENVIRONMENT_PREFIX + "CACHE")
DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
# LoraRetriever (arXiv 2402.09997), section 3.2: the instruction put before samples and prompts alike.
PAPER_INSTRUCTION = "Represent the sentence for similar task retrieval: "


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class Settings:
    """How a LoraRetriever works. Each field can be set by the environment: `LORARETRIEVER_` and its name in capitals.

    `base_model` None takes the pool's; `encoder` None the pool's, or else `DEFAULT_ENCODER`. `retriever` is `hybrid`,
    some of its parts (`dense`, `sparse`, `dense+sparse`), or `paper`. `instruction` None: the paper's for the paper's
    formula, else none. The base model answers where the fit is below `threshold`; None takes the retriever's, which
    for the hybrid lets through all but the share `false_fallback` of prompts like the pool's samples, if their
    cosines were lower by `drift`, as those of prompts in other words are (0: no allowance). Of the k hits those are
    used that together have the share `coverage` of the weight. `weighting_temperature` divides the logits that become
    weights. `precision` of the hybrid's encoder is `int8`, `float32`, or `auto`, which is `int8` on a CPU
    that has instructions for it (VNNI); `max_tokens` the most that it reads of a prompt. The sizes from `slots` on are
    those of `engine.local.LocalEngine`.
    """

    base_model: str | None = None
    retriever: str = "hybrid"
    encoder: str | None = None
    instruction: str | None = None
    precision: Literal["auto", "float32", "int8"] = "auto"
    max_tokens: int = Field(default=64, ge=8)
    k: int = Field(default=3, ge=1)
    threshold: float | None = Field(default=None, allow_inf_nan=False)
    false_fallback: float = Field(default=0.01, ge=0, lt=1)
    drift: float = Field(default=0.07, ge=0, lt=1)
    coverage: float = Field(default=0.95, gt=0, le=1)
    strategy: str = "mixture"
    weighting: str = "score"
    weighting_temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    device: str = "cpu"
    dtype: str = "auto"
    slots: int = Field(default=32, ge=1)
    batch_size: int = Field(default=32, ge=1)
    step_tokens: int = Field(default=256, ge=1)
    cache_mib: int = Field(default=2048, ge=1)
    prefix_mib: int = Field(default=256, ge=0)
    host_mib: int = Field(default=1024, ge=0)
    queue: int = Field(default=1024, ge=1)


def load_settings(**overrides: Any) -> Settings:
    """Settings from the environment, then from the overrides that are not None.

    Raises:
        InvalidInputError: an unknown name, or a value of the wrong type or range.
    """
    fields = Settings.__dataclass_fields__
    variables = {name: ENVIRONMENT_PREFIX + name.upper() for name in fields}
    environment = {name: os.environ[variable] for name, variable in variables.items() if variable in os.environ}
    _check_environment({*variables.values(), *_OTHER_VARIABLES})
    values = environment | {name: value for name, value in overrides.items() if value is not None}
    try:
        return TypeAdapter(Settings).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise InvalidInputError(
            f"setting {name} is {first['input']!r}: {first['msg']}. Known settings: {', '.join(fields)}."
        ) from error


def _check_environment(known: set[str]) -> None:
    for name in os.environ:
        if name.startswith(ENVIRONMENT_PREFIX) and name not in known:
            raise InvalidInputError(
                f"the environment has {name}={os.environ[name]!r}, which is no setting; expected one of "
                f"{', '.join(sorted(known))}. Unset it."
            )


def cache_folder() -> Path:
    """Folder for what can be made again: converted models, databases of read-only pools.

    `LORARETRIEVER_CACHE`, else `loraretriever` below `XDG_CACHE_HOME` or `~/.cache`.
    """
    chosen = os.environ.get(ENVIRONMENT_PREFIX + "CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "loraretriever"
