"""Recommendations meet their target, and nothing smaller does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from loraretriever.evaluate.plan.costs import Footprint, Machine, StepCosts
from loraretriever.evaluate.plan.figures import evaluate
from loraretriever.evaluate.plan.fleet import Deployment
from loraretriever.evaluate.plan.plots import draw_plan
from loraretriever.evaluate.plan.recommend import RATES, Search
from loraretriever.evaluate.plan.replica import ReplicaSizes
from loraretriever.evaluate.plan.report import Memory, PlanReport, Question, make_plan, memory_of
from loraretriever.evaluate.plan.workload import Lengths, Workload

COSTS = StepCosts(step=0.02, row=0.004, prompt=0.002, adapter=1e-3, write=3e-3, load=0.05)
FOOTPRINT = Footprint(weights=1 << 30, adapter=1 << 20, token=1 << 10)
CALLS = Workload(20.0, 600, pool=50, prompt=Lengths(8, 32), answer=Lengths(4, 32)).calls()
ASKED = Deployment(sizes=ReplicaSizes(slots=4, host=64, batch_size=8, queue=1000))


def plan(target: float | None, sweeps: bool = False) -> PlanReport:
    machine = Machine(COSTS, FOOTPRINT)
    return make_plan(Question(ASKED, machine, CALLS, 20.0, target_p95=target, sweeps=sweeps))


def test_the_recommended_deployment_meets_the_target_and_one_replica_less_does_not() -> None:
    report = plan(1.5)
    assert report.recommended is not None
    found = report.recommended.deployment
    assert report.recommended.figures.seconds is not None
    assert report.recommended.figures.seconds.p95 <= 1.5
    assert report.recommended.figures.late_p95 is not None
    assert report.recommended.figures.late_p95 <= 1.5
    assert not report.recommended.figures.is_overloaded
    assert found.replicas > 1
    search = Search(COSTS, CALLS, 0.1, lambda: None)
    for slots in (1, 2, 4, 8, 16, 32, 50):
        fewer = replace(found, replicas=found.replicas - 1, sizes=replace(ASKED.sizes, slots=slots))
        assert not search.meets(fewer, 1.5)


def test_a_queue_that_grows_is_told_from_a_busy_replica() -> None:
    light, heavy = (Workload(rate, 2000, k=0, prompt=Lengths(8, 8), answer=Lengths(8, 8)).calls() for rate in (10, 60))
    busy, over = (evaluate(ASKED, COSTS, calls) for calls in (light, heavy))
    assert busy.busy > 0.8
    assert not busy.is_overloaded
    assert over.is_overloaded
    search = Search(COSTS, heavy, 0.1, lambda: None)
    assert over.seconds is not None
    assert over.late_p95 is not None
    assert over.late_p95 > over.seconds.p50
    assert not search.meets(ASKED, over.seconds.p95)


def test_a_slower_target_needs_no_more_replicas() -> None:
    fast, slow = plan(1.5).recommended, plan(6.0).recommended
    assert fast is not None
    assert slow is not None
    assert slow.deployment.replicas <= fast.deployment.replicas


def test_a_target_below_the_time_of_a_lone_request_is_met_by_none() -> None:
    assert plan(0.05).recommended is None


def test_without_a_target_nothing_is_recommended() -> None:
    report = plan(None)
    assert report.recommended is None
    assert report.recommended_memory is None
    assert not report.by_rate


def test_memory_is_that_of_weights_slots_and_caches() -> None:
    deployment = Deployment(sizes=ReplicaSizes(slots=8, host=32, cache_tokens=2048))
    assert memory_of(deployment, FOOTPRINT) == Memory(weights=1024.0, slots=8.0, cache=2.0, host=32.0)
    assert memory_of(deployment, FOOTPRINT).device == 1034.0


def test_the_sweeps_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = plan(1.5, sweeps=True)
    assert [point.value for point in report.by_rate] == [20.0 * factor for factor in RATES]
    times = [point.figures.seconds.p95 for point in report.by_rate if point.figures.seconds is not None]
    assert times[0] < times[-1]
    hits = [point.figures.slot_hit_rate for point in report.by_slots]
    assert hits[0] is not None
    assert hits[-1] is not None
    assert hits[0] < hits[-1]
    draw_plan(report, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
