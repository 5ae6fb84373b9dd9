"""A BERT's forward pass on a processor, by ONNX Runtime: in float32, or with 8-bit products.

Most sentence encoders are BERTs, and prompts are short: with 12 tokens, PyTorch spends most of the time between the
products and on waking its workers. The graph is made here from the model's weights; no exported file is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import nn

States = NDArray[np.float32]
_OPSETS = {"": 20, "com.microsoft": 1}
_IR_VERSION = 10  # what opset 20 needs; a runtime that is older than `onnx` knows no later one
_INT8 = 63  # 7 of the 8 bits: processors without VNNI add two products in 16 bits, which would overflow
_LEAST = 1e-12  # of a scale
_FEW = 2  # texts that are not worth other threads


class OnnxBert:
    """The hidden states of a `BertModel`. Any thread may call it."""

    def __init__(self, model: Any, int8: bool = False) -> None:
        """Copy the weights of a model that `fits`.

        Args:
            model: of transformers.
            int8: linear modules have int8 weights, with a scale for each output, and uint8 inputs: each token is
                divided by its largest number first, because tokens differ much after the activation.
        """
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.inter_op_num_threads = 1
        # Products of 8 bits are too quick to be worth waking another thread: texts have a thread each.
        threads = torch.get_num_threads()
        options.intra_op_num_threads = 1 if int8 else threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        graph = _Graph(model, int8)
        self._outputs = graph.layers
        self._session = onnxruntime.InferenceSession(
            graph.model().SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="encoder") if int8 and threads > 1 else None

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

    def __call__(self, rows: Sequence[Sequence[int]], layers: Sequence[int] = (-1,)) -> list[list[States]]:
        """For each text the hidden states after each of these layers. A text's do not depend on the other texts.

        Shape: rows of token ids, at least one each; (tokens, hidden) for each text and layer.
        """
        wanted = [self._outputs[layer] for layer in layers]

        def run(row: Sequence[int]) -> list[States]:
            states: list[States] = self._session.run(wanted, {"ids": np.asarray(row, dtype=np.int64)})
            return states

        if self._threads is None or len(rows) <= _FEW:
            return [run(row) for row in rows]
        return list(self._threads.map(run, rows))


class _Graph:
    """A BERT as an ONNX graph over one text: `ids` of shape (tokens,) to the states after each layer."""

    def __init__(self, model: Any, int8: bool) -> None:
        config = model.config
        self._int8 = int8
        self._heads: int = config.num_attention_heads
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []
        self._hidden: int = config.hidden_size
        self.layers: list[str] = []
        states = self._embed(model.embeddings)
        for layer in model.encoder.layer:
            states = self._layer(layer, states)
            self.layers.append(states)

    def model(self) -> onnx.ModelProto:
        """The graph with all weights in it."""
        helper, kinds = onnx.helper, onnx.TensorProto
        ids = helper.make_tensor_value_info("ids", kinds.INT64, ["tokens"])
        outputs = [helper.make_tensor_value_info(name, kinds.FLOAT, ["tokens", self._hidden]) for name in self.layers]
        graph = helper.make_graph(self._nodes, "bert", [ids], outputs, self._weights)
        opsets = [helper.make_opsetid(domain, version) for domain, version in _OPSETS.items()]
        return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)

    def _add(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """One more node; gives the name of its output."""
        name = f"{len(self._nodes)}-{kind}"
        self._nodes.append(onnx.helper.make_node(kind, inputs, [name], name, domain=domain, **attributes))
        return name

    def _const(self, value: torch.Tensor | NDArray[Any] | np.float32 | Sequence[int]) -> str:
        """One more weight; gives its name."""
        name = f"w{len(self._weights)}"
        array = np.asarray(value.detach() if isinstance(value, torch.Tensor) else value, order="C")
        self._weights.append(onnx.numpy_helper.from_array(array, name))
        return name

    def _embed(self, embeddings: Any) -> str:
        positions = embeddings.position_embeddings.weight + embeddings.token_type_embeddings.weight[0]
        count = self._add("Shape", "ids")
        seen = self._add("Slice", self._const(positions), self._const([0]), count)
        tokens = self._add("Gather", self._const(embeddings.word_embeddings.weight), "ids")
        return self._norm(self._add("Add", tokens, seen), embeddings.LayerNorm)

    def _layer(self, layer: Any, states: str) -> str:
        attended = self._linear(self._attend(layer.attention.self, states), layer.attention.output.dense)
        states = self._norm(self._add("Add", attended, states), layer.attention.output.LayerNorm)
        inner = self._add("Gelu", self._linear(states, layer.intermediate.dense))
        return self._norm(self._add("Add", self._linear(inner, layer.output.dense), states), layer.output.LayerNorm)

    def _attend(self, attention: Any, states: str) -> str:
        size = self._hidden // self._heads
        joined = _side_by_side(attention.query, attention.key, attention.value)
        split = self._add("Reshape", self._linear(states, joined), self._const([0, 3, self._heads, size]))
        heads = self._add("Transpose", split, perm=[1, 2, 0, 3])  # query, key or value; heads; tokens; size
        query, key, value = (self._add("Gather", heads, self._const(np.array(i)), axis=0) for i in range(3))
        fits = self._add("MatMul", query, self._add("Transpose", key, perm=[0, 2, 1]))
        weights = self._add("Softmax", self._add("Mul", fits, self._const(np.float32(size**-0.5))), axis=-1)
        by_token = self._add("Transpose", self._add("MatMul", weights, value), perm=[1, 0, 2])
        return self._add("Reshape", by_token, self._const([0, self._hidden]))

    def _norm(self, states: str, norm: nn.LayerNorm) -> str:
        weights = self._const(norm.weight), self._const(norm.bias)
        return self._add("LayerNormalization", states, *weights, axis=-1, epsilon=norm.eps)

    def _linear(self, states: str, linear: nn.Linear) -> str:
        weight, bias = linear.weight.T, self._const(linear.bias)
        if not self._int8:
            return self._add("Add", self._add("MatMul", states, self._const(weight)), bias)
        largest = self._add("ReduceMax", self._add("Abs", states), self._const([-1]), keepdims=1)
        scaled = self._add("Div", states, self._add("Max", largest, self._const(np.float32(_LEAST))))
        scales = (weight.abs().amax(0) / _INT8).clamp(min=_LEAST)
        factors = self._const((weight / scales).round().to(torch.int8)), self._const(scales)
        product = self._add("DynamicQuantizeMatMul", scaled, *factors, domain="com.microsoft")
        return self._add("Add", self._add("Mul", product, largest), bias)


def _side_by_side(*linears: nn.Linear) -> nn.Linear:
    """One linear module with the outputs of all."""
    first = linears[0]
    joined = nn.Linear(first.in_features, sum(linear.out_features for linear in linears), device="meta")
    joined.weight = nn.Parameter(torch.cat([linear.weight.detach() for linear in linears]))
    joined.bias = nn.Parameter(torch.cat([linear.bias.detach() for linear in linears]))
    return joined
