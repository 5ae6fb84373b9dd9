"""Each row through its own slots, without copies of their factors: two Triton kernels for decoding.

The kernels are held to the functions of `lora.py` in Triton's interpreter and compiled for GPUs in the tests. They
have NOT been timed on a GPU; what follows is reasoning.

A decoding step has one token per row, so each factor that a row uses is read for one product only: memory bounds the
work, not arithmetic. Hence sums of products on the ordinary cores, as tiles of tensor cores would be mostly empty.
`lora.shrink_gathered` reads and writes each factor once to copy it, and reads it again; here it is read once.
Pairs of a token and a slot are independent programs. Where tokens share slots, programs side by side read the same
part of a factor, and all but the first find it in the L2 cache, which is not much faster than memory. So the kernels
suit rows whose slots differ. Where many rows share few slots, the products that read each slot once for all of its rows
(dense, grouped) should gain, as they do for prompts.

The number of rows does not decide how sums are cut up: a row's result does not depend on the batch it is in.
Nothing waits for the GPU, so a CUDA graph can hold the calls; what `slots`, `weights` and `parameters` hold may change
between its replays.

Letters in shapes as in `lora.py`; P = N T K pairs; C parts into which the input features are cut.
"""

# Triton has no types. What a kernel is given as a tensor is an address within it.
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from loraretriever.batch.paths import GatheredPath, RowPairs

# Numbers of one tile: 16 rows of A by 256 inputs, 16 rows of B by 128 outputs. Sums of 4096 (2048) float32 take 32 (16)
# registers of each of 128 threads, and some tiles in flight on each multiprocessor keep its memory busy.
RANKS, INPUTS, OUTPUTS = 16, 256, 128
# A part has at least 512 input features. More parts keep more of the GPU busy when rows are few, but the second kernel
# reads the sums of all parts anew for each tile of outputs; at 8 parts that is an eighth of what it reads of B.
PART, MOST_PARTS = 512, 8


