"""A process that is killed while it adds and removes leaves a pool that is whole."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import text

from loraretriever.pool import Pool
from places import Place, contents
from tiny import TINY_SPEC, write_peft_folder

# Imports once, then forks a child for each line it reads. The child opens the pool, tells its process id, and goes
# through rounds of six changes until it is killed.
WORKER = """
import os, sys
from loraretriever.pool import Pool
location, source, revised = sys.argv[1:]

def work():
    with Pool.open(location) as pool:
        pool.grace_seconds = 0
        print(os.getpid(), flush=True)
        while True:
            pool.add(source, name="one", samples=["a", "b"])
            pool.add(source, name="two", samples=["a", "b"])
            pool.add(revised, name="one")
            pool.add(source, name="two", samples=["c", "d"])
            pool.remove("one")
            pool.remove("two")
            print("round", flush=True)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        work()
    os.waitpid(child, 0)
    print("killed", flush=True)
"""


class Workers:
    """Starts workers on one pool, one after the other, and kills them."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin and process.stdout
        self._stdin, self._stdout = process.stdin, process.stdout

    def start(self) -> int:
        """Start a worker; returns its process id when it has opened the pool."""
        self._stdin.write("go\n")
        self._stdin.flush()
        return int(self._stdout.readline())

    def kill(self, worker: int) -> None:
        os.kill(worker, signal.SIGKILL)
        while self._stdout.readline() != "killed\n":
            pass

    def round_seconds(self) -> float:
        """How long a worker takes for a round, its first one aside."""
        worker = self.start()
        assert self._stdout.readline() == "round\n"
        begin = time.monotonic()
        assert self._stdout.readline() == "round\n"
        seconds = time.monotonic() - begin
        self.kill(worker)
        return seconds


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    return [write_peft_folder(tmp_path / name, seed=seed, rank=16) for seed, name in enumerate(["source", "revised"])]


@contextmanager
def working(location: Path | str, sources: list[Path]) -> Iterator[Workers]:
    command = [sys.executable, "-c", WORKER, str(location), *map(str, sources)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Workers(process)


def check(location: Path | str, digests: set[str]) -> frozenset[str]:
    """Look at all of the pool; returns the names in it."""
    with Pool.open(location) as pool:
        assert pool.verify() == []
        for adapter in pool.list():
            assert adapter.digest in digests
            assert adapter.samples == 2
            assert len(pool.weights(adapter.name).modules) == 4
        return frozenset(adapter.name for adapter in pool.list())


def kill_often(location: Path | str, sources: list[Path], kills: int) -> set[frozenset[str]]:
    """Kill workers at random moments of a round; returns the sets of names found afterwards."""
    with Pool.open(location) as pool:
        digests = {adapter.digest for adapter in pool.list()}
        digests |= {pool.add(source, name="probe").adapter.digest for source in sources}
        pool.grace_seconds = 0
        pool.remove("probe")
    found = set()
    with working(location, sources) as workers:
        round_seconds = workers.round_seconds()
        rng = random.Random(0)
        for _ in range(kills):
            worker = workers.start()
            time.sleep(rng.uniform(0, round_seconds))
            workers.kill(worker)
            found.add(check(location, digests))
    return found


@pytest.mark.slow
def test_kills_at_random_moments_leave_a_whole_pool(place: Place, sources: list[Path]) -> None:
    with place.create() as pool:
        kill_often(place.location, sources, 50)
        pool.grace_seconds = 0
        for adapter in pool.list():
            pool.remove(adapter.name)
        with pool._database.write() as session:  # as if the time were over for what killed adds have stored
            session.execute(text("UPDATE removed SET expires = '2000-01-01 00:00:00.000000'"))
        pool.add(sources[0], name="last")
        assert contents(pool) == {pool.get("last").digest}, "leftovers are swept"
        assert list((pool.state_folder / "staging").iterdir()) == []


@pytest.mark.slow
def test_kills_at_random_moments_leave_a_whole_plain_folder(tmp_path: Path, sources: list[Path]) -> None:
    location = tmp_path / "pool"
    write_peft_folder(location / "first", samples=["a", "b"], seed=7)
    with Pool.open(location) as pool:
        assert pool.check_shapes(TINY_SPEC) == []
    found = kill_often(location, sources, 25)
    assert all("first" in names for names in found)
