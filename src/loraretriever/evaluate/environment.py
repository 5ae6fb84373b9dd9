"""What a reader needs to judge a figure: versions, commit, processor, threads."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("loraretriever", "numpy", "scikit-learn", "scipy", "sentence-transformers", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class Environment:
    """Where a figure was measured. `commit` is None where the package does not lie in a git repository."""

    versions: dict[str, str]
    commit: str | None
    cpu: str
    threads: int


def environment() -> Environment:
    """Of this process."""
    import torch

    return Environment(_versions(), _commit(), _cpu(), torch.get_num_threads())


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():  # installed: a repository further up is another project's
        return None
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
