from __future__ import annotations

import itertools
import math
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraretriever.engine.scheduler import LOOK_AHEAD, Job, Limits, Memory, Plan, Scheduler
from loraretriever.errors import InvalidInputError, OverloadedError

ROOMY = Limits(rows=8, step_tokens=64, slots=4, waiting=100)


class FakeMemory:
    """Counts tokens in blocks. `reused` leading tokens of each job are said to be cached."""

    def __init__(self, blocks: int, block: int = 1, reused: int = 0) -> None:
        self.blocks, self.block, self.reused = blocks, block, reused
        self.rooms: dict[Job, int] = {}
        self.calls: Counter[str] = Counter()

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block)

    def place(self, job: Job, tokens: int) -> bool:
        self.calls["place"] += 1
        assert self.rooms.get(job, 0) < tokens
        others = sum(self._blocks(room) for other, room in self.rooms.items() if other is not job)
        if others + self._blocks(tokens) > self.blocks:
            return False
        self.rooms[job] = tokens
        return True

    def remove(self, job: Job) -> None:
        del self.rooms[job]

    def fits(self, tokens: int) -> bool:
        return self._blocks(tokens) <= self.blocks

    def reuse(self, job: Job) -> int:
        assert job in self.rooms
        return self.reused


class FakeHost:
    """Adapters at hand; loading takes `delay` steps; drops what was asked for longest ago and does not run."""

    def __init__(self, size: float = math.inf, delay: int = 0, ready: str = "") -> None:
        self.size, self.delay = size, delay
        self.ready: OrderedDict[Hashable, None] = OrderedDict.fromkeys(ready)
        self.loading: dict[Hashable, int] = {}
        self.calls = 0

    def __call__(self, adapter: Hashable) -> bool:
        self.calls += 1
        if adapter in self.ready:
            self.ready.move_to_end(adapter)
        return adapter in self.ready

    def step(self, prefetch: tuple[Hashable, ...], pinned: set[Hashable]) -> None:
        for adapter in prefetch:
            self.loading.setdefault(adapter, self.delay)
        for adapter, left in tuple(self.loading.items()):
            if left:
                self.loading[adapter] = left - 1
                continue
            del self.loading[adapter]
            self.ready[adapter] = None
        while len(self.ready) > self.size:
            del self.ready[next(adapter for adapter in self.ready if adapter not in pinned)]


def pins(jobs: set[Job]) -> set[Hashable]:
    return {adapter for job in jobs for adapter in job.adapters}


