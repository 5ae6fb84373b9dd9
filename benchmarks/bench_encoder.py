"""Time and accuracy of the sentence encoder, by token window and precision, against sentence-transformers' own encode.

    python benchmarks/bench_encoder.py --prompts prompts.jsonl      each prompt alone, 32 together, and one of 1 MB
    python benchmarks/bench_encoder.py --samples samples.jsonl      leave-one-out accuracy of finding a sample's adapter

One JSON line per measurement. In a prompts file each line has the text under `inputs` or `prompt`; a samples file also
has `adapter`. Prompts alone are timed in turns, contender by contender, in several rounds: `p50_ms` and `p99_ms` are
over prompts and rounds; `best_*` take each prompt's fastest round, which is the figure to trust while other work uses
the machine. With `--clock cpu --threads 1` the figures are processor time.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import CLOCKS, SEED, Output, alternate, summarize
from loraretriever.config import DEFAULT_ENCODER, PAPER_INSTRUCTION
from loraretriever.models import resolve_encoder
from loraretriever.retrieve import SentenceEncoder

INSTRUCTIONS = {"none": "", "paper": PAPER_INSTRUCTION}
SHRINKAGE = 0.2


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contenders(args: argparse.Namespace) -> dict[str, Callable[[Sequence[str]], np.ndarray]]:
    """Encoders by name: sentence-transformers as it is, and ours for each window and precision."""
    from sentence_transformers import SentenceTransformer

    plain = SentenceTransformer(resolve_encoder(args.encoder), device=args.device)
    found = {"sentence-transformers": partial(plain.encode, normalize_embeddings=True, show_progress_bar=False)}
    for precision, window in product(args.precisions, args.windows):
        encoder = SentenceEncoder(args.encoder, "", args.device, max_tokens=window, precision=precision)
        found[f"{precision}/{window}"] = encoder.encode
    return found


def time_each(
    calls: Mapping[str, Callable[[Sequence[str]], object]], prompts: Sequence[str], rounds: int, clock: str
) -> dict[str, np.ndarray]:
    """Milliseconds. Shape: (rounds, prompts) for each contender."""
    now = CLOCKS[clock]
    taken = {name: np.zeros((rounds + 1, len(prompts))) for name in calls}
    for turn, (column, prompt) in product(range(rounds + 1), enumerate(prompts)):
        for name, call in calls.items():
            start = now()
            call([prompt])
            taken[name][turn, column] = 1e3 * (now() - start)
    return {name: times[1:] for name, times in taken.items()}  # the first round warms up


def percentiles(times: np.ndarray, baseline: np.ndarray) -> dict[str, float]:
    """What a reader wants to know of the times of many prompts, and of those relative to the baseline's."""
    best = times.min(0)
    figures = {
        "p50_ms": np.percentile(times, 50),
        "p90_ms": np.percentile(times, 90),
        "p99_ms": np.percentile(times, 99),
        "best_p50_ms": np.percentile(best, 50),
        "best_p99_ms": np.percentile(best, 99),
        "ratio_median": np.median(baseline) / np.median(times),
        "ratio_best": baseline.min(0).sum() / best.sum(),
    }
    return {name: round(float(value), 3) for name, value in figures.items()}


def bench_time(args: argparse.Namespace, output: Output) -> None:
    """Single prompts, a batch of them, and a huge one."""
    records = read_lines(args.prompts)
    prompts = [record.get("inputs") or record["prompt"] for record in records]
    chosen = random.Random(SEED).sample(prompts, min(args.count, len(prompts)))
    calls = contenders(args)
    setup = {"encoder": args.encoder, "prompts": args.prompts.name, "count": len(chosen), "device": args.device}
    setup |= {"clock": args.clock, "rounds": args.rounds}
    times = time_each(calls, chosen, args.rounds, args.clock)
    base = times["sentence-transformers"]
    results = {name: percentiles(taken, base) for name, taken in times.items()}
    output.write({"benchmark": "encoder-single", "setup": setup, "results": results})
    for name, texts in {"encoder-batch-32": chosen[:32], "encoder-1-mb": ["word " * 200_000]}.items():
        seconds = alternate({key: partial(call, texts) for key, call in calls.items()}, args.rounds, args.clock)
        results = summarize(seconds, "sentence-transformers")
        output.write({"benchmark": name, "setup": setup, "results": results})


def accuracy(vectors: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Per cent of samples whose adapter comes first, or among the first three, when the sample is left out.

    Shape: vectors (samples, dimension), labels (samples,) from 0.
    Semantics: cosine: cos(m, x); whitened: m'S⁻¹x - m'S⁻¹m / 2, with m the mean of an adapter's other samples and S
    the covariance within adapters, shrunk towards the mean of its diagonal.
    """
    x = vectors.astype(np.float64)
    counts = np.bincount(labels)[:, None]
    means = np.stack([x[labels == label].mean(0) for label in range(len(counts))])
    centred = x - means[labels]
    within = centred.T @ centred / (len(x) - len(means))
    level = np.trace(within) / len(within)
    inverse = np.linalg.inv((1 - SHRINKAGE) * within + SHRINKAGE * level * np.eye(len(within)))
    ranks: dict[str, list[int]] = {"cosine": [], "whitened": []}
    for text, label in zip(x, labels, strict=True):
        others = means.copy()
        others[label] = (counts[label] * means[label] - text) / (counts[label] - 1)
        cosines = others @ text / np.linalg.norm(others, axis=1)
        whitened = others @ (inverse @ text) - 0.5 * np.einsum("ij,ij->i", others @ inverse, others)
        for name, scores in {"cosine": cosines, "whitened": whitened}.items():
            ranks[name].append(int((scores > scores[label]).sum()))
    return {
        f"{name}_top{k}": round(100 * float(np.mean(np.array(found) < k)), 2)
        for name, found in ranks.items()
        for k in (1, 3)
    }


def bench_accuracy(args: argparse.Namespace, output: Output) -> None:
    """Leave one out, over windows, precisions and instructions."""
    records = read_lines(args.samples)
    names = sorted({record["adapter"] for record in records})
    labels = np.array([names.index(record["adapter"]) for record in records])
    texts = [record["inputs"] for record in records]
    for precision, window, instruction in product(args.precisions, args.windows, INSTRUCTIONS):
        encoder = SentenceEncoder(
            args.encoder, INSTRUCTIONS[instruction], args.device, max_tokens=window, precision=precision
        )
        setup = {"encoder": args.encoder, "samples": len(texts), "adapters": len(names), "window": window}
        setup |= {"precision": precision, "instruction": instruction}
        results = accuracy(encoder.encode(texts), labels)
        output.write({"benchmark": "encoder-accuracy", "setup": setup, "results": results})


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompts", type=Path, help="JSON lines of prompts, to be timed")
    what.add_argument("--samples", type=Path, help="JSON lines of samples, for accuracy")
    parser.add_argument("--encoder", default=DEFAULT_ENCODER, help="a folder or hub id")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--windows", type=int, nargs="+", default=[256, 128, 96, 64], help="tokens")
    parser.add_argument("--precisions", nargs="+", default=["float32", "int8"])
    parser.add_argument("--count", type=int, default=200, help="how many prompts to time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's own choice")
    parser.add_argument("--clock", default="wall", choices=sorted(CLOCKS), help="cpu: with --threads 1")
    parser.add_argument("--output", type=Path, help="append the lines to this file too")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    (bench_time if args.prompts else bench_accuracy)(args, Output(args.output))


if __name__ == "__main__":
    main()
