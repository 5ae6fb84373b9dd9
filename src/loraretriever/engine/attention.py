"""Attention over sequences of unequal length, each with its keys and values in a row of one flat memory.

A transformers model runs on one packed row of tokens, (1, T): first the sequences that add one token, then chunks of
prompts. `attend` takes the place of the model's attention function: it writes the new keys and values to their cells
and reads each sequence's own, in place. Letters in shapes: T tokens of the step, H heads, V key/value heads, D numbers
of a head, L tokens that a row of the memory holds.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention

from loraretriever.engine.pages import Move, Place
from loraretriever.engine.prefixes import BLOCK
from loraretriever.errors import ModelLoadError

NAME = "loraretriever"  # under which transformers knows `attend`


@dataclass(frozen=True, slots=True)
class How:
    """What a layer asks of its attention: products are scaled, masked by a window, and flattened by a softcap."""

    scale: float | None  # None: one over the root of a head's size
    window: int | None
    softcap: float | None


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps of a token."""

    heads: int  # of keys and values
    key: int  # numbers of a key
    value: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some consecutive tokens of one sequence that go through the model in this step."""

    place: Place
    start: int  # position of the first of them in the sequence
    count: int


class Memory:
    """Keys and values of all layers.

    Head by head within a row: the cell of a token is row start * V + head * capacity + position. Blocks of prefixes
    lie behind the rows, each laid out like a row of `BLOCK` tokens.
    """

    def __init__(
        self, shapes: Sequence[LayerShape], tokens: int, blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shapes = shapes
        cells = tokens + blocks * BLOCK
        self._first_block = tokens
        # No cell may ever hold NaN of others: a mask does not keep it out, for 0 * NaN is NaN.
        self.keys = [_zeros(cells * s.heads, s.key, dtype, device) for s in shapes]
        self.values = [_zeros(cells * s.heads, s.value, dtype, device) for s in shapes]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values. On a CPU, pages that were never written to take no memory."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def move(self, move: Move) -> None:
        """Copy the beginning of one row to another, and clear the rest of that."""
        if move.source is not None:
            for source, target in zip(self._rows(move.source), self._rows(move.target), strict=True):
                target[:, : move.tokens] = source[:, : move.tokens]
        for target in self._rows(move.target):
            target[:, move.tokens :] = 0

    def load_blocks(self, place: Place, blocks: Sequence[int]) -> None:
        """Begin a row with the tokens of these blocks."""
        for i, block in enumerate(blocks):
            for source, target in zip(self._rows(self._block(block)), self._rows(place), strict=True):
                target[:, i * BLOCK : (i + 1) * BLOCK] = source

    def save_blocks(self, place: Place, blocks: Sequence[tuple[int, int]]) -> None:
        """Keep tokens of a row: pairs of (place among the row's blocks, block)."""
        for i, block in blocks:
            for source, target in zip(self._rows(place), self._rows(self._block(block)), strict=True):
                target[:] = source[:, i * BLOCK : (i + 1) * BLOCK]

    def _block(self, block: int) -> Place:
        return Place(self._first_block + block * BLOCK, BLOCK)

    def _rows(self, place: Place) -> Iterator[torch.Tensor]:
        """Views (V, capacity, D) of one row, for each layer's keys and values."""
        for shape, keys, values in zip(self.shapes, self.keys, self.values, strict=True):
            start, end = place.start * shape.heads, (place.start + place.capacity) * shape.heads
            for stack in (keys, values):
                yield stack[start:end].view(shape.heads, place.capacity, -1)


def _zeros(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU, of memory that the system gives only where it is written to."""
    if device.type != "cpu" or rows * columns == 0:
        return torch.zeros(rows, columns, dtype=dtype, device=device)
    private = mmap.mmap(-1, rows * columns * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(private, dtype=dtype).view(rows, columns)


@dataclass(frozen=True, slots=True)
class _Side:
    """Sequences that add one token, in adjacent rows of one capacity: tokens [first, first + count) of the step."""

    first: int
    count: int
    place: Place  # the first of the rows
    longest: int
    lengths: torch.Tensor  # (count, 1, 1, 1), the new token included


@dataclass(frozen=True, slots=True)
class _Run:
    """A chunk of a prompt: tokens [first, first + chunk.count) of the step."""

    first: int
    chunk: Chunk


class StepLayout:
    """Where a step's tokens are written to and what they attend to; made once per step, shared by all layers."""

    def __init__(self, memory: Memory, singles: Sequence[Chunk], runs: Sequence[Chunk], device: torch.device) -> None:
        """The step's tokens are those of `singles`, then those of `runs`.

        Args:
            singles: the last token of each of these sequences, in the order of their places.
            runs: other chunks. They read what has been written of their row, and no further.
        """
        self.memory = memory
        self._device = device
        self._chunks = [*singles, *runs]
        self._cells: dict[int, torch.Tensor] = {}
        self._masks: dict[tuple[int, int | None], torch.Tensor] = {}
        self._sides = list(self._find_sides(singles))
        self._runs = []
        first = len(singles)
        for chunk in runs:
            self._runs.append(_Run(first, chunk))
            first += chunk.count

    def _find_sides(self, chunks: Sequence[Chunk]) -> Iterator[_Side]:
        first = 0
        for i, chunk in enumerate(chunks):
            after = chunks[i + 1] if i + 1 < len(chunks) else None
            if after is not None and after.place == _behind(chunk.place):
                continue
            rows = chunks[first : i + 1]
            lengths = torch.tensor([row.start + 1 for row in rows], device=self._device).view(-1, 1, 1, 1)
            yield _Side(first, len(rows), rows[0].place, max(row.start + 1 for row in rows), lengths)
            first = i + 1

    def cells(self, heads: int) -> torch.Tensor:
        """The cells of the step's tokens for `heads` key/value heads, (T * V,), each token's heads together."""
        cells = self._cells.get(heads)
        if cells is None:
            first = [
                chunk.place.start * heads + position
                for chunk in self._chunks
                for position in range(chunk.start, chunk.start + chunk.count)
            ]
            capacity = [chunk.place.capacity for chunk in self._chunks for _ in range(chunk.count)]
            table = torch.tensor([first, capacity], device=self._device)
            offsets = torch.arange(heads, device=self._device) * table[1][:, None]
            cells = self._cells[heads] = (table[0][:, None] + offsets).view(-1)
        return cells

    def run(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: How) -> torch.Tensor:
        """Write the step's keys and values, and attend.

        Shapes: query (1, H, T, D); key, value (1, V, T, D). Returns (1, T, H, D of the values).

        Semantics: y[t] = softmax(scale q[t] K[j]ᵀ) V[j] over the tokens j of t's sequence up to t itself; with a
        window, over the last `window` of them; with a softcap c, the products s become c tanh(s / c)
        """
        shape = self.memory.shapes[layer]
        keys, values = self.memory.keys[layer], self.memory.values[layer]
        for stack, new in ((keys, key), (values, value)):
            stack.index_copy_(
                0, self.cells(shape.heads), new[0].transpose(0, 1).reshape(-1, new.shape[3]).to(stack.dtype)
            )
        q = query[0].transpose(0, 1)
        heads = q.shape[1]
        y = q.new_empty(q.shape[0], heads, shape.value)
        for side in self._sides:
            k, v = (_rows(stack, shape.heads, side.place, side.count, side.longest) for stack in (keys, values))
            part = q[side.first : side.first + side.count].reshape(side.count, shape.heads, -1, q.shape[2])
            done = _attention(part, k, v, self._side_mask(side, how.window), how)
            y[side.first : side.first + side.count] = done.reshape(side.count, heads, -1)
        for run in self._runs:
            done = self._attend_run(run, layer, q, how)
            y[run.first : run.first + run.chunk.count] = done
        return y[None]

    def _attend_run(self, run: _Run, layer: int, q: torch.Tensor, how: How) -> torch.Tensor:
        shape = self.memory.shapes[layer]
        chunk, count, heads = run.chunk, run.chunk.count, q.shape[1]
        end = chunk.start + count
        stacks = (self.memory.keys[layer], self.memory.values[layer])
        k, v = (_rows(stack, shape.heads, chunk.place, 1, end) for stack in stacks)
        part = q[run.first : run.first + count]
        if chunk.start == 0 and how.softcap is None and (how.window is None or end <= how.window):
            whole = part.transpose(0, 1)[None]
            done = scaled_dot_product_attention(
                whole, k, v, is_causal=True, scale=how.scale, enable_gqa=heads != shape.heads
            )
            return done[0].transpose(0, 1)
        # The heads that share keys become further queries, so that a mask does not need the keys repeated.
        group = heads // shape.heads
        folded = part.view(count, shape.heads, group, -1).permute(1, 2, 0, 3).reshape(1, shape.heads, group * count, -1)
        done = _attention(folded, k, v, self._run_mask(chunk, how.window, group), how)
        return done.view(shape.heads, group, count, -1).permute(2, 0, 1, 3).reshape(count, heads, -1)

    def _side_mask(self, side: _Side, window: int | None) -> torch.Tensor:
        """(count, 1, 1, longest) bool."""
        key = (side.first, window)
        mask = self._masks.get(key)
        if mask is None:
            position = torch.arange(side.longest, device=self._device)
            mask = position < side.lengths
            if window is not None:
                mask &= position >= side.lengths - window
            self._masks[key] = mask
        return mask

    def _run_mask(self, chunk: Chunk, window: int | None, group: int) -> torch.Tensor:
        """(group * count, end) bool."""
        key = (-1 - chunk.place.start, window)
        mask = self._masks.get(key)
        if mask is None:
            position = torch.arange(chunk.start + chunk.count, device=self._device)
            query = position[chunk.start :, None]
            mask = position <= query
            if window is not None:
                mask &= position > query - window
            mask = self._masks[key] = mask.repeat(group, 1)
        return mask


def _behind(place: Place) -> Place:
    return Place(place.start + place.capacity, place.capacity)


def _rows(stack: torch.Tensor, heads: int, place: Place, count: int, tokens: int) -> torch.Tensor:
    """(count, V, tokens, D): the first tokens of adjacent rows, in place."""
    size = stack.shape[1]
    head = place.capacity * size
    strides = (heads * head, head, size, 1)
    return torch.as_strided(stack, (count, heads, tokens, size), strides, place.start * heads * size)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, how: How) -> torch.Tensor:
    if how.softcap is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=how.scale)
    scores = (q @ k.transpose(-1, -2)).float() * (q.shape[-1] ** -0.5 if how.scale is None else how.scale)
    scores = how.softcap * torch.tanh(scores / how.softcap)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return weights.to(v.dtype) @ v