@dataclass(eq=False)
class Engine:
    """Plays the engine: runs the plans, one second a step, and checks each of them against its own record of the jobs.

    A job ends when it has `longest` tokens.
    """

    limits: Limits
    memory: FakeMemory
    host: FakeHost = field(default_factory=FakeHost)
    now: float = 0.0
    waiting: set[Job] = field(default_factory=set)
    running: set[Job] = field(default_factory=set)
    ended: dict[Job, str] = field(default_factory=dict)
    arrivals: dict[Job, tuple[float, int]] = field(default_factory=dict)
    computed_prompts: set[Job] = field(default_factory=set)
    bypassed: Counter[Job] = field(default_factory=Counter)
    overtakers: dict[Job, list[Job]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        memory: Memory = self.memory
        self.scheduler = Scheduler(self.limits, memory, self.host)

    def add(self, job: Job) -> Job:
        self.scheduler.add(job, self.now)
        self.waiting.add(job)
        self.arrivals[job] = (self.now, len(self.arrivals))
        self.check_numbers()
        return job

    def cancel(self, job: Job) -> None:
        self.scheduler.remove(job)
        if job not in self.ended:
            self.end(job, "cancelled")
        self.check_numbers()

    def end(self, job: Job, why: str) -> None:
        assert job not in self.ended
        self.waiting.discard(job)
        self.running.discard(job)
        self.ended[job] = why

    def order(self, job: Job) -> tuple[float, int]:
        """The formula as the documentation has it, at the present time."""
        arrival, number = self.arrivals[job]
        return (job.priority - (self.now - arrival) / self.limits.aging, number)

    def is_free(self, job: Job) -> bool:
        """Whether only slots, memory, rows and budget can be in a waiting job's way."""
        led = job.after is None or job.after in self.computed_prompts or job.after in self.ended
        return led and all(adapter in self.host.ready for adapter in job.adapters)

    def step(self) -> Plan:
        late = {j for j in self.waiting | self.running if j.deadline is not None and j.deadline <= self.now}
        self.computed_prompts |= {job for job in self.running if job.computed >= job.prompt}
        plan = self.scheduler.plan(self.now)
        assert set(plan.expired) == late and len(plan.expired) == len(late)
        for job in plan.expired:
            self.end(job, "expired")
        free = {job for job in self.waiting if self.is_free(job)}
        self.move_jobs(plan, free)
        self.check_chunks(plan)
        self.check_prefetch(plan)
        self.check_numbers()
        if not plan.chunks and len(self.waiting) <= LOOK_AHEAD:
            assert not free, "jobs that could run do not"
        self.run_model(plan)
        self.host.step(plan.prefetch, pins(self.running))
        self.now += 1.0
        return plan

    def move_jobs(self, plan: Plan, free: set[Job]) -> None:
        for job in plan.preempted:
            assert job in self.running and job.computed == 0
            self.running.remove(job)
            self.waiting.add(job)
            assert all(self.order(job) > self.order(other) for other in self.running)
        assert not (plan.preempted and plan.admitted)
        for job in plan.admitted:
            assert job in self.waiting and job in free
            self.waiting.remove(job)
            self.running.add(job)
            assert job.computed == min(self.memory.reused, job.tokens - 1)
        assert list(plan.admitted) == sorted(plan.admitted, key=self.order)
        for job in free & self.waiting:
            later = [other for other in plan.admitted if self.order(other) > self.order(job)]
            self.bypassed[job] += len(later)
            self.overtakers.setdefault(job, []).extend(later)
            assert self.bypassed[job] <= self.limits.patience

    def check_chunks(self, plan: Plan) -> None:
        jobs = [job for job, _ in plan.chunks]
        assert len(set(jobs)) == len(jobs) and set(jobs) <= self.running and set(plan.admitted) <= set(jobs)
        left = [job.tokens - job.computed for job in jobs]
        counts = [count for _, count in plan.chunks]
        assert sum(counts) <= self.limits.step_tokens
        assert all(1 <= count <= most for count, most in zip(counts, left, strict=True))
        assert {job for job in self.running if job.tokens - job.computed == 1} <= set(jobs)
        prompts = [job for job, most in zip(jobs, left, strict=True) if most > 1]
        assert jobs[len(jobs) - len(prompts) :] == prompts == sorted(prompts, key=self.order)
        complete = [count == most for count, most in zip(counts, left, strict=True)]
        assert all(complete[:-1]), "only the last chunk may be cut"
        if sum(counts) < self.limits.step_tokens:
            assert set(jobs) == self.running and all(complete), "budget is left over"
        if self.running:
            assert min(self.running, key=self.order) in jobs, "the first in order does not go on"

    def check_prefetch(self, plan: Plan) -> None:
        needed = pins(self.waiting) - self.host.ready.keys() - pins(self.running)
        assert set(plan.prefetch) <= needed
        assert len(set(plan.wanted)) == len(plan.wanted) <= self.limits.slots
        assert plan.prefetch == tuple(adapter for adapter in plan.wanted if adapter not in self.host.ready)
        assert self.scheduler.pinned == pins(self.running)
        assert self.scheduler.pinned.isdisjoint(plan.wanted)

    def check_numbers(self) -> None:
        assert not self.waiting & self.running
        assert self.scheduler.waiting == len(self.waiting)
        assert self.scheduler.running == len(self.running) <= self.limits.rows
        assert len(pins(self.running)) <= self.limits.slots
        assert self.memory.rooms.keys() == self.running

    def run_model(self, plan: Plan) -> None:
        for job, count in plan.chunks:
            assert self.memory.rooms[job] >= job.tokens
            job.computed += count
            if job.computed < job.tokens:
                continue
            if job.tokens < job.longest:
                job.tokens += 1
            else:
                self.computed_prompts.add(job)
                self.scheduler.remove(job)
                self.end(job, "finished")
        self.check_numbers()

    def run(self, most: int = 10_000) -> None:
        """Until every job has ended and everything has been given back."""
        for _ in range(most):
            if not self.waiting and not self.running:
                break
            self.step()
        assert self.ended.keys() == self.arrivals.keys()
        assert self.scheduler.waiting == self.scheduler.running == 0
        assert not self.memory.rooms
        assert self.scheduler.plan(self.now) == Plan()


def engine(limits: Limits = ROOMY, blocks: int = 1000, ready: str = "abcdefgh", **changes: int) -> Engine:
    return Engine(replace(limits, **changes), FakeMemory(blocks), FakeHost(ready=ready))


def uses(names: str) -> frozenset[Hashable]:
    return frozenset(names)


# Chunks


def test_decoding_rows_come_first_and_prompts_share_what_is_left() -> None:
    e = engine(rows=4, step_tokens=10)
    short = e.add(Job(3, longest=20))
    long = e.add(Job(20, longest=30))
    assert e.step().chunks == ((short, 3), (long, 7))
    assert e.step().chunks == ((short, 1), (long, 9))
    third = e.add(Job(5, longest=9))
    assert e.step().chunks == ((short, 1), (long, 4), (third, 5))
    assert e.step().chunks == ((short, 1), (long, 1), (third, 1))


def test_a_cut_chunk_is_followed_by_the_rest_of_the_prompt() -> None:
    e = engine(rows=1, step_tokens=4)
    job = e.add(Job(9, longest=10))
    assert [e.step().chunks for _ in range(4)] == [((job, 4),), ((job, 4),), ((job, 1),), ((job, 1),)]
    assert e.ended == {job: "finished"}


def test_a_job_of_better_order_takes_the_budget_from_running_prompts() -> None:
    e = engine(rows=4, step_tokens=8)
    e.add(Job(30, priority=1))
    e.step()
    urgent = e.add(Job(8))
    assert e.step().chunks == ((urgent, 8),)


@pytest.mark.parametrize(("reused", "computed"), [(0, 0), (6, 6), (9, 9), (10, 9), (99, 9)])
def test_cached_prefixes_are_skipped_but_for_the_last_token(reused: int, computed: int) -> None:
    e = Engine(ROOMY, FakeMemory(100, reused=reused))
    job = e.add(Job(10))
    assert e.step().chunks == ((job, 10 - computed),)


def test_a_new_job_with_one_token_left_is_among_those_that_decode() -> None:
    e = Engine(ROOMY, FakeMemory(500, reused=20))
    long, whole = e.add(Job(100, longest=200)), e.add(Job(21))
    assert e.step().chunks == ((long, 64),)  # no budget is left for the other: it is not admitted
    assert e.step().chunks == ((whole, 1), (long, 16))


# Admission


def test_rows_bound_the_running_jobs() -> None:
    e = engine(rows=2)
    jobs = [e.add(Job(2, longest=3)) for _ in range(3)]
    assert e.step().admitted == tuple(jobs[:2])
    assert e.step().admitted == ()
    assert e.step().admitted == (jobs[2],)


def test_running_jobs_pin_their_adapters_until_they_leave() -> None:
    e = engine(slots=2)
    a, b = e.add(Job(1, adapters=uses("a"), longest=3)), e.add(Job(1, adapters=uses("ab"), longest=9))
    c = e.add(Job(1, adapters=uses("c")))
    base = e.add(Job(1))
    assert e.step().admitted == (a, b, base)
    e.step()
    e.step()
    assert a in e.ended and e.step().admitted == ()  # b still uses "a"
    e.cancel(b)
    assert e.step().admitted == (c,)


def test_adapters_are_prefetched_in_order_up_to_the_slots() -> None:
    e = engine(ready="r", slots=3, rows=1)
    e.host.delay = 100
    e.add(Job(1, longest=50, adapters=uses("r")))
    e.add(Job(1, adapters=uses("c"), priority=1))
    e.add(Job(1, adapters=uses("ra")))
    e.add(Job(1, adapters=uses("ab")))
    e.add(Job(1, adapters=uses("d"), priority=2))
    assert e.step().prefetch == ("a", "b", "c")


def test_the_order_of_prefetching_does_not_depend_on_hashes() -> None:
    e = engine(ready="", slots=8)
    e.add(Job(1, adapters=uses("hgfedcba")))
    assert e.step().prefetch == tuple("abcdefgh")


def test_ready_adapters_that_wait_count_among_the_slots() -> None:
    """Or loading for later jobs could drive out what earlier ones wait with."""
    e = engine(ready="abr", slots=2, rows=1)
    for names in ("r", "a", "b", "x"):
        e.add(Job(1, longest=9, adapters=uses(names)))
    assert e.step().prefetch == ()


def test_unready_jobs_are_skipped_and_keep_their_place() -> None:
    e = engine(ready="r", rows=2, patience=0)
    e.host.delay = 5
    cold = e.add(Job(1, adapters=uses("c")))
    others = [e.add(Job(1, longest=2, adapters=uses("r"))) for _ in range(20)]
    admitted = [e.step().admitted for _ in range(9)]
    assert admitted[0] == tuple(others[:2])
    assert next(i for i, jobs in enumerate(admitted) if cold in jobs) == 6  # loaded at the end of step 5
    assert admitted[6] == (cold, others[6])


def test_followers_wait_for_the_leaders_prompt() -> None:
    e = engine(rows=4, step_tokens=4)
    leader = e.add(Job(10, longest=20))
    followers = [e.add(Job(10, longest=20, after=leader)) for _ in range(2)]
    other = e.add(Job(1, longest=20))
    assert [e.step().admitted for _ in range(3)] == [(leader,), (), (other,)]
    e.memory.reused = 9
    plan = e.step()
    assert plan.admitted == tuple(followers)
    assert plan.chunks == ((leader, 1), (other, 1), (followers[0], 1), (followers[1], 1))


@pytest.mark.parametrize("ending", ["cancel", "expire", "finish"])
def test_followers_go_on_when_the_leader_leaves(ending: str) -> None:
    e = engine(rows=1, step_tokens=2)
    leader = e.add(Job(4, deadline=1.0 if ending == "expire" else None))
    follower = e.add(Job(4, after=leader))
    gone = e.add(Job(4, after=leader))
    e.step()
    e.cancel(gone)
    if ending == "cancel":
        e.cancel(leader)
    if ending == "finish":
        e.step()
    assert e.step().admitted == (follower,)
    late = e.add(Job(4, after=leader))
    e.cancel(follower)
    assert e.step().admitted == (late,)


def test_a_queue_in_order_of_priority_and_age() -> None:
    e = engine(rows=1, aging=10.0)
    low = e.add(Job(1, priority=2))
    old = e.add(Job(1, priority=1))
    e.now = 10.0
    first, second = e.add(Job(1)), e.add(Job(1, priority=1))
    urgent = e.add(Job(1, priority=-1))
    assert [e.step().admitted for _ in range(5)] == [(urgent,), (old,), (first,), (low,), (second,)]


# Refusal


def test_a_full_queue_refuses_with_numbers() -> None:
    e = engine(rows=1, waiting=2)
    for _ in range(2):
        e.add(Job(1))
    with pytest.raises(OverloadedError, match=r"^2 of the queue's 2 places.* 1 more .*; send it again later\.$"):
        e.add(Job(1))
    e.step()
    e.scheduler.check(1, (), jobs=1)
    with pytest.raises(OverloadedError, match=r"^1 of the queue's 2 places"):
        e.scheduler.check(1, (), jobs=2)
    with pytest.raises(InvalidInputError, match=r"asks for 3 answers, but the queue has 2 places"):
        e.scheduler.check(1, (), jobs=3)
    e.run()


def test_held_jobs_count_in_the_queue() -> None:
    e = engine(waiting=2)
    leader = e.add(Job(100))
    e.add(Job(100, after=leader))
    with pytest.raises(OverloadedError):
        e.add(Job(100, after=leader))


def test_what_can_never_run_is_refused() -> None:
    e = engine(slots=2, blocks=10)
    with pytest.raises(InvalidInputError, match=r"uses 3 adapters, but there are 2 slots"):
        e.add(Job(1, adapters=uses("abc")))
    with pytest.raises(InvalidInputError, match=r"can have 11 tokens"):
        e.add(Job(1, longest=11))
    with pytest.raises(InvalidInputError, match=r"can have 12 tokens"):
        e.add(Job(12, deadline=5.0))
    e.scheduler.check(10, ("a", "b", "a"))
    e.run()  # nothing is left of them


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rows", 0),
        ("step_tokens", 7),
        ("slots", -1),
        ("waiting", 0),
        ("patience", -1),
        ("aging", 0.0),
        ("aging", math.inf),
        ("aging", math.nan),
    ],
)
def test_limits_that_mean_nothing_are_refused(name: str, value: float) -> None:
    with pytest.raises(InvalidInputError, match=f"^{name} is {value}; expected "):
        replace(ROOMY, **{name: value})


