"""8-bit products for encoders that `bert.py` does not run."""

from __future__ import annotations

import torch
from torch import nn


class Int8Linear(nn.Module):
    """A linear module with int8 weights (a scale for each output) and int8 inputs (scale and middle for each row).

    Semantics: y = s_x s_w (q_x q_wᵀ) + m_x Σ s_w q_w + b, with q_x = round((x - m_x) / s_x), q_w = round(w / s_w),
    m_x in the middle of the row's least and greatest value. The integer product is exact, so a row's result does not
    depend on the other rows. Weights take 7 of the 8 bits: processors without VNNI add two products of 8-bit numbers
    in 16 bits, which would overflow. So the results are the same on all.
    """

    _INPUTS, _WEIGHTS = 127, 63

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        self._scale = (weight.abs().amax(1) / self._WEIGHTS).clamp_(min=1e-12)
        quantised = (weight / self._scale[:, None]).round_()
        self._weight = quantised.to(torch.int8).T.contiguous()
        self._sums = quantised.sum(1) * self._scale
        self._bias = torch.zeros_like(self._scale) if linear.bias is None else linear.bias.detach().float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape: (..., in features) -> (..., out features), float32."""
        rows = x.reshape(-1, x.shape[-1])
        least, greatest = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        middle = (least + greatest) / 2
        scale = ((greatest - least) / (2 * self._INPUTS)).clamp_(min=1e-12)
        product = torch._int_mm(((rows - middle) / scale).round_().to(torch.int8), self._weight)
        y = torch.addcmul(self._bias, product * self._scale, scale).addcmul_(middle, self._sums)
        return y.view(*x.shape[:-1], -1)


def to_int8(module: nn.Module) -> None:
    """Replace all linear modules below a module by int8 ones."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear(child))
        else:
            to_int8(child)
