"""Token routers as plain functions on rank-space activations: how much each adapter of a row acts on each token.

Letters in shapes as in `lora.py`; n rows that share a gate. Every module of a group has weights of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from loraretriever.errors import InvalidInputError
from loraretriever.types import Gate


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What a gate computes its logits from. A trained gate's router stands in the first place of each row.

    Shapes: h (G, n, T, K, R), the activations A x of all that a row holds; slots (n, K); outputs (n, K), of a linear
    router the output that belongs to each adapter; b of each member (S, R, out), scalings folded in.
    """

    h: torch.Tensor
    slots: torch.Tensor
    outputs: torch.Tensor
    b: Sequence[torch.Tensor]


Logits = Callable[[Seen], torch.Tensor]


def arrow(seen: Seen) -> torch.Tensor:
    """How far a token lies along the direction that an adapter's update amplifies most (Arrow, arXiv 2405.11157).

    Needs adapters in the spectral form whose A has orthonormal rows, so that v = A[0].

    Shapes: returns (G, n, T, K).

    Semantics: z_p = |v_p · x|, v_p the first right singular vector of B_p A_p
    """
    return _wide(seen.h[..., 0]).abs()


def spectral(seen: Seen) -> torch.Tensor:
    """How strongly an adapter's update acts on a token (SpectR, arXiv 2504.03454).

    Needs adapters in the spectral form whose A holds the singular values, so that B has orthonormal columns.

    Shapes: returns (G, n, T, K).

    Semantics: z_p = ‖S_p V_pᵀ x‖ = ‖s_p B_p A_p x‖, U S Vᵀ the decomposition of the scaled update s B A
    """
    norms: torch.Tensor = torch.linalg.vector_norm(_wide(seen.h), dim=-1)
    return norms


def ramole(seen: Seen) -> torch.Tensor:
    """Attention of a token over the adapters' outputs (RAMoLE, arXiv 2406.16989).

    The router's B has 1 / √r folded in. ⟨q, B_rᵀ v⟩ = ⟨B_pᵀ B_r q, h_p⟩ needs two products with factors that are
    there: no adapter's output is made, nor a product of factors that would have to be kept.

    Shapes: returns (G, n, T, K).

    Semantics: z_p = ⟨A_r x, B_rᵀ s_p B_p A_p x⟩ / √r
    """
    _, rows, tokens, places, rank = seen.h.shape
    routers, flat = seen.slots[:, 0], seen.slots.reshape(-1)
    logits = []
    for h, b in zip(seen.h, seen.b, strict=True):
        asked = torch.bmm(h[:, :, 0], b.index_select(0, routers))  # (n, T, out)
        chosen = b.index_select(0, flat).view(rows, places * rank, -1)
        keys = torch.bmm(asked, chosen.transpose(1, 2)).view(rows, tokens, places, rank)
        logits.append((_wide(keys) * _wide(h)).sum(dim=-1))
    return torch.stack(logits)


def moe(seen: Seen) -> torch.Tensor:
    """A linear router over the adapters that it was trained for (a baseline of LoraRetriever's).

    Shapes: returns (G, n, T, K).

    Semantics: z_p = (W x)[outputs[p]], W the router's A
    """
    logits = _wide(seen.h[..., 0, :])
    return logits.gather(-1, seen.outputs[None, :, None, :].expand(*logits.shape[:3], -1))


@dataclass(frozen=True, slots=True)
class GateKind:
    """A gate's function and what it needs: a trained router, or adapters in a spectral form.

    `form`: None for adapters as they are, or as in `compose.spectral.spectral_form`.
    """

    logits: Logits
    trained: bool = False
    form: str | None = None


GATES: Mapping[str, GateKind] = {
    "arrow": GateKind(arrow, form="unit"),
    "spectral": GateKind(spectral, form="scaled"),
    "ramole": GateKind(ramole, trained=True),
    "moe": GateKind(moe, trained=True),
}


def check_gate(gate: Gate) -> None:
    """Look at a gate's kind and options.

    Raises:
        InvalidInputError: the kind is unknown, or an option out of its range.
    """
    if gate.kind not in GATES:
        raise InvalidInputError(f"unknown gate {gate.kind!r}; expected one of {', '.join(GATES)}.")
    if gate.top_k is not None and gate.top_k < 1:
        raise InvalidInputError(f"the gate's top_k is {gate.top_k}; expected at least 1, or None for all adapters.")
    if not (gate.temperature > 0 and math.isfinite(gate.temperature)):
        raise InvalidInputError(f"the gate's temperature is {gate.temperature}; expected a positive number.")


def gate_weights(logits: torch.Tensor, priors: torch.Tensor, top_k: int | None, temperature: float) -> torch.Tensor:
    """From logits to weights, which sum to one over the adapters that act on a token.

    The top k are those of the sum of both terms; equal priors change neither them nor the weights.

    Shapes: logits (G, n, T, K); priors (1 or G, n, 1, K), logarithms, -inf where a place has no adapter or the adapter
    lacks the module, with a finite one in each row. Returns (G, n, T, K).

    Semantics: α = softmax over the top k of (z / τ + ln w)
    """
    total = (logits if temperature == 1 else logits / temperature) + priors
    if top_k is not None and top_k < total.shape[-1]:
        best = total.topk(top_k, dim=-1)
        total = torch.full_like(total, -math.inf).scatter(-1, best.indices, best.values)
    return total.softmax(dim=-1)


def _wide(values: torch.Tensor) -> torch.Tensor:
    """In float32, or in float64 if they are: sums and exponentials of half precision are too coarse."""
    return values if values.dtype == torch.float64 else values.float()