class Probe:
    """In a layout's place: plain attention over the step's own tokens, which notes what each layer keeps."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}
        self.windows: dict[int, int | None] = {}

    def run(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: How) -> torch.Tensor:
        """Shapes: as `StepLayout.run`."""
        self.shapes[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        self.windows[layer] = how.window
        gqa = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=how.scale, enable_gqa=gqa
        ).transpose(1, 2)


class _Layout(Protocol):
    def run(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: How
    ) -> torch.Tensor: ...


_current = threading.local()  # .layout: that of the step which this thread runs


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function as transformers calls it.

    Shapes: query (1, H, T, D); key, value (1, V, T, D). Returns (1, T, H, D).
    """
    for name in ("s_aux", "position_bias"):
        if others.get(name) is not None:
            raise ModelLoadError(
                f"the model's attention takes {name!r}, which the local engine does not know; "
                "use a model without it, or serve this one by another engine."
            )
    layer: Any = module.layer_idx
    layout: _Layout = _current.layout
    return layout.run(layer, query, key, value, How(scaling, sliding_window, softcap)), None


@contextmanager
def attending(model: Any, layout: _Layout) -> Iterator[None]:
    """Inside the block the model's attention is `attend` with this layout; outside, its own."""
    configs = _configs(model)
    kept = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = NAME
    _current.layout = layout
    try:
        yield
    finally:
        del _current.layout
        for config, implementation in zip(configs, kept, strict=True):
            config._attn_implementation = implementation


def _configs(model: Any) -> list[Any]:
    """The model's configuration and those inside it, the outer ones first: setting one sets those inside it too."""
    found = [model.config]
    for config in found:
        inner = (getattr(config, name, None) for name in getattr(config, "sub_configs", ()))
        found += [each for each in inner if each is not None and not any(each is other for other in found)]
    return found


def register() -> None:
    """Make `attend` known to transformers. It makes no masks, which tells transformers to make none either."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
