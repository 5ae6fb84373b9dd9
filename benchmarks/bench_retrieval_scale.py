"""Time of the hybrid retriever without the encoder, for many adapters, and of adding and removing one.

    python benchmarks/bench_retrieval_scale.py --adapters 1000 10000

Adapters are synthetic: each belongs to one of 500 topics in a space of 64 effective dimensions, has 20 samples that
scatter around its own centre in all 1,152, and texts of 40 words, of which half come from the words of its topic.
Queries are new samples. `recall8` is the share of the 8 best of an exhaustive scoring that the retriever has among its
8 best; `own_first` the share of queries whose own adapter comes first.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import numpy as np

from common import SEED, Output
from loraretriever.retrieve import block, sparse
from loraretriever.retrieve.model import Member, Parts
from loraretriever.retrieve.snapshot import Snapshot
from loraretriever.types import AdapterFilter

DIMENSION, EFFECTIVE, TOPICS, SAMPLES, WORDS = 1152, 64, 500, 20, 40
QUERIES = 200


class Synthetic:
    """Draws members and queries."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(SEED)
        basis, _ = np.linalg.qr(self._rng.normal(size=(DIMENSION, EFFECTIVE)))
        self._basis = basis.T.astype(np.float32)
        self._topics = self._rng.normal(size=(TOPICS, EFFECTIVE)).astype(np.float32)
        self._centres: list[np.ndarray] = []

    def vectors(self, adapter: int, count: int) -> np.ndarray:
        """Unit vectors around the adapter's centre. Shape: (count, DIMENSION)."""
        noise = self._rng.normal(size=(count, DIMENSION)).astype(np.float32) * (6 / DIMENSION**0.5)
        rows = self._centres[adapter] @ self._basis + noise
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def texts(self, adapter: int, count: int) -> list[str]:
        """Words, half of them of the adapter's topic."""
        topic = adapter % TOPICS
        common = self._rng.integers(0, 5000, (count, WORDS // 2))
        special = self._rng.integers(0, 60, (count, WORDS // 2)) + 10_000 + 60 * topic
        return [" ".join(f"w{word}" for word in row) for row in np.concatenate([common, special], axis=1)]

    def member(self, adapter: int) -> Member:
        """An adapter with its samples."""
        topic = self._topics[adapter % TOPICS]
        self._centres.append(topic + 0.5 * self._rng.normal(size=EFFECTIVE).astype(np.float32))
        none = np.zeros((0, DIMENSION), dtype=np.float16)
        vectors = self.vectors(adapter, SAMPLES).astype(np.float16)
        terms = sparse.count_terms(self.texts(adapter, SAMPLES))
        tags, tenant = frozenset({f"t{adapter % 10}"}), f"tenant{adapter // 3}"
        return Member(f"a{adapter:07}", tags, tenant, "base", vectors, terms, none, sparse.count_terms([]))


def timed(calls: list[float]) -> dict[str, float]:
    """Milliseconds."""
    p50, p99 = np.quantile(np.array(calls) * 1e3, [0.5, 0.99])
    return {"ms_p50": round(float(p50), 3), "ms_p99": round(float(p99), 3), "ms_best": round(min(calls) * 1e3, 3)}


def measure(count: int, output: Output) -> None:
    """All measurements for a pool of this size."""
    synthetic = Synthetic()
    members = [synthetic.member(adapter) for adapter in range(count)]
    start = time.perf_counter()
    snapshot = Snapshot.learnt(members, Parts())
    setup = {"adapters": count, "samples": SAMPLES, "dimension": DIMENSION}
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    learnt = {"learn_s": round(time.perf_counter() - start, 2), "peak_rss_mb": round(rss)}
    output.write({"benchmark": "retrieval-scale-learn", "setup": setup, "results": learnt})

    own = np.random.default_rng(1).integers(0, count, QUERIES)
    queries = [(synthetic.vectors(a, 1), synthetic.texts(a, 1)) for a in own]
    filters = {
        "all": AdapterFilter(),
        "tenant of 3": AdapterFilter(tenant="tenant7"),
        "tag of a tenth": AdapterFilter(tags=frozenset({"t3"})),
    }
    for name, wanted in filters.items():
        snapshot.rank(*queries[0], wanted)
        seconds, found = [], []
        for vector, texts in queries:
            start = time.perf_counter()
            found.append(snapshot.rank(vector, texts, wanted)[0].names[:8])
            seconds.append(time.perf_counter() - start)
        results = timed(seconds)
        if name == "all":
            results["own_first"] = float(np.mean([names[0] == f"a{a:07}" for names, a in zip(found, own, strict=True)]))
            results["recall8"] = recall(snapshot, queries, found)
        output.write({"benchmark": "retrieval-scale-rank", "setup": {**setup, "filter": name}, "results": results})

    adding, removing = [], []
    current = snapshot
    for each in range(10):
        new = synthetic.member(count + each)
        start = time.perf_counter()
        after = current.changed({new.name: new}, ())
        adding.append(time.perf_counter() - start)
        start = time.perf_counter()
        assert after is not None
        removed = after.changed({}, {members[each].name})
        removing.append(time.perf_counter() - start)
        assert removed is not None
        current = removed
    for name, taken in (("add one", adding), ("remove one", removing)):
        output.write({"benchmark": f"retrieval-scale-{name}", "setup": setup, "results": timed(taken)})


def recall(snapshot: Snapshot, queries: list[tuple[np.ndarray, list[str]]], found: list[list[str]]) -> float:
    """Against the same scores of 20,000 candidates: of all members, in pools of no more."""
    kept = block.CANDIDATES
    block.CANDIDATES = 20_000
    try:
        every = [snapshot.rank(*query, AdapterFilter())[0].names[:8] for query in queries[:50]]
    finally:
        block.CANDIDATES = kept
    return round(float(np.mean([len({*a} & {*b}) / 8 for a, b in zip(every, found, strict=False)])), 4)


def main() -> None:
    """Parse arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--output", type=Path, help="a JSON lines file to append to")
    args = parser.parse_args()
    output = Output(args.output)
    for count in args.adapters:
        measure(count, output)


if __name__ == "__main__":
    main()
