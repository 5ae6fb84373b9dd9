"""Routers over frozen adapters, in a form that can be trained: the baselines of the paper, and RAMoLE's gate.

What a router computes is written once more in `batch/gates.py`, for inference in mixed batches; tests compare the two.
Letters in shapes: N rows, T tokens, E adapters, R their rank (padded), Q the router's own rank, in/out features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from loraretriever.errors import InvalidInputError
from loraretriever.types import AdapterWeights, LoraPair

_INITIAL = 0.01  # standard deviation of a linear router's weights at first
KINDS = ("moe", "smear", "ramole")


@dataclass(frozen=True, slots=True, eq=False)
class Experts:
    """The adapters' factors of one module, zeros where one lacks it. The scalings are folded into b."""

    a: torch.Tensor  # (E, R, in)
    b: torch.Tensor  # (E, R, out)
    present: torch.Tensor  # (E,) bool


def stack_experts(adapters: Sequence[AdapterWeights], module: str) -> Experts:
    """The experts of one module that one of the adapters has at least, in float32."""
    pairs = [adapter.modules.get(module) for adapter in adapters]
    like = next(pair for pair in pairs if pair is not None)
    rank = max(pair.a.shape[0] for pair in pairs if pair is not None)
    a = torch.zeros(len(pairs), rank, like.a.shape[1])
    b = torch.zeros(len(pairs), rank, like.b.shape[0])
    for e, pair in enumerate(pairs):
        if pair is not None:
            a[e, : pair.a.shape[0]] = pair.a
            b[e, : pair.a.shape[0]] = pair.b.float().T * pair.scaling
    return Experts(a, b, torch.tensor([pair is not None for pair in pairs]))


def shares(logits: torch.Tensor, allowed: torch.Tensor, top_k: int | None) -> torch.Tensor:
    """The softmax over the `top_k` greatest logits of those allowed.

    The share of one alone is 1, whatever its logit. Its gradient is that of its share among all (straight through):
    otherwise nothing could be learnt.

    Shapes: logits (..., E); allowed bool, broadcast to it. Returns (..., E), zeros where nothing is allowed.
    """
    open_logits = logits.masked_fill(~allowed, -math.inf)
    kept = allowed.expand_as(logits)
    if top_k is not None and top_k < logits.shape[-1]:
        best = open_logits.topk(top_k, dim=-1).indices
        kept = kept & torch.zeros_like(kept).scatter(-1, best, True)
    weights = open_logits.masked_fill(~kept, -math.inf).softmax(dim=-1)
    if top_k == 1:
        of_all = open_logits.softmax(dim=-1) * kept
        weights = kept.to(logits.dtype) + of_all - of_all.detach()
    return torch.where(kept, weights, torch.zeros_like(weights)).nan_to_num(0.0)


def add_mixture(x: torch.Tensor, weights: torch.Tensor, experts: Experts) -> torch.Tensor:
    """Shapes: x (N, T, in); weights (N, T, E). Returns (N, T, out).

    Semantics: y[n, t] = Σ_e w[n, t, e] s_e B_e A_e x[n, t]
    """
    h = torch.einsum("nti,eri->nter", x, experts.a) * weights[..., None]
    return torch.einsum("nter,ero->nto", h, experts.b)


def add_average(x: torch.Tensor, weights: torch.Tensor, experts: Experts) -> torch.Tensor:
    """SMEAR (arXiv 2306.03745, section 3): the parameters averaged for each row. Shapes: as above, weights (N, E).

    Semantics: y[n, t] = (Σ_e w[n, e] s_e B_e)(Σ_f w[n, f] A_f) x[n, t]
    """
    a = torch.einsum("ne,eri->nri", weights, experts.a)
    b = torch.einsum("ne,ero->nro", weights, experts.b)
    return torch.bmm(torch.bmm(x, a.transpose(1, 2)), b)


def gate_logits(x: torch.Tensor, a_r: torch.Tensor, b_r: torch.Tensor, experts: Experts) -> torch.Tensor:
    """RAMoLE's gate (arXiv 2406.16989). Shapes: x (N, T, in); a_r (Q, in); b_r (out, Q). Returns (N, T, E).

    Semantics: z[n, t, e] = ⟨A_r x, B_rᵀ s_e B_e A_e x⟩ / √Q, with B_rᵀ B_e in place of the outputs B_e A_e x
    """
    keys = torch.einsum("oq,ero->eqr", b_r, experts.b)
    h = torch.einsum("nti,eri->nter", x, experts.a)
    return torch.einsum("ntq,eqr,nter->nte", x @ a_r.T, keys, h) / math.sqrt(a_r.shape[0])


