"""One replica of the local engine in simulated time: its scheduler, its slots and its pages are the engine's own.

`advance` does what `engine/steps.py` does between two steps. Steps that are alike, because all that runs decodes and
nothing comes or goes, are taken together as one stretch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import cast

from loraretriever.batch import AdapterRef
from loraretriever.batch.slots import SlotTable
from loraretriever.engine.pages import PageTable, Place
from loraretriever.engine.scheduler import Job, Limits, Plan, Scheduler
from loraretriever.errors import InvalidInputError, OverloadedError
from loraretriever.evaluate.plan.costs import StepCosts, StepWork
from loraretriever.evaluate.plan.store import SimulatedStore
from loraretriever.evaluate.plan.workload import Call


@dataclass(frozen=True, slots=True)
class ReplicaSizes:
    """The engine's sizes of the same names; adapters in host memory and tokens of keys and values are counted.

    Raises:
        InvalidInputError: a value is out of its range.
    """

    slots: int = 32
    host: int = 256
    batch_size: int = 32
    step_tokens: int = 256
    cache_tokens: int = 1 << 20
    queue: int = 1024

    def __post_init__(self) -> None:
        """Refuse sizes that the engine would refuse."""
        for name, least in (("slots", 1), ("host", 0), ("batch_size", 1), ("step_tokens", 1), ("cache_tokens", 64)):
            value = getattr(self, name)
            if value < least:
                raise InvalidInputError(f"{name} is {value}; expected at least {least}.")


@dataclass(frozen=True, slots=True, eq=False)
class Simulated(AdapterRef):
    """An adapter of the simulation; there is one object for each, so that comparing them is quick."""

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return self.digest


@dataclass(slots=True, eq=False)
class Served:
    """What becomes of one request; times in seconds from the simulation's start."""

    call: Call
    replica: int
    refs: tuple[AdapterRef, ...]
    begun: float = math.nan  # its first step
    first: float = math.nan  # the end of the step that gave its first token
    end: float = math.nan

    @property
    def is_refused(self) -> bool:
        """Whether the queue was full."""
        return self.replica < 0


@dataclass(frozen=True, slots=True)
class _Stretch:
    """`steps` steps alike, but that each takes `growth` seconds more than the one before."""

    start: float
    steps: int
    seconds: float  # of the first
    growth: float
    chunks: tuple[tuple[Job, int], ...]

    def after(self, steps: int) -> float:
        """When so many of them have ended."""
        return self.start + steps * self.seconds + self.growth * steps * (steps - 1) / 2

    def steps_until(self, now: float) -> int:
        """The fewest steps, one at least and no more than there are, after which it is `now` or later."""
        if self.after(self.steps) <= now:
            return self.steps
        passed, half = now - self.start, self.growth / 2
        first = self.seconds - half
        steps = 2 * passed / (first + math.sqrt(first * first + 4 * half * passed)) if passed > 0 else 1.0
        whole = max(1, math.ceil(steps - 1e-9))
        return min(whole, self.steps)


@dataclass(slots=True)
class Usage:
    """Sums over a replica's steps."""

    busy: float = 0.0  # seconds
    steps: int = 0
    rows: int = 0  # sequences of all steps
    preemptions: int = 0
    hits: int = 0  # adapters of requests that began, found in slots; one of several that began at once counts once
    writes: int = 0  # those copied into slots


