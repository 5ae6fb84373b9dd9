"""Memory and time of many adapters that pass through few slots: from disk to host memory to the device.

    python benchmarks/bench_residency.py --adapters 1000 --slots 64 --host-mib 256

Writes adapters of random factors (q, k, v and o of every layer, bfloat16, PEFT's format) to a folder, once, and asks
for random ones of them in batches: prefetch all of a batch, wait, put them into slots. One JSON line. Memory is the
process's peak resident memory beyond that of the base model, which has answered one prompt before; that includes
`slots_mib` and `host_peak_mib`, and whatever the allocator and the mapped files keep. Milliseconds are per adapter,
in the background thread `read_ms` (the file is mapped) and `prepare_ms` (its pages are read, converted and checked);
in the decoding thread `write_ms`, which with batches smaller than the slots includes moving slots to the front.
The clock `cpu` counts the thread's own processor time: use it with --threads 1 while other work uses the machine.
"""

from __future__ import annotations

import argparse
import json
import random
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file

from common import SEED, Output
from loraretriever.batch import AdapterRef, LoraLayers
from loraretriever.batch.stacks import PreparedAdapter
from loraretriever.config import cache_folder
from loraretriever.engine.residency import HostStore
from loraretriever.models import DEFAULT_BASE_MODEL, base_model_spec, load_base_model
from loraretriever.pool.peft_config import CONFIG_FILE
from loraretriever.pool.weights import WEIGHTS_FILE, load_weights
from loraretriever.types import AdapterWeights

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.thread_time}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
MIB = 1 << 20


def write_adapters(folder: Path, count: int, rank: int) -> list[AdapterRef]:
    """Make the adapters that the folder does not have; each has a folder of its own."""
    linear = {n: s for n, s in base_model_spec(DEFAULT_BASE_MODEL).linear.items() if n.endswith(TARGETS)}
    refs = [AdapterRef(f"a{i}", f"rank{rank}-{i}") for i in range(count)]
    for i, ref in enumerate(refs):
        target = folder / ref.digest
        if (target / CONFIG_FILE).exists():
            continue
        target.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(SEED + i)
        tensors = {}
        for name, (out, features) in linear.items():
            for factor, shape in (("A", (rank, features)), ("B", (out, rank))):
                values = 0.02 * torch.randn(shape, generator=generator)
                tensors[f"base_model.model.{name}.lora_{factor}.weight"] = values.bfloat16()
        save_file(tensors, target / WEIGHTS_FILE)
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(TARGETS)}
        (target / CONFIG_FILE).write_text(json.dumps(config))  # last: it says that the adapter is whole
    return refs


def resident_mib(name: str) -> float:
    """The process's resident memory: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


class Loading:
    """Reads and prepares adapters, with the seconds that each took."""

    def __init__(
        self, folder: Path, prepare: Callable[[AdapterWeights], PreparedAdapter], now: Callable[[], float]
    ) -> None:
        self._folder, self._prepare, self._now = folder, prepare, now
        self.read: list[float] = []
        self.prepared: list[float] = []

    def __call__(self, ref: AdapterRef) -> PreparedAdapter:
        """What the host store calls."""
        start = self._now()
        weights = load_weights(self._folder / ref.digest, ref.name, ref.digest)
        middle = self._now()
        prepared = self._prepare(weights)
        self.read.append(middle - start)
        self.prepared.append(self._now() - middle)
        return prepared


def run(
    layers: LoraLayers,
    store: HostStore,
    ended: threading.Event,
    batches: list[list[AdapterRef]],
    now: Callable[[], float],
) -> list[float]:
    """Seconds per adapter written, of each batch that had to write any."""
    seconds = []
    for batch in batches:
        store.keep(batch)
        missing = set(batch) - set(layers.resident)
        for ref in missing:
            store.prefetch(ref)
        while not all(store.is_ready(ref) for ref in missing):
            ended.wait()
            ended.clear()
        start = now()
        layers.acquire(batch)
        if missing:
            seconds.append((now() - start) / len(missing))
    return seconds


def bench(args: argparse.Namespace, output: Output) -> None:
    """One measurement."""
    folder = args.folder or cache_folder() / "bench-residency"
    refs = write_adapters(folder, args.adapters, args.rank)
    base = load_base_model(dtype=args.dtype)
    with torch.inference_mode():
        base.model(**base.tokenizer("All pages of the weights are in memory now.", return_tensors="pt"))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident_mib("VmRSS")

    store: HostStore
    layers = LoraLayers(base.model, args.slots, lambda ref: store.get(ref))
    now, ended = CLOCKS[args.clock], threading.Event()
    loading = Loading(folder, layers.prepare, now)
    chooser = random.Random(SEED)
    batches = [chooser.sample(refs, args.batch) for _ in range(args.batches)]
    with closing(HostStore(loading, args.host_mib * MIB, args.loaders, ended.set)) as store:
        writes = run(layers, store, ended, batches, now)
    names = ("adapters", "rank", "slots", "host_mib", "batch", "batches", "loaders", "dtype", "clock")
    results = {
        "base_model_mib": round(before),
        "peak_growth_mib": round(resident_mib("VmHWM") - before),
        "slots_mib": round(layers.nbytes / MIB),
        "host_peak_mib": round(store.peak_bytes / MIB),
        "all_adapters_mib": round(args.adapters * layers.nbytes / args.slots / MIB),
        "requested": args.batch * args.batches,
        "loads": store.loads,
        "hits": store.hits,
        "evictions": store.evictions,
    }
    for name, seconds in (("read_ms", loading.read), ("prepare_ms", loading.prepared), ("write_ms", writes)):
        results[name] = {"median": round(1e3 * median(seconds), 2), "best": round(1e3 * min(seconds), 2)}
    output.write({"benchmark": "residency", "setup": {name: getattr(args, name) for name in names}, "results": results})


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--host-mib", type=int, default=256, help="bound of the host memory")
    parser.add_argument("--batch", type=int, default=64, help="different adapters in a batch")
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--loaders", type=int, default=1, help="threads that load")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--clock", default="wall", choices=sorted(CLOCKS))
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's own choice")
    parser.add_argument("--folder", type=Path, help="where the adapters are kept; default: below the cache folder")
    parser.add_argument("--output", type=Path, help="append the line to this file too")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    bench(args, Output(args.output))


if __name__ == "__main__":
    main()
