"""The local engine: continuous batching on a transformers model, each sequence under its own composition.

Every step runs the plan of `scheduler.py` through `runner.py`, samples (`sampler.py`) and hands out text (`text.py`).
One thread does that; any thread may submit and abort. The lock guards all bookkeeping; the model runs outside it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Ordered
from queue import Empty, SimpleQueue
from typing import Any, cast

from loraretriever.batch import AdapterRef, LoraLayers
from loraretriever.compose.merged import MergedStore
from loraretriever.engine.adapters import Adapters, AdapterSource
from loraretriever.engine.openmp import release_workers
from loraretriever.engine.prefixes import BLOCK
from loraretriever.engine.runner import ModelRunner, Work, check_length
from loraretriever.engine.sampler import Sampled, Sampler, check_sampling
from loraretriever.engine.scheduler import Job, Limits, Plan, Scheduler
from loraretriever.engine.sequence import Sequence, Sink, tokenize
from loraretriever.engine.stream import Stream
from loraretriever.errors import InvalidInputError, OverloadedError
from loraretriever.models import BaseModel
from loraretriever.types import Generation, Piece, Request

_log = logging.getLogger(__name__)
_MIB = 1 << 20
_RETRY = 0.05  # seconds until what cannot go on is tried again
_LINGER = 1.0  # seconds that the thread waits for the next request; an engine that nobody uses can be collected


class LocalEngine:
    """Runs requests on one model in this process. Any thread may use it; `close` it in the end."""

    def __init__(
        self,
        base: BaseModel,
        source: AdapterSource,
        *,
        slots: int = 32,
        batch_size: int = 32,
        step_tokens: int = 256,
        cache_mib: int = 2048,
        prefix_mib: int = 256,
        host_mib: int = 1024,
        queue: int = 1024,
        merged: MergedStore | None = None,
    ) -> None:
        """Prepare the model.

        Args:
            base: its linear modules get adapters; between steps it is the plain base model.
            source: looked up when a request comes in; the request keeps the revisions of that moment.
            slots: adapters on the device at once, which bounds the distinct adapters of the running sequences.
            batch_size: sequences that run at once.
            step_tokens: tokens of prompts that go through the model in one step, besides one of each running sequence.
            cache_mib: memory for keys and values of running sequences.
            prefix_mib: memory for those of prompts' beginnings, which are not computed again.
            host_mib: memory for adapters outside the slots. Those that run and those to run next are held anyway.
            queue: sequences that may wait.
            merged: keeps the adapters that merging strategies make; None: each is made whenever it is loaded.

        Raises:
            ModelLoadError: the model does not work with this engine.
            InvalidInputError: a size is out of its range.
        """
        self._base = base
        self._lock = threading.Condition()
        self._sequences: dict[Job, Sequence] = {}  # that have not ended
        self._layers = LoraLayers(base.model, slots, lambda ref: self._adapters.store.get(ref))
        self._runner = ModelRunner(base.model, self._layers, cache_mib * _MIB, prefix_mib * _MIB)
        limits = Limits(batch_size, step_tokens + batch_size, slots, queue)
        memory = _Memory(self._runner, self._sequences)
        self._scheduler = Scheduler(limits, memory, lambda ref: self._is_ready(cast(AdapterRef, ref)))
        self._adapters = Adapters(source, self._layers.prepare, host_mib * _MIB, merged, self._wake)
        self._sampler = Sampler(base.model.device)
        self._vocabulary = int(base.model.get_output_embeddings().weight.shape[0])
        self._known_ids = int(base.model.get_input_embeddings().weight.shape[0])
        self._end_ids = _end_ids(base)
        self._thread: threading.Thread | None = None
        self._woken = False
        self._closed = False
        self._stepping: list[Sequence] = []  # what the present step is about
        self._wanted: frozenset[AdapterRef] = frozenset()  # adapters of those that wait, as of the last step
        self._aborted: list[Sequence] = []  # by the engine's own thread, in which an iterator of `run` may be collected

    def submit(self, request: Request) -> Stream:
        """Let a request join the running ones as soon as there is room.

        Raises:
            InvalidInputError: it can never run (too long, more adapters than slots).
            AdapterNotFoundError: an adapter is not in the pool.
            OverloadedError: the queue is full; try again later.
        """
        sequences: list[Sequence] = []
        stream = Stream(request.sampling.n, lambda: self._abort(sequences))
        sequences += self._make(request, 0, stream)
        self._add(sequences)
        return stream

    def run(self, requests: Ordered[Request]) -> Iterator[tuple[int, Generation]]:
        """Yield (position in `requests`, answer) in the order of completion, `n` answers for each request.

        Waits where the queue is full. Closing the iterator aborts what has not ended.

        Raises:
            InvalidInputError, AdapterNotFoundError: as `submit`; nothing has been run then.
            LoraRetrieverError: a request failed on its way (its adapter cannot be read, say); the others are aborted.
        """
        done: SimpleQueue[tuple[int, Generation | Exception]] = SimpleQueue()
        waiting = deque(self._make(request, i, _Collector(i, done)) for i, request in enumerate(requests))
        running: dict[int, list[Sequence]] = {}
        left: Counter[int] = Counter()  # answers to come
        position = 0
        try:
            while waiting or running:
                with self._lock:  # all that fit at once, so that the first step is a full one
                    while waiting and self._try_add(waiting[0]):
                        running[position] = waiting.popleft()
                        left[position] = len(running[position])
                        position += 1
                try:
                    of, outcome = done.get(timeout=_RETRY if waiting else None)
                except Empty:
                    continue
                if isinstance(outcome, Exception):
                    raise outcome
                left[of] -= 1
                if not left[of]:
                    del running[of]
                yield of, outcome
        finally:
            self._abort([sequence for sequences in running.values() for sequence in sequences])

    def close(self) -> None:
        """Abort what runs, stop the threads, and give the model its own modules back. May be called twice."""
        with self._lock:
            self._closed = True
            thread = self._thread
            self._lock.notify_all()
        if thread is not None:
            thread.join()
        with self._lock:
            self._abort(list(self._sequences.values()))
        self._adapters.close()
        self._layers.eject()

    def _make(self, request: Request, position: int, sink: Sink) -> list[Sequence]:
        """The sequences of a request, checked but not added."""
        sampling = request.sampling
        ids = tokenize(request, self._base.tokenizer)
        check_length(len(ids), sampling.max_tokens, self._runner.max_length, position)
        if max(ids) >= self._known_ids:
            raise InvalidInputError(
                f"prompt {position + 1} has the token {max(ids)}, but the model knows only those below "
                f"{self._known_ids}; use the model's own tokenizer, or leave that special token out."
            )
        check_sampling(sampling, self._vocabulary)
        route, now = self._adapters.route(request.composition), time.monotonic()
        made: list[Sequence] = []
        for index in range(sampling.n):
            leader = made[0] if made else None
            made.append(Sequence(request, index, ids, route, self._base.tokenizer, sink, now, leader))
        self._scheduler.check_fit(made[0].job.longest, made[0].job.adapters, len(made))
        return made

    def _add(self, sequences: list[Sequence]) -> None:
        release_workers()  # of this thread, which has tokenised, and perhaps retrieved
        with self._lock:
            if self._closed:
                raise InvalidInputError("the engine is closed; make a new one.")
            first = sequences[0].job
            self._scheduler.check(first.longest, first.adapters, len(sequences))
            for sequence in sequences:
                self._scheduler.add(sequence.job, time.monotonic())
                self._sequences[sequence.job] = sequence
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._loop, name="local-engine", daemon=True)
                self._thread.start()
            self._wake()

    def _try_add(self, sequences: list[Sequence]) -> bool:
        try:
            self._add(sequences)
        except OverloadedError:
            return False
        return True

    def _abort(self, sequences: Ordered[Sequence]) -> None:
        if threading.current_thread() is self._thread:
            self._aborted += sequences
            return
        with self._lock:
            for sequence in sequences:
                if sequence.job in self._sequences:
                    self._end(sequence, "aborted")

    def _end(self, sequence: Sequence, reason: str) -> None:
        self._leave(sequence)
        sequence.end(reason, time.monotonic())

    def _fail(self, sequences: Ordered[Sequence], error: Exception) -> None:
        for sequence in sequences:
            if sequence.job in self._sequences:
                self._leave(sequence)
                sequence.fail(error)

    def _leave(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence.job)
        del self._sequences[sequence.job]

    def _wake(self) -> None:
        with self._lock:
            self._woken = True
            self._lock.notify_all()

    def _is_ready(self, ref: AdapterRef) -> bool:
        return self._layers.holds(ref) or self._adapters.store.is_ready(ref)

    # From here on, all runs in the engine's thread.

    def _loop(self) -> None:
        while True:
            with self._lock:
                if not self._sequences and not self._closed:
                    self._lock.wait(_LINGER)
                if not self._sequences or self._closed:
                    self._thread = None
                    self._sampler = Sampler(self._base.model.device)  # the old one holds the last batch
                    return
                self._woken = False
            try:
                progressed = self._step()
            except Exception as error:  # whatever it is, those whom it was about must hear of it
                _log.exception("a step of the engine failed")
                with self._lock:
                    self._fail(self._stepping or list(self._sequences.values()), error)
                continue
            if not progressed:
                with self._lock:
                    if not self._woken and not self._closed:
                        self._lock.wait(_RETRY)  # an adapter is loaded meanwhile

    def _step(self) -> bool:
        """Plan and run one step; False if nothing can run now."""
        with self._lock:
            self._stepping = []
            for sequence in self._aborted:
                if sequence.job in self._sequences:
                    self._end(sequence, "aborted")
            self._aborted.clear()
            plan = self._scheduler.plan(time.monotonic())
            self._stepping = [self._sequences[job] for job, _ in plan.chunks]
            chunks = self._prepare(plan)
            works = [self._work(sequence, count) for sequence, count in chunks]
        if not works:
            return bool(plan.admitted or plan.preempted or plan.expired)
        logits, order = self._runner.step(works)
        rows = [chunks[i][0] for i in order]
        sampled = self._sampler.sample(logits, rows) if rows else []
        now = time.monotonic()
        with self._lock:
            for sequence, count in chunks:
                if sequence.job in self._sequences:
                    sequence.job.computed += count
                    self._keep_prefix(sequence)
            for sequence, token in zip(rows, sampled, strict=True):
                if sequence.job in self._sequences:
                    sequence.job.tokens += 1
                    self._append(sequence, token, now)
        return True

    def _append(self, sequence: Sequence, token: Sampled, now: float) -> None:
        try:
            sequence.append(token, self._end_ids, now)
        except Exception as error:  # of a tokenizer that cannot decode
            self._fail([sequence], error)
        else:
            if sequence.finish_reason is not None:
                self._leave(sequence)

    def _prepare(self, plan: Plan) -> list[tuple[Sequence, int]]:
        """End what is late, fetch adapters into slots, and settle the cache; the chunks that can run."""
        for job in plan.expired:
            self._end(self._sequences[job], "timeout")
        pinned = cast("frozenset[AdapterRef]", self._scheduler.pinned)
        wanted = frozenset(cast("tuple[AdapterRef, ...]", plan.wanted))
        for ref in self._wanted - wanted - pinned:
            self._adapters.store.forget(ref)
        self._wanted = wanted
        self._adapters.store.keep(pinned | wanted)
        self._adapters.prefetch(cast("tuple[AdapterRef, ...]", plan.prefetch))
        self._fetch([self._sequences[job] for job in plan.admitted])
        self._runner.settle()
        chunks = [(self._sequences[job], count) for job, count in plan.chunks if job in self._sequences]
        for job in plan.admitted:
            sequence = self._sequences.get(job)
            if sequence is not None and sequence.blocks:
                self._runner.load_prefix(self._runner.table[job], sequence.blocks)
        return chunks

    def _fetch(self, admitted: list[Sequence]) -> None:
        """Adapters of all that run into slots; those just admitted fail if one of theirs cannot be loaded."""
        failed: dict[AdapterRef, Exception] = {}
        for ref in {ref: None for sequence in admitted for ref in sequence.route.adapters}:
            if not self._layers.holds(ref):
                try:
                    self._adapters.store.get(ref)
                except Exception as error:  # of the pool, the file system, or a merge
                    failed[ref] = error
        for sequence in admitted:
            for ref in failed.keys() & set(sequence.route.adapters):
                self._fail([sequence], failed[ref])
        while True:
            pinned = cast("frozenset[AdapterRef]", self._scheduler.pinned)
            try:
                self._layers.acquire(sorted(pinned, key=lambda ref: ref.digest))
                return
            except Exception as error:  # no memory for a larger rank, say
                without = [s for s in admitted if not all(map(self._layers.holds, s.route.adapters))]
                if not any(sequence.job in self._sequences for sequence in without):
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
            blocks = self._runner.prefixes.add(sequence.route, sequence.prompt_ids)
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
        sequence.blocks = self._runner.prefixes.find(sequence.route, sequence.tokens(0, job.tokens - 1))
        if sequence.cached is None:
            sequence.cached = len(sequence.blocks) * BLOCK
        return len(sequence.blocks) * BLOCK


class _Collector:
    """A sink for `run`: the answers of many requests in one queue."""

    def __init__(self, position: int, done: SimpleQueue[tuple[int, Generation | Exception]]) -> None:
        self._position = position
        self._done = done

    def piece(self, piece: Piece) -> None:
        """See `Sink`; the whole answer comes at its end."""

    def finish(self, generation: Generation) -> None:
        """See `Sink`."""
        self._done.put((self._position, generation))

    def fail(self, error: Exception) -> None:
        """See `Sink`."""
        self._done.put((self._position, error))


def _end_ids(base: BaseModel) -> frozenset[int]:
    """Tokens that end an answer: those of the model's generation settings and the tokenizer's."""
    configured: Any = base.model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*listed, base.tokenizer.eos_token_id) if token is not None)