# Preemption


def test_the_last_in_order_gives_way_and_comes_back() -> None:
    e = engine(blocks=12)
    first = e.add(Job(4, longest=12))
    second = e.add(Job(4, longest=8))
    third = e.add(Job(4, longest=5))
    plans = [e.step(), e.step()]
    assert plans[0].admitted == (first, second, third)
    assert plans[1].preempted == (third,)
    assert [job for job, _ in plans[1].chunks] == [first, second]
    e.step()
    assert e.step().preempted == (second,)  # both have 7 tokens now
    while first in e.running:
        assert e.step().admitted == ()  # for 7 and 5 tokens there is no room beside the first's 7
    assert e.step().admitted == (second, third)
    e.run()


def test_a_job_that_is_last_gives_way_itself() -> None:
    e = engine(blocks=9, step_tokens=4, rows=2)
    last = e.add(Job(1, longest=8, priority=1))
    e.step()
    first = e.add(Job(7))
    assert e.step().chunks == ((last, 1), (first, 3))
    plan = e.step()  # the first's prompt has its room; only the last grows
    assert plan.preempted == (last,) and plan.chunks == ((first, 4),)
    e.run()


def test_priority_decides_who_gives_way() -> None:
    e = engine(blocks=6)
    low = e.add(Job(3, longest=6, priority=1))
    high = e.add(Job(3, longest=6))
    assert e.step().admitted == (high, low)
    assert e.step().preempted == (low,)
    e.run()
    assert list(e.ended) == [high, low]


