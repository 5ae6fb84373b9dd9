"""Which requests are better off at the same replica."""

from __future__ import annotations

from loraretriever.compose import format_composition
from loraretriever.types import Request

_DIGITS = 17  # of a weight: all of them
_DIGEST = 12  # characters of one


def affinity_key(request: Request) -> str:
    """What Ray Serve calls the request's model; empty where any replica is as good as another.

    It is the composition's heaviest adapter, in its revision. The others differ from prompt to prompt, so that whole
    compositions would hardly ever meet again. A merge is one adapter of its own, which only its composition can use.
    """
    composition = request.composition
    if not composition.adapters:
        return ""
    if composition.merge is not None:
        digests = "+".join(digest[:_DIGEST] for digest in request.digests)
        return f"{format_composition(composition, _DIGITS)}@{digests}"
    heaviest = max(range(len(composition.adapters)), key=composition.weights.__getitem__)
    return f"{composition.adapters[heaviest]}@{request.digests[heaviest][:_DIGEST]}"
