"""A BERT's forward pass for short texts on a processor: several texts end to end, without padding, if wanted in int8.

Most sentence encoders are BERTs. For a prompt of 60 tokens a third of the time of transformers' own forward pass is
spent between the products; and a batch of prompts of very different lengths would be padding for the greater part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

Linear = Callable[[torch.Tensor], torch.Tensor]


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


class PackedBert:
    """The hidden states of a `BertModel`, on the processor, for texts laid end to end."""

    def __init__(self, model: Any, int8: bool = False) -> None:
        """Take over the weights of a model that `fits`."""
        embeddings = model.embeddings
        self._tokens = embeddings.word_embeddings.weight.detach()
        types = embeddings.token_type_embeddings.weight.detach()
        self._positions = embeddings.position_embeddings.weight.detach() + types[0]
        self._norm = embeddings.LayerNorm
        self._layers = [_Layer(layer, Int8Linear if int8 else _same) for layer in model.encoder.layer]

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether the model is a plain BERT encoder in float32 on the processor."""
        config = model.config
        return (
            type(model).__name__ == "BertModel"
            and config.hidden_act == "gelu"
            and not config.is_decoder
            and getattr(config, "position_embedding_type", "absolute") == "absolute"
            and all(weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in model.parameters())
        )

    def __call__(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, ...]:
        """The last layer's hidden states of each text.

        Shape: rows of token ids, at least one each; a tensor (tokens, hidden) for each.
        """
        return self.every_layer(rows)[-1]

    def every_layer(self, rows: Sequence[Sequence[int]]) -> list[tuple[torch.Tensor, ...]]:
        """The same of each layer, the first layer first."""
        lengths = [len(row) for row in rows]
        ids = torch.tensor([token for row in rows for token in row])
        positions = torch.cat([self._positions[:length] for length in lengths])
        hidden = self._norm(self._tokens[ids] + positions)
        states = []
        for layer in self._layers:
            hidden = layer(hidden, lengths)
            states.append(torch.split(hidden, lengths))
        return states


class _Layer:
    def __init__(self, layer: Any, linear: Callable[[nn.Linear], Linear]) -> None:
        attention = layer.attention.self
        self._heads: int = attention.num_attention_heads
        self._inputs = linear(_side_by_side(attention.query, attention.key, attention.value))
        self._joined, self._joined_norm = linear(layer.attention.output.dense), layer.attention.output.LayerNorm
        self._up, self._down = linear(layer.intermediate.dense), linear(layer.output.dense)
        self._norm = layer.output.LayerNorm

    def __call__(self, hidden: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """Shape: (tokens of all texts, hidden) -> the same."""
        attended = torch.cat([self._attend(part) for part in torch.split(self._inputs(hidden), lengths)])
        hidden = self._joined_norm(self._joined(attended) + hidden)
        output: torch.Tensor = self._norm(self._down(functional.gelu(self._up(hidden))) + hidden)
        return output

    def _attend(self, part: torch.Tensor) -> torch.Tensor:
        """One text's attention. Shape: (tokens, 3 hidden) -> (tokens, hidden)."""
        query, key, value = part.view(1, len(part), 3, self._heads, -1).permute(2, 0, 3, 1, 4)
        attended: torch.Tensor = functional.scaled_dot_product_attention(query, key, value)
        return attended.transpose(1, 2).reshape(len(part), -1)


def _same(linear: nn.Linear) -> Linear:
    return linear


def _side_by_side(*linears: nn.Linear) -> nn.Linear:
    """One linear module with the outputs of all."""
    first = linears[0]
    joined = nn.Linear(first.in_features, sum(linear.out_features for linear in linears), device="meta")
    joined.weight = nn.Parameter(torch.cat([linear.weight.detach() for linear in linears]))
    joined.bias = nn.Parameter(torch.cat([linear.bias.detach() for linear in linears]))
    return joined