def test_a_preempted_job_does_not_come_back_in_the_same_step() -> None:
    e = engine(blocks=12)
    e.add(Job(5, longest=12))
    e.add(Job(5, longest=7))
    e.add(Job(2, longest=3))
    e.step()
    plan = e.step()  # needs two blocks; the third gives way with two
    assert len(plan.preempted) == 1 and plan.admitted == ()
    e.run()


# Leaving


def test_cancelled_jobs_free_everything_at_once() -> None:
    e = engine(rows=1, slots=1, blocks=10)
    running = e.add(Job(10, adapters=uses("a"), deadline=50.0))
    waiting = e.add(Job(10, adapters=uses("b"), deadline=60.0))
    last = e.add(Job(10, adapters=uses("c")))
    e.step()
    e.cancel(waiting)
    e.cancel(running)
    e.cancel(running)
    e.scheduler.remove(running)
    assert e.step().admitted == (last,)
    e.now = 70.0
    e.run()
    e.cancel(last)
    assert set(e.ended.values()) == {"cancelled", "finished"}


def test_a_job_that_was_never_added_can_be_cancelled() -> None:
    e = engine()
    e.scheduler.remove(Job(1))
    e.check_numbers()


def test_deadlines_end_waiting_running_and_held_jobs() -> None:
    e = engine(rows=1)
    running = e.add(Job(2, longest=90, deadline=3.0))
    waiting = e.add(Job(2, longest=90, deadline=2.0))
    held = e.add(Job(2, longest=90, deadline=1.0, after=waiting))
    kept = e.add(Job(2, longest=90))
    assert [e.step().expired for _ in range(4)] == [(), (held,), (waiting,), (running,)]
    assert kept in e.running


