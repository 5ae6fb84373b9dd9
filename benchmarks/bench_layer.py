"""Time of the batched adapters against the base model, PEFT's mixed batch and the paper's published formulation.

    python benchmarks/bench_layer.py             the linear modules of a few layers, over adapters, k and batch sizes
    python benchmarks/bench_layer.py --model     whole decoding steps of SmolLM2 with a real cache

One JSON line per measurement. `ratio_*` is throughput relative to the base model, measured in turns in one process.
`--paths` adds each path alone, which is how the constants in `loraretriever/batch/costs.py` were found.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import random
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import DynamicCache

from common import CLOCKS, SEED, Output, alternate, summarize
from loraretriever.batch import BASE_ROW, AdapterRef, LoraLayers, RowRoute
from loraretriever.batch.kernels import available
from loraretriever.batch.reference import paper_mixture
from loraretriever.batch.routing import Routing
from loraretriever.engine.memory import keep_freed_memory
from loraretriever.models import DEFAULT_BASE_MODEL, load_base_model
from loraretriever.types import AdapterWeights, LoraPair

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
PATHS = ("dense", "gathered", "grouped", "split")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Block(nn.Module):
    """The targeted linear modules of one SmolLM2 layer, called as attention calls them."""

    def __init__(self, hidden: int = 576, key_value: int = 192) -> None:
        super().__init__()
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, key_value, bias=False)
        self.v_proj = nn.Linear(hidden, key_value, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Projections without the attention between them."""
        q, _, _ = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(q)


class Blocks(nn.Module):
    """Several layers, so that the weights do not all stay in the processor's cache."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Each layer on the same input."""
        for layer in self.layers:
            layer(x)
        return x


def random_adapters(model: nn.Module, count: int, rank: int) -> dict[AdapterRef, AdapterWeights]:
    """Adapters with random factors for the attention modules of every layer."""
    linear = {n: m for n, m in model.named_modules() if n.endswith(TARGETS)}
    adapters = {}
    for i in range(count):
        modules = {
            name: LoraPair(0.02 * torch.randn(rank, m.in_features), 0.02 * torch.randn(m.out_features, rank), 2.0)
            for name, m in linear.items()
        }
        adapters[AdapterRef(f"a{i}", f"d{i}")] = AdapterWeights(f"a{i}", f"d{i}", modules)
    return adapters


def random_rows(refs: Sequence[AdapterRef], batch: int, k: int, seed: int = SEED) -> list[RowRoute]:
    """Each row takes k random adapters with equal weights."""
    chooser = random.Random(seed)
    k = min(k, len(refs))
    return [RowRoute(tuple(chooser.sample(list(refs), k)), (1 / k,) * k) for _ in range(batch)]


class FixedCosts:
    """Stands in for the cost model to time one path alone."""

    def __init__(self, path: str) -> None:
        self._path = path

    def cheapest(self, rows: int, tokens: int, *sizes: object) -> str:
        """The one path; the kernels are for decoding only."""
        return "gathered" if self._path == "kernels" and tokens > 1 else self._path


def routings(layers: LoraLayers, rows: list[RowRoute], paths: bool) -> dict[str, Routing]:
    """The routing under test and, if asked for, one for each path."""
    named = {"ours": layers.route(rows)}
    if paths:
        slot_of = layers.acquire([ref for row in rows for ref in row.adapters])
        epoch = layers.route(rows).epoch
        device = layers.device
        for path in (*PATHS, *(("kernels",) if available(device) else ())):
            named[f"ours/{path}"] = Routing(rows, slot_of, device, epoch, FixedCosts(path))
    return named


