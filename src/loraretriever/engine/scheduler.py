"""Which sequences go through the model at each step, and how many tokens of each: continuous batching.

The engine asks for a plan before every step, runs its chunks, adds the counts to `Job.computed`, and adds a sampled
token to `Job.tokens` where a chunk was a job's last.

The order is that of priority - (now - arrival) / aging, lowest first. The present time is the same for all, so that
the order of two jobs never changes and the queue stays sorted without being sorted anew.
"""

from __future__ import annotations

import heapq
import itertools
import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Protocol

from loraretriever.errors import InvalidInputError, OverloadedError

# Waiting jobs that a step looks at, the first in order. What lies behind waits until those before it move on: they
# all do, since their adapters get loaded, and since a job that lacks slots or memory holds up those behind it in time.
LOOK_AHEAD = 128


@dataclass(slots=True, eq=False)
class Job:
    """One sequence as the scheduler sees it. The engine changes `tokens` and `computed` only, between plans."""

    tokens: int  # prompt and answer so far, at least 1; those not `computed` must still go through the model
    computed: int = 0  # of them, the leading ones whose keys and values are in the cache
    adapters: frozenset[Hashable] = frozenset()
    priority: int = 0  # lower goes first
    deadline: float | None = None  # seconds on the clock of `now`
    longest: int = 0  # tokens that it can have in the end; at least those that it starts with
    prompt: int = 0  # leading tokens that are the prompt; 0: all that it starts with
    # Not admitted before that job's prompt has been computed, or that job has left: for answers that share a prompt.
    after: Job | None = field(default=None, repr=False)

    # The scheduler's own.
    order: tuple[float, int] = field(default=(0.0, 0), init=False, repr=False)  # seconds; then the order of adding
    room: int = field(default=0, init=False, repr=False)  # while it runs, tokens that memory has a place for
    bypassed: int = field(default=0, init=False, repr=False)  # later jobs admitted while it lacked slots or memory
    line: _Line | None = field(default=None, init=False, repr=False)  # where it is; None: not in the scheduler
    followers: list[Job] = field(default_factory=list, init=False, repr=False)  # held until its prompt is computed

    def __post_init__(self) -> None:
        """Fill in what follows from the number of tokens."""
        self.prompt = self.prompt or self.tokens
        self.longest = max(self.longest, self.tokens)


@dataclass(frozen=True, slots=True)
class Limits:
    """What the scheduler keeps to.

    Raises:
        InvalidInputError: a value is out of its range.
    """

    rows: int  # sequences running at once
    step_tokens: int  # tokens through the model in one step
    slots: int  # distinct adapters of all running sequences
    waiting: int  # sequences in the queue
    patience: int = 32  # later jobs that may be admitted before one that lacks slots or memory
    aging: float = 30.0  # seconds of waiting that make up for one level of priority

    def __post_init__(self) -> None:
        """Refuse limits under which jobs could wait for ever."""
        rules = (
            ("rows", self.rows, self.rows >= 1, "at least 1"),
            ("step_tokens", self.step_tokens, self.step_tokens >= self.rows, f"at least rows ({self.rows})"),
            ("slots", self.slots, self.slots >= 0, "at least 0"),
            ("waiting", self.waiting, self.waiting >= 1, "at least 1"),
            ("patience", self.patience, self.patience >= 0, "at least 0"),
            ("aging", self.aging, 0 < self.aging < math.inf, "a finite number of seconds above 0"),
        )
        for name, value, is_valid, expected in rules:
            if not is_valid:
                raise InvalidInputError(f"{name} is {value!r}; expected {expected}.")


class Memory(Protocol):
    """The bookkeeping of the cache of keys and values."""

    def place(self, job: Job, tokens: int) -> bool:
        """Let the job have room for that many tokens in all; False: there is none, and nothing has changed.

        If `fits(tokens)`, it must succeed when no other job has room.
        """
        ...

    def remove(self, job: Job) -> None:
        """Take the room of a job back."""
        ...

    def fits(self, tokens: int) -> bool:
        """Whether one sequence of that length fits into an otherwise empty memory."""
        ...

    def reuse(self, job: Job) -> int:
        """How many leading tokens of a job just placed are copied from cached prefixes; called once per admission."""
        ...


@dataclass(frozen=True, slots=True)
class Plan:
    """One step."""

    # (job, number of its tokens to run), each job at most once. First those with one token left, which sample; then
    # longer prompts, in order: those whose count is all that was left sample, the others go on in the next step.
    chunks: tuple[tuple[Job, int], ...] = ()
    admitted: tuple[Job, ...] = ()  # run from this step on
    preempted: tuple[Job, ...] = ()  # wait again, in their old place: the cached tokens and the room are lost
    expired: tuple[Job, ...] = ()  # their deadline has come: they have left
    wanted: tuple[Hashable, ...] = ()  # adapters of the first that wait, the most urgent first: not to be dropped
    prefetch: tuple[Hashable, ...] = ()  # those of them that are to be loaded


