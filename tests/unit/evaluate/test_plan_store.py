"""The simulated host memory does what the engine's does."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from loraretriever.batch import AdapterRef
from loraretriever.batch.stacks import PreparedAdapter
from loraretriever.engine.residency import HostStore
from loraretriever.evaluate.plan.store import SimulatedStore

REFS = [AdapterRef(f"a{i}", f"{i}") for i in range(12)]
SECONDS = 5.0  # the test fails after so many without progress
BYTES = 10


class Sized(PreparedAdapter):
    """An adapter of `BYTES` bytes."""

    def __init__(self, digest: str) -> None:
        object.__setattr__(self, "digest", digest)

    @property
    def nbytes(self) -> int:
        return BYTES


class Pair:
    """Both stores, and the order in which each loads; a load ends when the test says so."""

    def __init__(self, capacity: int) -> None:
        self.now = 0.0
        self.real_order: list[str] = []
        self.order: list[str] = []
        self._may_end = threading.Semaphore(0)
        self._ended = threading.Semaphore(0)
        self.real = HostStore(self._load, capacity * BYTES, on_ready=self._ended.release)
        self.simulated = SimulatedStore(capacity, self._seconds)

    def _load(self, ref: AdapterRef) -> PreparedAdapter:
        self.real_order.append(ref.digest)
        assert self._may_end.acquire(timeout=SECONDS)
        return Sized(ref.digest)

    def _seconds(self, ref: AdapterRef) -> float:
        self.order.append(ref.digest)
        return 1.0

    def prefetch(self, ref: AdapterRef, early: bool) -> None:
        is_idle = self.simulated.next_end == float("inf")
        self.real.prefetch(ref, early)
        self.simulated.prefetch(ref, self.now, early)
        if is_idle:
            self._wait_for_begin()

    def end_load(self) -> None:
        """Let the present load end, if there is one."""
        if self.simulated.next_end == float("inf"):
            return
        self.now = self.simulated.next_end
        self.simulated.advance(self.now)
        self._may_end.release()
        assert self._ended.acquire(timeout=SECONDS)
        self._wait_for_begin()

    def _wait_for_begin(self) -> None:
        """The real store's thread takes a moment to begin the next load."""
        done = threading.Event()
        for _ in range(int(SECONDS * 1000)):
            if len(self.real_order) == len(self.order):
                return
            done.wait(0.001)
        raise AssertionError(f"{self.real_order} loaded; expected {self.order}")

    def check(self) -> None:
        for ref in REFS:
            assert self.real.is_ready(ref) == (ref in self.simulated), ref
        assert self.real_order == self.order


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = Pair(request.param)
    yield made
    for _ in range(100):
        made._may_end.release()
    made.real.close()


@pytest.mark.parametrize("pair", (0, 1, 3, 6), indirect=True)
def test_both_hold_and_load_the_same(pair: Pair) -> None:
    rng = np.random.default_rng(0)
    for _ in range(400):
        ref = REFS[rng.integers(len(REFS))]
        match rng.integers(5):
            case 0 | 1:
                pair.prefetch(ref, early=bool(rng.integers(2)))
            case 2 | 3:
                pair.end_load()
            case _ if ref in pair.simulated:
                kept = [REFS[i] for i in rng.integers(len(REFS), size=2)]
                pair.real.keep(kept)
                pair.simulated.keep(kept)
                if ref in pair.simulated:
                    pair.real.get(ref)
                    pair.simulated.take(ref)
        pair.check()
    assert pair.simulated.loads == pair.real.loads > 20
