"""Pools to measure engines with: as many adapters as it takes, in the shapes of those that there are."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from loraretriever.errors import PoolError
from loraretriever.pool.peft_config import CONFIG_FILE
from loraretriever.pool.weights import WEIGHTS_FILE
from loraretriever.types import Adapter

_SYNTHETIC_NOISE = 0.05  # of a factor's root mean square
_ALPHA_STEP = 1e-6  # of lora_alpha: makes another adapter


def make_pool(folder: Path, adapters: Sequence[Adapter], names: Sequence[str], seed: int) -> None:
    """Write a plain folder with adapters of these names: those given, then copies of them with random numbers added.

    Raises:
        PoolError: no adapter is given.
    """
    if not adapters:
        raise PoolError("the pool has no enabled adapter; expected one at least. Add one, or name another pool.")
    rng = np.random.default_rng(seed)
    for place, name in enumerate(names):
        source, target = adapters[place % len(adapters)].folder, folder / name
        target.mkdir(parents=True)
        shutil.copyfile(source / CONFIG_FILE, target / CONFIG_FILE)
        if place < len(adapters):
            shutil.copyfile(source / WEIGHTS_FILE, target / WEIGHTS_FILE)
        else:
            _write_varied(source / WEIGHTS_FILE, target / WEIGHTS_FILE, int(rng.integers(2**63)))


def make_crowd(folder: Path, sources: Sequence[Path], count: int) -> None:
    """Write a plain folder of `count` adapters: the sources under their names, then others that are never used.

    Those are of one module, so that a pool admits them fast, and share their weights (one file, where the file system
    allows it); they differ in `lora_alpha`.
    """
    for source in sources:
        target = folder / source.name
        target.mkdir(parents=True)
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            _link(source / file, target / file)
    config = json.loads((sources[0] / CONFIG_FILE).read_text(encoding="utf-8"))
    alpha = config.get("lora_alpha", 8)
    small = folder / f".{WEIGHTS_FILE}"  # no adapter: a pool passes over it
    _write_one_module(sources[0] / WEIGHTS_FILE, small)
    for place in range(len(sources), count):
        target = folder / f"unused{place}"
        target.mkdir()
        config["lora_alpha"] = alpha * (1 + _ALPHA_STEP * place)
        (target / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
        _link(small, target / WEIGHTS_FILE)


def _write_one_module(source: Path, target: Path) -> None:
    factors = load_file(source)
    module = min(factors).partition(".lora_")[0]
    kept = {name: factor for name, factor in factors.items() if name.partition(".lora_")[0] == module}
    save_file(kept, target, metadata={"format": "pt"})


def _write_varied(source: Path, target: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    varied = {}
    for name, factor in load_file(source).items():
        noise = torch.randn(factor.shape, generator=generator)
        size = factor.float().square().mean().sqrt()
        varied[name] = (factor.float() + _SYNTHETIC_NOISE * size * noise).to(factor.dtype)
    save_file(varied, target, metadata={"format": "pt"})


def _link(source: Path, target: Path) -> None:
    with suppress(OSError):
        os.link(source, target)
        return
    shutil.copyfile(source, target)
