"""A shared pool: how soon another process uses a change, what reading the pool costs, and what a fetch costs.

    python benchmarks/bench_shared_pool.py --changes 50 [--url postgresql://... --storage s3://...]

Without a URL it starts the tests' PostgreSQL on this machine, with its data in a temporary folder and no fsync, and
keeps the files in a folder. One JSON line per measurement:

- `seen`: from the end of a `Pool.set_enabled` here until `change` is another number in another process, which follows
  the pool.
- `routed`: from the end of a `Pool.add` until that process has routed a prompt to the new adapter: it reads the adapter
  from the pool, embeds its samples, stores them, and ranks. It asks for the prompt again and again, as a client would.
- `read`: one `change` and one `get`, with SQLite, with PostgreSQL, and with PostgreSQL followed.
- `weights`: one `Pool.weights`, from the storage and from this host's cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median, quantiles

from common import Output, alternate

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from loraretriever.evaluate.demo import demo_folder
from loraretriever.evaluate.tasks import read_examples
from loraretriever.pool import Pool
from loraretriever.pool.cache import discard_unused
from postgres_server import PostgresServer

# Reads an adapter's name and a prompt for it, and tells when the next change came; without a name that of any change,
# with one that when a prompt was routed to the adapter.
FOLLOWER = """
import json, sys, time
from loraretriever.pipeline import LoraRetriever
with LoraRetriever.open(sys.argv[1]) as retriever:
    retriever.route(["Is everything there?"])
    for line in sys.stdin:
        name, prompt = json.loads(line)
        change = retriever.pool.change
        print("waiting", flush=True)
        while retriever.pool.change == change:
            time.sleep(0.0002)
        while name and all(hit.adapter != name for hit in retriever.route([prompt], threshold=0.0)[0].hits):
            pass
        print(time.time(), flush=True)
"""


class Follower:
    """Another process that follows the pool."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin and process.stdout
        self._stdin, self._stdout = process.stdin, process.stdout

    def seconds(self, change: Callable[[], object], name: str = "", prompt: str = "") -> float:
        """From the end of a change until the process has it."""
        self._stdin.write(json.dumps([name, prompt]) + "\n")
        self._stdin.flush()
        assert self._stdout.readline() == "waiting\n"
        change()
        done = time.time()
        return float(self._stdout.readline()) - done


def measure_changes(pool: Pool, url: str, count: int, output: Output) -> None:
    """Disables, enables, removes and adds each adapter of the demo in its turn."""
    folder = demo_folder()
    prompts = {example.task: example.inputs for example in read_examples(folder / "prompts.jsonl")}
    names = [each.name for each in sorted((folder / "pool").iterdir()) if each.name in prompts]
    for name in names:
        pool.add(folder / "pool" / name)
    seen, routed = [], []
    command = [sys.executable, "-c", FOLLOWER, url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        follower = Follower(process)
        for number in range(count):
            name = names[number % len(names)]
            seen += [follower.seconds(partial(pool.set_enabled, name, value)) for value in (False, True)]
            pool.remove(name)
            time.sleep(1.0)  # until the change has come, and all is learnt
            routed.append(follower.seconds(partial(pool.add, folder / "pool" / name), name, prompts[name]))
        process.stdin.close()
    for kind, values in (("seen", seen), ("routed", routed)):
        figures = {"median": median(values), "p95": quantiles(values, n=20)[-1], "worst": max(values)}
        found = {f"{figure}_ms": round(1e3 * value, 2) for figure, value in figures.items()}
        output.write({"name": kind, "changes": len(values), "adapters": len(names), **found})


def measure_reads(pool: Pool, folder: Path, output: Output) -> None:
    """Three pools with the same adapter, in their turns."""
    name = pool.list()[0].name
    with ExitStack() as stack:
        local = stack.enter_context(Pool.create(folder / "local", pool.base_model, check_base=False))
        local.add(demo_folder() / "pool" / name)
        followed = stack.enter_context(Pool.open(str(pool.location)))
        followed.watch()
        pools = {"sqlite": local, "postgres": pool, "postgres followed": followed}
        changes = alternate({kind: partial(getattr, each, "change") for kind, each in pools.items()}, 300)
        gets = alternate({kind: partial(each.get, name) for kind, each in pools.items()}, 300)
    for kind in pools:
        found = {f"{what}_{figure}": value for what, times in (("change", changes), ("get", gets))
                 for figure, value in figures(times[kind], 1e6, "us").items()}  # fmt: skip
        output.write({"name": "read", "pool": kind, **found})


def measure_weights(pool: Pool, output: Output) -> None:
    """One adapter, deleted from the cache before each fetch."""
    adapter = pool.list()[0]
    load = partial(pool.weights, adapter.name, adapter.digest)

    def fetch() -> None:
        discard_unused(adapter.folder, pool.state_folder)
        load()

    times = alternate({"fetched": fetch, "cached": load}, 30)
    for kind, each in times.items():
        size = round(adapter.size / (1 << 20), 2)
        output.write({"name": "weights", "mib": size, "from": kind, **figures(each, 1e3, "ms")})


def figures(seconds: list[float], scale: float, unit: str) -> dict[str, float]:
    """The median, and the best: the one to trust while other work uses the machine."""
    return {f"median_{unit}": round(scale * median(seconds), 2), f"best_{unit}": round(scale * min(seconds), 2)}


@contextmanager
def shared_pool(url: str | None, storage: str | None, folder: Path) -> Iterator[tuple[str, Pool]]:
    """An empty pool and its URL."""
    with ExitStack() as stack:
        if url is None:
            server = PostgresServer()
            stack.callback(server.close)
            url, storage = server.new_database(), f"file://{folder}/storage"
        base_model = json.loads((next((demo_folder() / "pool").glob("*/adapter_config.json"))).read_text())
        name = base_model["base_model_name_or_path"]
        yield url, stack.enter_context(Pool.create(url, name, storage=storage, check_base=False))


def main() -> None:
    """Read the arguments, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", type=int, default=50)
    parser.add_argument("--url", help="an empty database of a PostgreSQL server")
    parser.add_argument("--storage", help="with --url: where the adapters' files go")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    output = Output(options.output)
    with (
        tempfile.TemporaryDirectory() as folder,
        shared_pool(options.url, options.storage, Path(folder)) as (url, pool),
    ):
        measure_changes(pool, url, options.changes, output)
        measure_reads(pool, Path(folder), output)
        measure_weights(pool, output)


if __name__ == "__main__":
    main()
