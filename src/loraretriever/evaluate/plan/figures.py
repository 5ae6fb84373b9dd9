"""What a simulation says of a deployment: latencies, hit rates, how busy it is, and the memory it needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from loraretriever.evaluate.plan.costs import StepCosts
from loraretriever.evaluate.plan.fleet import Deployment, Outcome, simulate
from loraretriever.evaluate.plan.replica import Served
from loraretriever.evaluate.plan.workload import Call

_GROWTH = 1.5


@dataclass(frozen=True, slots=True)
class Times:
    """Of all answered requests, in seconds."""

    mean: float
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What came of the requests that count.

    Times are from a request's arrival at the router: to its first step, its first token and its end; None if no
    request was answered. `slot_hit_rate`: of the adapters of requests that began, the share found in slots;
    `host_hit_rate`: of the others, those that were in host memory already; None where there were none. `busy`: the
    share of time that replicas spent in steps, which is near 1 long before their batches are full. `rows`: sequences
    in a step, on average. `late_p95`: the 95th percentile of `seconds` of the last quarter of the requests; `growth`:
    its mean relative to that of the first quarter, well above 1 where a queue grows as long as requests come.
    """

    requests: int
    refused: int
    requests_per_second: float
    tokens_per_second: float  # of answers
    queue_seconds: Times | None
    first_token_seconds: Times | None
    seconds: Times | None
    slot_hit_rate: float | None
    host_hit_rate: float | None
    loads_per_second: float  # from disk, of all replicas
    busy: float
    rows: float
    preemptions: int
    late_p95: float | None
    growth: float | None

    @property
    def is_overloaded(self) -> bool:
        """Whether more requests come than are answered, as far as this can be told."""
        return self.refused > 0 or (self.growth is not None and self.growth > _GROWTH)


def evaluate(
    deployment: Deployment, costs: StepCosts, calls: Sequence[Call], warm_up: float = 0.1, seed: int = 0
) -> Figures:
    """Simulate, and sum up; see `fleet.simulate`."""
    return summarize(simulate(deployment, costs, calls, warm_up, seed))


def summarize(outcome: Outcome) -> Figures:
    """The figures of a simulation."""
    answered = [served for served in outcome.served if not served.is_refused]
    totals, seconds = outcome.totals, max(outcome.seconds, 1e-9)
    used = totals.hits + totals.writes
    quarter = len(answered) // 4
    early, late = (_times(part, _end) for part in (answered[:quarter], answered[len(answered) - quarter :]))
    return Figures(
        requests=len(outcome.served),
        refused=len(outcome.served) - len(answered),
        requests_per_second=len(answered) / seconds,
        tokens_per_second=sum(served.call.answer for served in answered) / seconds,
        queue_seconds=_times(answered, lambda served: served.begun),
        first_token_seconds=_times(answered, lambda served: served.first),
        seconds=_times(answered, _end),
        slot_hit_rate=totals.hits / used if used else None,
        host_hit_rate=max(0.0, 1 - totals.loads / totals.writes) if totals.writes else None,
        loads_per_second=totals.loads / seconds,
        busy=min(1.0, totals.busy / (seconds * outcome.replicas)),
        rows=totals.rows / totals.steps if totals.steps else 0.0,
        preemptions=totals.preemptions,
        late_p95=late.p95 if late is not None else None,
        growth=late.mean / early.mean if early is not None and late is not None else None,
    )


def _end(served: Served) -> float:
    return served.end


def _times(served: Sequence[Served], moment: Callable[[Served], float]) -> Times | None:
    if not served:
        return None
    return times([moment(one) - one.call.arrival for one in served])


def times(seconds: Sequence[float]) -> Times:
    """Mean and percentiles of at least one value."""
    p50, p95, p99 = (float(value) for value in np.quantile(seconds, (0.5, 0.95, 0.99)))
    return Times(float(np.mean(seconds)), p50, p95, p99)
