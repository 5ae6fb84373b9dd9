"""Merges of adapters in weight space into one new adapter. None of them is linear in the updates B A, but `svd`.

All but `lego` are those of PEFT's `add_weighted_adapter` under the same names, with its numbers. Those without `svd`
work on the factors A and B each, with √|w s| as the weight of both and the sign of w s on A's. Those with `svd` work
on the updates s B A with weights w, and cut the result to a rank. TIES (Yadav et al., 2023) keeps the largest entries
of each adapter and adds up those that agree in sign; DARE (Yu et al., 2024) keeps random ones, scaled up.

Beyond PEFT: factors of different ranks are padded with zeros, after entries were chosen among their own.
Letters in shapes: P adapters, R rank, in/out features of a module.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import pad

from loraretriever.errors import InvalidInputError
from loraretriever.types import AdapterWeights, LoraPair, Merge

# Part of every merged adapter's identity: count it up when a method comes to give other numbers.
VERSION = 1


@dataclass(frozen=True, slots=True)
class Part:
    """What one adapter has for one module, in float32, and its weight."""

    pair: LoraPair
    weight: float
    digest: str  # the adapter's
    module: str

    @property
    def strength(self) -> float:
        """The number before B A."""
        return self.weight * self.pair.scaling


Keep = Callable[[torch.Tensor, float, torch.Generator], torch.Tensor]
Combine = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# One module's parts, and options with the rank and the density that hold: a pair with scaling 1.
Method = Callable[[Sequence[Part], Merge], LoraPair]


def keep_all(tensor: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """All entries, as they are."""
    return tensor


def keep_largest(tensor: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """TIES' trimming. Semantics: t'[i] = t[i] for the ⌊density · size⌋ largest |t[i]|, else 0."""
    mask = torch.zeros(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    mask[tensor.abs().flatten().topk(int(density * tensor.numel())).indices] = 1
    return tensor * mask.view_as(tensor)


def keep_random(tensor: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """DARE's dropping. Semantics: t'[i] = t[i] m[i] / density, m[i] ~ Bernoulli(density); E[t'] = t."""
    # Drawn on the CPU, one number after the other: the same mask on every device and with any number of threads.
    mask = torch.rand(tensor.shape, dtype=torch.float32, generator=generator) < density
    return tensor * mask.to(tensor.device) / density


def random_source(seed: int, digest: str, module: str, factor: str) -> torch.Generator:
    """The random numbers for one tensor of one adapter, whatever else is merged, and in which order."""
    key = hashlib.sha256(f"{seed} {digest} {module} {factor}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little"))


