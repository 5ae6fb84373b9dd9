"""Several processes use one pool at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from loraretriever.pool import Pool
from places import Place, contents
from tiny import TINY_SPEC, write_peft_folder

ADD = """
import sys
from loraretriever.pool import Pool
prefix, location, *sources = sys.argv[1:]
with Pool.open(location) as pool:
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(6):
        pool.add(sources[number % 2], name=f"{prefix}{number}", samples=["a", "b"])
        pool.add(sources[number % 2], name="shared", samples=[prefix, str(number)])
    pool.remove(f"{prefix}0")
"""


def start(prefix: str, location: Path | str, sources: list[Path]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", ADD, prefix, str(location), *map(str, sources)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def go(worker: subprocess.Popen[str]) -> None:
    assert worker.stdin
    worker.stdin.write("\n")
    worker.stdin.flush()


def make_sources(folder: Path) -> list[Path]:
    return [write_peft_folder(folder / name, seed=seed) for seed, name in enumerate(["even", "odd"])]


def test_one_process_reads_while_others_add(place: Place, tmp_path: Path) -> None:
    sources = make_sources(tmp_path)
    with place.create() as pool:
        workers = [start(prefix, pool.location, sources) for prefix in ("x", "y")]
        for worker in workers:
            assert worker.stdout and worker.stdout.readline() == "ready\n"
        changes = [pool.change]
        for worker in workers:
            go(worker)
        while any(worker.poll() is None for worker in workers):
            changes.append(pool.change)
            for adapter in pool.list():
                assert adapter.samples == 2, "a reader sees whole adapters only"
            for samples in pool.missing_embeddings("e").values():
                assert len(samples) == 2
        for worker in workers:
            worker.communicate()
        assert [worker.returncode for worker in workers] == [0, 0]
        assert changes == sorted(changes)
        assert pool.change > changes[0]
        expected = {f"{prefix}{number}" for prefix in "xy" for number in range(1, 6)} | {"shared"}
        assert {adapter.name for adapter in pool.list()} == expected
        assert pool.verify() == []
        assert contents(pool) == {adapter.digest for adapter in pool.list()}


def test_processes_add_to_a_plain_folder(tmp_path: Path) -> None:
    sources = make_sources(tmp_path)
    write_peft_folder(tmp_path / "plain/first", seed=3)
    with Pool.open(tmp_path / "plain") as pool:
        pool.check_shapes(TINY_SPEC)
        workers = [start(prefix, pool.location, sources) for prefix in ("x", "y")]
        for worker in workers:
            worker.communicate("\n")
        assert [worker.returncode for worker in workers] == [0, 0]
        assert len(pool.list()) == 12
        assert pool.verify() == []
