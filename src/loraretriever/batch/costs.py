"""When each path is the cheapest: a cost model in units of one multiply-add of a large matrix product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loraretriever.batch.lora import NARROW


@dataclass(frozen=True, slots=True)
class CostModel:
    """What a path costs per parameter of one slot, relative to one multiply-add in a large matrix product.

    `read`: reading a parameter from memory once. `narrow` and `wide`: what a batched product of up to `NARROW` or
    more rows for each slot adds to that, per parameter. `fixed`: the extra operations of a path that is not dense,
    as if they were slots (a slot of rank 8 has about 20,000 parameters in a q/k/v group of a small model).
    `again`: reading a parameter once more while it is in the device's cache, as the GPU kernels do for each further
    row of a slot; None: there are no kernels, or they are not to be used.
    """

    read: float
    narrow: float
    wide: float
    fixed: float
    again: float | None = None

    def dense(self, rows: int, tokens: int, span: int) -> float:
        """Every row through slots [0, span): one product for all A, one for all B."""
        return span * (self.read + rows * tokens)

    def gathered(self, rows: int, tokens: int, width: int) -> float:
        """Each row's `width` slots copied (read, written, read again), then one batched product over the rows."""
        return rows * width * (3 * self.read + tokens) + self.fixed

    def grouped(self, tokens: int, counts: Sequence[int]) -> float:
        """Rows collected by slot, padded to the largest count, then one batched product over slots."""
        columns = max(counts) * tokens
        # Columns count twice: their inputs are collected and their outputs summed besides being multiplied.
        return len(counts) * (self.read + (self.wide if columns > NARROW else self.narrow) + 2 * columns) + self.fixed

    def split(self, tokens: int, counts: Sequence[int]) -> float:
        """Up to `NARROW` rows of each slot as in grouped; the rest likewise, from copies of those slots."""
        rest = [count - NARROW for count in counts if count > NARROW]
        first = self.grouped(tokens, [min(count, NARROW) for count in counts])
        return first + self.grouped(tokens, rest) + 2 * self.read * len(rest) if rest else first

    def cheapest(self, rows: int, tokens: int, width: int, counts: Sequence[int], additive: bool) -> str:
        """`dense`, `gathered`, `grouped`, `split` or `kernels`; the first of them if costs are equal.

        Args:
            rows: rows of the batch.
            tokens: tokens per row.
            width: the largest number of adapters that a row uses.
            counts: for slots 0 up to the highest in use, the number of rows that use it.
            additive: no row averages parameters.
        """
        costs = {
            "dense": self.dense(rows, tokens, len(counts)),
            "gathered": self.gathered(rows, tokens, width),
            "grouped": self.grouped(tokens, counts),
        }
        if additive and max(counts) > NARROW:
            costs["split"] = self.split(tokens, counts)
        if tokens == 1 and self.again is not None:
            used = sum(count > 0 for count in counts)
            costs["kernels"] = used * self.read + (sum(counts) - used) * self.again
        return min(costs, key=lambda path: costs[path])


# Measured on one core of an EPYC (Zen 4) with `benchmarks/bench_layer.py --model --paths --threads 1 --clock cpu`.
CPU_COSTS = CostModel(read=6.0, narrow=0.0, wide=6.0, fixed=200.0)
# In bfloat16 large products are twice as fast there, but batched products of small matrices are not.
CPU_HALF_COSTS = CostModel(read=4.0, narrow=22.0, wide=22.0, fixed=400.0)
# Not measured: from the ratio of arithmetic to bandwidth of data-centre GPUs. There, decoding is bound by reading
# the adapters and by launches, which dense has fewest of; prompts are bound by arithmetic, which gathered saves.
# The kernels (`batch/kernels`) have never been timed on a GPU: `again` stays None until they have.
CUDA_COSTS = CostModel(read=100.0, narrow=20.0, wide=20.0, fixed=2000.0)


def cost_model(device: torch.device, dtype: torch.dtype) -> CostModel:
    """The constants for a device type and a dtype."""
    if device.type == "cuda":
        return CUDA_COSTS
    return CPU_COSTS if dtype == torch.float32 else CPU_HALF_COSTS
