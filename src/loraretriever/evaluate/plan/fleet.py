"""A deployment of replicas in simulated time: routes requests to them, and says what came of each."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from loraretriever.batch import AdapterRef
from loraretriever.errors import InvalidInputError
from loraretriever.evaluate.plan.costs import StepCosts
from loraretriever.evaluate.plan.replica import Replica, ReplicaSizes, Served, Simulated
from loraretriever.evaluate.plan.workload import Call

MERGES, TRAINED = ("merge",), ("ramole", "moe")
STRATEGIES = ("selection", "mixture", "fusion", "arrow", "spectral", *TRAINED, *MERGES)
POLICIES = ("random", "least-loaded", "affinity", "composition")
# An adapter's own replica takes no more than this many times the mean load; then its next one in order is asked
# (consistent hashing with bounded loads, arXiv 1608.01350).
_BOUND = 1.25


@dataclass(frozen=True, slots=True)
class Deployment:
    """Replicas of one size behind a router.

    `strategy`: `selection` uses a request's first adapter, `merge` (any of the merging strategies) makes one of all,
    others give each a slot, `ramole` and `moe` one to their router too. Merged adapters recur only where the weights
    are `uniform`: those by score differ from prompt to prompt. `policy` chooses a request's replica: at random, the
    one with the fewest requests, that of its first adapter unless it has many more than others (`affinity`), or that
    of all its adapters together, as gateways do before vLLM's servers (`composition`). `route_seconds` pass before a
    request reaches it.

    Raises:
        InvalidInputError: a value is out of its range.
    """

    replicas: int = 1
    sizes: ReplicaSizes = ReplicaSizes()
    strategy: str = "mixture"
    uniform: bool = False
    policy: str = "affinity"
    route_seconds: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what cannot be simulated."""
        rules = (
            ("replicas", self.replicas, self.replicas >= 1, "at least 1"),
            ("strategy", self.strategy, self.strategy in STRATEGIES, f"one of {', '.join(STRATEGIES)}"),
            ("policy", self.policy, self.policy in POLICIES, f"one of {', '.join(POLICIES)}"),
            ("route_seconds", self.route_seconds, 0 <= self.route_seconds < math.inf, "seconds from 0"),
        )
        for name, value, is_valid, expected in rules:
            if not is_valid:
                raise InvalidInputError(f"{name} is {value!r}; expected {expected}.")


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over all replicas, from some moment on."""

    busy: float
    steps: int
    rows: int
    hits: int
    writes: int
    loads: int
    preemptions: int

    def since(self, before: Totals) -> Totals:
        """What has been added to `before`."""
        return Totals(*(getattr(self, name) - getattr(before, name) for name in Totals.__slots__))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a simulation: the requests that count, by arrival, and the replicas' sums over their time."""

    served: Sequence[Served]
    totals: Totals
    seconds: float  # from the first of these arrivals to the last end
    replicas: int


class _Refs:
    """What must have a slot for a request, and how long each takes to be loaded."""

    def __init__(self, deployment: Deployment, costs: StepCosts) -> None:
        self._deployment, self._costs = deployment, costs
        self._known: dict[object, Simulated] = {}
        self._parts: dict[Simulated, int] = {}  # of merged ones
        self._numbers = itertools.count()

    def of(self, adapters: tuple[int, ...]) -> tuple[AdapterRef, ...]:
        """The adapters of a request; each has one object."""
        strategy = self._deployment.strategy
        if not adapters or strategy == "selection" or (len(adapters) == 1 and strategy not in TRAINED):
            return tuple(self._get(adapter) for adapter in adapters[:1])
        if strategy in MERGES:
            merged = self._get(frozenset(adapters) if self._deployment.uniform else ("merged", next(self._numbers)))
            self._parts[merged] = len(adapters)
            return (merged,)
        router = (self._get("router"),) if strategy in TRAINED else ()
        return (*map(self._get, adapters), *router)

    def load_seconds(self, ref: AdapterRef) -> float:
        """To host memory."""
        parts = self._parts.get(ref, 0)  # type: ignore[call-overload]
        return self._costs.merge + parts * self._costs.load if parts else self._costs.load

    def _get(self, key: object) -> Simulated:
        ref = self._known.get(key)
        if ref is None:
            ref = self._known[key] = Simulated("", f"{len(self._known):08}")
        return ref