class _Line:
    """Jobs kept sorted by a key that differs between any two."""

    def __init__(self, key: Callable[[Job], tuple[float, int]]) -> None:
        self.jobs: list[Job] = []
        self._key = key

    def add(self, job: Job) -> None:
        insort(self.jobs, job, key=self._key)

    def remove(self, job: Job) -> None:
        place = bisect_left(self.jobs, self._key(job), key=self._key)
        assert self.jobs[place] is job
        del self.jobs[place]


_order: Callable[[Job], tuple[float, int]] = attrgetter("order")


def _due(job: Job) -> tuple[float, int]:
    assert job.deadline is not None
    return job.deadline, job.order[1]


class Scheduler:
    """Admits, preempts and expires jobs, and shares each step's tokens out. Not safe for several threads.

    A waiting job that lacks slots or memory is bypassed by at most `patience` later ones; then nobody behind it is
    admitted until it is. One whose adapters are not ready is bypassed freely, until they are.
    When memory runs out, the last running jobs in order give way: the first of them always goes on.
    """

    def __init__(self, limits: Limits, memory: Memory, is_ready: Callable[[Hashable], bool]) -> None:
        """Start empty.

        Args:
            limits: kept to at each step.
            memory: gives running jobs their room.
            is_ready: whether an adapter's weights are at hand, as those of running jobs always are. A plan's `wanted`
                adapters must not be dropped once they are loaded, or a job may never have all of its own at once. Jobs
                whose adapter cannot be loaded are the caller's to cancel.
        """
        self._limits = limits
        self._memory = memory
        self._is_ready = is_ready
        self._held = _Line(_order)  # waiting for the prompt of another
        self._queue = _Line(_order)
        self._running = _Line(_order)
        self._deadlines = _Line(_due)
        self._pins: Counter[Hashable] = Counter()  # how many running jobs use each adapter
        self._numbers = itertools.count()

    @property
    def waiting(self) -> int:
        """Jobs that wait."""
        return len(self._queue.jobs) + len(self._held.jobs)

    @property
    def running(self) -> int:
        """Jobs that run."""
        return len(self._running.jobs)

    @property
    def pinned(self) -> frozenset[Hashable]:
        """The adapters of all running jobs."""
        return frozenset(self._pins)

    def check_fit(self, longest: int, adapters: Collection[Hashable], jobs: int = 1) -> None:
        """Refuse what can never run: that many jobs, each of `longest` tokens in the end, with these adapters.

        Raises:
            InvalidInputError: it never can.
        """
        slots, places = self._limits.slots, self._limits.waiting
        used = len(set(adapters))
        if used > slots:
            raise InvalidInputError(
                f"a request uses {used} adapters, but there are {slots} slots; "
                "raise the number of slots or ask for fewer adapters."
            )
        if not self._memory.fits(longest):
            raise InvalidInputError(
                f"prompt and answer can have {longest} tokens, more than the cache has room for; "
                "shorten the prompt, lower max_tokens or give the cache more memory."
            )
        if jobs > places:
            raise InvalidInputError(
                f"a request asks for {jobs} answers, but the queue has {places} places; ask for at most {places}."
            )

    def check(self, longest: int, adapters: Collection[Hashable], jobs: int = 1) -> None:
        """Refuse what cannot be added now, as `check_fit` and for want of a place in the queue.

        Raises:
            InvalidInputError: it never can.
            OverloadedError: the queue has no place for it now.
        """
        self.check_fit(longest, adapters, jobs)
        places = self._limits.waiting
        if self.waiting + jobs > places:
            raise OverloadedError(
                f"{self.waiting} of the queue's {places} places are taken, and {jobs} more were asked for; "
                "send it again later."
            )

    def add(self, job: Job, now: float) -> None:
        """Let a new job wait.

        Raises:
            InvalidInputError, OverloadedError: as `check` does; nothing has changed then.
        """
        assert job.line is None and job.tokens >= 1
        self.check(job.longest, job.adapters)
        job.order = (job.priority * self._limits.aging + now, next(self._numbers))
        if job.deadline is not None:
            self._deadlines.add(job)
        leader = job.after
        if leader is None or leader.line is None:
            self._move(job, self._queue)
        else:  # the next plan releases it if the prompt has been computed already
            leader.followers.append(job)
            self._move(job, self._held)

    def remove(self, job: Job) -> None:
        """Let a job go, done or not, with all that it holds; nothing if it has left already."""
        self._leave(job)

    def plan(self, now: float) -> Plan:
        """The next step. `now` is in seconds and must not go back.

        Without chunks, no job can run before an adapter is loaded or a job is added.
        """
        expired = self._expire(now)
        for job in self._running.jobs:
            if job.computed >= job.prompt:
                self._release(job)
        preempted = self._grow()
        # The room that preemption makes is for those that grow.
        chunks, admitted = self._share_out(admissions=0 if preempted else self._limits.rows - self.running)
        wanted = self._wanted()
        prefetch = tuple(adapter for adapter in wanted if not self._is_ready(adapter))
        return Plan(chunks, admitted, preempted, expired, wanted, prefetch)

    def _expire(self, now: float) -> tuple[Job, ...]:
        due = tuple(itertools.takewhile(lambda job: _due(job)[0] <= now, self._deadlines.jobs))
        for job in due:
            self._leave(job)
        return due

    def _grow(self) -> tuple[Job, ...]:
        """Room for each running job's new tokens; the last jobs in order are preempted where there is none."""
        preempted = []
        for job in tuple(self._running.jobs):
            while job.line is self._running and job.room < job.tokens:
                if self._memory.place(job, job.tokens):
                    job.room = job.tokens
                else:
                    last = self._running.jobs[-1]
                    self._stop(last, self._queue)
                    last.computed = 0
                    preempted.append(last)
        return tuple(preempted)

    def _share_out(self, admissions: int) -> tuple[tuple[tuple[Job, int], ...], tuple[Job, ...]]:
        """The step's chunks and at most that many new jobs: a token for all that decode, the rest in order."""
        last_tokens = [(job, 1) for job in self._running.jobs if job.tokens - job.computed == 1]
        prompts: list[tuple[Job, int]] = []
        admitted: list[Job] = []
        passed: list[Job] = []  # lack slots or memory: whoever is admitted after them bypasses them
        budget = self._limits.step_tokens - len(last_tokens)
        unfinished = [job for job in self._running.jobs if job.tokens - job.computed > 1]
        window = self._queue.jobs[:LOOK_AHEAD] if admissions else []
        for job in heapq.merge(unfinished, window, key=_order):
            if not budget:
                break
            if job.line is self._queue:
                if not admissions or not all(map(self._is_ready, job.adapters)):
                    continue
                if not self._start(job):
                    passed.append(job)
                    admissions = min(admissions, self._limits.patience - job.bypassed)
                    continue
                admissions -= 1
                admitted.append(job)
                for other in passed:
                    other.bypassed += 1
            left = job.tokens - job.computed
            count = min(left, budget)
            budget -= count
            (last_tokens if left == 1 else prompts).append((job, count))
        return (*last_tokens, *prompts), tuple(admitted)

    def _start(self, job: Job) -> bool:
        """Let a waiting job run if there are slots and memory for it."""
        slots = len(self._pins) + len(job.adapters.difference(self._pins))
        if slots > self._limits.slots or not self._memory.place(job, job.tokens):
            return False
        self._move(job, self._running)
        self._pins.update(job.adapters)
        job.room = job.tokens
        job.computed = min(self._memory.reuse(job), job.tokens - 1)  # the last token's logits are needed
        return True

    def _stop(self, job: Job, to: _Line | None) -> None:
        """Take a running job's room and pins."""
        self._move(job, to)
        self._memory.remove(job)
        for adapter in job.adapters:
            self._pins[adapter] -= 1
            if not self._pins[adapter]:
                del self._pins[adapter]

    def _leave(self, job: Job) -> None:
        if job.line is None:
            return
        if job.line is self._running:
            self._stop(job, None)
        else:
            self._move(job, None)
        if job.deadline is not None:
            self._deadlines.remove(job)
        self._release(job)

    def _release(self, leader: Job) -> None:
        """Let the jobs that wait for this one's prompt into the queue."""
        for job in leader.followers:
            if job.line is self._held:
                self._move(job, self._queue)
        leader.followers.clear()

    def _move(self, job: Job, to: _Line | None) -> None:
        if job.line is not None:
            job.line.remove(job)
        if to is not None:
            to.add(job)
        job.line = to

    def _wanted(self) -> tuple[Hashable, ...]:
        """Adapters that the first waiting jobs need beside the running ones', at most as many as there are slots."""
        wanted: dict[Hashable, None] = {}
        for job in self._queue.jobs[:LOOK_AHEAD]:
            if len(wanted) >= self._limits.slots:
                break
            # Sorted, for the order of a set of strings differs from one process to the next.
            wanted.update(dict.fromkeys(sorted(job.adapters.difference(self._pins, wanted), key=repr)))
        return tuple(wanted)[: self._limits.slots]
