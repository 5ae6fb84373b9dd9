"""Compositions as names that never mean other bytes: `mixture(german@b7f0c2d41a9e=0.3,sql@3f9a1c2b0d1e=0.7)`.

An engine that knows an adapter only by its name (vLLM's server) keys what it keeps by that name. So each adapter is
followed by the beginning of its digest, the weights are written exactly, and the adapters stand in the order of their
names: one name for one composition, whatever the order in which its adapters were found.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loraretriever.compose.canonical import BASE, format_composition, parse_composition
from loraretriever.compose.strategies import compose_explicit
from loraretriever.errors import InvalidInputError
from loraretriever.types import BASE_COMPOSITION, Composition, Mixer

DIGEST_CHARACTERS = 12  # 48 bits; they tell revisions of one adapter apart, whose name stands before them
_PINNED = re.compile(rf"(.+)@([0-9a-f]{{{DIGEST_CHARACTERS}}})")


@dataclass(frozen=True, slots=True)
class Pinned:
    """A composition, and of each of its adapters the beginning of the digest."""

    composition: Composition
    digests: tuple[str, ...]


def pinned_name(composition: Composition, digests: Sequence[str]) -> str:
    """The name of a composition of adapters with these digests; `base` for the base model.

    How the adapters act is written, not the strategy that chose them: `selection`, and strategies of other packages,
    are mixtures here, or fusions.
    """
    pairs = zip(composition.adapters, composition.weights, digests, strict=True)
    ordered = sorted((f"{name}@{digest[:DIGEST_CHARACTERS]}", weight) for name, weight, digest in pairs)
    pinned = replace(
        composition,
        strategy=_mechanism(composition),
        adapters=tuple(name for name, _ in ordered),
        weights=tuple(weight for _, weight in ordered),
    )
    return format_composition(pinned, digits=None)


def parse_pinned(name: str) -> Pinned:
    """The composition of a pinned name.

    Raises:
        InvalidInputError: the name is no composition, or an adapter in it has no digest.
    """
    strategy, weights = parse_composition(name)
    if not weights:
        return Pinned(BASE_COMPOSITION, ())
    parts = [_PINNED.fullmatch(adapter) for adapter in weights]
    if not all(parts):
        raise InvalidInputError(
            f"{name!r:.200} names an adapter without its digest; expected each as NAME@DIGEST, with the first "
            f"{DIGEST_CHARACTERS} characters of the digest that `loraretriever pool show NAME` prints."
        )
    composition = compose_explicit(strategy or "mixture", weights)
    found = [_PINNED.fullmatch(adapter) for adapter in composition.adapters]
    names, digests = zip(*(match.groups() for match in found if match), strict=True)
    return Pinned(replace(composition, adapters=names), digests)


def adapter_id(name: str) -> int:
    """A number for a pinned name, the same in all processes: from 1, below 2**62."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % (2**62 - 1) + 1


def _mechanism(composition: Composition) -> str:
    if not composition.adapters:
        return BASE
    if composition.merge is not None:
        return composition.merge.method
    if composition.gate is not None:
        return composition.gate.kind
    return "fusion" if composition.mixer is Mixer.PARAMETERS else "mixture"
