"""The formulas as plainly as they can be written, for tests: no batching, no stacking, weight space."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loraretriever.types import LoraPair, Mixer


def merged_update(pairs: Sequence[LoraPair], weights: Sequence[float], mixer: Mixer) -> torch.Tensor:
    """What the chosen adapters add to a weight matrix, in float64.

    Shapes: the factors a (r_p, in), b (out, r_p); ranks may differ and are padded with zeros. Returns (out, in).

    Semantics: OUTPUTS Σ_p w_p s_p B_p A_p; PARAMETERS (Σ_p w_p s_p B_p)(Σ_q w_q A_q)
    """
    out, features = pairs[0].b.shape[0], pairs[0].a.shape[1]
    if mixer is Mixer.OUTPUTS:
        update = torch.zeros(out, features, dtype=torch.float64)
        for pair, weight in zip(pairs, weights, strict=True):
            update += weight * pair.scaling * pair.b.double() @ pair.a.double()
        return update
    rank = max(pair.a.shape[0] for pair in pairs)
    a = torch.zeros(rank, features, dtype=torch.float64)
    b = torch.zeros(out, rank, dtype=torch.float64)
    for pair, weight in zip(pairs, weights, strict=True):
        a[: pair.a.shape[0]] += weight * pair.a.double()
        b[:, : pair.b.shape[1]] += weight * pair.scaling * pair.b.double()
    return b @ a


def paper_fusion(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, mapping: torch.Tensor) -> torch.Tensor:
    """The paper's batched fusion, as published.

    Shapes: x (rows, tokens, in); a (p, rank, in); b (p, out, rank), scaling folded in; mapping (rows, p), entries 1/k.
    Returns (rows, tokens, out).

    Semantics: y[n] = (Σ_p M[n, p] B_p)(Σ_q M[n, q] A_q) x[n]
    """
    a_of_row = torch.einsum("bp,prd->brd", mapping, a)
    b_of_row = torch.einsum("bp,pdr->bdr", mapping, b)
    return torch.einsum("blr,bdr->bld", torch.einsum("bld,brd->blr", x, a_of_row), b_of_row)


def paper_mixture(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, mapping: torch.Tensor) -> torch.Tensor:
    """The paper's batched mixture, as published: every row through every adapter, then masked.

    Shapes: as `paper_fusion`.

    Semantics: y[n] = Σ_p M[n, p] B_p A_p x[n]
    """
    outputs = torch.einsum("blpr,pdr->blpd", torch.einsum("bld,prd->blpr", x, a), b)
    return torch.einsum("blpd,bp->bld", outputs, mapping)
