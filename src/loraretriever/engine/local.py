"""The local engine: continuous batching on a transformers model, each sequence under its own composition.

One thread runs the steps (`steps.py`); any thread may submit and abort. The lock guards all bookkeeping; the model
runs outside it.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Ordered
from concurrent.futures import Future
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from loraretriever.batch import LoraLayers
from loraretriever.compose.merged import MergedStore
from loraretriever.engine.adapters import Adapters, AdapterSource, read_routers
from loraretriever.engine.intake import Intake
from loraretriever.engine.probe import choose_module, effects, factors_of, last_inputs
from loraretriever.engine.prompts import check_length
from loraretriever.engine.runner import ModelRunner
from loraretriever.engine.scheduler import Limits
from loraretriever.engine.sequence import Sequence, Sink
from loraretriever.engine.steps import Steps
from loraretriever.engine.stream import Collector, Stream, Unheard
from loraretriever.errors import OverloadedError
from loraretriever.models import BaseModel
from loraretriever.openmp import release_workers
from loraretriever.types import Composition, EngineStats, Generation, Request

_Result = TypeVar("_Result")
_log = logging.getLogger(__name__)
_MIB = 1 << 20
_RETRY = 0.05  # seconds until what cannot go on is tried again
_LINGER = 1.0  # seconds that the thread waits for the next request; an engine that nobody uses can be collected


class LocalEngine:
    """Runs requests on one model in this process. Any thread may use it; `close` it in the end."""

    reduces_to: int | None = None  # it takes mixtures of any rank

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
        routers: Ordered[Path] = (),
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
            host_mib: memory for adapters outside the slots. Those that run and those to run next are held anyway; those
                of other waiting requests are loaded early while there is room.
            queue: sequences that may wait.
            merged: keeps the adapters that merging strategies make; None: each is made whenever it is loaded.
            routers: folders of trained routers for gates (`compose.routers`), one of each kind at most. A router takes
                a slot while it is in use.

        Raises:
            ModelLoadError: the model does not work with this engine.
            InvalidInputError: a size is out of its range, or a folder holds no router.
            AdmissionError: a router's weights cannot be used.
        """
        found = read_routers(routers, base.name)
        self._lock = threading.Condition()
        self._layers = LoraLayers(base.model, slots, lambda ref: self._adapters.store.get(ref))
        self._runner = ModelRunner(base.model, self._layers, cache_mib * _MIB, prefix_mib * _MIB)
        self._limits = Limits(batch_size, step_tokens + batch_size, slots, queue)
        self._adapters = Adapters(source, self._layers.prepare, host_mib * _MIB, merged, self._wake, found)
        self._unheard = Unheard()
        self._steps = Steps(base, self._layers, self._runner, self._adapters, self._limits, self._lock, self._unheard)
        self._intake = Intake(base, self._runner, self._adapters)
        self._model = base.model
        self._jobs: list[tuple[Callable[[], None], Future[Any]]] = []  # for the thread, before its next step
        self._thread: threading.Thread | None = None
        self._woken = False
        self._closed = False

    def submit(self, request: Request) -> Stream:
        """Let a request join the running ones as soon as there is room.

        Raises:
            InvalidInputError: it can never run (too long, more adapters than slots).
            AdapterNotFoundError: an adapter is not in the pool.
            OverloadedError: the queue is full, or the engine is stopping; try again later.
        """
        sequences: list[Sequence] = []
        stream = Stream(request.sampling.n, lambda: self._abort(sequences), self._unheard)
        sequences += self._make(request, 0, stream)
        self._add(sequences)
        return stream

    def run(self, requests: Ordered[Request]) -> Iterator[tuple[int, Generation]]:
        """Yield (position in `requests`, answer) in the order of completion, `n` answers for each request.

        Waits where the queue is full. Closing the iterator aborts what has not ended.

        Raises:
            InvalidInputError, AdapterNotFoundError: as `submit`; nothing has been run then.
            OverloadedError: the engine is stopping; what runs is aborted.
            LoraRetrieverError: a request failed on its way (its adapter cannot be read, say); the others are aborted.
        """
        done: SimpleQueue[tuple[int, Generation | Exception]] = SimpleQueue()
        waiting = deque(self._make(request, i, Collector(i, done)) for i, request in enumerate(requests))
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

    @property
    def max_length(self) -> int:
        """Tokens of the longest prompt and answer together."""
        return self._intake.max_length

    def count_tokens(self, request: Request) -> int:
        """Tokens of the request's prompt as the model reads it.

        Raises:
            InvalidInputError: the model does not know one, or the chat template refuses the messages.
        """
        return len(self._intake.tokenize(request))

    def detokenize(self, tokens: Ordered[int]) -> str:
        """The text of tokens, without the special ones.

        Raises:
            InvalidInputError: the model does not know one of them.
        """
        return self._intake.detokenize(tokens)

    def stats(self) -> EngineStats:
        """What the engine is doing, and what it has done. Takes no lock: a step may be half counted."""
        counted, store, table = self._steps.counters, self._adapters.store, self._runner.table
        return EngineStats(
            running=self._steps.scheduler.running,
            waiting=self._steps.scheduler.waiting,
            batch_size=self._limits.rows,
            queue=self._limits.waiting,
            slots=self._limits.slots,
            slots_used=self._layers.slots_used,
            cache_tokens=table.tokens,
            cache_tokens_used=table.used,
            host_bytes=store.nbytes,
            steps=counted.steps,
            step_sequences=counted.step_sequences,
            batch_sizes=counted.batch_sizes(),
            prompt_tokens=counted.prompt_tokens,
            cached_tokens=counted.cached_tokens,
            generated_tokens=counted.generated_tokens,
            preemptions=counted.preemptions,
            adapter_hits=counted.adapter_hits,
            slot_loads=counted.slot_loads,
            adapter_loads=store.loads,
            adapter_evictions=store.evictions,
        )

    def effects(self, requests: Ordered[Request], adapters: Ordered[Ordered[str]]) -> list[tuple[float, ...]]:
        """See `Engine`; the states are the base model's, at one module: see `probe.choose_module`."""
        self._check_open()
        prompts = [self._intake.tokenize(request, i) for i, request in enumerate(requests)]
        for position, prompt in enumerate(prompts):
            check_length(len(prompt), 1, self.max_length, position)
        names = list(dict.fromkeys(name for row in adapters for name in row))
        if not names:
            return [()] * len(prompts)
        refs = self._adapters.route(Composition("mixture", tuple(names), (1.0,) * len(names))).adapters
        held = {name: self._adapters.store.get(ref) for name, ref in zip(names, refs, strict=True)}
        module = choose_module(list(held.values()), [name for name, _ in self._model.named_modules()])
        x = self._between_steps(lambda: last_inputs(self._model, module, prompts))
        moved = {name: effects(x, factors_of(adapter, module)).tolist() for name, adapter in held.items()}
        return [tuple(moved[name][n] for name in row) for n, row in enumerate(adapters)]

    def close(self) -> None:
        """Abort what runs, stop the threads, and give the model its own modules back. May be called twice."""
        with self._lock:
            self._closed = True
            thread = self._thread
            self._lock.notify_all()
        if thread is not None:
            thread.join()
        self._abort(list(self._steps.sequences.values()))
        for _, future in self._jobs:
            future.set_exception(OverloadedError("the engine is stopping; send the request to another one."))
        self._jobs = []
        self._adapters.close()
        self._layers.eject()

    def _make(self, request: Request, position: int, sink: Sink) -> list[Sequence]:
        """The sequences of a request, checked but not added."""
        made = self._intake.make(request, position, sink)
        self._steps.scheduler.check_fit(made[0].job.longest, made[0].job.adapters, len(made))
        return made

    def _add(self, sequences: list[Sequence]) -> None:
        release_workers()  # of this thread, which has tokenised, and perhaps retrieved
        with self._lock:
            self._check_open()
            self._steps.add(sequences)
            self._start()

    def _between_steps(self, job: Callable[[], _Result]) -> _Result:
        """Let the engine's thread, which alone uses the model, do something before its next step."""
        future: Future[_Result] = Future()

        def run() -> None:
            try:
                future.set_result(job())
            except BaseException as error:  # the caller's, whatever it is
                future.set_exception(error)

        release_workers()
        with self._lock:
            self._check_open()
            self._jobs.append((run, future))
            self._start()
        return future.result()

    def _start(self) -> None:
        """Wake the thread, or make a new one. Call it under the lock."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._loop, name="local-engine", daemon=True)
            self._thread.start()
        self._wake()

    def _check_open(self) -> None:
        if self._closed:
            raise OverloadedError("the engine is stopping and takes no more requests; send it to another one.")

    def _try_add(self, sequences: list[Sequence]) -> bool:
        self._check_open()
        try:
            self._add(sequences)
        except OverloadedError:
            return False
        return True

    def _abort(self, sequences: Ordered[Sequence]) -> None:
        if threading.current_thread() is self._thread:
            self._steps.abort_next(sequences)
            return
        with self._lock:
            self._steps.abort(sequences)
        self._unheard.deliver()

    def _has_work(self) -> bool:
        return bool(self._steps.sequences or self._jobs)

    def _wake(self) -> None:
        with self._lock:
            self._woken = True
            self._lock.notify_all()

    def _loop(self) -> None:
        """What the engine's thread does."""
        while True:
            with self._lock:
                if not self._has_work() and not self._closed:
                    self._lock.wait(_LINGER)
                if not self._has_work() or self._closed:
                    self._thread = None
                    self._steps.rest()
                    return
                self._woken = False
                jobs, self._jobs = self._jobs, []
            for job, _ in jobs:
                job()
            if not self._steps.sequences:
                continue
            try:
                progressed = self._steps.step()
            except Exception as error:  # whatever it is, those whom it was about must hear of it
                _log.exception("a step of the engine failed")
                with self._lock:
                    self._steps.fail(error)
                self._unheard.deliver()
                continue
            if not progressed:
                with self._lock:
                    if not self._woken and not self._closed:
                        self._lock.wait(_RETRY)  # an adapter is loaded meanwhile
