"""Token buckets: what flows in, what is owed, and what processes share."""

from __future__ import annotations

import logging
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from loraretriever.errors import PoolError
from loraretriever.pool import Key
from loraretriever.server.limits import FILE, Limiter


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def key(requests: int | None = None, tokens: int | None = None, id_: str = "k") -> Key:
    return Key(id_, id_, frozenset({"generate"}), None, datetime.now(UTC), None, None, requests, tokens, None)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", "file"])
def limiter(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[Limiter]:
    limiter = Limiter(tmp_path / FILE if request.param == "file" else None, clock)
    yield limiter
    limiter.close()


def test_without_limits_nothing_is_counted(limiter: Limiter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limiter, "_connection", None)
    for _ in range(100):
        assert limiter.admit(key()) is None
        limiter.charge(key(), 10**9)
    assert limiter._seen == {}


def test_a_minutes_requests_may_come_at_once(limiter: Limiter, clock: Clock) -> None:
    slow = key(requests=3)
    assert [limiter.admit(slow) for _ in range(5)] == [None, None, None, 20.0, 20.0]
    clock.now += 15
    assert limiter.admit(slow) == pytest.approx(5)
    clock.now += 5
    assert [limiter.admit(slow) for _ in range(2)] == [None, 20.0]
    clock.now += 3600
    assert [limiter.admit(slow) for _ in range(4)] == [None, None, None, 20.0], "it holds no more than a minute's"
    assert limiter.admit(key(requests=3, id_="another")) is None


def test_whoever_waits_as_long_as_told_is_admitted(limiter: Limiter, clock: Clock) -> None:
    odd = key(requests=7, tokens=11)
    for _ in range(200):
        wait = limiter.admit(odd)
        if wait is None:
            limiter.charge(odd, 3)
        else:
            assert wait > 0
            clock.now += wait
            assert limiter.admit(odd) is None


def test_tokens_are_taken_afterwards_and_may_be_owed(limiter: Limiter, clock: Clock) -> None:
    heavy = key(tokens=60)
    assert [limiter.admit(heavy) for _ in range(3)] == [None] * 3, "what they will cost is not known"
    limiter.charge(heavy, 30)
    limiter.charge(heavy, 0)
    assert limiter.admit(heavy) is None
    limiter.charge(heavy, 150)
    assert limiter.admit(heavy) == pytest.approx(121), "120 are owed, and one must be there"
    clock.now += 121
    assert limiter.admit(heavy) is None
    limiter.charge(heavy, 1)
    assert limiter.admit(heavy) == pytest.approx(1)


def test_a_refused_request_costs_nothing(limiter: Limiter, clock: Clock) -> None:
    both = key(requests=2, tokens=60)
    assert limiter.admit(both) is None
    limiter.charge(both, 90)
    assert [limiter.admit(both) for _ in range(5)] == [pytest.approx(31)] * 5
    clock.now += 31
    assert limiter.admit(both) is None, "the request that was left is still there"
    assert limiter.admit(both) is None, "and half a minute brought another"
    assert limiter.admit(both) == pytest.approx(30)


def test_a_clock_that_begins_anew(limiter: Limiter, clock: Clock) -> None:
    one = key(requests=1)
    assert limiter.admit(one) is None
    clock.now = 3.0  # the host was started again
    assert limiter.admit(one) == pytest.approx(60)
    clock.now += 60
    assert limiter.admit(one) is None


def test_threads_share_the_allowance(limiter: Limiter) -> None:
    limited = key(requests=100)
    admitted = []
    threads = [
        threading.Thread(target=lambda: admitted.extend(limiter.admit(limited) for _ in range(50))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert admitted.count(None) == 100


def test_processes_share_the_allowance(tmp_path: Path) -> None:
    script = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from loraretriever.pool import Key
from loraretriever.server.limits import Limiter
limiter = Limiter(Path(sys.argv[1]), lambda: 0.0)
limiter._connection.execute("PRAGMA busy_timeout = 60000")  # the machine may be slow
key = Key("k", "k", frozenset(), None, datetime.now(UTC), None, None, 100, 1000, None)
print("ready", flush=True)
sys.stdin.readline()
admitted = 0
for _ in range(60):
    if limiter.admit(key) is None:
        admitted += 1
        limiter.charge(key, 1)
print(admitted)
"""
    command = [sys.executable, "-c", script, str(tmp_path / FILE)]
    workers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for worker in workers:
        assert worker.stdout and worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin
        worker.stdin.write("\n")
        worker.stdin.flush()
    admitted = [int(worker.communicate()[0]) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 3
    assert sum(admitted) == 100
    limiter = Limiter(tmp_path / FILE, lambda: 0.0)
    assert limiter.admit(key(tokens=1000)) is None
    limiter.charge(key(tokens=1000), 900)
    assert limiter.admit(key(tokens=1000)) == pytest.approx(60 / 1000)
    limiter.close()


def test_a_file_that_is_locked_holds_nobody_up(tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    limiter = Limiter(tmp_path / FILE, clock)
    limited = key(requests=3, tokens=60)
    assert limiter.admit(limited) is None
    holder = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with caplog.at_level(logging.WARNING):
        assert [limiter.admit(limited) for _ in range(3)] == [None, None, 20.0], "as it last saw them"
    limiter.charge(limited, 100)
    assert len(caplog.records) == 1, "it is not tried again at once"
    assert "counts its requests alone" in caplog.text
    holder.execute("ROLLBACK")
    holder.close()
    clock.now += 1
    other = Limiter(tmp_path / FILE, clock)
    assert other.admit(key(requests=3)) is None, "the file does not know yet what was taken without it"
    assert limiter.admit(limited) == pytest.approx((1 - (60 - 100)) * 1.0)
    assert other.admit(key(requests=3)) == pytest.approx(39), "now it does: four of three and a twentieth"
    for each in (limiter, other):
        each.close()


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b"no database" * 1000), lambda file: file.touch()])
def test_a_damaged_file_is_made_anew(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    damage(tmp_path / FILE)
    limiter = Limiter(tmp_path / FILE)
    assert [limiter.admit(key(requests=1)) is None for _ in range(2)] == [True, False]
    limiter.close()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(PoolError, match="cannot count requests in"):
        Limiter(tmp_path / FILE)
    with pytest.raises(PoolError, match="cannot count requests in"):
        Limiter(tmp_path / "missing" / FILE)