# Fairness


def resident_stream(e: Engine, names: str, tokens: int, longest: int) -> Iterator[Job]:
    """Jobs for these adapters in turn, for ever."""
    for name in itertools.cycle(names):
        yield e.add(Job(tokens, adapters=uses(name), longest=longest))


def keep_waiting(e: Engine, stream: Iterator[Job], least: int = 3) -> None:
    while len(e.waiting) < least:
        next(stream)


def admitted_within(e: Engine, job: Job, stream: Iterator[Job], steps: int) -> bool:
    for _ in range(steps):
        keep_waiting(e, stream)
        if job in e.step().admitted:
            return True
    return False


@pytest.mark.parametrize("patience", [0, 1, 5, 32])
def test_other_adapters_get_slots_beside_a_stream_for_resident_ones(patience: int) -> None:
    """At most `patience` later jobs go before it; then it waits for those that run, `answer` steps at most.

    Until then a later job is admitted at least every `answer` steps: at most answer * (patience + 1) steps in all.
    """
    answer = 6
    e = engine(rows=4, slots=2, patience=patience)
    stream = resident_stream(e, "ab", 1, answer)
    keep_waiting(e, stream)
    for _ in range(10):
        keep_waiting(e, stream)
        e.step()
    other = e.add(Job(1, adapters=uses("cd"), longest=3))
    assert admitted_within(e, other, stream, steps=answer * (patience + 2))
    assert len(e.overtakers.get(other, [])) == patience
    e.run()