def add(tensors: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Shapes: tensors (P, rows, columns); weights (P,). Returns (rows, columns).

    Semantics: y = Σ_p w[p] t[p]
    """
    return (tensors * weights[:, None, None]).sum(dim=0)


def add_agreeing(tensors: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """TIES' election and disjoint mean: of each entry, those with the sign of the sum of all. Shapes as in `add`.

    The weights take no part in the election; a mean over n adapters that agree divides by n, whatever they weigh.

    Semantics: y[i] = Σ_{p agrees} w[p] t[p, i] / |{p agrees}|, p agrees: sign t[p, i] = sign Σ_q t[q, i] (0 as +)
    """
    elected = torch.where(tensors.sum(dim=0) >= 0, 1, -1)
    agrees = tensors.sign() == elected
    total = (tensors * weights[:, None, None] * agrees).sum(dim=0)
    return total / agrees.sum(dim=0).clamp(min=1)


def merge_factors(keep: Keep, combine: Combine, parts: Sequence[Part], merge: Merge) -> LoraPair:
    """A and B each, padded with zeros to the largest rank of the parts.

    Semantics: A' = combine(keep(A[p]), sign(w s) √|w s|), B' = combine(keep(B[p]), √|w s|)
    """
    rank = max(part.pair.a.shape[0] for part in parts)
    factors_a, factors_b = [], []
    for part in parts:
        a, b, missing = part.pair.a, part.pair.b, rank - part.pair.a.shape[0]
        a, b = (
            keep(factor, merge.density, random_source(merge.seed, part.digest, part.module, name))
            for name, factor in (("A", a), ("B", b))
        )
        factors_a.append(pad(a, (0, 0, 0, missing)))
        factors_b.append(pad(b, (0, missing)))
    roots = [math.sqrt(abs(part.strength)) for part in parts]
    signed = [math.copysign(root, part.strength) for root, part in zip(roots, parts, strict=True)]
    a, b = torch.stack(factors_a), torch.stack(factors_b)
    return LoraPair(combine(a, a.new_tensor(signed)), combine(b, b.new_tensor(roots)), 1.0)


def merge_updates(keep: Keep, combine: Combine, parts: Sequence[Part], merge: Merge) -> LoraPair:
    """The whole (out, in) updates, then their singular value decomposition: slow for large modules.

    Semantics: B' A' = the best approximation of rank `merge.rank` of combine(keep(s B A [p]), w)
    """
    updates = [
        keep(
            part.pair.b @ part.pair.a * part.pair.scaling,
            merge.density,
            random_source(merge.seed, part.digest, part.module, "BA"),
        )
        for part in parts
    ]
    stacked = torch.stack(updates)
    merged = combine(stacked, stacked.new_tensor([part.weight for part in parts]))
    u, s, v = torch.linalg.svd(merged, full_matrices=False)
    return LoraPair(v[: merge.rank], (u * s)[:, : merge.rank], 1.0)


def merge_sum(parts: Sequence[Part], merge: Merge) -> LoraPair:
    """The weighted sum of the updates, decomposed without being built: in the space of all parts' ranks.

    Semantics: B' A' = the best approximation of rank `merge.rank` of Σ_p w[p] s[p] B[p] A[p];
    [w s B]_p = Q_b R_b and [A]_pᵀ = Q_a R_a, so the sum is Q_b (R_b R_aᵀ) Q_aᵀ
    """
    q_b, r_b = torch.linalg.qr(torch.cat([part.pair.b * part.strength for part in parts], dim=1))
    q_a, r_a = torch.linalg.qr(torch.cat([part.pair.a for part in parts]).T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return LoraPair(v[: merge.rank] @ q_a.T, q_b @ (u * s)[:, : merge.rank], 1.0)


_ROUNDS = 50  # of k-means; it ends earlier where nothing changes any more


def merge_units(parts: Sequence[Part], merge: Merge) -> LoraPair:
    """LoRA-LEGO (Zhao et al., arXiv 2409.16167): adapters taken apart into units of rank one, and joined by k-means.

    A unit is a row of A with its column of B. `merge.rank` clusters are made; the mean of each is a unit of the result.
    Two scales make up for what averaging does: a mean is shorter than its members, and a result of more units than the
    adapters have ranks would be louder. The composition's weights say how much a unit counts within its cluster, which
    the paper, whose adapters are all alike, does not say; nor does it say in which form the scalings enter: here B's.

    Semantics: u = [A[j]; s B[:, j]], c = Σ_{u in C} w u / Σ_{u in C} w, c' = c (Σ w ‖u‖ / Σ w) / ‖c‖,
    B' A' = Σ_p w[p] √(mean rank / merge.rank) Σ_c c'_b c'_aᵀ
    """
    rank, features = merge.rank or 1, parts[0].pair.a.shape[1]
    units = torch.cat([torch.cat([part.pair.a, (part.pair.b * part.pair.scaling).T], dim=1) for part in parts])
    weights = torch.cat([units.new_full((part.pair.a.shape[0],), part.weight) for part in parts])
    generator = random_source(merge.seed, "".join(part.digest for part in parts), parts[0].module, "units")
    labels = _cluster(units, rank, generator)
    members = torch.nn.functional.one_hot(labels, rank).to(units.dtype) * weights[:, None]
    total = members.sum(dim=0)
    total = torch.where(total == 0, torch.ones_like(total), total)[:, None]
    centroids = members.T @ units / total
    norms = members.T @ units.norm(dim=1, keepdim=True) / total
    centroids = centroids * norms / centroids.norm(dim=1, keepdim=True).clamp(min=1e-30)
    scale = sum(part.weight for part in parts) * math.sqrt(len(units) / len(parts) / rank)
    return LoraPair(centroids[:, :features], centroids[:, features:].T * scale, 1.0)


def _cluster(points: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """k-means, from a random point and those farthest from the ones before. Returns each point's cluster.

    There may be fewer than `count`. Shapes: points (n, features); returns (n,).
    """
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    distances = torch.cdist(points, points)
    while len(chosen) < min(count, len(points)):
        chosen.append(int(distances[chosen].min(dim=0).values.argmax()))
    centres = points[chosen].clone()
    labels = torch.full((len(points),), -1, device=points.device)
    for _ in range(_ROUNDS):
        nearest = torch.cdist(points, centres).argmin(dim=1)
        if bool((nearest == labels).all()):
            break
        labels = nearest
        for cluster in range(len(centres)):
            mine = labels == cluster
            if bool(mine.any()):
                centres[cluster] = points[mine].mean(dim=0)
    return labels


MERGES: Mapping[str, Method] = {
    "linear": partial(merge_factors, keep_all, add),
    "magnitude_prune": partial(merge_factors, keep_largest, add),
    "ties": partial(merge_factors, keep_largest, add_agreeing),
    "dare_linear": partial(merge_factors, keep_random, add),
    "dare_ties": partial(merge_factors, keep_random, add_agreeing),
    "svd": merge_sum,
    "lego": merge_units,
    "magnitude_prune_svd": partial(merge_updates, keep_largest, add),
    "ties_svd": partial(merge_updates, keep_largest, add_agreeing),
    "dare_linear_svd": partial(merge_updates, keep_random, add),
    "dare_ties_svd": partial(merge_updates, keep_random, add_agreeing),
}


@torch.no_grad()
def merge_adapters(adapters: Sequence[AdapterWeights], weights: Sequence[float], merge: Merge) -> AdapterWeights:
    """Merge adapters into a new one, which has the modules that any of them has.

    A module that an adapter lacks counts as zero there. One adapter alone is not pruned, as in PEFT, but is cut to a
    rank that is given. The order of the adapters does not matter: they are taken in that of their digests, which
    also choose DARE's masks, together with the seed.

    Returns:
        Factors in float32 on the adapters' device, with scaling 1. Its name is the method's and its digest is empty:
        `MergedStore` gives it both.

    Raises:
        InvalidInputError: an unknown method, an option out of its range, no adapters, weights of another number, a
            weight or factor that is not finite, or adapters of which the modules differ in shape.
    """
    _check(adapters, weights, merge)
    pairs = sorted(zip(adapters, weights, strict=True), key=lambda pair: (pair[0].digest, pair[1]))
    largest = max(pair.a.shape[0] for adapter in adapters for pair in adapter.modules.values())
    density = 1.0 if len(adapters) == 1 else merge.density
    options = Merge(merge.method, density, merge.rank or largest, merge.seed)
    modules = {}
    for module in dict.fromkeys(module for adapter, _ in pairs for module in adapter.modules):
        parts = [_part(adapter, module, weight, merge.method) for adapter, weight in pairs if module in adapter.modules]
        _check_shapes(parts)
        merged = MERGES[merge.method](parts, options)
        # Copied: a slice would keep the whole of what it was cut from in memory.
        a, b = (factor.clone(memory_format=torch.contiguous_format) for factor in (merged.a, merged.b))
        modules[module] = LoraPair(a, b, merged.scaling)
    return AdapterWeights(merge.method, "", modules)


def check_merge(merge: Merge) -> None:
    """Look at the method's name and its options.

    Raises:
        InvalidInputError: the method is unknown, or an option out of its range.
    """
    if merge.method not in MERGES:
        raise InvalidInputError(f"unknown merge {merge.method!r}; expected one of {', '.join(MERGES)}.")
    if not 0 < merge.density <= 1:
        raise InvalidInputError(f"the merge's density is {merge.density}; expected above 0, at most 1 (keep all).")
    if merge.rank is not None and merge.rank < 1:
        raise InvalidInputError(
            f"the merge's rank is {merge.rank}; expected at least 1, or None for the largest of the adapters'."
        )


def _check(adapters: Sequence[AdapterWeights], weights: Sequence[float], merge: Merge) -> None:
    check_merge(merge)
    if not adapters:
        raise InvalidInputError(f"{merge.method} was given no adapters; expected at least one. Name those to merge.")
    if len(adapters) != len(weights):
        raise InvalidInputError(
            f"{merge.method} was given {len(weights)} weights for {len(adapters)} adapters; expected one for each."
        )
    for adapter, weight in zip(adapters, weights, strict=True):
        if not math.isfinite(weight):
            raise InvalidInputError(f"the weight of {adapter.name!r} is {weight}; expected a finite number.")
        if not adapter.modules:
            raise InvalidInputError(f"the adapter {adapter.name!r} has no modules; expected some. Leave it out.")


def _part(adapter: AdapterWeights, module: str, weight: float, method: str) -> Part:
    pair = adapter.modules[module]
    a, b = pair.a.float(), pair.b.float()
    if not (math.isfinite(pair.scaling) and a.isfinite().all() and b.isfinite().all()):
        raise InvalidInputError(
            f"{adapter.name!r} has NaN or infinite numbers in {module}; {method} expects finite ones. Leave it out."
        )
    return Part(LoraPair(a, b, pair.scaling), weight, adapter.digest, module)


def _check_shapes(parts: Sequence[Part]) -> None:
    shapes = sorted({(part.pair.b.shape[0], part.pair.a.shape[1]) for part in parts})
    if len(shapes) > 1:
        raise InvalidInputError(
            f"the adapters' {parts[0].module} has (out, in) features {', '.join(map(str, shapes))}; expected the same "
            "in all. Merge adapters of one base model."
        )
