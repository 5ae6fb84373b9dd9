"""One adapter that acts as a whole composition does, for engines that take one adapter per prompt.

Letters in shapes: P adapters, r their ranks, in/out features of a module.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from loraretriever.compose.merge import merge_adapters
from loraretriever.errors import InvalidInputError
from loraretriever.types import AdapterWeights, Composition, LoraPair, Mixer

# Part of every such adapter's identity: count it up when one comes to have other numbers.
VERSION = 1
_Parts = Sequence[tuple[LoraPair, float]]  # of one module: each adapter's factors, and its weight


@torch.no_grad()
def single_adapter(parts: Sequence[AdapterWeights], composition: Composition) -> AdapterWeights:
    """The composition's adapters as one. A module that an adapter lacks counts as zero there.

    Args:
        parts: the weights of the composition's adapters, in its order.
        composition: without a gate.

    Returns:
        Factors with scaling 1: B in float32, A as it is stored where it is only stacked. Neither name nor digest.

    Raises:
        InvalidInputError: the composition has a gate, or no adapters; or as `merge_adapters`.
    """
    check_single(composition)
    if composition.merge is not None:
        return merge_adapters(parts, composition.weights, composition.merge)
    combine = fused if composition.mixer is Mixer.PARAMETERS else concatenated
    modules = {}
    for module in dict.fromkeys(module for part in parts for module in part.modules):
        pairs = zip(parts, composition.weights, strict=True)
        modules[module] = combine([(part.modules[module], weight) for part, weight in pairs if module in part.modules])
    return AdapterWeights("", "", modules)


def single_rank(ranks: Sequence[int], composition: Composition) -> int:
    """The largest rank that `single_adapter` can give, from the largest of each adapter.

    Raises:
        InvalidInputError: the composition has a gate, or no adapters.
    """
    check_single(composition)
    if composition.merge is not None:
        return composition.merge.rank or max(ranks)
    return max(ranks) if composition.mixer is Mixer.PARAMETERS else sum(ranks)


def check_single(composition: Composition) -> None:
    """Refuse what is no single adapter.

    Raises:
        InvalidInputError: the composition has a gate, or no adapters.
    """
    if composition.gate is not None:
        raise InvalidInputError(
            f"the strategy {composition.gate.kind!r} weighs its adapters anew for every token, which no single adapter "
            "can do; choose mixture, fusion or a merge, or the engine `local`."
        )
    if not composition.adapters:
        raise InvalidInputError("the base model has no adapters; expected a composition with at least one.")


def concatenated(parts: _Parts) -> LoraPair:
    """A mixture as one adapter, exactly: ranks side by side.

    Shapes: a (Σ r, in), b (out, Σ r).

    Semantics: A' = [A[1]; ...; A[P]], B' = [w[1] s[1] B[1], ..., w[P] s[P] B[P]]; B' A' = Σ_p w[p] s[p] B[p] A[p]
    """
    dtype = parts[0][0].a.dtype
    if any(pair.a.dtype != dtype for pair, _ in parts):
        dtype = torch.float32
    a = torch.cat([pair.a.to(dtype) for pair, _ in parts])
    return LoraPair(a, torch.cat([_weighted(pair, weight) for pair, weight in parts], dim=1), 1.0)


def fused(parts: _Parts) -> LoraPair:
    """The paper's fusion as one adapter, exactly (LoraRetriever, equation 4); smaller ranks are padded with zeros.

    Shapes: a (max r, in), b (out, max r).

    Semantics: A' = Σ_p w[p] A[p], B' = Σ_p w[p] s[p] B[p]
    """
    rank = max(pair.a.shape[0] for pair, _ in parts)
    padded = [(pair, weight, rank - pair.a.shape[0]) for pair, weight in parts]
    a = sum(pad(pair.a.float() * weight, (0, 0, 0, missing)) for pair, weight, missing in padded)
    b = sum(pad(_weighted(pair, weight), (0, missing)) for pair, weight, missing in padded)
    assert isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)  # of at least one part
    return LoraPair(a, b, 1.0)


def _weighted(pair: LoraPair, weight: float) -> torch.Tensor:
    return pair.b.float() * (weight * pair.scaling)
