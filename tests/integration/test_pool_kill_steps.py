"""Kills at every step: one child per step of a change, killed when it comes to that step."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loraretriever.pool import Pool
from tiny import TINY_BASE, TINY_SPEC, write_peft_folder

# Reads "<change> <number>", makes the change in a child that kills itself before that step, and answers with the
# child's exit: 0 when the change took fewer steps. Steps are the calls that change files or commit.
WORKER = """
import os, signal, sys
from loraretriever.pool import Pool
location, first, second = sys.argv[1:]
changes = {
    "add": lambda pool: pool.add(first, name="one", samples=["a", "b"]),
    "revise": lambda pool: pool.add(second, name="one", samples=["c", "d"]),
    "resample": lambda pool: pool.add(first, name="one", samples=["c", "d"]),
    "retire": lambda pool: pool.remove("one"),
    "remove": lambda pool: (setattr(pool, "grace_seconds", 0), pool.remove("one")),
}
STEPS = {"mkdir", "open", "fsync", "rename", "unlink", "rmdir", "commit"}
left = 0

def count(frame, event, argument):
    global left
    if event == "c_call" and argument.__name__ in STEPS:
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

for line in sys.stdin:
    change, number = line.split()
    left = int(number)
    child = os.fork()
    if child == 0:
        with Pool.open(location) as pool:
            sys.setprofile(count)
            changes[change](pool)
            sys.setprofile(None)
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""
Ask = Callable[[str, int], int]


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    return [write_peft_folder(tmp_path / name, seed=seed) for seed, name in enumerate(["first", "second"])]


@pytest.fixture(params=["store", "plain"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    location = tmp_path / "pool"
    if request.param == "store":
        Pool.create(location, TINY_BASE, spec=TINY_SPEC).close()
    else:
        write_peft_folder(location / "other", samples=["a"], seed=7)
        with Pool.open(location) as pool:
            assert pool.check_shapes(TINY_SPEC) == []
    return location


@pytest.fixture
def ask(location: Path, sources: list[Path]) -> Iterator[Ask]:
    command = [sys.executable, "-c", WORKER, str(location), *map(str, sources)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin and stdout

        def ask(change: str, step: int) -> int:
            stdin.write(f"{change} {step}\n")
            stdin.flush()
            return int(stdout.readline())

        yield ask


State = tuple[str, list[str]] | None


def state(pool: Pool) -> State:
    """The weights and the samples of the adapter, or None."""
    if all(adapter.name != "one" for adapter in pool.list()):
        return None
    pool.weights("one")
    return pool.get("one").digest, [sample.text for sample in pool.samples("one")]


def prepare(pool: Pool, before: State, source: Path) -> None:
    """Bring the adapter to the state before the change."""
    if state(pool) == before:
        return
    if state(pool) is not None:
        pool.remove("one")
    if before is not None:
        pool.add(source, name="one", samples=before[1])


@pytest.mark.slow
@pytest.mark.parametrize("change", ["add", "revise", "resample", "retire", "remove"])
def test_a_change_that_is_killed_at_any_step_is_made_or_not(
    location: Path, sources: list[Path], ask: Ask, change: str
) -> None:
    with Pool.open(location) as pool:
        pool.grace_seconds = 0
        digests = [pool.add(source, name="one").adapter.digest for source in sources]
        pool.remove("one")
        old: State = (digests[0], ["a", "b"])
        before = None if change == "add" else old
        after: State = {
            "add": old,
            "revise": (digests[1], ["c", "d"]),
            "resample": (digests[0], ["c", "d"]),
            "retire": None,
            "remove": None,
        }[change]
        seen: list[Any] = []
        exit_status, step = -1, 0
        while exit_status != 0:
            pool.refresh()
            prepare(pool, before, sources[0])
            exit_status = ask(change, step)
            assert os.WIFEXITED(exit_status) == (exit_status == 0), "it was killed, or made the change"
            with Pool.open(location) as again:
                seen.append(state(again))
                assert again.verify() == [], step
            step += 1
    assert step > (2 if change == "retire" else 3)
    turn = seen.index(after)
    assert all(each == before for each in seen[:turn])
    assert all(each == after for each in seen[turn:])
