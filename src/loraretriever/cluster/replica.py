"""An engine in a replica of its own: takes requests, and streams what becomes of them."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NoReturn, TypeVar

from ray import serve

from loraretriever.engine import Answers
from loraretriever.engine.memory import keep_freed_memory
from loraretriever.errors import EngineEndedError, EngineError, LoraRetrieverError
from loraretriever.models import quiet_libraries
from loraretriever.pipeline import load_engine
from loraretriever.pool import Pool
from loraretriever.server import logs
from loraretriever.server.run import Plan
from loraretriever.server.streaming import Courier, Event, Inbox
from loraretriever.types import EngineStats, Generation, Request, Sampling

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")
_THREADS = 4  # for what blocks: tokenising, the pool's database, the engine's lock
_PROBE = Request("Are you there?", sampling=Sampling(max_tokens=1), priority=-1000)
_PROBE_SECONDS = 20.0  # that a tiny request may take in an engine that makes no other step


class EngineReplica:
    """A pool's engine with a copy of the base model. Ray Serve calls the methods, all on one event loop."""

    def __init__(self, plan: Plan, adapters: int) -> None:
        """Load the model, and run it once.

        Args:
            plan: names the pool, which all replicas read, and the engine's settings.
            adapters: how many adapters Ray Serve believes to be at hand here.
        """
        logs.configure(plan.server.log_level, plan.server.log_format)
        quiet_libraries()
        keep_freed_memory()
        if plan.settings.engine == "vllm":
            # On a CPU each replica's vLLM would bind its threads to the same processors, however many Ray reserves.
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        self._pool = Pool.open(plan.pool)
        self._engine = load_engine(self._pool, plan.settings)
        self._engine.submit(_PROBE).result()
        self._has_servers = bool(plan.settings.vllm_urls) and plan.settings.engine == "vllm"
        self._courier: Courier | None = None
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="replica")
        self._progress = -1, -1
        self._note = serve.multiplexed(max_num_models_per_replica=adapters)(_name)

    async def answer(self, request: Request, expires: float | None, affinity: str) -> AsyncIterator[list[Event]]:
        """Run a request; yields its events, those together that are there together.

        The first list is empty: from then on the engine has the request. An error is the last event, so that its class
        and message stay as they are. When the caller cancels, the request is aborted. When the engine has ended, this
        process ends: to the caller that is a replica that dies.

        Args:
            expires: seconds since the epoch when the request times out; it has waited for a replica before.
            affinity: what is at hand from now on, for requests like this one; empty: nothing.
        """
        if expires is not None:
            request = replace(request, timeout=max(0.0, expires - time.time()))
        try:
            answers = await self._submit(request)
        except LoraRetrieverError as error:
            yield [error]
            return
        left = request.sampling.n
        try:
            if affinity:
                await self._note(affinity)
            inbox: Inbox[None] = Inbox()
            answers.listen(self._loop_courier().listener(inbox, None))
            yield []
            while left:
                events = await _all(inbox)
                left -= sum(isinstance(event, Generation) for event in events)
                if isinstance(events[-1], EngineEndedError):
                    _end_process(events[-1])
                if isinstance(events[-1], Exception):
                    left = 0
                yield events
        finally:
            if left:
                self._threads.submit(answers.abort)

    async def effects(self, requests: Sequence[Request], adapters: Sequence[Sequence[str]]) -> list[tuple[float, ...]]:
        """See `Engine`."""
        return await self._in_thread(self._engine.effects, requests, adapters)

    async def max_length(self) -> int:
        """See `Engine`."""
        return self._engine.max_length

    async def reduces_to(self) -> int | None:
        """See `Engine`."""
        return self._engine.reduces_to

    async def stats(self) -> tuple[str, EngineStats]:
        """The replica's name, and what its engine does."""
        return serve.get_replica_context().replica_tag, self._engine.stats()

    async def check_health(self) -> None:
        """Called by Ray Serve every few seconds: the engine has made a step since the last time, or can make one.

        An engine that has ended ends this process.

        Raises:
            EngineError: it cannot; after some failures Ray Serve starts another replica.
        """
        if self._has_stepped():
            return
        answers = await self._submit(_PROBE)
        if self._has_servers:  # no other replica would find them better: it is enough that requests begin and end
            answers.abort()
        try:
            await asyncio.wait_for(self._in_thread(answers.result), _PROBE_SECONDS)
        except TimeoutError as error:
            if not self._has_stepped():
                raise EngineError(
                    f"the engine has made no step for {_PROBE_SECONDS:.0f} s; this replica must be replaced."
                ) from error
        except EngineEndedError as error:
            _end_process(error)
        finally:
            self._threads.submit(answers.abort)
        self._has_stepped()

    def __del__(self) -> None:
        """Ray Serve calls it when a replica that has drained ends."""
        if hasattr(self, "_threads"):
            self._threads.shutdown(cancel_futures=True)
            self._engine.close()
            self._pool.close()

    def _has_stepped(self) -> bool:
        stats = self._engine.stats()
        before, self._progress = self._progress, (stats.steps, stats.generated_tokens)  # vLLM does not tell of steps
        return self._progress != before

    async def _submit(self, request: Request) -> Answers:
        """The request, accepted by the engine; aborted, if nobody waits for it any more."""
        submitting = asyncio.ensure_future(self._in_thread(self._engine.submit, request))
        try:
            return await asyncio.shield(submitting)
        except asyncio.CancelledError:
            submitting.add_done_callback(self._abort_submitted)
            raise

    def _abort_submitted(self, submitting: asyncio.Future[Answers]) -> None:
        if not submitting.cancelled() and submitting.exception() is None:
            self._threads.submit(submitting.result().abort)

    async def _in_thread(self, function: Callable[..., _Result], *args: Any) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, functools.partial(function, *args))

    def _loop_courier(self) -> Courier:
        if self._courier is None:
            self._courier = Courier(asyncio.get_running_loop())
        return self._courier


async def _all(inbox: Inbox[None]) -> list[Event]:
    """The next event, and all that are there with it; what is after an error does not count."""
    events: list[Event] = []
    while not events or not inbox.is_empty:
        received = await inbox.get()
        assert received is not None  # without a timeout it waits
        events.append(received[1])
        if isinstance(received[1], Exception):
            break
    return events


def _end_process(error: EngineEndedError) -> NoReturn:
    """End this replica at once. Ray Serve sends it no more requests then, and starts another one."""
    _log.error("this replica ends, because its engine has: %s", error)
    os._exit(1)


async def _name(affinity: str) -> str:
    """What Ray Serve keeps of an adapter at hand: the weights are the engine's own affair."""
    return affinity
