"""From text to unit vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from loraretriever.config import DEFAULT_ENCODER, PAPER_INSTRUCTION
from loraretriever.errors import InvalidInputError
from loraretriever.models import encodable, load_errors, resolve_encoder
from loraretriever.retrieve.window import Window, cut_characters

if TYPE_CHECKING:
    import torch

    from loraretriever.retrieve.bert import OnnxBert

_EXPECTED = "Expected a local folder in sentence-transformers format or the id of such a model on the hub."

DEFAULT_MAX_TOKENS = 128

Vectors = NDArray[np.float32]
Precision = Literal["float32", "int8"]
Layers = Literal["last", "thirds"]

# One text's vector from its hidden states, shape (tokens, hidden) -> (hidden,).
_POOLS: dict[object, Callable[[Vectors], Vectors]] = {
    "mean": lambda states: states.mean(0),
    "cls": lambda states: states[0],
    "lasttoken": lambda states: states[-1],
}


class Encoder(Protocol):
    """Anything that turns texts into unit vectors."""

    @property
    def tag(self) -> str:
        """Names the encoder, its weights and how it reads: vectors of different tags cannot be compared."""
        ...

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Shape: (len(texts), dimension), rows of length 1."""
        ...


def count_tokens(encoder: Encoder, texts: Sequence[str]) -> int:
    """How many tokens an encoder reads of texts; where it cannot tell, how many words there are."""
    count = getattr(encoder, "count_tokens", None)
    return int(count(texts)) if count is not None else sum(len(text.split()) for text in texts)


class SentenceEncoder:
    """A sentence-transformers model that reads `instruction + text`, of long texts the first and the last tokens.

    Transformers with a fast tokenizer are given the tokens directly, BERTs on the processor without padding.
    Everything else (static embeddings, models that read chat messages) goes through `SentenceTransformer.encode`,
    which cuts off the end of what the model does not take; `max_tokens` then only bounds the characters.
    """

    def __init__(
        self,
        name: str = DEFAULT_ENCODER,
        instruction: str = PAPER_INSTRUCTION,
        device: str = "cpu",
        batch_size: int = 32,
        max_tokens: int | None = DEFAULT_MAX_TOKENS,
        precision: Precision = "float32",
        layers: Layers = "last",
    ) -> None:
        """Load the model from a folder, the hub, or an installed package.

        Args:
            name: a folder in sentence-transformers format, or a hub id.
            instruction: put before each text.
            device: a torch device.
            batch_size: texts per forward pass.
            max_tokens: the most tokens of a text, special tokens and instruction included; None for as many as the
                model takes.
            precision: `int8`, on the processor only, computes the linear modules with 8-bit integers: several times as
                fast where the processor has instructions for them (VNNI), at a cosine of 0.99 with float32.
            layers: `last` for the model's own vector. `thirds`, where the model is a transformer over text: the mean
                hidden states after one and two thirds of its layers and after the last, of equal length, one after
                the other. The lower ones tell more of a prompt's form, the last more of what it is about.

        Raises:
            ModelLoadError: the model cannot be found or loaded.
            InvalidInputError: a value is out of range.
        """
        from sentence_transformers import SentenceTransformer

        _check(device, batch_size, max_tokens, precision)
        with load_errors("encoder", name, _EXPECTED):
            self._model: Any = SentenceTransformer(resolve_encoder(name), device=device).eval()
        self._instruction = instruction
        self._batch_size = batch_size
        self._size = _least(max_tokens, _limit(self._model)) if _takes_tokens(self._model) else max_tokens
        self._layers = layers if _takes_tokens(self._model) else "last"
        self._window = Window(self._model.tokenizer, self._size) if _takes_tokens(self._model) else None
        fingerprint = self._fingerprint()
        self._bert = self._prepare(precision)
        kind = f"{precision}/onnx" if self._bert and precision == "int8" else precision
        self.tag = f"{name}#{fingerprint}:{self._size}:{kind}:{self._layers}#{instruction}"

    def _prepare(self, precision: Precision) -> OnnxBert | None:
        """The model in the wanted precision: by another runtime, or the model itself changed."""
        from loraretriever.retrieve.bert import OnnxBert
        from loraretriever.retrieve.int8 import to_int8

        modules = list(self._model)
        if self._window and getattr(modules[1], "pooling_mode", None) in _POOLS and OnnxBert.fits(_inner(modules[0])):
            bert = OnnxBert(_inner(modules[0]), int8=precision == "int8")
            _inner(modules[0]).to("meta")  # its weights are not needed twice
            return bert
        if precision == "int8":
            to_int8(self._model)
        return None

    def _fingerprint(self) -> str:
        """Tells weights apart, whatever the folder is called, without reading all of them."""
        digest = hashlib.sha256()
        for key, value in sorted(self._model.state_dict().items()):
            head = value.detach().flatten()[:64].cpu().float().numpy().tobytes()
            digest.update(f"{key}{tuple(value.shape)}".encode() + head)
        return digest.hexdigest()[:16]

    def _dimension(self) -> int:
        if self._layers == "thirds":
            config = _inner(self._model[0]).config
            return int(config.hidden_size) * len(_thirds(config.num_hidden_layers))
        return _dimension(self._model)

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Shape: (len(texts), dimension), rows of length 1 (of length 0 where a static model knows no token)."""
        if not texts:
            return np.empty((0, self._dimension()), dtype=np.float32)
        cut = self._cut(texts)
        vectors = self._encode_tokens(self._window.read(cut)) if self._window else self._encode_texts(cut)
        if self._layers == "last":
            vectors = vectors[:, : self._model.truncate_dim]
        return _unit(vectors)

    def count_tokens(self, texts: Sequence[str]) -> int:
        """How many tokens `encode` reads of the texts; words, where the model has no tokenizer that we know."""
        cut = self._cut(texts)
        return sum(map(len, self._window.read(cut) if self._window else map(str.split, cut)))

    def _cut(self, texts: Sequence[str]) -> list[str]:
        """With the instruction, and without the middle of what is far too long."""
        prefix = (_prompt(self._model) if self._window else "") + self._instruction
        return [encodable(cut_characters(prefix + text, self._size)) for text in texts]

    def _encode_texts(self, texts: list[str]) -> Vectors:
        """By the model's own way. Shape: (len(texts), dimension)."""
        vectors = self._model.encode(texts, batch_size=self._batch_size, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float32)

    def _encode_tokens(self, rows: list[list[int]]) -> Vectors:
        """Batches of similar length. Shape: rows of token ids -> (len(rows), dimension)."""
        import torch

        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        batches = [order[start : start + self._batch_size] for start in range(0, len(order), self._batch_size)]
        with torch.inference_mode():
            parts = [self._forward([rows[i] for i in batch]) for batch in batches]
        vectors: Vectors = np.empty((len(rows), parts[0].shape[1]), dtype=np.float32)
        vectors[order] = np.concatenate(parts)
        return vectors

    def _forward(self, rows: list[list[int]]) -> Vectors:
        """Shape: rows of token ids -> (len(rows), dimension)."""
        import torch

        if self._layers == "thirds":
            return self._forward_thirds(rows)
        if self._bert is None:
            features = self._model(_padded(rows, self._model.tokenizer, self._model.device))
        else:
            pool = _POOLS[self._model[1].pooling_mode]
            features = {"sentence_embedding": torch.from_numpy(np.stack([pool(text) for (text,) in self._bert(rows)]))}
            for module in list(self._model)[2:]:
                features = module(features)
        return _to_numpy(features["sentence_embedding"])

    def _forward_thirds(self, rows: list[list[int]]) -> Vectors:
        """Shape: rows of token ids -> (len(rows), 3 hidden)."""
        wanted = _thirds(_inner(self._model[0]).config.num_hidden_layers)
        if self._bert is None:
            features = _padded(rows, self._model.tokenizer, self._model.device)
            states = _inner(self._model[0])(**features, output_hidden_states=True).hidden_states[1:]
            mask = features["attention_mask"].unsqueeze(-1)
            layers = [_to_numpy((states[i] * mask).sum(1) / mask.sum(1)) for i in wanted]
        else:
            texts = [[states.mean(0) for states in text] for text in self._bert(rows, wanted)]
            layers = [np.stack(layer) for layer in zip(*texts, strict=True)]
        return np.concatenate([_unit(layer) for layer in layers], axis=1)


