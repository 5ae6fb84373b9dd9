"""Adapters in spectral form: the same updates, with factors from which a gate reads its logits."""

from __future__ import annotations

import hashlib

import torch

from loraretriever.errors import InvalidInputError
from loraretriever.types import AdapterWeights, LoraPair

FORMS = ("unit", "scaled")
_VERSION = 1  # of what the digest stands for


def spectral_digest(digest: str, form: str) -> str:
    """SHA-256, in hexadecimal, of an adapter's spectral form, from the adapter's digest."""
    return hashlib.sha256(f"spectral {_VERSION} {form} {digest}".encode()).hexdigest()


@torch.no_grad()
def spectral_form(weights: AdapterWeights, form: str) -> AdapterWeights:
    """The adapter with its modules' updates decomposed, in float32, in the space of their ranks.

    Shapes: as the adapter's; the rank falls to min(in, out) where it is above that.

    Semantics: s B A = U S Vᵀ; unit: A' = Vᵀ, B' = U S; scaled: A' = S Vᵀ, B' = U; singular values descend. From
    s B = Q_b R_b and Aᵀ = Q_a R_a, R_b R_aᵀ = U' S V'ᵀ, U = Q_b U', V = Q_a V'. Where S is zero, so are A' and B'.

    Raises:
        InvalidInputError: a number of the adapter is not finite.
    """
    assert form in FORMS
    modules = {name: _decomposed(weights.name, name, pair, form) for name, pair in weights.modules.items()}
    return AdapterWeights(weights.name, spectral_digest(weights.digest, form), modules)


def _decomposed(adapter: str, module: str, pair: LoraPair, form: str) -> LoraPair:
    b, a = pair.b.float() * pair.scaling, pair.a.float()
    if not (b.isfinite().all() and a.isfinite().all()):
        raise InvalidInputError(
            f"{adapter!r} has NaN or infinite numbers in {module}; a spectral gate expects finite ones. Leave it out."
        )
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    # The directions of values that are nothing but rounding are arbitrary: they must not draw tokens.
    is_real = s > s[0] * s.shape[0] * torch.finfo(s.dtype).eps
    u, s, vt = q_b @ (u * is_real), s * is_real, (vt * is_real[:, None]) @ q_a.T
    return LoraPair(vt, u * s, 1.0) if form == "unit" else LoraPair(s[:, None] * vt, u, 1.0)
