"""Host memory for adapters and the thread that fills it, as `engine/residency.py` has them, in simulated time.

All adapters have one size, so that the bound is a number of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

from loraretriever.batch import AdapterRef


class SimulatedStore:
    """Adapters in host memory, the least recently used leave first; one is loaded at a time.

    Times are in seconds and must not go back.
    """

    def __init__(self, capacity: int, seconds: Callable[[AdapterRef], float]) -> None:
        """`seconds`: what loading an adapter takes."""
        self.capacity = capacity
        self.loads = 0
        self._seconds = seconds
        self._held: dict[AdapterRef, None] = {}  # least recently used first
        self._queue: dict[AdapterRef, None] = {}
        self._early: dict[AdapterRef, None] = {}
        self._kept: Collection[AdapterRef] = frozenset()
        self._loading: AdapterRef | None = None
        self._end = math.inf  # of the present load
        self._any_loaded = False

    @property
    def next_end(self) -> float:
        """When the present load ends; infinite if there is none."""
        return self._end

    def __contains__(self, ref: AdapterRef) -> bool:
        return ref in self._held

    def __len__(self) -> int:
        return len(self._held)

    def advance(self, now: float) -> None:
        """Let the loads end that have ended by now, each followed by the next."""
        while self._end <= now:
            assert self._loading is not None
            self._shrink(self.capacity - 1)
            self._held[self._loading] = None
            self.loads += 1
            self._any_loaded = True
            self._begin(self._end)

    def prefetch(self, ref: AdapterRef, now: float, early: bool = False) -> None:
        """See `HostStore.prefetch`."""
        self.advance(now)
        if ref in self._early:
            if not early:
                del self._early[ref]
                self._queue[ref] = None
        elif ref not in self._held and ref not in self._queue and ref is not self._loading:
            (self._early if early else self._queue)[ref] = None
            if self._loading is None:
                self._begin(now)

    def take(self, ref: AdapterRef) -> None:
        """An adapter that is held goes into a slot; see `HostStore.get`."""
        self._held[ref] = self._held.pop(ref, None)
        self._shrink(self.capacity)

    def keep(self, refs: Collection[AdapterRef]) -> None:
        """See `HostStore.keep`."""
        self._kept = refs
        self._shrink(self.capacity)

    def _begin(self, now: float) -> None:
        if not self._queue and self._any_loaded and len(self._held) + 1 >= self.capacity:
            self._early.clear()
        line = self._queue or self._early
        self._loading = next(iter(line), None)
        if self._loading is None:
            self._end = math.inf
        else:
            del line[self._loading]
            self._end = now + self._seconds(self._loading)

    def _shrink(self, limit: int) -> None:
        if len(self._held) <= limit:
            return
        for ref in list(self._held):
            if len(self._held) <= limit:
                return
            if ref not in self._kept:
                del self._held[ref]
