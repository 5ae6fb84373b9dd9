"""What the gateway adds before vLLM, and what new compositions cost there: each way of serving in turn.

    python benchmarks/bench_vllm.py lanes one-adapter adapters --model smollm2

Starts vLLM from the environment that `make test-vllm` makes, and measures as `loraretriever bench server --vllm-url`
does. One JSON object per way, as that command prints it, with the way's name.

- `lanes`: mixtures of three, composed in vLLM's batch; 20 adapters in slots of rank 16.
- `one-adapter`: vLLM's own path, 16 adapters in slots of rank 16.
- `adapters`: mixtures of three, each made into an adapter of rank 48; 8 in slots of rank 64.
- `adapters-short`: the same with at most 32 tokens a step.

Idle threads of vLLM's OpenMP are told not to spin: they would take the processors from gateway and load, which in a
deployment are elsewhere.

The model `tiny` has random weights and takes next to no time, so that it shows what everything else takes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from common import SEED, Output

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from loraretriever.console import to_json
from loraretriever.evaluate.demo import demo_folder
from loraretriever.evaluate.vllm_bench import Options, bench_vllm
from loraretriever.models import DEFAULT_BASE_MODEL, resolve_base_model
from tiny import WIDE, tiny_spec
from tiny_text import write_base_model, write_encoder
from unit.server.conftest import make_pool
from vllm_server import vllm_server


@dataclass(frozen=True, slots=True)
class Way:
    """Options and environment of vLLM, and the adapters of a composition."""

    options: tuple[str, ...]
    variables: dict[str, str]
    k: int


_IDLE = {"KMP_BLOCKTIME": "1"}  # milliseconds
_MADE = ("--max-loras", "8", "--max-lora-rank", "64")
WAYS = {
    "lanes": Way(
        ("--max-loras", "16", "--max-lora-rank", "16"),
        {"LORARETRIEVER_VLLM_LANES": "1", "LORARETRIEVER_VLLM_SLOTS": "20"},
        3,
    ),
    "one-adapter": Way(("--max-loras", "16", "--max-lora-rank", "16"), {}, 1),
    "adapters": Way(_MADE, {}, 3),
    "adapters-short": Way((*_MADE, "--max-num-batched-tokens", "32"), {}, 3),
}


@contextmanager
def model_and_pool(name: str) -> Iterator[tuple[str, Path]]:
    """Folders of the base model and the pool."""
    if name == "smollm2":
        yield resolve_base_model(DEFAULT_BASE_MODEL), demo_folder() / "pool"
        return
    with tempfile.TemporaryDirectory(prefix="loraretriever-bench-") as folder:
        write_base_model(Path(folder) / "base", WIDE)
        write_encoder(Path(folder), layers=3)
        yield str(Path(folder) / "base"), make_pool(Path(folder), Path(folder), spec=tiny_spec(WIDE))


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="+", choices=WAYS)
    parser.add_argument("--model", default="smollm2", choices=("smollm2", "tiny"))
    parser.add_argument("--pairs", type=int, default=100, help="of requests, by the gateway and straight to vLLM")
    parser.add_argument("--requests", type=int, default=96, help="at each share of new compositions")
    parser.add_argument("--max-tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--output", type=Path, help="append the lines to this file too")
    args = parser.parse_args()
    output = Output(args.output)
    with model_and_pool(args.model) as (model, pool), tempfile.TemporaryDirectory(prefix="loraretriever-vllm-") as logs:
        sizes = Options(pool, "", SEED, pairs=args.pairs, requests=args.requests, max_tokens=args.max_tokens)
        for name in args.ways:
            way = WAYS[name]
            length = ("--max-model-len", "512" if args.model == "tiny" else "2048")
            with vllm_server(Path(logs), model, str(pool), *length, *way.options, **_IDLE, **way.variables) as running:
                report = bench_vllm(replace(sizes, url=running.url, k=way.k))
            output.write({"benchmark": "vllm", "way": name, "model": args.model, "report": json.loads(to_json(report))})


if __name__ == "__main__":
    main()
