"""Counters, gauges and histograms as plain numbers: kept in one process, merged over many, shown by prometheus_client.

prometheus_client chooses its several-processes mode by an environment variable when it is imported, for all metrics of
the process, and cannot remove series in it. So the numbers are kept here; its registry, formats and content
negotiation are used as they are.
"""

from __future__ import annotations

import bisect
import itertools
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

WINDOW_SECONDS = 60
_SLICE_SECONDS = 5  # recent values are forgotten by slices of this length

Labels = tuple[str, ...]
# A counter and a gauge have one number. A histogram has its buckets' counts (not cumulative, the last one for values
# above all bounds), then the sum of its values: everything adds up element by element.
Numbers = list[float]


class Kind(StrEnum):
    """What a family's numbers mean."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Family:
    """A metric with all its series. `bounds` are a histogram's buckets, ascending.

    Gauges of several processes are added, or the `largest` is taken.
    """

    kind: Kind
    name: str
    help: str
    labels: Labels = ()
    bounds: tuple[float, ...] = ()
    largest: bool = False

    def zero(self) -> Numbers:
        """The numbers of a series in which nothing has been counted."""
        return [0.0] * (len(self.bounds) + 2 if self.kind is Kind.HISTOGRAM else 1)


@dataclass(slots=True)
class Figures:
    """The numbers of all series, by family name and label values; `recent` those of each slice of the last minute."""

    values: dict[str, dict[Labels, Numbers]] = field(default_factory=dict)
    recent: dict[str, dict[Labels, dict[int, Numbers]]] = field(default_factory=dict)


class Series:
    """The numbers of one process. Any thread may call any method."""

    def __init__(self, families: Iterable[Family]) -> None:
        """Families without labels show a zero from the beginning, so that a rate sees their first event."""
        self.families = {family.name: family for family in families}
        self._lock = threading.Lock()
        self._values: dict[str, dict[Labels, Numbers]] = {
            name: {} if family.labels else {(): family.zero()} for name, family in self.families.items()
        }
        self._recent: dict[str, dict[Labels, dict[int, Numbers]]] = {
            name: {} for name, family in self.families.items() if family.kind is Kind.HISTOGRAM
        }

    def add(self, family: Family, amount: float = 1.0, labels: Labels = ()) -> None:
        """Raise a counter."""
        with self._lock:
            self._numbers(family, labels)[0] += amount

    def set(self, family: Family, value: float, labels: Labels = ()) -> None:
        """Set a gauge."""
        with self._lock:
            self._numbers(family, labels)[0] = value

    def replace(self, family: Family, values: Mapping[Labels, float]) -> None:
        """Let a family have these series and no others."""
        with self._lock:
            self._values[family.name] = {labels: [value] for labels, value in values.items()}

    def observe(self, family: Family, value: float, labels: Labels = ()) -> None:
        """Count a value in a histogram."""
        bucket = bisect.bisect_left(family.bounds, value)
        with self._lock:
            numbers = self._numbers(family, labels)
            recent = self._recent_numbers(family, labels)
            for each in (numbers, recent):
                each[bucket] += 1
                each[-1] += value

    def add_buckets(self, family: Family, counts: Sequence[float], total: float) -> None:
        """Count many values at once in a histogram without labels: `counts` for each bucket, `total` their sum."""
        with self._lock:
            for each in (self._numbers(family, ()), self._recent_numbers(family, ())):
                for place, count in enumerate((*counts, total)):
                    each[place] += count

    def _numbers(self, family: Family, labels: Labels) -> Numbers:
        series = self._values[family.name]
        numbers = series.get(labels)
        if numbers is None:
            numbers = series[labels] = family.zero()
        return numbers

    def _recent_numbers(self, family: Family, labels: Labels) -> Numbers:
        slices = self._recent[family.name].setdefault(labels, {})
        now = _slice()
        if now not in slices:
            for old in [each for each in slices if each <= now - WINDOW_SECONDS // _SLICE_SECONDS]:
                del slices[old]
            slices[now] = family.zero()
        return slices[now]

    def figures(self) -> Figures:
        """A copy of the numbers as they are now."""
        with self._lock:
            return Figures(
                {
                    name: {labels: list(each) for labels, each in series.items()}
                    for name, series in self._values.items()
                },
                {
                    name: {labels: {at: list(each) for at, each in slices.items()} for labels, slices in series.items()}
                    for name, series in self._recent.items()
                },
            )


def _slice() -> int:
    return int(time.time()) // _SLICE_SECONDS  # wall time, because processes are merged by it


def merge(parts: Sequence[tuple[Figures, bool]], families: Sequence[Family]) -> Figures:
    """The figures of several processes together. What is true beside each: the process runs; else no gauge counts."""
    merged = Figures()
    for family in families:
        values = merged.values.setdefault(family.name, {})
        for figures, runs in parts:
            if family.kind is Kind.GAUGE and not runs:
                continue
            for labels, numbers in figures.values.get(family.name, {}).items():
                before = values.get(labels, family.zero())
                values[labels] = [max(before[0], numbers[0])] if family.largest else _sum(before, numbers)
        if family.kind is not Kind.HISTOGRAM:
            continue
        recent = merged.recent.setdefault(family.name, {})
        for figures, _ in parts:
            for labels, slices in figures.recent.get(family.name, {}).items():
                into = recent.setdefault(labels, {})
                for at, numbers in slices.items():
                    into[at] = _sum(into.get(at, family.zero()), numbers)
    return merged


def _sum(one: Numbers, other: Numbers) -> Numbers:
    return [a + b for a, b in zip(one, other, strict=True)]


def last_minute(slices: Mapping[int, Numbers], family: Family) -> Numbers:
    """What a histogram counted in the last minute, to the accuracy of a slice."""
    oldest = _slice() - WINDOW_SECONDS // _SLICE_SECONDS
    total = family.zero()
    for at, numbers in slices.items():
        if at > oldest:
            total = _sum(total, numbers)
    return total


def quantile(numbers: Numbers, bounds: Sequence[float], share: float) -> float | None:
    """The value below which a share of a histogram's values lies, by straight lines within the buckets.

    None: there are no values. Above the last bound nothing is known: that bound then.
    """
    counts = numbers[:-1]
    wanted = share * sum(counts)
    if wanted <= 0:
        return None
    lower, below = 0.0, 0.0
    for bound, count in zip(bounds, counts, strict=False):  # the counts have one more
        if below + count >= wanted:
            return lower + (bound - lower) * (wanted - below) / count
        lower, below = bound, below + count
    return bounds[-1]


def cumulative(numbers: Numbers) -> list[float]:
    """How many values lie at or below each bound; the last number counts all."""
    return list(itertools.accumulate(numbers[:-1]))


def to_metrics(figures: Figures, families: Sequence[Family]) -> Iterator[Metric]:
    """The figures as prometheus_client's metrics."""
    for family in families:
        series = figures.values.get(family.name, {}).items()
        if family.kind is Kind.COUNTER:
            counter = CounterMetricFamily(family.name, family.help, labels=family.labels)
            for labels, (value,) in series:
                counter.add_metric(labels, value)
            yield counter
        elif family.kind is Kind.GAUGE:
            gauge = GaugeMetricFamily(family.name, family.help, labels=family.labels)
            for labels, (value,) in series:
                gauge.add_metric(labels, value)
            yield gauge
        else:
            histogram = HistogramMetricFamily(family.name, family.help, labels=family.labels)
            bounds = [*(str(float(bound)) for bound in family.bounds), "+Inf"]
            for labels, numbers in series:
                buckets = list(zip(bounds, cumulative(numbers), strict=True))
                histogram.add_metric(labels, buckets, numbers[-1])
            yield histogram
