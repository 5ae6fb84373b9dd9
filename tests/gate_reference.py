"""Gates as plainly as they can be written: one token, one module, weight space, float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from batch_helpers import targets_of
from loraretriever.types import AdapterWeights, Gate, LoraPair


@dataclass(frozen=True)
class Row:
    """The adapters of a row, their weights, its gate (None: the weights as they are) and the router of that kind."""

    adapters: tuple[AdapterWeights, ...] = ()
    weights: tuple[float, ...] = ()
    gate: Gate | None = None
    router: AdapterWeights | None = None
    experts: tuple[str, ...] = ()


def gate_logit(x: torch.Tensor, update: torch.Tensor, expert: int, gate: Gate, router: LoraPair | None) -> float:
    """Of one adapter, whose update of the module's weight is (out, in), for one token x (in,), in float64."""
    if gate.kind == "arrow":
        return float(abs(torch.linalg.svd(update).Vh[0] @ x))
    if gate.kind == "spectral":
        return float((update @ x).norm())
    assert router is not None
    a, b = router.a.double(), router.b.double()
    if gate.kind == "ramole":
        return float((a @ x) @ (b.T @ (update @ x))) / math.sqrt(a.shape[0])
    assert gate.kind == "moe"
    return float((a @ x)[expert])


def gated_weights(logits: Sequence[float], priors: Sequence[float], gate: Gate) -> list[float]:
    """α ∝ w exp(z / τ) for the top k of them, 0 for the others."""
    largest = max(logits)  # taken away from all, which changes nothing
    powers = [w * math.exp((z - largest) / gate.temperature) for z, w in zip(logits, priors, strict=True)]
    best = sorted(range(len(powers)), key=lambda i: -powers[i])[: gate.top_k]
    total = sum(powers[i] for i in best)
    return [powers[i] / total if i in best else 0.0 for i in range(len(powers))]


def row_update(x: torch.Tensor, module: str, row: Row) -> torch.Tensor | float:
    """What the row's adapters add to the module's output for one token x (in,)."""
    x = x.double()
    present = [(a, w) for a, w in zip(row.adapters, row.weights, strict=True) if module in a.modules and w]
    if not present:
        return 0.0
    pairs = [adapter.modules[module] for adapter, _ in present]
    updates = [pair.scaling * pair.b.double() @ pair.a.double() for pair in pairs]
    weights = [weight for _, weight in present]
    if row.gate is not None:
        experts = [row.experts.index(a.name) if row.experts else 0 for a, _ in present]
        router = row.router.modules[module] if row.router is not None else None
        logits = [gate_logit(x, update, e, row.gate, router) for update, e in zip(updates, experts, strict=True)]
        weights = gated_weights(logits, weights, row.gate)
    total: torch.Tensor = sum((w * (update @ x) for w, update in zip(weights, updates, strict=True)), torch.zeros(1))
    return total


def gated_model(model: Any, row: Row) -> Any:
    """A copy of the model whose linear modules add the row's update to each token's output."""
    copied = copy.deepcopy(model)
    for path in {path for adapter in row.adapters for path in adapter.modules}:
        module = copied.get_submodule(path)
        module.register_forward_hook(_adder(path, row))
    return copied


def _adder(path: str, row: Row) -> Any:
    def add(module: nn.Module, inputs: tuple[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
        flat = inputs[0].reshape(-1, inputs[0].shape[-1])
        added = [torch.as_tensor(row_update(x, path, row)).expand(y.shape[-1]) for x in flat]
        return y + torch.stack(added).view(y.shape).to(y.dtype)

    return add


def make_router(model: Any, kind: str, targets: Sequence[str], rank: int, seed: int = 7) -> dict[str, LoraPair]:
    """Random factors of a router for the modules with these last names; strong enough to tell tokens apart."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for path, (out, features) in targets_of(model, targets).items():
        a = 0.5 * torch.randn(rank, features, generator=generator)
        b = torch.randn(out, rank, generator=generator) if kind == "ramole" else torch.zeros(out, rank)
        modules[path] = LoraPair(a, b, 1.0)
    return modules
