"""Compositions as one string, for vLLM's workers, which get a name and a path of an adapter and nothing else.

A *lane* is how one composition's rows go through the adapters that lie in the slots: several rows, several lanes, and
each adapter is in its slot only once.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass

from loraretriever.types import Mixer

PREFIX = "lane:"  # of the path of a lane; others are folders


@dataclass(frozen=True, slots=True)
class Lane:
    """PEFT folders of adapters, their weights, and how they act together."""

    folders: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    mixer: Mixer = Mixer.OUTPUTS


def lane_path(lane: Lane) -> str:
    """The lane as text; `read_lane` reads it."""
    adapters = list(zip(lane.folders, lane.weights, strict=True))
    return PREFIX + json.dumps({"adapters": adapters, "mixer": lane.mixer.value})


@functools.lru_cache(maxsize=4096)
def read_lane(path: str) -> Lane:
    """The lane of a path; that of a folder has one adapter, of weight 1."""
    if not path.startswith(PREFIX):
        return Lane((path,), (1.0,))
    told = json.loads(path.removeprefix(PREFIX))
    return Lane(
        tuple(folder for folder, _ in told["adapters"]),
        tuple(weight for _, weight in told["adapters"]),
        Mixer(told["mixer"]),
    )


def folder_id(folder: str) -> int:
    """A number for an adapter's folder, the same in all processes: at least 2**62, above all of vLLM's own."""
    return 2**62 + int.from_bytes(hashlib.sha256(folder.encode()).digest()[:7], "big")