class Replica:
    """Takes requests at their time and carries them on, step by step. Times are in seconds and must not go back."""

    def __init__(self, number: int, sizes: ReplicaSizes, costs: StepCosts, load: Callable[[AdapterRef], float]) -> None:
        """`load`: seconds from the disk to host memory."""
        self.number = number
        self.usage = Usage()
        self.wake = math.inf  # when `advance` is to be called next
        self.store = SimulatedStore(sizes.host, load)
        self._costs = costs
        self._table = PageTable(sizes.cache_tokens)
        self._slots = SlotTable(sizes.slots)
        self._held: frozenset[AdapterRef] = frozenset()
        limits = Limits(sizes.batch_size, sizes.step_tokens + sizes.batch_size, sizes.slots, sizes.queue)
        self._scheduler = Scheduler(limits, _Memory(self._table), self._is_ready)
        self._served: dict[Job, Served] = {}
        self._stretch: _Stretch | None = None

    @property
    def load(self) -> int:
        """Requests that run or wait."""
        return len(self._served)

    def submit(self, served: Served, now: float) -> bool:
        """Let a request wait; False if the queue is full.

        Raises:
            InvalidInputError: it can never run.
        """
        call = served.call
        job = Job(tokens=call.prompt, adapters=frozenset(served.refs), longest=call.prompt + call.answer)
        try:
            self._scheduler.add(job, now)
        except OverloadedError:
            return False
        self._served[job] = served
        for ref in served.refs:
            if ref not in self._slots:
                self.store.prefetch(ref, now, early=True)
        if self._stretch is None:
            self.wake = now
        else:  # it is looked at after the step that is under way
            self._cut(now)
        return True

    def advance(self, now: float) -> list[Served]:
        """Do what is due at `wake`; the requests that have ended."""
        ended = self._finish_stretch()
        self.store.advance(now)
        plan = self._scheduler.plan(now)
        writes = self._prepare(plan, now)
        if plan.chunks:
            self._begin(plan, writes, now)
        elif plan.admitted or plan.preempted:
            self.wake = now
        else:
            self.wake = self.store.next_end
        return ended

    def _is_ready(self, ref: Hashable) -> bool:
        return ref in self._slots or ref in self.store  # type: ignore[operator]

    def _cut(self, now: float) -> None:
        stretch = self._stretch
        assert stretch is not None
        steps = stretch.steps_until(now)
        self._stretch = _Stretch(stretch.start, steps, stretch.seconds, stretch.growth, stretch.chunks)
        self.wake = stretch.after(steps)

    def _prepare(self, plan: Plan, now: float) -> int:
        """As `Steps._prepare`: adapters into host memory and into slots; how many were copied."""
        pinned = cast("frozenset[AdapterRef]", self._scheduler.pinned)
        self.usage.preemptions += len(plan.preempted)
        self.store.keep(pinned.union(cast("tuple[AdapterRef, ...]", plan.wanted)))
        for ref in cast("tuple[AdapterRef, ...]", plan.prefetch):
            self.store.prefetch(ref, now)
        seen: set[AdapterRef] = set()
        for job in plan.admitted:
            served = self._served[job]
            if math.isnan(served.begun):
                served.begun = now
            for ref in served.refs:
                if ref in seen:
                    continue
                seen.add(ref)
                if ref in self._slots:
                    self.usage.hits += 1
                else:
                    self.store.take(ref)
                    self.usage.writes += 1
        return self._acquire(pinned) if pinned != self._held else 0

    def _acquire(self, pinned: frozenset[AdapterRef]) -> int:
        """As `LoraLayers.acquire`."""
        missing = self._slots.touch(sorted(pinned, key=repr))
        for ref in missing:
            self._slots.put(ref, self._slots.make_room(pinned))
        self._slots.compact(pinned)
        self._held = pinned
        return len(missing)

    def _begin(self, plan: Plan, writes: int, now: float) -> None:
        work = _work(plan.chunks, writes, self._table)
        seconds = self._costs.seconds(work)
        growth = self._costs.pair * work.rows
        stretch = _Stretch(now, self._steps_alike(plan), seconds, growth, plan.chunks)
        if stretch.steps > 1 and self._scheduler.waiting and self.store.next_end < stretch.after(stretch.steps):
            steps = stretch.steps_until(self.store.next_end)
            stretch = _Stretch(now, steps, seconds, growth, plan.chunks)
        self._stretch = stretch
        self.wake = stretch.after(stretch.steps)

    def _steps_alike(self, plan: Plan) -> int:
        """How many steps there are until the plan may be another one, arrivals and loads aside."""
        if plan.admitted or plan.preempted or any(job.tokens - job.computed > 1 for job, _ in plan.chunks):
            return 1
        if len(plan.chunks) < self._scheduler.running:
            return 1
        left = min(self._left(job) for job, _ in plan.chunks)
        room = min(self._table[job].capacity - job.tokens + 1 for job, _ in plan.chunks)
        return max(1, min(left, room))

    def _left(self, job: Job) -> int:
        """Tokens of its answer that are to come."""
        call = self._served[job].call
        return call.prompt + call.answer - job.tokens

    def _finish_stretch(self) -> list[Served]:
        stretch, self._stretch = self._stretch, None
        if stretch is None:
            return []
        ended = []
        end = stretch.after(stretch.steps)
        self.usage.busy += end - stretch.start
        self.usage.steps += stretch.steps
        self.usage.rows += stretch.steps * len(stretch.chunks)
        for job, count in stretch.chunks:
            job.computed += count * stretch.steps
            if job.computed < job.tokens + stretch.steps - 1:
                continue  # its prompt goes on
            served = self._served[job]
            if math.isnan(served.first):
                served.first = stretch.after(1)
            job.tokens += stretch.steps
            if not self._left(job):
                served.end = end
                self._scheduler.remove(job)
                del self._served[job]
                ended.append(served)
        return ended


def _work(chunks: Sequence[tuple[Job, int]], writes: int, table: PageTable) -> StepWork:
    tokens = rows = prompt = parts = uses = 0
    pairs = 0.0
    adapters: set[Hashable] = set()
    decoding = []
    for job, count in chunks:
        tokens += count
        rows += job.computed + count == job.tokens
        uses += count * len(job.adapters)
        adapters |= job.adapters
        if job.tokens - job.computed > 1:
            prompt += count
            parts += 1
            pairs += count * (job.computed + (count + 1) / 2)
        else:
            decoding.append((table[job], job.tokens))
    sides = _sides(decoding)
    pairs += sum(len(side) * max(side) for side in sides)
    return StepWork(tokens, rows, prompt, parts, len(sides), pairs, int(bool(adapters)), len(adapters), uses, writes)


def _sides(decoding: Sequence[tuple[Place, int]]) -> list[list[int]]:
    """The lengths of sequences in adjacent rows of one capacity, as `StepLayout` takes them together."""
    sides: list[list[int]] = []
    behind = None
    for place, length in sorted(decoding, key=lambda each: each[0].start):
        if place != behind:
            sides.append([])
        sides[-1].append(length)
        behind = Place(place.start + place.capacity, place.capacity)
    return sides


@dataclass(frozen=True, slots=True)
class _Memory:
    """The cache as the scheduler asks for room in it; no prompt begins like another. See `engine/steps.py`."""

    table: PageTable = field(repr=False)

    def place(self, job: Job, tokens: int) -> bool:
        """See `scheduler.Memory`."""
        wanted = max(tokens, job.longest) if job.longest > self.table.tokens // 4 else tokens
        placed = self.table.place(job, wanted)
        self.table.take_moves()
        return placed

    def remove(self, job: Job) -> None:
        """See `scheduler.Memory`."""
        self.table.remove(job)
        self.table.take_moves()

    def fits(self, tokens: int) -> bool:
        """See `scheduler.Memory`."""
        return self.table.fits(tokens)

    def reuse(self, job: Job) -> int:
        """See `scheduler.Memory`."""
        return 0