def with_peft(model: Any, count: int, rank: int) -> Any:
    """The model with `count` PEFT adapters of the same shape, B random, for its mixed batch."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS), init_lora_weights=False)
    peft = get_peft_model(model, config, adapter_name="a0")
    for i in range(1, count):
        peft.add_adapter(f"a{i}", config)
    return peft.eval()


def used(layers: LoraLayers, routing: Routing, call: Callable[[], object]) -> Callable[[], None]:
    """The call under a routing."""

    def run() -> None:
        with layers.use(routing):
            call()

    return run


def paper_layer(blocks: Blocks, adapters: dict[AdapterRef, AdapterWeights], rows: list[RowRoute]) -> Any:
    """The published code's way: the batch's distinct adapters stacked, `mapping` of rows to adapters, einsum."""
    refs = list(dict.fromkeys(ref for row in rows for ref in row.adapters))
    mapping = torch.zeros(len(rows), len(refs))
    for n, row in enumerate(rows):
        for ref, weight in zip(row.adapters, row.weights, strict=True):
            mapping[n, refs.index(ref)] = weight
    stacked = []
    for name, module in blocks.named_modules():
        if isinstance(module, nn.Linear):
            pairs = [adapters[ref].modules[name] for ref in refs]
            a, b = torch.stack([p.a for p in pairs]), torch.stack([p.scaling * p.b for p in pairs])
            stacked.append((module, a.to(module.weight), b.to(module.weight)))
    mapping = mapping.to(stacked[0][1])

    def run(x: torch.Tensor) -> None:
        for module, a, b in stacked:
            module(x).add_(paper_mixture(x, a, b, mapping))

    return run


def bench_layers(args: argparse.Namespace, output: Output) -> None:
    """The adapted linear modules alone."""
    dtype = DTYPES[args.dtype]
    counts, sizes = ((8,), (32,)) if args.quick else ((1, 8, 48), (1, 8, 32))
    for count in args.counts or counts:
        torch.manual_seed(SEED)
        plain = Blocks(args.layers).to(args.device, dtype).eval()
        ours, peft = copy.deepcopy(plain), with_peft(copy.deepcopy(plain), count, args.rank)
        adapters = random_adapters(plain, count, args.rank)
        layers = LoraLayers(ours, count, adapters.__getitem__)
        for batch, k, tokens in product(sizes, sorted({1, min(3, count)}), (1, 128)):
            rows = random_rows(list(adapters), batch, k)
            x = torch.randn(batch, tokens, 576, device=args.device, dtype=dtype)
            contenders: dict[str, Callable[[], object]] = {"base": partial(plain, x)}
            for name, routing in routings(layers, rows, args.paths).items():
                contenders[name] = used(layers, routing, partial(ours, x))
            if k == 1:
                names = [row.adapters[0].name for row in rows]
                contenders["peft"] = partial(peft, x, adapter_names=names)
            # 32 x 128 tokens through 48 adapters of all outputs would need gigabytes, as it does in the paper's code.
            if batch * tokens * count <= 32 * 128 * 8:
                paper = paper_layer(plain, adapters, rows)
                contenders["paper"] = partial(paper, x)
            seconds = alternate(contenders, args.rounds or (3 if tokens > 1 else 15), args.clock)
            setup = {"adapters": count, "k": k, "batch": batch, "tokens": tokens, "layers": args.layers}
            setup |= {"rank": args.rank, "dtype": args.dtype, "device": args.device, "clock": args.clock}
            output.write({"benchmark": "layer", "setup": setup, "results": summarize(seconds, "base")})


class Decoder:
    """A batch in the middle of decoding: each step reads one token per row, then drops it from the cache again."""

    def __init__(self, model: Any, batch: int, context: int, **extra: Any) -> None:
        self._model, self._context, self._extra = model, context, extra
        config = model.config
        ids = torch.randint(0, config.vocab_size, (batch, context), generator=torch.Generator().manual_seed(SEED))
        self._ids = ids.to(model.device)
        self._cache = DynamicCache(config=config)
        # transformers 5.24 renamed the argument.
        accepted = inspect.signature(model.forward).parameters
        self._extra["cache" if "cache" in accepted else "past_key_values"] = self._cache

    def start(self) -> None:
        """Read the prompts."""
        self._model(input_ids=self._ids, logits_to_keep=1, **self._extra)

    def step(self) -> None:
        """One token for every row; the cache stays as long as it was."""
        self._model(input_ids=self._ids[:, :1], logits_to_keep=1, **self._extra)
        self._cache.crop(-1)


def bench_model(args: argparse.Namespace, output: Output) -> None:
    """Whole decoding steps: attention, cache, norms and vocabulary included."""
    plain = load_base_model(args.name, dtype=args.dtype, device=args.device).model
    counts = (8,) if args.quick else (8, 48)
    for count in args.counts or counts:
        torch.manual_seed(SEED)
        ours = copy.deepcopy(plain)
        adapters = random_adapters(plain, count, args.rank)
        layers = LoraLayers(ours, count, adapters.__getitem__)
        peft = None if args.no_peft else with_peft(copy.deepcopy(plain), count, args.rank)
        base, mine = Decoder(plain, args.batch, args.context), Decoder(ours, args.batch, args.context)
        base.start(), mine.start()
        for k in (1, 3):
            rows = random_rows(list(adapters), args.batch, k)
            contenders: dict[str, Callable[[], object]] = {"base": base.step}
            for name, routing in routings(layers, rows, args.paths).items():
                contenders[name] = used(layers, routing, mine.step)
            contenders["ours/no adapter"] = used(layers, layers.route([BASE_ROW] * args.batch), mine.step)
            if k == 1 and peft is not None:
                names = [row.adapters[0].name for row in rows]
                other = Decoder(peft, args.batch, args.context, adapter_names=names)
                other.start()
                contenders["peft"] = other.step
            seconds = alternate(contenders, args.rounds or (5 if args.quick else 20), args.clock)
            used_slots = len({ref for row in rows for ref in row.adapters})
            setup = {"model": args.name, "adapters": count, "used": used_slots, "k": k, "batch": args.batch}
            setup |= {
                "context": args.context,
                "rank": args.rank,
                "dtype": args.dtype,
                "device": args.device,
                "clock": args.clock,
            }
            output.write({"benchmark": "decode", "setup": setup, "results": summarize(seconds, "base")})


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="store_true", help="whole decoding steps of a real model")
    parser.add_argument("--name", default=DEFAULT_BASE_MODEL, help="the model for --model")
    parser.add_argument("--quick", action="store_true", help="8 adapters and few rounds")
    parser.add_argument("--paths", action="store_true", help="time each path alone too")
    parser.add_argument("--no-peft", action="store_true", help="leave PEFT out of --model")
    parser.add_argument("--dtype", default="float32", choices=sorted(DTYPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32, help="rows in --model")
    parser.add_argument("--context", type=int, default=64, help="tokens in the cache in --model")
    parser.add_argument("--layers", type=int, default=6, help="layers without --model")
    parser.add_argument("--rounds", type=int, default=0, help="timed rounds; 0: by size")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's own choice")
    parser.add_argument(
        "--clock", default="wall", choices=sorted(CLOCKS), help="cpu: with --threads 1, on a busy machine"
    )
    parser.add_argument("--counts", type=int, nargs="+", help="numbers of adapters")
    parser.add_argument("--output", type=Path, help="append the lines to this file too")
    args = parser.parse_args()
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    with torch.inference_mode():
        (bench_model if args.model else bench_layers)(args, Output(args.output))


if __name__ == "__main__":
    main()
