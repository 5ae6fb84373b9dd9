"""The BERT that ONNX Runtime computes, against transformers' own and the formula of its 8-bit products."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from loraretriever.retrieve.bert import OnnxBert

ROWS = [[5], [3, 9, 4], list(range(1, 40)), [7] * 12]


class Quantised(nn.Module):
    """A linear module by the formula: 7-bit weights by output, inputs divided by the token's largest number, 8 bits."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True) / 63
        self.weight = (linear.weight / scale).round() * scale
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        largest = x.abs().amax(-1, keepdim=True)
        scaled = x / largest
        least, greatest = min(0.0, float(scaled.min())), max(0.0, float(scaled.max()))
        step = (greatest - least) / 255
        zero = round(-least / step)
        rounded = ((scaled / step).round() + zero).clamp(0, 255) - zero
        return nn.functional.linear(rounded * step, self.weight) * largest + self.bias


def make_model(**changes: Any) -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        **{"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
           "intermediate_size": 96, "max_position_embeddings": 64} | changes
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model


def states(model: BertModel, row: list[int]) -> list[np.ndarray]:
    with torch.inference_mode():
        found = model(torch.tensor([row]), output_hidden_states=True).hidden_states[1:]
    return [each[0].numpy() for each in found]


def quantise(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Quantised(child))
        else:
            quantise(child)


@pytest.mark.parametrize("heads", [1, 4])
def test_the_states_after_each_layer_are_those_of_transformers(heads: int) -> None:
    model = make_model(num_attention_heads=heads)
    bert = OnnxBert(model)
    for row, found in zip(ROWS, bert(ROWS, [0, 1, 2]), strict=True):
        for ours, theirs in zip(found, states(model, row), strict=True):
            assert ours == pytest.approx(theirs, abs=2e-5)
    assert bert([ROWS[1]])[0][0] == pytest.approx(states(model, ROWS[1])[-1], abs=2e-5)


@pytest.mark.parametrize("weight", [None, -1.0], ids=["random", "extreme"])
def test_products_of_8_bits_are_the_formula(weight: float | None) -> None:
    """With all weights at their limit nothing overflows."""
    model = make_model(num_hidden_layers=1)
    if weight is not None:
        nn.init.constant_(model.encoder.layer[0].intermediate.dense.weight, weight)
    bert = OnnxBert(model, int8=True)
    quantise(model.encoder)
    for row, (found,) in zip(ROWS, bert(ROWS), strict=True):
        expected = states(model, row)[0]
        # A number that lies between two steps may be rounded to either.
        assert np.abs(found - expected).max() < 0.05 and np.abs(found - expected).mean() < 2e-3


@pytest.mark.parametrize("int8", [False, True])
def test_a_text_depends_on_no_other(int8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    bert = OnnxBert(make_model(), int8=int8)
    for row, found in zip(ROWS * 3, bert(ROWS * 3, [0, 2]), strict=True):
        for one, other in zip(found, bert([row], [0, 2])[0], strict=True):
            assert np.array_equal(one, other)


@pytest.mark.parametrize("changes", [{"hidden_act": "relu"}, {"is_decoder": True}])
def test_other_models_do_not_fit(changes: dict[str, Any]) -> None:
    assert OnnxBert.fits(make_model())
    assert not OnnxBert.fits(make_model(**changes))
    assert not OnnxBert.fits(make_model().to(torch.bfloat16))
