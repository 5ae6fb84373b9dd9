"""The whole answer of `loraretriever plan`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loraretriever.evaluate.plan.costs import Footprint, Machine, StepCosts
from loraretriever.evaluate.plan.figures import Figures
from loraretriever.evaluate.plan.fleet import Deployment
from loraretriever.evaluate.plan.recommend import Point, Recommendation, Search
from loraretriever.evaluate.plan.workload import Call

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Memory:
    """Of one replica, in MiB: on the device weights, slots and keys and values; adapters in host memory."""

    weights: float
    slots: float
    cache: float
    host: float

    @property
    def device(self) -> float:
        """What the device must have at least; activations come on top."""
        return self.weights + self.slots + self.cache


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked: a deployment, its requests, and perhaps a target for the 95th percentile of their seconds."""

    deployment: Deployment
    machine: Machine
    calls: Sequence[Call]
    rate: float
    warm_up: float = 0.1
    target_p95: float | None = None
    sweeps: bool = False


@dataclass(frozen=True, slots=True)
class PlanReport:
    """The figures of the deployment, the recommended one, and what a plot shows.

    `recommended` is None where no target was given, or where none meets it.
    """

    deployment: Deployment
    costs: StepCosts
    rate: float
    adapters: int  # different ones that were asked for
    figures: Figures
    memory: Memory
    target_p95: float | None
    recommended: Recommendation | None
    recommended_memory: Memory | None
    by_rate: Sequence[Point]
    by_slots: Sequence[Point]


def make_plan(question: Question, advance: Callable[[], None] = lambda: None) -> PlanReport:
    """Simulate what is asked; advances after each simulation.

    Raises:
        InvalidInputError: a request can never run.
    """
    search = Search(question.machine.costs, question.calls, question.warm_up, advance)
    figures = search.figures(question.deployment)
    found = None
    if question.target_p95 is not None:
        found = search.recommend(question.deployment, question.target_p95)
    return PlanReport(
        deployment=question.deployment,
        costs=question.machine.costs,
        rate=question.rate,
        adapters=len({adapter for call in question.calls for adapter in call.adapters}),
        figures=figures,
        memory=memory_of(question.deployment, question.machine.footprint),
        target_p95=question.target_p95,
        recommended=found,
        recommended_memory=None if found is None else memory_of(found.deployment, question.machine.footprint),
        by_rate=search.by_rate(question.deployment, question.rate) if question.sweeps else (),
        by_slots=search.by_slots(question.deployment) if question.sweeps else (),
    )


def memory_of(deployment: Deployment, footprint: Footprint) -> Memory:
    """What one replica takes."""
    sizes = deployment.sizes
    parts = (
        footprint.weights,
        sizes.slots * footprint.adapter,
        sizes.cache_tokens * footprint.token,
        sizes.host * footprint.adapter,
    )
    return Memory(*(part / _MIB for part in parts))
