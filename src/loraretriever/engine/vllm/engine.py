"""The engine over vLLM: names compositions, hands prompts over as tokens, and makes text of the tokens that come.

One thread has the event loop in which all requests run; any thread may submit and abort.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Iterator
from collections.abc import Sequence as Ordered
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any, TypeVar

from loraretriever.batch import RowRoute
from loraretriever.compose.folders import AdapterFolders
from loraretriever.engine.prompts import PromptReader, check_length
from loraretriever.engine.sampler import check_sampling
from loraretriever.engine.sequence import Sequence, Sink
from loraretriever.engine.stream import Collector, Stream, Unheard
from loraretriever.engine.vllm.backend import Backend, Job, Part
from loraretriever.errors import InvalidInputError, OverloadedError
from loraretriever.types import EngineStats, Generation, Request

_Result = TypeVar("_Result")


@dataclass(slots=True, eq=False)
class _Run:
    """A request under way. Only the loop's thread looks at `task` and `has_begun`."""

    request: Request
    job: Job
    sequences: list[Sequence]
    task: asyncio.Task[None] | None = None
    has_begun: bool = False


class _Counted:
    """A sink that counts an answer before anybody hears of its end."""

    def __init__(self, sink: Sink, on_end: Callable[[int], None]) -> None:
        """`on_end` gets the answer's number of tokens."""
        self._sink = sink
        self._on_end = on_end
        self.piece = sink.piece

    def finish(self, generation: Generation) -> None:
        """See `Sink`."""
        self._on_end(generation.completion_tokens)
        self._sink.finish(generation)

    def fail(self, error: Exception) -> None:
        """See `Sink`."""
        self._on_end(0)
        self._sink.fail(error)