def _unit(vectors: Vectors) -> Vectors:
    """Rows of length 1, or of length 0 as they were."""
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12), dtype=np.float32)


def _to_numpy(vectors: torch.Tensor) -> Vectors:
    found: Vectors = vectors.float().cpu().numpy()
    return found


def _thirds(layers: int) -> list[int]:
    """Places of the layers after one third, two thirds and all, from 0; fewer where there are fewer layers."""
    return sorted({max(round(layers * part / 3), 1) - 1 for part in (1, 2, 3)})


def _check(device: str, batch_size: int, max_tokens: int | None, precision: str) -> None:
    if batch_size < 1:
        raise InvalidInputError(f"batch_size is {batch_size}; expected a whole number of at least 1.")
    if max_tokens is not None and max_tokens < 8:
        raise InvalidInputError(f"max_tokens is {max_tokens}; expected a whole number of at least 8, or None.")
    if precision not in get_args(Precision):
        raise InvalidInputError(f"precision is {precision!r}; expected one of {', '.join(get_args(Precision))}.")
    if precision == "int8" and device != "cpu":
        raise InvalidInputError(f"precision is 'int8' and device {device!r}; expected the device 'cpu', or 'float32'.")


def _takes_tokens(model: Any) -> bool:
    """Whether the model is a transformer over plain text, followed by modules that need nothing else than its states.

    Modules are told by their names: the packages that they come from have moved between versions.
    """
    from transformers import PreTrainedTokenizerFast

    names = [type(module).__name__ for module in model]
    return (
        names[:2] == ["Transformer", "Pooling"]
        and set(names[2:]) <= {"Dense", "Normalize"}
        and isinstance(model.tokenizer, PreTrainedTokenizerFast)
        and "message" not in getattr(model[0], "modality_config", ())
        and getattr(model[1], "include_prompt", True)
    )


def _inner(transformer: Any) -> Any:
    """The transformers model in a sentence-transformers module."""
    return transformer.auto_model


def _prompt(model: Any) -> str:
    """What the model's own configuration puts before every text."""
    return (model.prompts.get(model.default_prompt_name) if model.default_prompt_name else None) or ""


def _limit(model: Any) -> int | None:
    """The most tokens that the model takes."""
    positions = getattr(_inner(model[0]).config, "max_position_embeddings", None)
    return _least(model.max_seq_length, positions)


def _least(*numbers: int | None) -> int | None:
    return min((number for number in numbers if number is not None), default=None)


def _dimension(model: Any) -> int:
    # The method's name before sentence-transformers 6.
    ask = getattr(model, "get_embedding_dimension", None) or model.get_sentence_embedding_dimension
    return int(model.truncate_dim or ask())


def _padded(rows: list[list[int]], tokenizer: Any, device: Any) -> dict[str, torch.Tensor]:
    """What a transformer reads. Shape: (len(rows), length of the longest)."""
    import torch

    shape = (len(rows), max(map(len, rows)))
    ids = torch.full(shape, tokenizer.pad_token_id or 0)
    mask = torch.zeros(shape, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(-len(row), None) if tokenizer.padding_side == "left" else slice(len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
