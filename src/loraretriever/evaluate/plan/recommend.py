"""The smallest deployment that meets a target, and how figures change with the rate and with the slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from loraretriever.evaluate.plan.costs import StepCosts
from loraretriever.evaluate.plan.figures import Figures, evaluate
from loraretriever.evaluate.plan.fleet import TRAINED, Deployment
from loraretriever.evaluate.plan.workload import Call

RATES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)  # relative to the one asked for
_MOST_REPLICAS = 1 << 14
_MOST_SLOTS = 512
_CLOSE = 0.1  # slots and memory that improve the 95th percentile by less than this share are not worth it


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The fewest replicas that meet the target, with slots and host memory that are worth it for their latency."""

    deployment: Deployment
    figures: Figures


@dataclass(frozen=True, slots=True)
class Point:
    """The figures at another rate (requests a second) or number of slots."""

    value: float
    figures: Figures


class Search:
    """Simulates deployments for the same requests, each once."""

    def __init__(self, costs: StepCosts, calls: Sequence[Call], warm_up: float, advance: Callable[[], None]) -> None:
        """`advance` is called after each simulation."""
        self._costs, self._calls, self._warm_up, self._advance = costs, calls, warm_up, advance
        self._known: dict[Deployment, Figures] = {}

    def figures(self, deployment: Deployment) -> Figures:
        """Of one deployment."""
        if deployment not in self._known:
            self._known[deployment] = evaluate(deployment, self._costs, self._calls, self._warm_up)
            self._advance()
        return self._known[deployment]

    def meets(self, deployment: Deployment, target: float) -> bool:
        """Whether it answers all, 95 % of them within `target` seconds, and of the last quarter as well.

        Where a queue grows, the last ones wait longest.
        """
        found = self.figures(deployment)
        if found.seconds is None or found.refused:
            return False
        return max(found.seconds.p95, found.late_p95 or 0.0) <= target

    def recommend(self, deployment: Deployment, target: float) -> Recommendation | None:
        """The smallest deployment like this one that meets the target; None if no number of replicas does."""
        fewest: int | None = None
        slots = _powers(_least_slots(deployment, self._calls), _adapters(self._calls))
        for count in slots:
            at_most = _MOST_REPLICAS if fewest is None else fewest - 1
            fewest = self._fewest_replicas(_with(deployment, slots=count), target, at_most) or fewest
        if fewest is None:
            return None
        found = replace(deployment, replicas=fewest)
        found = self._smallest([_with(found, slots=count) for count in slots], target)
        hosts = [host for host in _powers(found.sizes.slots, found.sizes.host) if host <= found.sizes.host]
        found = self._smallest([_with(found, host=host) for host in hosts] or [found], target)
        return Recommendation(found, self.figures(found))

    def _smallest(self, deployments: Sequence[Deployment], target: float) -> Deployment:
        """The first of those that meet the target whose 95th percentile is within `_CLOSE` of the best."""
        slowest = {each: times.p95 for each in deployments if (times := self.figures(each).seconds) is not None}
        met = [each for each in deployments if self.meets(each, target)]
        best = min(slowest[each] for each in met)
        return next(each for each in met if slowest[each] <= (1 + _CLOSE) * best)

    def _fewest_replicas(self, deployment: Deployment, target: float, at_most: int) -> int | None:
        """How many meet the target, `at_most` so many: doubled until they do, then by halved intervals."""
        low, high, most = 0, 1, min(at_most, len(self._calls))
        while high <= most and not self.meets(replace(deployment, replicas=high), target):
            low, high = high, 2 * high
        if high > most:
            if low >= most or not self.meets(replace(deployment, replicas=most), target):
                return None
            high = most
        while high - low > 1:
            middle = (low + high) // 2
            if self.meets(replace(deployment, replicas=middle), target):
                high = middle
            else:
                low = middle
        return high

    def by_rate(self, deployment: Deployment, rate: float) -> list[Point]:
        """The figures at `RATES` times the rate, which is that of the requests."""
        points = []
        for factor in RATES:
            calls = [replace(call, arrival=call.arrival / factor) for call in self._calls]
            points.append(Point(factor * rate, evaluate(deployment, self._costs, calls, self._warm_up)))
            self._advance()
        return points

    def by_slots(self, deployment: Deployment) -> list[Point]:
        """The figures with other numbers of slots."""
        sizes = _powers(_least_slots(deployment, self._calls), _adapters(self._calls))
        return [Point(slots, self.figures(_with(deployment, slots=slots))) for slots in sizes]


def _adapters(calls: Sequence[Call]) -> int:
    """How many different ones there are, but no more than a replica has slots for."""
    return min(_MOST_SLOTS, len({adapter for call in calls for adapter in call.adapters}))


def _least_slots(deployment: Deployment, calls: Sequence[Call]) -> int:
    """What the request with the most adapters needs."""
    return max(1, max(len(call.adapters) for call in calls) + (deployment.strategy in TRAINED))


def _powers(least: int, most: int) -> list[int]:
    """The least, powers of two in between, the most."""
    powers = [1 << exponent for exponent in range(least.bit_length(), max(most, least).bit_length() + 1)]
    return sorted({least, *(power for power in powers if least < power < most), max(least, most)})


def _with(deployment: Deployment, **sizes: int) -> Deployment:
    return replace(deployment, sizes=replace(deployment.sizes, **sizes))
