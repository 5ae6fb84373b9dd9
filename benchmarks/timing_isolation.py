"""Does the time of an answer tell a tenant that another one has an adapter of some name?

    python benchmarks/timing_isolation.py --rounds 2000

A pool with shared adapters and with those of another tenant is asked, with a tenant's key, for names that the other
tenant has and for names that nobody has, in random order: all are answered with 404. The application is called in this
process, without a network between, which would only hide differences. One JSON line: for each operation the median
microseconds of both, how often a hidden name took longer than a missing one (`auc`; 0.5: no difference), and the
probability (`p`) that chance alone makes such a difference, by the Mann-Whitney rank test.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
from safetensors.numpy import save_file
from scipy.stats import mannwhitneyu

from common import SEED, Output
from loraretriever.config import ServerSettings, Settings
from loraretriever.pipeline import LoraRetriever
from loraretriever.pool import Pool
from loraretriever.server.app import create_app
from loraretriever.types import BaseModelSpec

MODULE, SIZE, RANK = "model.layers.0.self_attn.q_proj", 16, 2
SPEC = BaseModelSpec("base", {MODULE: (SIZE, SIZE)})
WARMUP = 20
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
Ask = Callable[[str], Awaitable[httpx.Response]]


def write_adapter(folder: Path, seed: int) -> Path:
    """An adapter for one small module."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    shapes = {"A": (RANK, SIZE), "B": (SIZE, RANK)}
    tensors = {f"base_model.model.{MODULE}.lora_{f}.weight": rng.normal(size=s).astype("f4") for f, s in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "base_model_name_or_path": "base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def fill(pool: Pool, folder: Path, hidden: list[str], shared: int) -> None:
    """Add adapters of a tenant, and of nobody."""
    for number, name in enumerate(hidden):
        adapter = write_adapter(folder / name, number)
        pool.add(adapter, name=f"globex:{name}", tenant="globex", samples=[f"Sample of {name}."])
    for number in range(shared):
        adapter = write_adapter(folder / f"shared{number}", 1000 + number)
        pool.add(adapter, samples=[f"Sample {number}."])


def operations(client: httpx.AsyncClient) -> dict[str, Ask]:
    """What is asked of a name."""
    return {
        "GET /v1/adapters/{name}": lambda name: client.get(f"/v1/adapters/{name}"),
        "GET /v1/adapters/{name}/samples": lambda name: client.get(f"/v1/adapters/{name}/samples"),
        "DELETE /v1/adapters/{name}": lambda name: client.delete(f"/v1/adapters/{name}"),
        "GET /v1/models/{name}": lambda name: client.get(f"/v1/models/{name}"),
        "POST /v1/chat/completions": lambda name: client.post("/v1/chat/completions", json={**CHAT, "model": name}),
    }


async def measure(ask: Ask, names: dict[str, list[str]], rounds: int, rng: random.Random) -> dict[str, list[float]]:
    """Seconds of each answer, by kind of name; in each round one of both, in random order."""
    seconds: dict[str, list[float]] = {kind: [] for kind in names}
    for number in range(WARMUP + rounds):
        for kind in rng.sample(sorted(names), len(names)):
            name = rng.choice(names[kind])
            start = time.perf_counter()
            answer = await ask(name)
            taken = time.perf_counter() - start
            if answer.status_code != 404:
                raise SystemExit(f"{kind} name {name}: expected 404, got {answer.status_code}: {answer.text}")
            if number >= WARMUP:
                seconds[kind].append(taken)
    return seconds


def compare(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and the rank test between hidden and missing names."""
    hidden, missing = seconds["hidden"], seconds["missing"]
    test = mannwhitneyu(hidden, missing, alternative="two-sided")
    return {
        "hidden_us": round(1e6 * median(hidden), 1),
        "missing_us": round(1e6 * median(missing), 1),
        "auc": round(float(test.statistic) / (len(hidden) * len(missing)), 4),
        "p": float(f"{test.pvalue:.3g}"),
    }


async def run(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all operations."""
    rng = random.Random(SEED)
    names = [f"{rng.getrandbits(48):012x}" for _ in range(2 * arguments.adapters)]
    kinds = {"hidden": names[: arguments.adapters], "missing": names[arguments.adapters :]}
    with Pool.create(folder / "pool", "base", spec=SPEC) as pool:
        fill(pool, folder, kinds["hidden"], arguments.shared)
        secret, _ = pool.keys.create("acme", ["generate", "route", "pool:read", "pool:write"], "acme")
        retriever = LoraRetriever(pool, Settings(), _needless, _needless)
        app = create_app(retriever, ServerSettings())
        state = app.state.server
        state.is_loaded = True  # no request comes as far as to the models
        transport = httpx.ASGITransport(app)
        headers = {"authorization": f"Bearer {secret}"}
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
                return {
                    operation: compare(await measure(ask, kinds, arguments.rounds, rng))
                    for operation, ask in operations(client).items()
                }
        finally:
            state.jobs.close(0)
            state.close()


def _needless(*_: object) -> Any:
    raise AssertionError("a name that is not found needs no model")


def main() -> None:
    """Measure, and write one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2000, help="answers for each kind of name and operation")
    parser.add_argument("--adapters", type=int, default=100, help="of the other tenant")
    parser.add_argument("--shared", type=int, default=20, help="adapters that both tenants see")
    parser.add_argument("--output", type=Path, help="also add the line to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(run(Path(folder), arguments))
    Output(arguments.output).write(
        {
            "benchmark": "timing_isolation",
            "rounds": arguments.rounds,
            "adapters": arguments.adapters,
            "shared": arguments.shared,
            "operations": found,
        }
    )


if __name__ == "__main__":
    main()