class Router:
    """Chooses a replica for each request."""

    def __init__(self, policy: str, replicas: Sequence[Replica], rng: np.random.Generator) -> None:
        """`policy`: one of `POLICIES`."""
        choices: dict[str, Callable[[Call], int]] = {
            "random": self._random,
            "least-loaded": self._least_loaded,
            "affinity": self._affinity,
            "composition": self._composition,
        }
        self._choose = choices[policy]
        self._replicas = replicas
        self._running = 0  # requests at all replicas
        self._rng = rng

    def choose(self, call: Call) -> Replica:
        """The replica, which has one request more from now on."""
        replica = self._replicas[self._choose(call) if len(self._replicas) > 1 else 0]
        self._running += 1
        return replica

    def release(self, requests: int) -> None:
        """So many requests have ended, or were refused."""
        self._running -= requests

    def _random(self, call: Call) -> int:
        return int(self._rng.integers(len(self._replicas)))

    def _least_loaded(self, call: Call) -> int:
        loads = [replica.load for replica in self._replicas]
        least = min(loads)
        start = int(self._rng.integers(len(loads)))  # equal ones take turns
        try:
            return loads.index(least, start)
        except ValueError:
            return loads.index(least)

    def _affinity(self, call: Call) -> int:
        if not call.adapters:
            return self._least_loaded(call)
        bound = _BOUND * (self._running + 1) / len(self._replicas)
        number = call.adapters[0] << 32
        for _ in self._replicas:
            candidate = _mix(number) % len(self._replicas)
            if self._replicas[candidate].load < bound:
                return candidate
            number += 1
        return self._least_loaded(call)

    def _composition(self, call: Call) -> int:
        if not call.adapters:
            return self._least_loaded(call)
        number = 0
        for adapter in sorted(call.adapters):
            number = _mix(number + adapter + 1)
        return number % len(self._replicas)


def _mix(number: int) -> int:
    """A number of 64 bits that looks random, the same for the same number (splitmix64)."""
    mask = (1 << 64) - 1
    z = (number + 1) * 0x9E3779B97F4A7C15 & mask
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return z ^ (z >> 31)


def simulate(
    deployment: Deployment, costs: StepCosts, calls: Sequence[Call], warm_up: float = 0.0, seed: int = 0
) -> Outcome:
    """Let all requests be answered.

    Args:
        deployment: starts with empty caches.
        costs: what its steps take.
        calls: by arrival.
        warm_up: the share of them, from the first on, that fill the caches and do not count.
        seed: of the router's choices.

    Raises:
        InvalidInputError: no request, a share that leaves none, or a request that can never run.
    """
    if not calls or not 0 <= warm_up < 1:
        raise InvalidInputError(
            f"there are {len(calls)} requests, of which the share {warm_up} warms up; expected at least one request, "
            "and a share from 0, below 1."
        )
    refs = _Refs(deployment, costs)
    replicas = [Replica(number, deployment.sizes, costs, refs.load_seconds) for number in range(deployment.replicas)]
    router = Router(deployment.policy, replicas, np.random.default_rng((seed, 4)))
    events: list[tuple[float, int]] = []
    first = int(warm_up * len(calls))
    before = _totals(replicas)
    served = []
    for place, call in enumerate(calls):
        now = call.arrival + deployment.route_seconds
        _advance(replicas, events, router, now)
        if place == first:
            before = _totals(replicas)
        replica = router.choose(call)
        one = Served(call, replica.number, refs.of(call.adapters))
        served.append(one)
        if replica.submit(one, now):
            heapq.heappush(events, (replica.wake, replica.number))
        else:
            one.replica = -1
            router.release(1)
    _advance(replicas, events, router, math.inf)
    counted = served[first:]
    end = max((one.end for one in counted if not one.is_refused), default=counted[-1].call.arrival)
    return Outcome(counted, _totals(replicas).since(before), end - counted[0].call.arrival, len(replicas))


def _advance(replicas: Sequence[Replica], events: list[tuple[float, int]], router: Router, now: float) -> None:
    """Let everything happen that is due before `now`."""
    while events and events[0][0] < now:
        due, number = heapq.heappop(events)
        replica = replicas[number]
        if due != replica.wake:
            continue  # it was cut short, and there is another entry
        router.release(len(replica.advance(due)))
        if replica.wake < math.inf:
            heapq.heappush(events, (replica.wake, number))


def _totals(replicas: Sequence[Replica]) -> Totals:
    usages = [replica.usage for replica in replicas]
    return Totals(
        busy=sum(usage.busy for usage in usages),
        steps=sum(usage.steps for usage in usages),
        rows=sum(usage.rows for usage in usages),
        hits=sum(usage.hits for usage in usages),
        writes=sum(usage.writes for usage in usages),
        loads=sum(replica.store.loads for replica in replicas),
        preemptions=sum(usage.preemptions for usage in usages),
    )