def test_a_cold_adapter_beside_a_stream_is_loaded_and_then_waits_no_longer_than_patience() -> None:
    answer, patience, delay = 6, 5, 20
    e = engine(rows=4, slots=2, patience=patience, ready="ab")
    e.host.delay = delay
    e.host.size = 4
    stream = resident_stream(e, "ab", 1, answer)
    other = e.add(Job(1, adapters=uses("cd"), longest=3))
    assert admitted_within(e, other, stream, steps=delay + answer * (patience + 2))
    assert len(e.overtakers[other]) == patience
    e.run()


@pytest.mark.parametrize("patience", [0, 3, 32])
def test_a_long_prompt_gets_memory_beside_a_stream_of_short_ones(patience: int) -> None:
    """The same bounds as for slots; the prompt takes the whole memory, so that no short one runs beside it."""
    answer = 6
    e = engine(rows=8, blocks=40, patience=patience)
    stream = resident_stream(e, "a", 1, answer)
    for _ in range(10):
        keep_waiting(e, stream)
        e.step()
    long = e.add(Job(40))
    assert admitted_within(e, long, stream, steps=answer * (patience + 2))
    assert len(e.overtakers.get(long, [])) == patience
    e.run()


def test_low_priority_is_served_once_age_makes_up_for_it() -> None:
    """Before a job of priority p go only jobs of priority 0 that came less than p * aging seconds after it."""
    priority, aging = 3, 5.0
    e = engine(rows=1, aging=aging, waiting=1000)
    for _ in range(4):
        e.add(Job(1, longest=2))
    low = e.add(Job(1, priority=priority))
    for _ in range(100):
        e.add(Job(1, longest=2))  # each runs for two steps: the queue only grows
        if low in e.step().admitted:
            break
    before = [job for job in e.ended if job is not low]
    assert max(e.arrivals[job][0] for job in before) == priority * aging - 1
    assert len(before) == 4 + priority * aging
    assert len(e.waiting) > 10
    e.run()


# Cost and determinism


def test_a_step_looks_at_a_bounded_number_of_waiting_jobs() -> None:
    limits = Limits(rows=64, step_tokens=512, slots=8, waiting=6000, patience=10)
    e = Engine(limits, FakeMemory(100), FakeHost(ready="r"))
    e.scheduler.add(Job(60, longest=80), 0.0)
    for _ in range(2500):
        e.scheduler.add(Job(90, longest=100, adapters=uses("r")), 0.0)
        e.scheduler.add(Job(90, longest=100, adapters=uses("c")), 0.0)
    plan = e.scheduler.plan(0.0)
    assert len(plan.admitted) == 1
    assert e.memory.calls["place"] <= LOOK_AHEAD
    assert e.host.calls <= 2 * LOOK_AHEAD + limits.slots


