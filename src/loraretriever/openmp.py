"""Gives the worker threads of OpenMP back when a thread hands its work to another.

Each thread that runs products has workers of its own, which stay. GNU's OpenMP lets waiting workers sleep at once when
all threads' workers together outnumber the processors: then each product wakes them anew, and a decoding step on two
cores takes a third longer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

_SOFT = 1  # omp_pause_soft: what threads keep for themselves survives


def release_workers() -> None:
    """End the calling thread's workers, which come again when it needs them; elsewhere than on Linux nothing."""
    for pause in _libraries():
        pause(_SOFT)


@cache
def _libraries() -> list[Callable[[int], int]]:
    maps = Path("/proc/self/maps")
    lines = maps.read_text(encoding="utf-8", errors="replace").splitlines() if maps.exists() else []
    found: list[Callable[[int], int]] = []
    for path in {line.split()[-1] for line in lines if "/libgomp" in line or "/libomp" in line or "/libiomp" in line}:
        with suppress(OSError, AttributeError):  # removed meanwhile, or older than OpenMP 5
            found.append(ctypes.CDLL(path).omp_pause_resource_all)
    return found
