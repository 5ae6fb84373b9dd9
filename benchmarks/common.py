"""What all benchmarks share: seeded inputs, alternating timings in one process, one JSON line per measurement."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

SEED = 0


def environment() -> dict[str, Any]:
    """Versions, commit, device and threads: what a reader needs to judge a figure."""
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": _commit(),
        "cpu": _cpu(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "transformers", "peft", "loraretriever"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


@cache
def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


@cache
def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


class Output:
    """Writes one JSON line per measurement to standard output, and to a file if one is given."""

    def __init__(self, path: Path | None) -> None:
        self._file = path.open("a", encoding="utf-8") if path else None

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a measurement together with the environment."""
        line = json.dumps({**record, **environment()}, sort_keys=False)
        for stream in (sys.stdout, self._file):
            if stream is not None:
                stream.write(line + "\n")
                stream.flush()


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def alternate(
    contenders: Mapping[str, Callable[[], object]], rounds: int, clock: str = "wall", warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each call, the contenders taking turns (A B A B), so that they share the machine's ups and downs.

    The clock `cpu` counts the process's own processor time, all threads together: use it with one thread while other
    work uses the machine (with more, threads that wait for each other count too).
    """
    now = CLOCKS[clock]
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(warmup + rounds):
        for name, call in contenders.items():
            start = now()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= warmup:
                seconds[name].append(now() - start)
    return seconds


def summarize(seconds: Mapping[str, list[float]], baseline: str) -> dict[str, dict[str, float]]:
    """Per contender: median and best milliseconds, and throughput relative to the baseline by either.

    The best of many rounds is the figure to trust while other work uses the machine.
    """
    base = seconds[baseline]
    return {
        name: {
            "median_ms": round(1e3 * median(times), 3),
            "best_ms": round(1e3 * min(times), 3),
            "ratio_median": round(median(base) / median(times), 3),
            "ratio_best": round(min(base) / min(times), 3),
        }
        for name, times in seconds.items()
    }
