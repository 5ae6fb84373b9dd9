"""The simulation of deployments against closed forms, against itself step by step, and against the engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from loraretriever.engine.local import LocalEngine
from loraretriever.errors import InvalidInputError
from loraretriever.evaluate.engine_contenders import request_of
from loraretriever.evaluate.engine_workloads import Job, make_prompt
from loraretriever.evaluate.plan.costs import StepCosts
from loraretriever.evaluate.plan.figures import Figures, evaluate, summarize
from loraretriever.evaluate.plan.fleet import Deployment, Outcome, simulate
from loraretriever.evaluate.plan.replica import Replica, ReplicaSizes
from loraretriever.evaluate.plan.workload import Call, Lengths, Workload, popularity
from loraretriever.models import BaseModel
from loraretriever.pool import Pool
from loraretriever.types import Request
from tiny import TINY_BASE, TINY_SPEC, tiny_llama, write_peft_folder
from tiny_text import tiny_tokenizer

COSTS = StepCosts(
    step=0.02, row=0.004, prompt=0.002, pair=1e-5, adapter=1e-3, use=1e-4, write=3e-3, load=0.02, merge=0.1
)
ALONE = ReplicaSizes(batch_size=1, slots=8, host=16, queue=1 << 20)


def one_by_one(workload: Workload, sizes: ReplicaSizes = ALONE, costs: StepCosts = COSTS) -> Outcome:
    return simulate(Deployment(sizes=sizes), costs, workload.calls())


def waits(outcome: Outcome) -> list[float]:
    return [served.begun - served.call.arrival for served in outcome.served]


# Closed forms


@pytest.mark.parametrize("busy", (0.3, 0.7, 0.9))
def test_one_by_one_with_equal_requests_it_waits_as_an_m_d_1_queue(busy: float) -> None:
    service = COSTS.step + COSTS.row + 16 * COSTS.prompt + COSTS.pair * 16 * 17 / 2
    workload = Workload(busy / service, 20_000, k=0, prompt=Lengths(16, 16), answer=Lengths(1, 1))
    outcome = one_by_one(workload)
    assert np.mean(waits(outcome)) == pytest.approx(service * busy / (2 * (1 - busy)), rel=0.1)
    assert summarize(outcome).busy == pytest.approx(busy, rel=0.02)


def test_one_by_one_it_waits_as_an_m_g_1_queue() -> None:
    """Pollaczek and Khinchine, with the moments of the requests that were drawn."""
    workload = Workload(1.0, 20_000, k=0, prompt=Lengths(1, 300), answer=Lengths(1, 200))
    costs = replace(COSTS, pair=0.0)
    seconds = np.array(
        [
            (call.answer + (call.prompt - 1) // 257) * costs.step + call.answer * costs.row
            + (call.prompt if call.prompt > 1 else 0) * costs.prompt
            for call in workload.calls()
        ]
    )  # fmt: skip
    workload = replace(workload, rate=0.6 / float(seconds.mean()))
    found = waits(one_by_one(workload, costs=costs))
    assert np.mean(found) == pytest.approx(workload.rate * float(np.mean(seconds**2)) / (2 * 0.4), rel=0.1)


def che_hit_rate(shares: np.ndarray, slots: int) -> float:
    """Che's approximation: T solves Σ 1 - exp(-p T) = slots; the hit rate is Σ p (1 - exp(-p T))."""
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.sum(1 - np.exp(-shares * middle)) < slots else (low, middle)
    return float(np.sum(shares * (1 - np.exp(-shares * low))))


@pytest.mark.parametrize(("zipf", "slots"), ((0.6, 50), (1.0, 10), (1.0, 100), (1.3, 30)))
def test_slots_are_hit_as_an_lru_cache_is(zipf: float, slots: int) -> None:
    workload = Workload(0.1, 30_000, pool=500, zipf=zipf, k=1, prompt=Lengths(1, 1), answer=Lengths(1, 1))
    figures = evaluate(Deployment(sizes=replace(ALONE, slots=slots)), COSTS, workload.calls())
    assert figures.slot_hit_rate == pytest.approx(che_hit_rate(popularity(500, zipf), slots), abs=0.01)


@pytest.mark.parametrize("k", (1, 2))
def test_more_slots_never_lower_the_hit_rate_one_by_one(k: int) -> None:
    workload = Workload(0.2, 2000, pool=60, k=k, answer=Lengths(1, 4))
    rates = [summarize(one_by_one(workload, replace(ALONE, slots=slots))).slot_hit_rate for slots in (2, 3, 5, 20, 60)]
    assert rates == sorted(rates)
    assert rates[-1] > rates[0]


def test_a_pool_that_fits_is_loaded_once() -> None:
    workload = Workload(0.2, 3000, pool=20, zipf=0.5, answer=Lengths(1, 4))
    outcome = one_by_one(workload, replace(ALONE, slots=20, host=20))
    assert outcome.totals.loads == outcome.totals.writes == 20