class RoutedModel:
    """A transformers model of which the adapted linear modules have frozen adapters and a router each.

    `allowed` (N, E) says which adapters each row of the next forward pass may use, and for SMEAR `prompt` (N, T) which
    tokens are the prompt's; both are bool. SMEAR keeps the weights of the last prompt for the tokens after it.
    """

    def __init__(
        self, model: Any, adapters: Mapping[str, AdapterWeights], kind: str, rank: int, top_k: int | None
    ) -> None:
        """Nothing in the model changes before `installed`.

        Args:
            model: whose device and float32 are the routers' too.
            adapters: in the order of the router's outputs.
            kind: one of `KINDS`.
            rank: of RAMoLE's router.
            top_k: of a moe.

        Raises:
            InvalidInputError: an unknown kind, or no adapters.
        """
        if kind not in KINDS or not adapters:
            raise InvalidInputError(
                f"a router of the kind {kind!r} over {len(adapters)} adapters; expected one of {', '.join(KINDS)}, and "
                "one adapter at least."
            )
        self.kind, self.top_k, self.names = kind, top_k, tuple(adapters)
        self.allowed = self.prompt = torch.empty(0, dtype=torch.bool)
        self._model = model
        weights = list(adapters.values())
        modules = dict.fromkeys(module for adapter in weights for module in adapter.modules)
        self._experts = {module: stack_experts(weights, module) for module in modules}
        self.routers = {module: self._new_router(experts, rank) for module, experts in self._experts.items()}
        self._kept: dict[str, torch.Tensor] = {}

    def _new_router(self, experts: Experts, rank: int) -> tuple[nn.Parameter, ...]:
        features, out = experts.a.shape[2], experts.b.shape[2]
        if self.kind == "ramole":
            a = torch.empty(rank, features)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            return nn.Parameter(a), nn.Parameter(torch.zeros(out, rank))  # even weights at first
        # Not zero: where all logits are equal, the first experts would be the only ones to learn at the top k.
        return (nn.Parameter(torch.randn(len(self.names), features) * _INITIAL),)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [parameter for router in self.routers.values() for parameter in router]

    def state(self) -> list[torch.Tensor]:
        """The parameters' values, for a checkpoint."""
        return [parameter.detach() for parameter in self.parameters]

    @torch.no_grad()
    def load_state(self, state: Sequence[torch.Tensor]) -> None:
        """Take the values of a checkpoint."""
        for parameter, kept in zip(self.parameters, state, strict=True):
            parameter.copy_(kept)

    def pairs(self) -> dict[str, LoraPair]:
        """The routers as `compose.routers.write_router` takes them."""
        from loraretriever.compose.routers import linear_router

        found = {}
        for module, router in self.routers.items():
            tensors = [parameter.detach().clone() for parameter in router]
            found[module] = (
                LoraPair(tensors[0], tensors[1], 1.0)
                if self.kind == "ramole"
                else linear_router(tensors[0], self._experts[module].b.shape[2])
            )
        return found

    def load(self, weights: AdapterWeights) -> None:
        """Take the routers of a folder that was written.

        Raises:
            InvalidInputError: they are for other modules.
        """
        if weights.modules.keys() != self.routers.keys():
            raise InvalidInputError(
                f"the router {weights.name!r} has {len(weights.modules)} modules, but the adapters have "
                f"{len(self.routers)}, or others; train it again for these adapters."
            )
        with torch.no_grad():
            for module, router in self.routers.items():
                pair = weights.modules[module]
                for parameter, tensor in zip(router, (pair.a, pair.b), strict=False):
                    parameter.copy_(tensor)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside the block the model's adapted modules are routed."""
        modules = {module: self._model.get_submodule(module) for module in self._experts}
        replaced = {name: vars(module)["forward"] for name, module in modules.items() if "forward" in vars(module)}
        for name, module in modules.items():
            module.forward = partial(self._forward, name, module.forward)
        try:
            yield
        finally:
            for name, module in modules.items():
                del module.forward
                if name in replaced:
                    module.forward = replaced[name]
            self._kept.clear()

    def _forward(self, name: str, base: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        y, experts, router = base(x), self._experts[name], self.routers[name]
        allowed = self.allowed & experts.present
        if self.kind == "smear":
            weights = self._of_prompt(name, x, allowed, router[0])
            return y + add_average(x.to(router[0].dtype), weights, experts).to(y.dtype)
        if self.kind == "moe":
            logits = x.to(router[0].dtype) @ router[0].T
        else:
            logits = gate_logits(x.to(router[0].dtype), router[0], router[1], experts)
        weights = shares(logits.float(), allowed[:, None], self.top_k)
        return y + add_mixture(x.to(router[0].dtype), weights.to(router[0].dtype), experts).to(y.dtype)

    def _of_prompt(self, name: str, x: torch.Tensor, allowed: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
        """SMEAR's weights. Semantics: w[n] = softmax(W mean_{t in prompt} x[n, t]). Returns (N, E)."""
        if x.shape[1] == self.prompt.shape[1]:
            prompt = self.prompt.to(router.dtype)  # float32: sums of half precision lose count
            mean = (x * prompt[..., None]).sum(dim=1) / prompt.sum(dim=1, keepdim=True)
            self._kept[name] = shares(mean @ router.T, allowed, None)
        return self._kept[name]
