"""A soak test of the server: 50 clients for five minutes, while adapters are added, updated and deleted each second.

    python benchmarks/soak_server.py --minutes 5 --clients 50

The adapters are five of the demo's. A server process of its own serves a pool in a temporary folder. Requests name an
adapter or a composition, or leave the choice to the server; some clients go before they have their answer, and bad
requests are mixed in. Answers are compared with those of the engine alone, made beforehand, by their text and their
tokens' log-probabilities. One JSON line; the exit status is 1 if an answer was wrong, a request hung, an error was not
in the right form, the server did not come to rest, or its memory grew too much.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import shutil
import sys
import tempfile
from pathlib import Path

from common import Output
from loraretriever.evaluate.demo import demo_folder
from loraretriever.evaluate.server_drivers import server
from loraretriever.evaluate.server_soak import CONTENTS, Options, SoakReport, initial_contents, make_references, soak
from loraretriever.evaluate.server_soak_answers import References
from loraretriever.evaluate.server_soak_changes import Content
from loraretriever.evaluate.tasks import read_examples
from loraretriever.models import DEFAULT_BASE_MODEL
from loraretriever.pipeline import LoraRetriever
from loraretriever.pool import Pool
from loraretriever.pool.samples import SAMPLES_FILE

ADAPTERS = ("wikisql", "translate_en_es", "movie_sentiment", "nl2bash", "mawps_expression")
# Few slots, so that adapters leave them for others; memory small enough that all of it is in use after the warm-up.
SETTINGS = {"dtype": "float32", "slots": 4, "cache_mib": 128, "prefix_mib": 32, "host_mib": 64}


def read_contents(folder: Path) -> tuple[list[Content], list[str]]:
    """The adapters, in a copy, and the demo's prompt for each."""
    contents = []
    with Pool.open(demo_folder() / "pool") as demo:
        for name in ADAPTERS:
            target = folder / name
            shutil.copytree(demo.get(name).folder, target, ignore=shutil.ignore_patterns(SAMPLES_FILE))
            contents.append(Content(name, target, tuple(sample.text for sample in demo.samples(name))))
    examples = read_examples(demo_folder() / "prompts.jsonl")
    return contents, [example.inputs for example in examples if example.task in ADAPTERS]


def make_pool(folder: Path, contents: dict[str, Content]) -> Path:
    """A pool with these adapters."""
    with Pool.create(folder, DEFAULT_BASE_MODEL) as pool:
        for name, content in contents.items():
            pool.add(content.folder, name=name, samples=content.samples)
    return folder


def run(folder: Path, options: Options) -> SoakReport:
    """Make the references, then start the server and begin."""
    contents, prompts = read_contents(folder / "contents")
    references = _references(folder, contents, prompts, options.max_tokens)
    pool = make_pool(folder / "pool", initial_contents(contents))
    variables = {f"LORARETRIEVER_{name.upper()}": str(value) for name, value in SETTINGS.items()}
    arguments = ["--pool", str(pool), "--log-level", "error"]
    with server(arguments, folder, variables) as (process, url):
        return asyncio.run(soak(url, contents, prompts, references, options, process.pid))


def _references(folder: Path, contents: list[Content], prompts: list[str], max_tokens: int) -> References:
    pool = make_pool(folder / "references", {content.name: content for content in contents})
    with LoraRetriever.open(pool, **SETTINGS) as retriever:
        return make_references(retriever, contents, prompts, max_tokens)


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--change-seconds", type=float, default=1.0, help="from one round of changes to the next")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds after which a request hangs")
    parser.add_argument("--growth-mib", type=float, default=64.0, help="by which memory may grow after the warm-up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="append the line to this file too")
    args = parser.parse_args()
    options = Options(
        seconds=60 * args.minutes,
        clients=args.clients,
        change_seconds=args.change_seconds,
        patience=args.patience,
        warm_up=12 * args.minutes,
        growth_mib=args.growth_mib,
        seed=args.seed,
    )
    assert len(ADAPTERS) == CONTENTS
    with tempfile.TemporaryDirectory(prefix="loraretriever-soak-") as folder:
        report = run(Path(folder), options)
    results = dataclasses.asdict(report)
    setup = {**dataclasses.asdict(options), **SETTINGS, "adapters": ADAPTERS, "processors": os.cpu_count()}
    Output(args.output).write(
        {"benchmark": "soak_server", "setup": setup, "is_well": report.is_well, "results": results}
    )
    sys.exit(0 if report.is_well else 1)


if __name__ == "__main__":
    main()