@triton.jit
def shrink_kernel(
    h: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    slots: torch.Tensor,
    weights: torch.Tensor,
    tokens: int,
    width: int,
    rows: int,
    features: int,
    part: int,
    a_slot: int,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
) -> None:
    """One pair, some of the G * R rows of its slot's A, one part of the input: h[part, pair, row] = A x."""
    pair = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(2) * part
    token = pair // width
    entry = token // tokens * width + pair % width
    if tl.load(weights + entry) == 0:
        return  # the second kernel does not read it either
    x += token.to(tl.int64) * features
    a += tl.load(slots + entry).to(tl.int64) * a_slot
    h += (tl.program_id(2) * tl.num_programs(0) + pair).to(tl.int64) * rows
    column = tl.arange(0, INPUTS)
    total = tl.zeros((ROWS, INPUTS), tl.float32)
    for first in range(start, tl.minimum(start + part, features), INPUTS):
        inside = first + column < features
        values = tl.load(x + first + column, mask=inside, other=0.0).to(tl.float32)
        tile = row[:, None] * features + (first + column)[None, :]
        factors = tl.load(a + tile, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        total += factors.to(tl.float32) * values[None, :]
    tl.store(h + row, tl.sum(total, axis=1), mask=row < rows)


@triton.jit
def activations(
    h: torch.Tensor,
    pair: int,
    rank: torch.Tensor,
    inside: torch.Tensor,
    pairs: int,
    rows: int,
    PARTS: tl.constexpr,
) -> torch.Tensor:
    """The parts' activations of one pair, summed: (RANKS,)."""
    part = tl.arange(0, PARTS).to(tl.int64)
    values = tl.load(h + (part[:, None] * pairs + pair) * rows + rank[None, :], mask=inside[None, :], other=0.0)
    return tl.sum(values, axis=0)  # type: ignore[no-any-return]


@triton.jit
def expand_kernel(
    y: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    slots: torch.Tensor,
    weights: torch.Tensor,
    parameters: torch.Tensor | None,
    tokens: int,
    width: int,
    ranks: int,
    out: int,
    rows: int,
    b_slot: int,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    RANKS: tl.constexpr,
    OUTPUTS: tl.constexpr,
) -> None:
    """One token, some of its outputs: y += the sum over its slots of B times the mixed activations."""
    token = tl.program_id(0)
    entry = token // tokens * width
    place = tl.arange(0, WIDTH)
    used = tl.load(weights + entry + place, mask=place < width, other=0.0) != 0
    if tl.sum(used.to(tl.int32), axis=0) == 0:
        return
    column = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    pairs = tl.num_programs(0) * width
    total = tl.zeros((RANKS, OUTPUTS), tl.float32)
    for first in range(0, ranks, RANKS):
        rank = first + tl.arange(0, RANKS)
        inside = rank < ranks
        mean = tl.zeros((RANKS,), tl.float32)
        is_mean = False
        if parameters is not None:
            is_mean = tl.load(parameters + token // tokens) != 0
            if is_mean:
                for j in range(width):
                    weight = tl.load(weights + entry + j)
                    if weight != 0:
                        mean += weight * activations(h, token * width + j, rank, inside, pairs, rows, PARTS)
        for j in range(width):
            weight = tl.load(weights + entry + j)
            if weight != 0:
                mixed = mean
                if not is_mean:
                    mixed = activations(h, token * width + j, rank, inside, pairs, rows, PARTS)
                slot = tl.load(slots + entry + j).to(tl.int64)
                tile = slot * b_slot + rank[:, None] * out + column[None, :]
                factors = tl.load(b + tile, mask=inside[:, None] & (column < out)[None, :], other=0.0)
                total += factors.to(tl.float32) * (weight * mixed)[:, None]
    y += token.to(tl.int64) * out + column
    before = tl.load(y, mask=column < out).to(tl.float32)
    tl.store(y, before + tl.sum(total, axis=0), mask=column < out)


def shrink(x: torch.Tensor, a: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Each row through the A of its own slots, read in place; all members of the group in one launch.

    Shapes: x (N, T, in); a (S, G, R, in), contiguous; slots (N, K) integers; weights (N, K). Returns (C, P, G * R),
    float32: the C parts sum to the activations. Undefined where the weight is zero.

    Semantics: Σ_c h[c, (n, t, j), (g, r)] = A[slots[n, j], g, r] x[n, t], where weights[n, j] is not zero
    """
    assert all(each.is_contiguous() for each in (a, slots, weights))
    rows, tokens, features = x.shape
    width = slots.shape[1]
    members = a.shape[1] * a.shape[2]
    parts = min(MOST_PARTS, triton.next_power_of_2(features // PART + 1) // 2 or 1)
    part = triton.cdiv(triton.cdiv(features, parts), INPUTS) * INPUTS
    h = x.new_empty(parts, rows * tokens * width, members, dtype=torch.float32)
    height = min(RANKS, triton.next_power_of_2(members))
    grid = (rows * tokens * width, triton.cdiv(members, height), parts)
    sizes = (tokens, width, members, features, part, a.stride(0), height, INPUTS)
    _launch(shrink_kernel, grid, h, x.contiguous(), a, slots, weights, *sizes)
    return h


def expand(
    y: torch.Tensor,
    h: torch.Tensor,
    member: int,
    b: torch.Tensor,
    slots: torch.Tensor,
    weights: torch.Tensor,
    parameters: torch.Tensor | None,
) -> None:
    """Mix each row's activations and send them through the B of its own slots, read in place; added in place.

    The mixer is here and not in `shrink`, as each sum over a row's slots needs the sums of all parts.
    Members of a group are launched one by one: a model computes their y one by one.

    Shapes: y (N, T, out), contiguous; h as `shrink` returns it; b (S, R, out), contiguous; slots (N, K) integers;
    weights (N, K); parameters (N,) bool, or None if no row has it set.

    Semantics: y[n, t] += Σ_j w[n, j] B[slots[n, j]] h'[j], with h'[j] = h[member, n, t, j];
    where `parameters`: h'[j] = Σ_q w[n, q] h[member, n, t, q]
    """
    assert all(each.is_contiguous() for each in (y, b, slots, weights))
    rows, tokens, out = y.shape
    width, rank, parts = slots.shape[1], b.shape[1], h.shape[0]
    height = min(RANKS, triton.next_power_of_2(rank))
    sizes = (tokens, width, rank, out, h.shape[2], b.stride(0), triton.next_power_of_2(width), parts, height, OUTPUTS)
    grid = (rows * tokens, triton.cdiv(out, OUTPUTS))
    _launch(expand_kernel, grid, y, h[0, 0, member * rank :], b, slots, weights, parameters, *sizes)


def _launch(kernel: Any, grid: tuple[int, ...], result: torch.Tensor, *arguments: Any) -> None:
    """Launch on the result's device, which need not be the current one."""
    with torch.cuda.device_of(result):  # type: ignore[no-untyped-call]
        kernel[grid](result, *arguments)


class KernelPath(GatheredPath):
    """As `GatheredPath`, by kernels. They know no gradients."""

    def __init__(
        self, pairs: RowPairs, parameters: torch.Tensor | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(pairs, parameters, torch.float32, device)  # the sums are float32, whatever x is
        self._entries = (self.slots.view(len(pairs), -1), self.weights.view(len(pairs), -1))
        self._flags = parameters

    def hidden(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """(C, P, G * R), not mixed yet."""
        if torch.is_grad_enabled() and (x.requires_grad or a.requires_grad):
            raise RuntimeError("the kernels have no gradients; call the model under torch.inference_mode().")
        return shrink(x, a, *self._entries)

    def add(self, y: torch.Tensor, h: torch.Tensor, member: int, b: torch.Tensor) -> None:
        """See `Path`."""
        expand(y, h, member, b, *self._entries, self._flags)