def test_jobs_behind_the_look_ahead_run_once_those_before_are_loaded() -> None:
    e = engine(ready="r", waiting=1000)
    e.host.delay = 3
    for _ in range(LOOK_AHEAD):
        e.add(Job(1, adapters=uses("c")))
    last = e.add(Job(1, adapters=uses("r")))
    plan = e.scheduler.plan(0.0)
    assert plan.admitted == () and plan.prefetch == ("c",)
    e.run(most=4 + LOOK_AHEAD // ROOMY.rows + 1)
    assert e.ended[last] == "finished"


def test_no_adapters_are_loaded_for_jobs_behind_the_look_ahead() -> None:
    e = engine(ready="", waiting=1000, rows=1)
    jobs = [e.add(Job(1)) for _ in range(LOOK_AHEAD + 1)]
    e.add(Job(1, adapters=uses("c")))
    assert e.step().prefetch == ()
    e.cancel(jobs[-1])
    assert e.step().prefetch == ("c",)


def test_followers_may_join_a_leader_whose_prompt_is_computed() -> None:
    e = engine()
    leader = e.add(Job(3, longest=9))
    e.step()
    follower = e.add(Job(3, after=leader))
    assert e.step().admitted == (follower,)


# Random traffic


@dataclass(frozen=True)
class Arrival:
    step: int
    prompt: int
    answer: int
    adapters: str
    priority: int
    deadline: int | None
    cancel: int | None
    answers: int


names = st.text("abcdefgh", max_size=3).map(lambda text: "".join(sorted(set(text))))
arrivals = st.builds(
    Arrival,
    step=st.integers(0, 30),
    prompt=st.integers(1, 20),
    answer=st.integers(0, 12),
    adapters=names,
    priority=st.integers(-2, 3),
    deadline=st.none() | st.integers(0, 40),
    cancel=st.none() | st.integers(0, 40),
    answers=st.sampled_from((1, 1, 1, 2, 3)),
)


@st.composite
def limits_and_memory(draw: st.DrawFn) -> tuple[Limits, FakeMemory]:
    rows = draw(st.integers(1, 5))
    limits = Limits(
        rows=rows,
        step_tokens=rows + draw(st.integers(0, 12)),
        slots=draw(st.integers(3, 5)),
        waiting=10_000,
        patience=draw(st.integers(0, 6)),
        aging=draw(st.sampled_from((0.5, 4.0, 32.0))),  # powers of 2: the checks of the order are exact
    )
    block = draw(st.integers(1, 4))
    return limits, FakeMemory(draw(st.integers(32, 60)) // block, block, reused=draw(st.integers(0, 8)))


def play(limits: Limits, memory: FakeMemory, delay: int, traffic: list[Arrival]) -> list[tuple[tuple[int, int], ...]]:
    """Run random traffic to its end; the chunks of each step, jobs as numbers of arrival."""
    e = Engine(limits, memory, FakeHost(2 * limits.slots, delay))
    cancels: dict[int, list[Job]] = {}
    history = []
    for step in range(75):
        for arrival in [a for a in traffic if a.step == step]:
            leader = None
            for _ in range(arrival.answers):
                deadline = None if arrival.deadline is None else e.now + arrival.deadline
                longest = min(arrival.prompt + arrival.answer, 29)
                adapters = uses(arrival.adapters)
                job = e.add(Job(arrival.prompt, 0, adapters, arrival.priority, deadline, longest, after=leader))
                leader = leader or job
                if arrival.cancel is not None:
                    cancels.setdefault(step + arrival.cancel, []).append(job)
        for job in cancels.get(step, ()):
            e.cancel(job)
        history.append(tuple((e.arrivals[job][1], count) for job, count in e.step().chunks))
    e.run()
    return history


@settings(max_examples=100, deadline=None)
@given(limits_and_memory(), st.integers(0, 4), st.lists(arrivals, max_size=25))
def test_random_traffic_keeps_every_rule_and_ends(
    setup: tuple[Limits, FakeMemory], delay: int, traffic: list[Arrival]
) -> None:
    play(*setup, delay, traffic)


@settings(max_examples=10, deadline=None)
@given(limits_and_memory(), st.lists(arrivals, min_size=10, max_size=25))
def test_the_same_traffic_gives_the_same_plans(setup: tuple[Limits, FakeMemory], traffic: list[Arrival]) -> None:
    limits, memory = setup
    same = FakeMemory(memory.blocks, memory.block, memory.reused)
    assert play(limits, memory, 2, traffic) == play(limits, same, 2, traffic)
