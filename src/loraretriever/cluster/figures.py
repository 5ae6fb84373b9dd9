"""What all replicas of an engine do together."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping

from loraretriever.types import EngineStats

_COUNTERS = tuple(field.name for field in dataclasses.fields(EngineStats) if field.default == 0)
_GAUGES = tuple(field.name for field in dataclasses.fields(EngineStats) if field.default is dataclasses.MISSING)


class ReplicaFigures:
    """Adds the figures of replicas up. What a replica that is gone has counted stays, so that counters never fall.

    What the first replicas had counted before anybody looked does not count: it is in the figures of an ingress
    before this one.
    """

    def __init__(self) -> None:
        self._first: Mapping[str, EngineStats] | None = None
        self._last: dict[str, EngineStats] = {}  # of each replica ever seen
        self._alive: frozenset[str] = frozenset()

    def update(self, figures: Mapping[str, EngineStats]) -> None:
        """Take the figures of all replicas there are, by their names."""
        if self._first is None:
            self._first = dict(figures)
        self._last |= figures
        self._alive = frozenset(figures)

    def total(self) -> EngineStats:
        """The sum."""
        first, last = list((self._first or {}).values()), list(self._last.values())
        alive = [self._last[replica] for replica in self._alive]
        totals = {name: _sum(alive, name) for name in _GAUGES}
        totals |= {name: _sum(last, name) - _sum(first, name) for name in _COUNTERS}
        sizes: Counter[int] = Counter()
        for each in last:
            sizes.update(dict(each.batch_sizes))
        for each in first:
            sizes.subtract(dict(each.batch_sizes))
        return EngineStats(**totals, batch_sizes=tuple(sorted(sizes.items())))


def _sum(figures: Iterable[EngineStats], name: str) -> int:
    return sum(getattr(each, name) for each in figures)