def test_loads_delay_the_first_token_by_what_they_take() -> None:
    calls = [Call(float(place), (place,), 1, 1) for place in range(10)]
    outcome = simulate(Deployment(sizes=ALONE), COSTS, calls)
    step = COSTS.step + COSTS.row + COSTS.pair + COSTS.adapter + COSTS.use + COSTS.write
    for served in outcome.served:
        assert served.begun - served.call.arrival == pytest.approx(COSTS.load)
        assert served.first - served.call.arrival == pytest.approx(COSTS.load + step)


# Against itself

CROWDED = ReplicaSizes(slots=5, host=8, batch_size=6, step_tokens=48, cache_tokens=16384, queue=40)
SMALL = replace(CROWDED, cache_tokens=1024)
WORKLOADS = {
    "light": (Workload(0.7, 400, pool=30, k=2), CROWDED),
    "heavy": (Workload(3.0, 600, pool=30, k=2, prompt=Lengths(1, 200)), CROWDED),
    "little memory": (Workload(2.0, 400, pool=8, k=1, prompt=Lengths(1, 300), answer=Lengths(1, 200)), SMALL),
    "no host memory": (Workload(1.0, 400, pool=40, k=3), replace(CROWDED, host=0)),
    "base model": (Workload(2.0, 400, k=0), CROWDED),
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_steps_taken_together_are_those_taken_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    workload, sizes = WORKLOADS[name]
    calls = workload.calls()
    together = simulate(Deployment(sizes=sizes), COSTS, calls)
    monkeypatch.setattr(Replica, "_steps_alike", lambda self, plan: 1)
    apart = simulate(Deployment(sizes=sizes), COSTS, calls)
    assert together.totals.preemptions == apart.totals.preemptions
    assert (together.totals.preemptions > 0) == (name == "little memory")
    assert together.totals.steps == apart.totals.steps
    assert (together.totals.hits, together.totals.loads) == (apart.totals.hits, apart.totals.loads)
    for one, other in zip(together.served, apart.served, strict=True):
        assert one.replica == other.replica
        for moment in ("begun", "first", "end"):
            assert getattr(one, moment) == pytest.approx(getattr(other, moment), abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("replicas", (1, 3))
def test_each_request_is_answered_or_refused(name: str, replicas: int) -> None:
    workload, sizes = WORKLOADS[name]
    calls = workload.calls()
    outcome = simulate(Deployment(replicas, sizes), COSTS, calls)
    assert [served.call for served in outcome.served] == calls
    answered = [served for served in outcome.served if not served.is_refused]
    for served in answered:
        assert served.call.arrival <= served.begun < served.first <= served.end
        shortest = served.call.answer * (COSTS.step + COSTS.row)
        assert served.end - served.begun >= shortest - 1e-9
    if name == "heavy" and replicas == 1:
        assert len(answered) < len(calls)
    figures = summarize(outcome)
    assert figures.requests == len(calls)
    assert figures.refused == len(calls) - len(answered)
    if not outcome.totals.preemptions:
        assert outcome.totals.rows >= sum(served.call.answer for served in answered)


def test_the_same_seed_gives_the_same_and_another_does_not() -> None:
    def figures(seed: int) -> Figures:
        return evaluate(Deployment(3, CROWDED, policy="random"), COSTS, Workload(2.0, 300, seed=seed).calls())

    assert figures(1) == figures(1)
    assert figures(1) != figures(2)


def test_requests_that_warm_up_do_not_count() -> None:
    calls = Workload(0.2, 200, pool=8, answer=Lengths(1, 4)).calls()
    all_, late = (evaluate(Deployment(sizes=ALONE), COSTS, calls, warm_up) for warm_up in (0.0, 0.5))
    assert (all_.requests, late.requests) == (200, 100)
    assert all_.slot_hit_rate is not None
    assert late.slot_hit_rate is not None
    assert late.slot_hit_rate > all_.slot_hit_rate + 0.02


# Strategies and policies


@pytest.mark.parametrize(
    ("strategy", "uniform", "slots"),
    (("selection", False, 1), ("mixture", False, 3), ("merge", False, 1), ("ramole", False, 4)),
)
def test_a_strategy_takes_its_slots(strategy: str, uniform: bool, slots: int) -> None:
    calls = [Call(0.0, (0, 1, 2), 4, 4)]
    deployment = Deployment(sizes=ALONE, strategy=strategy, uniform=uniform)
    assert simulate(deployment, COSTS, calls).totals.writes == slots
    if slots > 1:
        with pytest.raises(InvalidInputError, match=f"uses {slots} adapters, but there are 1 slots"):
            simulate(replace(deployment, sizes=replace(ALONE, slots=1)), COSTS, calls)


def test_merges_recur_with_uniform_weights_alone() -> None:
    calls = [Call(10.0 * place, (0, 1, 2) if place % 2 else (2, 1, 0), 4, 4) for place in range(20)]
    by_score, uniform = (
        simulate(Deployment(sizes=ALONE, strategy="merge", uniform=uniform), COSTS, calls) for uniform in (False, True)
    )
    assert by_score.totals.loads == 20
    assert uniform.totals.loads == 1
    assert by_score.served[0].begun == pytest.approx(3 * COSTS.load + COSTS.merge)


def by_policy(policy: str, workload: Workload) -> Figures:
    sizes = ReplicaSizes(slots=8, host=16, batch_size=8)
    return evaluate(Deployment(8, sizes, policy=policy), COSTS, workload.calls())


def test_affinity_finds_more_adapters_than_chance() -> None:
    workload = Workload(8.0, 6000, pool=300, zipf=0.8)
    random, own = (by_policy(policy, workload).slot_hit_rate for policy in ("random", "affinity"))
    assert random is not None
    assert own is not None
    assert own > random + 0.1


def test_the_least_loaded_waits_less_than_chance() -> None:
    workload = Workload(8.0, 6000, k=0)
    random, least = (by_policy(policy, workload).queue_seconds for policy in ("random", "least-loaded"))
    assert random is not None
    assert least is not None
    assert least.mean < 0.7 * random.mean


def test_affinity_spares_the_replica_of_a_popular_adapter() -> None:
    calls = [Call(0.0, (0,), 8, 8) for _ in range(64)]
    outcome = simulate(Deployment(8, replace(ALONE, batch_size=8)), COSTS, calls)
    counts = np.bincount([served.replica for served in outcome.served], minlength=8)
    assert counts.max() <= 1.25 * 64 / 8 + 1


def test_a_composition_has_a_replica_of_its_own_whatever_the_order_of_its_adapters() -> None:
    calls = [Call(float(place), adapters, 4, 4) for place, adapters in enumerate(((0, 1), (1, 0), (2, 0), (0, 2)) * 5)]
    outcome = simulate(Deployment(64, ALONE, policy="composition"), COSTS, calls)
    places = {frozenset(served.call.adapters): set() for served in outcome.served}  # type: ignore[var-annotated]
    for served in outcome.served:
        places[frozenset(served.call.adapters)].add(served.replica)
    assert [len(found) for found in places.values()] == [1, 1]
    assert set.union(*places.values()) != places[frozenset((0, 1))]


@pytest.mark.parametrize(
    ("make", "message"),
    (
        (lambda: Deployment(replicas=0), "replicas is 0; expected at least 1"),
        (lambda: Deployment(strategy="magic"), "strategy is 'magic'; expected one of selection"),
        (lambda: Deployment(policy="magic"), "policy is 'magic'; expected one of random"),
        (lambda: Deployment(route_seconds=math.nan), "route_seconds is nan"),
        (lambda: ReplicaSizes(slots=0), "slots is 0; expected at least 1"),
        (lambda: simulate(Deployment(), COSTS, []), "there are 0 requests"),
        (lambda: simulate(Deployment(), COSTS, [Call(0.0, (), 1, 1)], warm_up=1.0), "the share 1.0 warms up"),
        (lambda: simulate(Deployment(sizes=ReplicaSizes(cache_tokens=64)), COSTS, [Call(0.0, (), 90, 1)]), "91 tokens"),
    ),
)
def test_what_cannot_be_simulated_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        make()


# Against the engine


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return BaseModel(TINY_BASE, tiny_llama(), tiny_tokenizer())


def requests_of(calls: Sequence[Call], base: BaseModel) -> list[Request]:
    rng = np.random.default_rng(0)
    return [
        request_of(
            Job(make_prompt(base.tokenizer, call.prompt, rng), call.answer, 0.0, tuple(f"a{a}" for a in call.adapters))
        )
        for call in calls
    ]


def test_the_engine_takes_as_many_steps_with_as_many_sequences(
    base: BaseModel, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A batch that is there at once, and whose adapters are in host memory: times decide nothing."""
    folder = tmp_path_factory.mktemp("plan")
    calls = [
        replace(call, arrival=0.0)
        for call in Workload(1.0, 40, pool=6, k=2, prompt=Lengths(2, 90), answer=Lengths(1, 20), seed=3).calls()
    ]
    with Pool.create(folder / "pool", TINY_BASE, spec=TINY_SPEC) as pool:
        for seed in range(6):
            pool.add(write_peft_folder(folder / f"a{seed}", seed=seed), samples=[f"sample {seed}"])
        engine = LocalEngine(base, pool, slots=4, batch_size=8, step_tokens=32, cache_mib=4, prefix_mib=0)
        with closing(engine):
            list(engine.run(requests_of(calls, base)))
            before = engine.stats()
            list(engine.run(requests_of(calls, base)))
            after = engine.stats()
    sizes = ReplicaSizes(slots=4, host=6, batch_size=8, step_tokens=32, cache_tokens=after.cache_tokens)
    totals = simulate(Deployment(sizes=sizes), replace(COSTS, load=0.0), calls).totals
    assert totals.steps == after.steps - before.steps
    assert totals.rows == after.step_sequences - before.step_sequences
