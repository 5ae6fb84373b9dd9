"""Time, recall and memory of the nearest-neighbour indexes, alone and beside each other.

    python benchmarks/bench_index.py --rows 10000 100000 1000000
    python benchmarks/bench_index.py --rows 1000000 --faiss     Faiss (pip install faiss-cpu) on the same lists

One JSON line per measurement. The vectors are made:

- clustered: 3,000 topics of unequal size (popularity rank^-0.7), normal in a random subspace of 64 dimensions; an
  adapter is its topic plus 0.4 normal in the subspace plus 0.08 normal in all dimensions.
- overlapping: the same with a subspace of 24 dimensions and adapters 0.8 around their topics, which then run together.
- gaussian: independent normal numbers in all dimensions, without any structure: the hardest case.

A query is a new point: a random adapter plus 0.3 normal in the subspace plus 0.1 normal in all dimensions (a new
draw in the gaussian case). Recall is against exact search. Milliseconds are wall time in one process, the contenders
in turns.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common import SEED, Output
from loraretriever.retrieve.approximate import ApproximateIndex
from loraretriever.retrieve.vectors import EXACT_LIMIT, ExactIndex, VectorIndex, load, save

Floats = NDArray[np.float32]
# Subspace, and how far adapters are from their topics in it.
KINDS: dict[str, tuple[int, float] | None] = {"clustered": (64, 0.4), "overlapping": (24, 0.8), "gaussian": None}
TOPICS = 3000
_BLOCK = 65_536


def vectors(kind: str, rows: int, dimension: int, queries: int) -> tuple[Floats, Floats]:
    """Adapters and queries of one kind, shape (rows, dimension) and (queries, dimension)."""
    rng = np.random.default_rng(SEED)
    shape = KINDS[kind]
    if shape is None:
        made = rng.standard_normal((rows + queries, dimension), dtype=np.float32)
        return made[:rows], made[rows:]
    subspace, spread = shape
    basis = np.linalg.qr(rng.standard_normal((dimension, subspace)))[0].T.astype(np.float32)
    centres = rng.standard_normal((TOPICS, subspace), dtype=np.float32)
    popularity = np.arange(1, TOPICS + 1) ** -0.7
    topic = rng.choice(TOPICS, rows, p=popularity / popularity.sum())

    def around(middle: Floats, inside: float, outside: float) -> Floats:
        drawn = middle + inside * rng.standard_normal((len(middle), subspace), dtype=np.float32) @ basis
        drawn += outside * rng.standard_normal((len(middle), dimension), dtype=np.float32)
        return drawn.astype(np.float32, copy=False)

    stored = np.empty((rows, dimension), dtype=np.float32)
    for start in range(0, rows, _BLOCK):
        part = slice(start, start + _BLOCK)
        stored[part] = around(centres[topic[part]] @ basis, spread, 0.08)
    return stored, around(stored[rng.choice(rows, queries)], 0.3, 0.1)


def recall(found: NDArray[np.int64], expected: NDArray[np.int64]) -> float:
    """The mean part of the expected rows that was found."""
    pairs = zip(found.tolist(), expected.tolist(), strict=True)
    return round(float(np.mean([len({*a} & {*b}) / len({*b}) for a, b in pairs])), 4)


def timed(calls: Mapping[str, Callable[[Floats], object]], queries: Floats, batch: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each contender, the queries in batches, the contenders in turns at every batch."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for start in range(0, len(queries) - batch + 1, batch):
        for name, call in calls.items():
            begin = time.perf_counter()
            call(queries[start : start + batch])
            seconds[name].append(time.perf_counter() - begin)
    return {
        name: {
            "p50_ms": round(1e3 * float(np.median(times)), 3),
            "p99_ms": round(1e3 * float(np.percentile(times, 99)), 3),
            "best_ms": round(1e3 * min(times), 3),
        }
        for name, times in seconds.items()
    }


_FRESH = """
import json, sys
from pathlib import Path
import numpy as np
from loraretriever.retrieve.vectors import load