class VllmEngine:
    """Runs requests on vLLM. Any thread may use it; `close` it in the end."""

    def __init__(
        self,
        backend: Backend,
        folders: AdapterFolders,
        tokenizer: Any,
        vocabulary: int,
        end_ids: Collection[int],
        *,
        queue: int = 1024,
        reduce: bool = False,
    ) -> None:
        """Wait until vLLM runs.

        Args:
            backend: the vLLM; the engine closes it.
            folders: names compositions.
            tokenizer: the base model's, of transformers.
            vocabulary: how many tokens the model knows.
            end_ids: the tokens that end an answer.
            queue: answers that may be under way at once, here and in vLLM's own queue.
            reduce: as in `AdapterFolders.name`.

        Raises:
            ModelLoadError: vLLM does not run, or cannot be used.
        """
        self._backend = backend
        self._folders = folders
        self._end_ids = end_ids
        self._vocabulary = vocabulary
        self._queue = queue
        self._reduce = reduce
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-engine", daemon=True)
        self._thread.start()
        self._unheard = Unheard()
        self._lock = threading.Lock()
        self._runs: set[_Run] = set()
        self._answers = 0  # under way
        self._counts: Counter[str] = Counter()
        self._closed = False
        try:
            self._limits = self._call(backend.limits())
        except BaseException:
            self.close()
            raise
        self._reader = PromptReader(tokenizer, vocabulary, self._limits.max_length)

    def submit(self, request: Request) -> Stream:
        """Hand a request to vLLM.

        Raises:
            InvalidInputError: it can never run (too long, no single adapter, too large a rank).
            AdapterNotFoundError: an adapter is not in the pool.
            OverloadedError: too many are under way, or the engine is stopping; try again later.
        """
        runs: list[_Run] = []
        stream = Stream(request.sampling.n, lambda: self._abort(runs), self._unheard)
        runs.append(self._start(request, self._job(request, 0), stream))
        return stream

    def run(self, requests: Ordered[Request]) -> Iterator[tuple[int, Generation]]:
        """Yield (position in `requests`, answer) in the order of completion, `n` answers for each request.

        Waits where too many are under way. Closing the iterator aborts what has not ended.

        Raises:
            InvalidInputError, AdapterNotFoundError: as `submit`; nothing has been run then.
            OverloadedError: the engine is stopping; what runs is aborted.
            LoraRetrieverError: a request failed on its way; the others are aborted.
        """
        done: SimpleQueue[tuple[int, Generation | Exception]] = SimpleQueue()
        jobs = [self._job(request, position) for position, request in enumerate(requests)]
        runs: list[_Run] = []
        left = 0  # answers to come
        try:
            while left or len(runs) < len(jobs):
                while len(runs) < len(jobs) and (not left or self._has_room(requests[len(runs)])):
                    position = len(runs)
                    runs.append(self._start(requests[position], jobs[position], Collector(position, done)))
                    left += requests[position].sampling.n
                of, outcome = done.get()
                if isinstance(outcome, Exception):
                    raise outcome
                left -= 1
                yield of, outcome
        finally:
            self._abort(runs)

    def effects(self, requests: Ordered[Request], adapters: Ordered[Ordered[str]]) -> list[tuple[float, ...]]:
        """Not with vLLM, which shows no states of the model.

        Raises:
            InvalidInputError: always.
        """
        raise InvalidInputError(
            "the weighting 'effect' probes the model, which vLLM does not allow; choose another weighting, or the "
            "engine `local`."
        )

    @property
    def max_length(self) -> int:
        """Tokens of the longest prompt and answer together."""
        return self._limits.max_length

    @property
    def reduces_to(self) -> int | None:
        """See `Engine`: what vLLM takes, where that is asked for and vLLM does not compose adapters itself."""
        return self._limits.max_rank if self._reduce and not self._limits.lanes else None

    def count_tokens(self, request: Request) -> int:
        """Tokens of the request's prompt as the model reads it.

        Raises:
            InvalidInputError: the model does not know one, or the chat template refuses the messages.
        """
        return len(self._reader.tokenize(request))

    def detokenize(self, tokens: Ordered[int]) -> str:
        """The text of tokens, without the special ones.

        Raises:
            InvalidInputError: the model does not know one of them.
        """
        return self._reader.detokenize(tokens)

    def stats(self) -> EngineStats:
        """What is under way from here, and what has been done; slots, memory and steps are vLLM's own affair."""
        counts = self._counts
        return EngineStats(
            running=self._answers,
            waiting=0,
            batch_size=self._queue,
            queue=0,
            slots=self._limits.slots,
            slots_used=0,
            cache_tokens=0,
            cache_tokens_used=0,
            host_bytes=0,
            prompt_tokens=counts["prompt"],
            cached_tokens=counts["cached"],
            generated_tokens=counts["generated"],
        )

    def close(self) -> None:
        """Abort what runs, and let go of vLLM. May be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            runs = list(self._runs)
        self._abort(runs)
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        await asyncio.gather(*(run.task for run in list(self._runs) if run.task is not None), return_exceptions=True)
        await self._backend.close()
        await self._loop.shutdown_asyncgens()

    def _call(self, coroutine: Coroutine[Any, Any, _Result]) -> _Result:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _job(self, request: Request, position: int) -> Job:
        """What vLLM gets of a request, checked."""
        tokens = self._reader.tokenize(request, position)
        check_length(len(tokens), request.sampling.max_tokens, self._limits.max_length, position)
        check_sampling(request.sampling, self._vocabulary)
        model = self._limits.base
        if request.composition.adapters:
            limits, digests = self._limits, request.digests
            model = self._folders.name(request.composition, limits.max_rank, self._reduce, limits.lanes, digests)
        sampling = request.sampling
        if sampling.temperature == 0 and sampling.n > 1:
            sampling = replace(sampling, n=1)  # greedy answers are all the same, and vLLM refuses to make several
        return Job(model, tuple(tokens), sampling, request.namespace)

    def _has_room(self, request: Request) -> bool:
        return self._answers + request.sampling.n <= self._queue

    def _start(self, request: Request, job: Job, sink: Sink) -> _Run:
        """Let a job run in the loop."""
        counted, now = _Counted(sink, self._count_end), time.monotonic()
        made = [
            Sequence(request, index, list(job.tokens), RowRoute((), ()), self._reader.tokenizer, counted, now)
            for index in range(request.sampling.n)
        ]
        run = _Run(request, job, made)
        with self._lock:
            if self._closed:
                raise OverloadedError("the engine is stopping and takes no more requests; send it to another one.")
            if not self._has_room(request):
                raise OverloadedError(
                    f"{self._answers} answers are under way, and {request.sampling.n} more are asked for; the limit is "
                    f"{self._queue} (queue). Send the request again later."
                )
            self._answers += len(made)
            self._counts["prompt"] += len(job.tokens)
            self._runs.add(run)
            self._loop.call_soon_threadsafe(self._begin, run)
        return run

    def _count_end(self, tokens: int) -> None:
        with self._lock:
            self._answers -= 1
            self._counts["generated"] += tokens

    def _begin(self, run: _Run) -> None:
        run.task = self._loop.create_task(self._answer(run))

    def _abort(self, runs: Ordered[_Run]) -> None:
        for run in runs:
            with suppress(RuntimeError):  # the loop has ended, and so has the run
                self._loop.call_soon_threadsafe(self._abort_here, run)

    def _abort_here(self, run: _Run) -> None:
        """In the loop, after `_begin`."""
        if run.task is not None and run in self._runs:
            run.task.cancel()
            if not run.has_begun:  # then it never does
                self._end(run, "aborted")

    async def _answer(self, run: _Run) -> None:
        """Run a job to its end, whatever that is: its sink hears of it."""
        run.has_begun = True
        try:
            async with asyncio.timeout(run.request.timeout):
                await self._follow(run)
            self._end(run, "stop")
        except TimeoutError:
            self._end(run, "timeout")
        except asyncio.CancelledError:
            self._end(run, "aborted")
        except Exception as error:  # whatever it is, whoever waits must hear of it
            for sequence in run.sequences:
                if sequence.finish_reason is None:
                    sequence.fail(error)
            self._end(run, "error")

    def _end(self, run: _Run, reason: str) -> None:
        """Those answers that have not ended end so."""
        for sequence in run.sequences:
            if sequence.finish_reason is None:
                sequence.end(reason, time.monotonic())
        with self._lock:
            self._runs.discard(run)
        self._unheard.deliver()

    async def _follow(self, run: _Run) -> None:
        def on_start() -> None:
            for sequence in run.sequences:
                sequence.admit(time.monotonic())

        async with aclosing(self._backend.generate(run.job, on_start)) as parts:
            async for part in parts:
                self._take(part, run)
                self._unheard.deliver()
                if all(sequence.finish_reason for sequence in run.sequences):
                    break  # perhaps at a stop string that vLLM has not come to

    def _take(self, part: Part, run: _Run) -> None:
        if part.cached is not None:
            self._counts["cached"] += part.cached
        is_shared = run.job.sampling.n < len(run.sequences)
        for sequence in run.sequences if is_shared else [run.sequences[part.index]]:
            if part.cached is not None:
                sequence.cached = part.cached
            for sampled in part.tokens:
                if sequence.finish_reason is None:
                    sequence.append(sampled, self._end_ids, time.monotonic())
            if part.finish_reason is not None and sequence.finish_reason is None:
                sequence.end(part.finish_reason, time.monotonic())
