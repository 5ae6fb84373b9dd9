"""The rank-space product as plain functions on tensors.

Letters in shapes: N rows, T tokens of a row, S slots, K chosen slots of a row, M places of a slot (grouped path),
G modules that share one input (q/k/v, gate/up, or one alone), R the rank of a slot, in/out features.
Scalings are already folded into every B. Weights w are zero where a row does not use a slot.
The paper (LoraRetriever, section 3.3): mixture x' = (1/k) Σ_j B_j A_j x; fusion x' = ((1/k) Σ_j B_j)((1/k) Σ_j A_j) x.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

# Up to so many columns, a batched product with the long side on the left is up to twice as fast (MKL, Zen 4).
NARROW = 4


def mix(h: torch.Tensor, weights: torch.Tensor, parameters: torch.Tensor | None) -> torch.Tensor:
    """The mixer: what makes selection, mixture and fusion of the adapters' rank-space activations.

    Token routers have their place here: `weights` may have T entries per row instead of one, computed from x or h.

    Shapes: h (G, N, T, S, R); weights (N, T or 1, S, 1); parameters (N, 1, 1, 1) bool, or None if no row has it set.
    Returns (G, N, T, S, R).

    Semantics: h'[p] = w[p] h[p], where `parameters`: h'[p] = w[p] Σ_q w[q] h[q]
    """
    if parameters is None:
        return h * weights
    total = (h * weights).sum(dim=3, keepdim=True)
    return torch.where(parameters, total, h) * weights


def shrink_dense(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Every row through every slot's A, in one product.

    Shapes: x (N, T, in); a (S, G, R, in). Returns (G, N, T, S, R), contiguous.

    Semantics: h[g, n, t, p] = A[p, g] x[n, t]
    """
    slots, members, rank, features = a.shape
    h = linear(x, a.view(slots * members * rank, features)).view(*x.shape[:2], slots, members, rank)
    return h.movedim(3, 0).contiguous()


def expand_dense(y: torch.Tensor, h: torch.Tensor, b: torch.Tensor) -> None:
    """Every slot's B, in one product, added in place.

    Shapes: y (N, T, out), contiguous; h (N, T, S, R), contiguous; b (S, R, out).

    Semantics: y[n, t] += Σ_p B[p] h[n, t, p]
    """
    out = b.shape[-1]
    y.view(-1, out).addmm_(h.view(-1, b.shape[0] * b.shape[1]), b.view(-1, out))


def shrink_gathered(x: torch.Tensor, a: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Each row through the A of its own slots, which are copied side by side.

    Shapes: x (N, T, in); a (S, G, R, in); slots (N * K,). Returns (G, N, T, K, R), contiguous.

    Semantics: h[g, n, t, j] = A[slots[n, j], g] x[n, t]
    """
    rows, tokens, features = x.shape
    _, members, rank, _ = a.shape
    chosen = a.index_select(0, slots).view(rows, -1, features)
    h = torch.bmm(x, chosen.transpose(1, 2))
    return h.view(rows, tokens, -1, members, rank).movedim(3, 0).contiguous()


def expand_gathered(y: torch.Tensor, h: torch.Tensor, b: torch.Tensor, slots: torch.Tensor) -> None:
    """Each row through the B of its own slots, added in place.

    Shapes: y (N, T, out), contiguous; h (N, T, K, R), contiguous; b (S, R, out); slots (N * K,).

    Semantics: y[n, t] += Σ_j B[slots[n, j]] h[n, t, j]
    """
    rows, tokens, out = y.shape
    y.baddbmm_(h.view(rows, tokens, -1), b.index_select(0, slots).view(rows, -1, out))


def shrink_grouped(x: torch.Tensor, a: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Each slot's A over the rows that use it; the rows are collected by slot, M places for each.

    Shapes: x (N, T, in); a (S, G, R, in); places (S * M,), the row in each place (any row where a place is empty).
    Returns (S, M * T, G * R).

    Semantics: h[p, i] = A[p] x[places[p, i]]
    """
    slots, members, rank, features = a.shape
    a = a.view(slots, members * rank, features)
    collected = x.reshape(x.shape[0], -1).index_select(0, places).view(slots, -1, features).transpose(1, 2)
    if collected.shape[2] <= NARROW:
        return torch.bmm(a, collected).transpose(1, 2).contiguous()
    return torch.bmm(collected.transpose(1, 2), a.transpose(1, 2))


def mix_grouped(
    h: torch.Tensor,
    weights: torch.Tensor,
    parameters: torch.Tensor | None,
    places: torch.Tensor,
    taken: torch.Tensor,
    offsets: torch.Tensor,
) -> torch.Tensor:
    """The mixer on activations collected by slot; see `mix`.

    Shapes: h (S * M, T * G * R); weights (S * M, 1), zero where a place is empty; parameters (S * M, 1) bool or None;
    places, taken, offsets as in `shrink_grouped` and `sum_places`. Returns the shape of h.

    Semantics: as `mix`, with the sum over q taken over all places that hold the same row
    """
    if parameters is None:
        return h * weights
    total = sum_places(h * weights, taken, offsets).index_select(0, places)
    return torch.where(parameters, total, h) * weights


def sum_places(values: torch.Tensor, taken: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """What the places of each row hold, summed: the way back from slots to rows.

    Shapes: values (S * M, features); taken (pairs,), the places that hold a row, sorted by row; offsets (N,), where
    each row's places begin in `taken`. Returns (N, features); zero for a row without a place.

    Semantics: y[n] = Σ_i values[taken[i]], i from offsets[n] up to offsets[n + 1]
    """
    summed: torch.Tensor = torch.embedding_bag(values, taken, offsets)[0]
    return summed


def expand_grouped(
    y: torch.Tensor, h: torch.Tensor, b: torch.Tensor, taken: torch.Tensor, offsets: torch.Tensor
) -> None:
    """Each slot's B over the rows that use it, summed by row and added in place.

    Shapes: y (N, T, out), contiguous; h (S, M * T, R); b (S, R, out); taken, offsets as in `sum_places`.

    Semantics: y[n] += Σ over the places (p, i) of row n of B[p] h[p, i]
    """
    rows, tokens, out = y.shape
    products = torch.bmm(h, b).view(-1, tokens * out)
    y.view(rows, -1).add_(sum_places(products, taken, offsets))
