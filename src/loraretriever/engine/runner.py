"""One step of the model over sequences at any stage: tokens in, logits out. Knows nothing of requests.

What a step runs is packed into one row without padding. Keys and values stay where they are (`attention.py`); the
routes of the tokens go to the layers of `batch`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from loraretriever.batch import BASE_ROW, LoraLayers, RowRoute
from loraretriever.engine.attention import Chunk, LayerShape, Memory, Probe, StepLayout, attending, register
from loraretriever.engine.pages import SMALLEST_ROW, PageTable, Place
from loraretriever.engine.prefixes import BLOCK, PrefixTable
from loraretriever.errors import InvalidInputError, LoraRetrieverError, ModelLoadError

_PROBE_TOKENS = 24
# How far logits may be from those of the model's own attention, relative to the largest: rounding, and no more.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_HALF_TOLERANCE = 5e-2


@dataclass(frozen=True, slots=True)
class Work:
    """Consecutive tokens of one sequence to run: `tokens` begin at position `start`; `is_last`: logits are wanted."""

    place: Place
    start: int
    tokens: Sequence[int]
    route: RowRoute
    is_last: bool


class ModelRunner:
    """A decoder-only transformers model with a bounded memory for keys and values."""

    def __init__(self, model: Any, layers: LoraLayers, cache_bytes: int, prefix_bytes: int) -> None:
        """Look at the model, reserve the memory, and compare a few tokens with the model's own attention.

        Args:
            layers: of the same model.
            cache_bytes: for keys and values of the running sequences.
            prefix_bytes: for those of prompts' beginnings.

        Raises:
            ModelLoadError: the model does not work in this way; see `check_model`.
            InvalidInputError: the memory is too small for any sequence, or its size is negative.
        """
        if prefix_bytes < 0:
            raise InvalidInputError(f"the memory for prefixes is {prefix_bytes} bytes; expected at least 0.")
        self._model = model
        self._layers = layers
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        shapes = check_model(model)
        size = model.dtype.itemsize * sum(shape.heads * (shape.key + shape.value) for shape in shapes)
        self.token_bytes = size
        self.table = PageTable(cache_bytes // size)
        self.prefixes = PrefixTable(prefix_bytes // (size * BLOCK))
        self.max_length = _longest(model)
        self._memory = Memory(shapes, self.table.tokens, prefix_bytes // (size * BLOCK), model.dtype, model.device)
        with _refusal(model):
            _compare(self)

    @property
    def cache_bytes(self) -> int:
        """Bytes reserved for keys and values, those of prefixes included."""
        return self._memory.nbytes

    @torch.inference_mode()
    def settle(self) -> None:
        """Do the moves that the table has recorded: before a step, before rows are read or written otherwise."""
        for move in self.table.take_moves():
            self._memory.move(move)

    @torch.inference_mode()
    def load_prefix(self, place: Place, blocks: Sequence[int]) -> None:
        """Begin a row with known blocks."""
        self._memory.load_blocks(place, blocks)

    @torch.inference_mode()
    def save_prefix(self, place: Place, blocks: Sequence[tuple[int, int]]) -> None:
        """Keep blocks of a row: pairs from `PrefixTable.add`."""
        self._memory.save_blocks(place, blocks)

    @torch.inference_mode()
    def step(self, works: Sequence[Work]) -> tuple[torch.Tensor, list[int]]:
        """Run all works in one forward pass. The places are those of a settled table.

        Returns (logits (rows, vocabulary), which work each row belongs to); works whose logits are not wanted have
        no row.

        Raises:
            InvalidInputError: an adapter does not fit the model, or there are more of them than slots.
        """
        # What decodes comes first, in the order of its places; a single token in the midst of a prompt does not count.
        order = sorted(range(len(works)), key=lambda i: (not _decodes(works[i]), works[i].place.start))
        ordered = [works[i] for i in order]
        singles = sum(map(_decodes, ordered))
        device = self._model.device
        chunks = [Chunk(work.place, work.start, len(work.tokens)) for work in ordered]
        layout = StepLayout(self._memory, chunks[:singles], chunks[singles:], device)
        tokens = [token for work in ordered for token in work.tokens]
        positions = [position for work in ordered for position in range(work.start, work.start + len(work.tokens))]
        inputs = torch.tensor([tokens, positions], device=device)
        ends, end = [], 0
        for work in ordered:
            end += len(work.tokens)
            ends.append(end - 1)
        kept = [i for i, work in enumerate(ordered) if work.is_last]
        options: dict[str, Any] = {}
        if self._keeps_logits and len(kept) < len(tokens):
            # The output embeddings are by far the widest product; a step without a last token has use for none.
            options["logits_to_keep"] = torch.tensor([ends[i] for i in kept] or [0], device=device)
        routing = self._layers.pack(
            [work.route for work in ordered[:singles]],
            [(work.route, len(work.tokens)) for work in ordered[singles:]],
            [ordered[i].route for i in kept] or [ordered[0].route],
        )
        with attending(self._model, layout), self._layers.use(routing):
            output = self._model(
                input_ids=inputs[:1], position_ids=inputs[1:], use_cache=False, attention_mask=None, **options
            )
        logits = output.logits[0]
        if not kept:
            return logits[:0], []
        if logits.shape[0] != len(kept):
            logits = logits[[ends[i] for i in kept]]
        return logits, [order[i] for i in kept]


def _decodes(work: Work) -> bool:
    return work.is_last and len(work.tokens) == 1


@torch.inference_mode()
def check_model(model: Any) -> list[LayerShape]:
    """What each layer of a model keeps of a token.

    Raises:
        ModelLoadError: the model has no attention that can be replaced, takes no positions, or keeps a state other
            than keys and values.
    """
    name = type(model).__name__
    config = model.config.get_text_config()
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ModelLoadError(f"{name} takes no position_ids; {_ADVICE}")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise ModelLoadError(f"{name} has layers of the kind {', '.join(sorted(kinds))}; {_ADVICE}")
    if not model._can_set_attn_implementation():
        raise ModelLoadError(f"the attention of {name} cannot be replaced; {_ADVICE}")
    register()
    probe = Probe()
    ids = torch.zeros(1, 4, dtype=torch.long, device=model.device)
    with _refusal(model), attending(model, probe):
        model(input_ids=ids, position_ids=torch.arange(4, device=model.device)[None], use_cache=False)
    layers = config.num_hidden_layers
    if sorted(probe.shapes) != list(range(layers)):
        raise ModelLoadError(f"{name} has {layers} layers, of which {len(probe.shapes)} have attention; {_ADVICE}")
    for layer, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind == "sliding_attention" and probe.windows[layer] is None:
            raise ModelLoadError(f"{name} does not tell the window of its layer {layer}; {_ADVICE}")
    return [probe.shapes[layer] for layer in range(layers)]


_ADVICE = (
    "the local engine runs decoder-only models with full or sliding-window attention by transformers' attention "
    "interface. Use such a model, or serve this one by another engine."
)


@contextmanager
def _refusal(model: Any) -> Iterator[None]:
    """Turn whatever a model that does not fit raises into one clear error."""
    try:
        yield
    except LoraRetrieverError:
        raise
    except Exception as error:  # a model of any kind, which meets arguments and shapes that it does not know
        raise ModelLoadError(
            f"{type(model).__name__} fails with its attention replaced: {error!r}; {_ADVICE}"
        ) from error


def _longest(model: Any) -> int:
    """Tokens that the model can take. Rotary scaling that depends on the length would let rows depend on others."""
    config = model.config.get_text_config()
    longest = int(getattr(config, "max_position_embeddings", None) or sys.maxsize)
    for scaling in _rotary(config):
        kind = scaling.get("rope_type", "default")
        original = scaling.get("original_max_position_embeddings")
        if kind in ("dynamic", "longrope") and original:
            longest = min(longest, int(original))
    return longest


def _rotary(config: Any) -> list[dict[str, Any]]:
    values = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in values.values() if isinstance(value, dict)]
    return nested or [dict(values)]


@torch.inference_mode()
def _compare(runner: ModelRunner) -> None:
    """Run a few tokens in chunks and one by one, and compare with the model's own attention."""
    model = runner._model
    count = min(_PROBE_TOKENS, SMALLEST_ROW, runner.max_length, runner.table.longest)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = [(7 * i + 3) % vocabulary for i in range(count)]
    own = model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False).logits[0, -1].float()
    key = object()
    runner.table.place(key, count)
    place, at = runner.table[key], 0
    logits = own
    for size in (count // 2, count // 4, *[1] * (count - count // 2 - count // 4)):
        work = Work(place, at, tokens[at : at + size], BASE_ROW, is_last=True)
        at += size
        logits = runner.step([work])[0][0].float()
    runner.table.remove(key)
    tolerance = _TOLERANCE.get(model.dtype, _HALF_TOLERANCE) * float(own.abs().max())
    if not bool((logits - own).abs().max() <= tolerance):
        raise ModelLoadError(
            f"{type(model).__name__} gives other logits when its attention is replaced "
            f"(by up to {float((logits - own).abs().max()):.2g}); {_ADVICE}"
        )