def resident():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [int(lines[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile")]

before = resident()
index = load(Path(sys.argv[1]))
index.search(np.zeros((1, index.dimension)), 8)
print(json.dumps([round(b - a) for a, b in zip(before, resident())]))
"""


def resident(folder: Path) -> dict[str, int]:
    """What loading the index adds to a fresh process, in MB: memory of its own, and pages of the mapped file."""
    done = subprocess.run([sys.executable, "-c", _FRESH, str(folder)], capture_output=True, text=True, check=True)
    return dict(zip(("own", "mapped"), json.loads(done.stdout), strict=True))


def faiss_contenders(index: ApproximateIndex, stored: Floats) -> dict[str, Callable[[Floats, int], Any]]:
    """Faiss reading 32 and 64 of the same lists: as they are, and as 8-bit codes with the best 32 compared exactly."""
    import faiss

    centroids = index.arrays()["centroids"]
    coarse = faiss.IndexFlatL2(stored.shape[1])
    coarse.add(centroids)
    bits8 = faiss.ScalarQuantizer.QT_8bit
    flat = faiss.IndexIVFFlat(coarse, stored.shape[1], len(centroids))
    coded = faiss.IndexIVFScalarQuantizer(coarse, stored.shape[1], len(centroids), bits8, faiss.METRIC_L2)
    for made in (flat, coded):
        made.train(stored[:: max(1, len(stored) // 100_000)])
        made.add(stored)

    def plain(read: int, queries: Floats, k: int) -> Any:
        return flat.search(queries, k, params=faiss.SearchParametersIVF(nprobe=read))[1]

    def rescored(read: int, queries: Floats, k: int) -> Any:
        near = coded.search(queries, 4 * k, params=faiss.SearchParametersIVF(nprobe=read))[1]
        difference = stored[near] - queries[:, None]
        order = np.argsort(np.vecdot(difference, difference), axis=1)[:, :k]
        return np.take_along_axis(near, order, axis=1)

    return {
        f"faiss-{name}-{read}": partial(call, read)
        for name, call in (("flat", plain), ("8bit", rescored))
        for read in (32, 64)
    }


def bench(kind: str, rows: int, args: argparse.Namespace, output: Output) -> None:
    """All measurements of one set of vectors."""
    stored, queries = vectors(kind, rows, args.dimension, args.queries)
    setup = {"kind": kind, "rows": rows, "dimension": args.dimension, "queries": len(queries), "k": args.k}

    def write(part: str, results: Mapping[str, Any], **extra: Any) -> None:
        output.write({"benchmark": "index", "part": part, "setup": {**setup, **extra}, "results": dict(results)})

    exact = ExactIndex(stored)
    begin = time.perf_counter()
    index = ApproximateIndex.build(stored, SEED)
    seconds = time.perf_counter() - begin
    lists = np.diff(index.arrays()["starts"])
    chosen = "exact" if stored.size <= EXACT_LIMIT else "approximate"
    write(
        "build",
        {"seconds": round(seconds, 1), "index_mb": round(index.nbytes / 1e6), "lists": len(lists), "chosen": chosen},
        largest_list=int(lists.max()),
    )
    few = queries[: max(32, min(len(queries), 200_000_000 // stored.size))]
    expected, _ = exact.search(queries, 64)
    both: dict[str, VectorIndex] = {"exact": exact, "approximate": index}
    for k in (args.k, 64):
        write("search", timed({n: partial(_search, i, k, None) for n, i in both.items()}, few, 1), batch=1, k=k)
        alone = timed({"approximate": partial(_search, index, k, None)}, queries, 1)
        write("search alone", alone, batch=1, k=k, recall=recall(index.search(queries, k)[0], expected[:, :k]))
    write("search", timed({n: partial(_search, i, args.k, None) for n, i in both.items()}, queries, 32), batch=32)
    if args.faiss:
        others = faiss_contenders(index, stored)
        calls = {name: partial(lambda call, query: call(query, args.k), call) for name, call in others.items()}
        results = timed({"approximate": partial(_search, index, args.k, None), **calls}, queries, 1)
        for name, call in calls.items():
            results[name]["recall"] = recall(call(queries), expected[:, : args.k])
        write("faiss", results, batch=1)
        del others, calls
    rng = np.random.default_rng(SEED)
    for count in (3, rows // 100, rows // 2):
        allowed = np.sort(rng.choice(rows, count, replace=False))
        mask = np.zeros(rows, dtype=np.bool_)
        mask[allowed] = True
        calls = {"rows": partial(_search, index, args.k, allowed), "mask": partial(_search, index, args.k, mask)}
        calls["exact"] = partial(_search, exact, args.k, mask)
        same = recall(index.search(few, args.k, mask)[0], exact.search(few, args.k, mask)[0])
        write("filtered", timed(calls, few, 1), batch=1, allowed=count, recall=same)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        _bench_kept(index, Path(folder), queries, args.k, write)


def _search(index: VectorIndex, k: int, allowed: NDArray[Any] | None, queries: Floats) -> object:
    return index.search(queries, k, allowed)


def _bench_kept(index: ApproximateIndex, folder: Path, queries: Floats, k: int, write: Callable[..., None]) -> None:
    begin = time.perf_counter()
    save(index, folder)
    saved = time.perf_counter()
    again = load(folder)
    loaded = time.perf_counter()
    assert again is not None
    size = sum(file.stat().st_size for file in folder.iterdir())
    results: dict[str, Any] = timed({"loaded": partial(_search, again, k, None)}, queries, 1)
    times = {"save_s": round(saved - begin, 2), "load_s": round(loaded - saved, 2)}
    write("kept", {**results, **times, "file_mb": round(size / 1e6), "fresh_process_mb": resident(folder)}, batch=1)


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--kinds", nargs="+", choices=sorted(KINDS), default=["clustered", "gaussian"])
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--faiss", action="store_true", help="Faiss beside it; not among our dependencies")
    parser.add_argument("--folder", type=Path, help="where the index is kept for a moment; default: the system's")
    parser.add_argument("--output", type=Path, help="append the lines to this file too")
    args = parser.parse_args()
    output = Output(args.output)
    for rows in args.rows:
        for kind in args.kinds:
            bench(kind, rows, args, output)


if __name__ == "__main__":
    main()
