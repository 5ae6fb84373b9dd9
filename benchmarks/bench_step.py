"""Where a decoding step's time goes, and how far it is from the floor that the machine sets.

    python benchmarks/bench_step.py                      SmolLM2, batch 32, float32: base, 8 and 48 adapters, k = 3
    python benchmarks/bench_step.py --threads 1 --clock cpu

One JSON line. `floor_ms` is what the step's multiply-adds take at the rate of a large product on this machine, or what
its bytes (weights, adapters, keys and values) take at its reading speed, whichever is longer. Both are measured in the
same run. `shares` are the operators' own times in torch's profiler, in percent of the step.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench_layer import random_adapters, random_rows
from common import CLOCKS, SEED, Output, alternate, summarize
from loraretriever.batch import BASE_ROW, LoraLayers, RowRoute
from loraretriever.engine.memory import keep_freed_memory
from loraretriever.engine.runner import ModelRunner, Work
from loraretriever.models import DEFAULT_BASE_MODEL, load_base_model

GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm_"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",),
    "writing keys and values": ("aten::index_copy_",),
    "choosing the token": ("aten::argmax",),
    "collecting rows by slot": ("aten::index_select", "aten::_embedding_bag_forward_only"),
}


class Step:
    """A batch in the middle of decoding, for any routes of its rows."""

    def __init__(self, model: Any, layers: LoraLayers, batch: int, context: int) -> None:
        self._runner = ModelRunner(model, layers, 1 << 30, 1 << 20)
        self._batch, self._context = batch, context
        vocabulary = model.config.vocab_size
        chooser = random.Random(SEED)
        for row in range(batch):
            self._runner.table.place(row, context + 1)
        self._runner.settle()
        for row in range(batch):
            tokens = [chooser.randrange(vocabulary) for _ in range(context)]
            self._runner.step([Work(self._runner.table[row], 0, tokens, BASE_ROW, is_last=False)])

    def run(self, routes: list[RowRoute]) -> None:
        """One token for each row; the next call writes to the same places."""
        rows = [self._runner.table[row] for row in range(self._batch)]
        works = [
            Work(place, self._context, [11 + i], route, is_last=True)
            for i, (place, route) in enumerate(zip(rows, routes, strict=True))
        ]
        self._runner.step(works)[0].argmax(dim=-1).tolist()


def shares(call: Callable[[], None], steps: int = 4) -> dict[str, float]:
    """Percent of the processor's time by kind of operator."""
    with profile(activities=[ProfilerActivity.CPU]) as taken:
        for _ in range(steps):
            call()
    times = {event.key: event.self_cpu_time_total for event in taken.key_averages()}
    total = sum(times.values())
    found = {name: sum(times.get(key, 0.0) for key in keys) for name, keys in GROUPS.items()}
    found["all else"] = total - sum(found.values())
    return {name: round(100 * value / total, 1) for name, value in found.items()}


def rate(dtype: torch.dtype, rows: int, features: int, out: int, layers: int = 8) -> float:
    """Multiply-adds per second of products of this shape, weights not in the cache."""
    weights = [torch.randn(out, features, dtype=dtype) for _ in range(layers)]
    x = torch.randn(rows, features, dtype=dtype)
    return layers * rows * features * out / _best(lambda: [torch.nn.functional.linear(x, w) for w in weights])


def bandwidth(size: int = 1 << 28) -> float:
    """Bytes per second that a sum over memory reads."""
    values = torch.ones(size // 4)
    return size / _best(values.sum)


def _best(call: Callable[[], object], rounds: int = 9) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def work_of(model: Any, batch: int, context: int) -> tuple[float, float]:
    """(multiply-adds, bytes) of the base model's step: linear modules and attention."""
    config = model.config
    linear = sum(m.weight.numel() for _, m in model.named_modules() if isinstance(m, torch.nn.Linear))
    heads, head = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    attention = 2 * config.num_hidden_layers * heads * head * (context + 1)
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * head * (context + 1)
    return batch * (linear + attention), (linear + batch * cached) * model.dtype.itemsize


def adapter_work(routes: list[RowRoute], size: int, itemsize: int) -> tuple[float, float]:
    """(multiply-adds, bytes) that the chosen adapters of all rows need at least; `size`: numbers of one adapter."""
    pairs = sum(len(route.adapters) for route in routes)
    return pairs * size, len({ref for route in routes for ref in route.adapters}) * size * itemsize


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=80, help="tokens before the step")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--counts", type=int, nargs="+", default=[8, 48])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    torch.manual_seed(SEED)
    model = load_base_model(DEFAULT_BASE_MODEL, args.dtype).model
    adapters = random_adapters(model, max(args.counts), args.rank)
    layers = LoraLayers(model, max(args.counts), adapters.__getitem__)
    step = Step(model, layers, args.batch, args.context)
    routes = {"base": [BASE_ROW] * args.batch}
    routes |= {f"k3 of {count}": random_rows(list(adapters)[:count], args.batch, 3) for count in args.counts}
    layers.acquire(list(adapters))
    calls = {name: partial(step.run, rows) for name, rows in routes.items()}
    results = summarize(alternate(calls, args.rounds, args.clock), "base")
    speed = {"multiply_adds_per_s": rate(model.dtype, args.batch, 576, 3072), "bytes_per_s": bandwidth()}
    size = sum(p.a.numel() + p.b.numel() for p in next(iter(adapters.values())).modules.values())
    products, read = work_of(model, args.batch, args.context)
    for name, rows in routes.items():
        more, more_read = adapter_work(rows, size, model.dtype.itemsize)
        compute, reading = (products + more) / speed["multiply_adds_per_s"], (read + more_read) / speed["bytes_per_s"]
        results[name]["floor_ms"] = round(1e3 * max(compute, reading), 1)
        results[name]["compute_ms"], results[name]["reading_ms"] = round(1e3 * compute, 1), round(1e3 * reading, 1)
    setup = {key: getattr(args, key) for key in ("batch", "context", "rank", "dtype", "clock")}
    Output(args.output).write(
        {
            "benchmark": "step",
            "setup": setup,
            "machine": {key: round(value / 1e9, 1) for key, value in speed.items()},
            "results": results,
            "shares": {name: shares(call) for name, call in calls.items()},
        }
    )


if __name__ == "__main__":
    main()
