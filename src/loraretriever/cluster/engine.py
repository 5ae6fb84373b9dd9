"""The engine as an ingress sees it: each request goes to a replica, and its events come back."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

from ray.exceptions import RayTaskError
from ray.serve.handle import DeploymentHandle

from loraretriever.cluster.affinity import affinity_key
from loraretriever.cluster.call import Call
from loraretriever.cluster.figures import ReplicaFigures
from loraretriever.engine.prompts import PromptReader
from loraretriever.engine.stream import Event, Stream, Unheard
from loraretriever.errors import OverloadedError
from loraretriever.models import load_tokenizer
from loraretriever.pool import Pool
from loraretriever.types import EngineStats, Generation, Request

_log = logging.getLogger(__name__)
_STATS_SECONDS = 1.0
_CALL_SECONDS = 60.0  # that a call beside the requests may take
_TOGETHER = 256  # requests of one `run` that are on their way
_CLOSE_SECONDS = 5.0


class RayEngine:
    """Runs requests on the replicas of a deployment of `EngineReplica`. Any thread may use it; `close` it in the end.

    A request keeps the revisions that its adapters have in the pool when it is submitted, whichever replica answers.
    One that no replica has begun to answer is sent to another when its replica dies or is full. All requests share one
    thread with an event loop.
    """

    def __init__(
        self, handle: DeploymentHandle[Any], pool: Pool, base_model: str, *, affinity: bool = True, watches: bool = True
    ) -> None:
        """Wait until there is a replica.

        Args:
            handle: of the deployment.
            pool: the one that the replicas read.
            base_model: theirs; its tokenizer is loaded here, so that counting tokens does not wait behind requests.
            affinity: prefer replicas where a request's adapters are at hand.
            watches: ask the replicas for their figures; of several engines on one deployment one should.

        Raises:
            ModelLoadError: the tokenizer cannot be loaded.
        """
        self._pool = pool
        self._handle = handle
        self._answer = handle.options(method_name="answer", stream=True)
        self._affinity = affinity
        self._unheard = Unheard()
        self._figures = ReplicaFigures()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        tokenizer = load_tokenizer(base_model)
        self.max_length = int(self._call("max_length", timeout=None))
        self.reduces_to: int | None = self._call("reduces_to")
        self._prompts = PromptReader(tokenizer, len(tokenizer), self.max_length)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ray-engine", daemon=True)
        self._thread.start()
        if watches:
            self._loop.call_soon_threadsafe(lambda: self._keep(self._loop.create_task(self._watch())))

    def submit(self, request: Request) -> Stream:
        """See `Engine`. What a replica says of a request, be it that it cannot be run, comes with its events.

        Raises:
            AdapterNotFoundError: an adapter is not in the pool.
            OverloadedError: the engine is stopping.
        """
        if self._closed:
            raise OverloadedError("the engine is stopping and takes no more requests; send it to another one.")
        digests = tuple(self._pool.get(name).digest for name in request.composition.adapters)
        request = replace(request, digests=digests)
        affinity = affinity_key(request) if self._affinity else ""
        call = Call(request, affinity, self._answer, self._loop, self._unheard)
        self._loop.call_soon_threadsafe(lambda: self._keep(call.start()))
        return call.stream

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Generation]]:
        """See `Engine`. Requests are checked by the replicas: some may have been run when one is refused."""
        done: SimpleQueue[tuple[int, Event]] = SimpleQueue()
        waiting = deque(enumerate(requests))
        running: dict[int, Stream] = {}
        left: Counter[int] = Counter()  # answers to come
        try:
            while waiting or running:
                while waiting and len(running) < _TOGETHER:
                    position, request = waiting.popleft()
                    left[position] = request.sampling.n
                    running[position] = stream = self.submit(request)
                    stream.listen(lambda event, of=position: done.put((of, event)))  # type: ignore[misc]
                position, event = done.get()
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Generation):
                    left[position] -= 1
                    if not left[position]:
                        del running[position]
                    yield position, event
        finally:
            for stream in running.values():
                stream.abort()

    def effects(self, requests: Sequence[Request], adapters: Sequence[Sequence[str]]) -> list[tuple[float, ...]]:
        """See `Engine`; one replica computes them."""
        found: list[tuple[float, ...]] = self._call("effects", requests, adapters)
        return found

    def count_tokens(self, request: Request) -> int:
        """See `Engine`."""
        return len(self._prompts.tokenize(request))

    def detokenize(self, tokens: Sequence[int]) -> str:
        """See `Engine`."""
        return self._prompts.detokenize(tokens)

    def stats(self) -> EngineStats:
        """What all replicas together do, as of a second ago; nothing if this engine does not watch them."""
        return self._figures.total()

    def close(self) -> None:
        """Abort what runs. The replicas stay."""
        self._closed = True
        if not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(self._cancel_all(), self._loop).result(_CLOSE_SECONDS)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _call(self, method: str, *args: Any, timeout: float | None = _CALL_SECONDS) -> Any:
        """What a method of some replica returns; its errors are raised as they are."""
        try:
            return self._handle.options(method_name=method).remote(*args).result(timeout_s=timeout)
        except RayTaskError as error:
            raise error.cause from error

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _cancel_all(self) -> None:
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _watch(self) -> None:
        """Ask for the figures of all replicas, again and again."""
        while True:
            try:
                told = self._handle.broadcast("stats").results_async(timeout_s=_CALL_SECONDS, return_exceptions=True)
                answers = [each for each in await told if not isinstance(each, BaseException)]
                self._figures.update(dict(answers))
            except Exception as error:
                _log.warning("the replicas' figures cannot be had: %s", error)
            await asyncio.sleep(_STATS_SECONDS)
