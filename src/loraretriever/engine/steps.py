"""The sequences that wait and run, and the steps that carry them on, by the engine's thread.

Every step runs the plan of `scheduler.py` through `runner.py`, samples (`sampler.py`) and hands out text (`text.py`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Ordered
from contextlib import AbstractContextManager
from typing import Any, cast

from loraretriever.batch import AdapterRef, LoraLayers
from loraretriever.engine.adapters import Adapters
from loraretriever.engine.counters import Counters
from loraretriever.engine.prefixes import BLOCK
from loraretriever.engine.runner import ModelRunner, Work
from loraretriever.engine.sampler import Sampled, Sampler
from loraretriever.engine.scheduler import Job, Limits, Plan, Scheduler
from loraretriever.engine.sequence import Sequence
from loraretriever.engine.stream import Unheard
from loraretriever.models import BaseModel, end_ids


class Steps:
    """Sequences from the queue to their end.

    One lock guards the bookkeeping: `step` takes it itself and runs the model without it; whoever calls anything else
    holds it.
    """

    def __init__(
        self,
        base: BaseModel,
        layers: LoraLayers,
        runner: ModelRunner,
        adapters: Adapters,
        limits: Limits,
        lock: AbstractContextManager[Any],
        unheard: Unheard,
    ) -> None:
        """Start empty. Streams in `unheard` are told during each step."""
        self.sequences: dict[Job, Sequence] = {}  # that have not ended
        self.counters = Counters()
        memory = _Memory(runner, self.sequences)
        self.scheduler = Scheduler(limits, memory, lambda ref: self._is_ready(cast(AdapterRef, ref)))
        self._layers = layers
        self._runner = runner
        self._adapters = adapters
        self._lock = lock
        self._unheard = unheard
        self._device = base.model.device
        self._sampler = Sampler(self._device)
        self._end_ids = end_ids(base.model.generation_config, base.tokenizer)
        self._users: Counter[AdapterRef] = Counter()  # sequences of each adapter
        self._stepping: list[Sequence] = []  # what the present step is about
        self._aborted: list[Sequence] = []

    def add(self, sequences: Ordered[Sequence]) -> None:
        """Let the sequences of one request wait.

        Raises:
            InvalidInputError, OverloadedError: as `Scheduler.check`; nothing has changed then.
        """
        first = sequences[0].job
        self.scheduler.check(first.longest, first.adapters, len(sequences))
        for sequence in sequences:
            self.scheduler.add(sequence.job, time.monotonic())
            self.sequences[sequence.job] = sequence
            self._users.update(sequence.route.refs)
        for ref in sequences[0].route.refs:
            if not self._layers.holds(ref):
                self._adapters.store.prefetch(ref, early=True)

    def abort(self, sequences: Ordered[Sequence]) -> None:
        """End those that have not ended."""
        for sequence in sequences:
            if sequence.job in self.sequences:
                self._end(sequence, "aborted")

    def abort_next(self, sequences: Ordered[Sequence]) -> None:
        """End them at the next step: for the engine's own thread, which may be amid one. Without the lock."""
        self._aborted += sequences

    def fail(self, error: Exception) -> None:
        """A step has failed: so have those whom it was about."""
        self._fail(self._stepping or list(self.sequences.values()), error)

    def rest(self) -> None:
        """Let go of what steps remember of each other."""
        self._sampler = Sampler(self._device)

    def _end(self, sequence: Sequence, reason: str) -> None:
        self._leave(sequence)
        sequence.end(reason, time.monotonic())

    def _fail(self, sequences: Ordered[Sequence], error: Exception) -> None:
        for sequence in sequences:
            if sequence.job in self.sequences:
                self._leave(sequence)
                sequence.fail(error)

    def _leave(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence.job)
        del self.sequences[sequence.job]
        for ref in sequence.route.refs:
            self._users[ref] -= 1
            if not self._users[ref]:
                del self._users[ref]
                self._adapters.store.forget(ref)

    def _is_ready(self, ref: AdapterRef) -> bool:
        return self._layers.holds(ref) or self._adapters.store.is_ready(ref)

    def step(self) -> bool:
        """Plan and run one step; False if nothing can run now."""
        with self._lock:
            self._stepping = []
            aborted, self._aborted = self._aborted, []
            self.abort(aborted)
            plan = self.scheduler.plan(now := time.monotonic())
            for job in plan.admitted:
                self.sequences[job].admit(now)
            self.counters.preemptions += len(plan.preempted)
            self._stepping = [self.sequences[job] for job, _ in plan.chunks]
            chunks = self._prepare(plan)
            works = [self._work(sequence, count) for sequence, count in chunks]
        self._unheard.deliver()
        if not works:
            return bool(plan.admitted or plan.preempted or plan.expired)
        logits, order = self._runner.step(works)
        rows = [chunks[i][0] for i in order]
        sampled = self._sampler.sample(logits, rows) if rows else []
        now = time.monotonic()
        with self._lock:
            self.counters.step(len(works))
            for sequence, count in chunks:
                if sequence.job in self.sequences:
                    sequence.job.computed += count
                    self._keep_prefix(sequence)
            for sequence, token in zip(rows, sampled, strict=True):
                if sequence.job in self.sequences:
                    sequence.job.tokens += 1
                    self._append(sequence, token, now)
        self._unheard.deliver()
        return True

    def _append(self, sequence: Sequence, token: Sampled, now: float) -> None:
        before = len(sequence.output_ids)
        try:
            sequence.append(token, self._end_ids, now)
        except Exception as error:  # of a tokenizer that cannot decode
            self._fail([sequence], error)
        else:
            self.counters.generated_tokens += len(sequence.output_ids) - before
            if sequence.finish_reason is not None:
                self._leave(sequence)

    def _prepare(self, plan: Plan) -> list[tuple[Sequence, int]]:
        """End what is late, fetch adapters into slots, and settle the cache; the chunks that can run."""
        for job in plan.expired:
            self._end(self.sequences[job], "timeout")
        pinned = cast("frozenset[AdapterRef]", self.scheduler.pinned)
        wanted = frozenset(cast("tuple[AdapterRef, ...]", plan.wanted))
        self._adapters.store.keep(pinned | wanted)
        self._adapters.prefetch(cast("tuple[AdapterRef, ...]", plan.prefetch))
        self._fetch([self.sequences[job] for job in plan.admitted])
        self._runner.settle()
        chunks = [(self.sequences[job], count) for job, count in plan.chunks if job in self.sequences]
        for job in plan.admitted:
            sequence = self.sequences.get(job)
            if sequence is not None and sequence.blocks:
                self._runner.load_prefix(self._runner.table[job], sequence.blocks)
        return chunks

    def _fetch(self, admitted: list[Sequence]) -> None:
        """Adapters of all that run into slots; those just admitted fail if one of theirs cannot be loaded."""
        failed: dict[AdapterRef, Exception] = {}
        for ref in {ref: None for sequence in admitted for ref in sequence.route.refs}:
            if self._layers.holds(ref):
                self.counters.adapter_hits += 1
                continue
            try:
                self._adapters.store.get(ref)
                self.counters.slot_loads += 1
            except Exception as error:  # of the pool, the file system, or a merge
                failed[ref] = error
        for sequence in admitted:
            for ref in failed.keys() & set(sequence.route.refs):
                self._fail([sequence], failed[ref])
        while True:
            pinned = cast("frozenset[AdapterRef]", self.scheduler.pinned)
            try:
                self._layers.acquire(sorted(pinned, key=lambda ref: ref.digest))
                return
            except Exception as error:  # no memory for a larger rank, say
                without = [s for s in admitted if not all(map(self._layers.holds, s.route.refs))]
                if not any(sequence.job in self.sequences for sequence in without):
                    raise
                self._fail(without, error)

    def _work(self, sequence: Sequence, count: int) -> Work:
        job = sequence.job
        is_last = job.computed + count == job.tokens
        tokens = sequence.tokens(job.computed, count)
        return Work(self._runner.table[job], job.computed, tokens, sequence.route, is_last)

    def _keep_prefix(self, sequence: Sequence) -> None:
        """Once a prompt has been computed, let others begin with it."""
        if not sequence.is_kept and sequence.job.computed >= len(sequence.prompt_ids):
            sequence.is_kept = True
            self.counters.prompt_tokens += len(sequence.prompt_ids)
            self.counters.cached_tokens += sequence.cached or 0
            blocks = self._runner.prefixes.add(sequence.beginnings, sequence.prompt_ids)
            if blocks:
                self._runner.settle()
                self._runner.save_prefix(self._runner.table[sequence.job], blocks)


class _Memory:
    """The cache, as the scheduler asks for room in it."""

    def __init__(self, runner: ModelRunner, sequences: Mapping[Job, Sequence]) -> None:
        self._runner = runner
        self._sequences = sequences

    def place(self, job: Job, tokens: int) -> bool:
        """See `scheduler.Memory`. A sequence that may need much of the cache gets it at once: it could not grow."""
        table = self._runner.table
        return table.place(job, max(tokens, job.longest) if job.longest > table.tokens // 4 else tokens)

    def remove(self, job: Job) -> None:
        """See `scheduler.Memory`."""
        self._runner.table.remove(job)

    def fits(self, tokens: int) -> bool:
        """See `scheduler.Memory`."""
        return self._runner.table.fits(tokens)

    def reuse(self, job: Job) -> int:
        """See `scheduler.Memory`."""
        sequence = self._sequences[job]
        sequence.blocks = self._runner.prefixes.find(sequence.beginnings, sequence.tokens(0, job.tokens - 1))
        if sequence.cached is None:
            sequence.cached = len(sequence.blocks) * BLOCK
        return len(sequence.blocks) * BLOCK
