"""One request on its way to a replica, and its events on their way back."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException, RequestCancelledError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from loraretriever.engine.stream import Event, Stream, Unheard
from loraretriever.errors import EngineError, LoraRetrieverError, OverloadedError
from loraretriever.types import Generation, Piece, Request

_log = logging.getLogger(__name__)
_ATTEMPTS = 4  # to find a replica that answers
_PAUSE = 0.25  # seconds before the second attempt, and then twice as many each time


class Call:
    """A request that is answered by some replica. All but `abort` happens on one event loop."""

    def __init__(
        self,
        request: Request,
        affinity: str,
        handle: DeploymentHandle[Any],
        loop: asyncio.AbstractEventLoop,
        unheard: Unheard,
    ) -> None:
        """Send nothing yet: see `start`.

        Args:
            request: with the digests of its adapters.
            affinity: see `affinity_key`; empty: any replica will do.
            handle: streams from the method `answer` of `EngineReplica`.
            loop: where the call runs.
            unheard: of the engine that the caller knows.
        """
        self.stream = Stream(request.sampling.n, self.abort, unheard)
        self._request = request
        self._affinity = affinity
        self._handle = handle
        self._loop = loop
        self._unheard = unheard
        self._task: asyncio.Task[None] | None = None
        self._submitted = time.monotonic()
        self._waited = 0.0  # seconds until a replica had the request
        self._pieces: list[list[str]] = [[] for _ in range(request.sampling.n)]
        self._open = set(range(request.sampling.n))  # the answers to come

    @property
    def has_begun(self) -> bool:
        """Whether the caller may have read a part of an answer."""
        return len(self._open) < len(self._pieces) or any(self._pieces)

    def start(self) -> asyncio.Task[None]:
        """Send the request; called on the loop."""
        self._task = self._loop.create_task(self._run())
        self._task.add_done_callback(self._ended)
        return self._task

    def abort(self) -> None:
        """End the request, here and at the replica. Any thread may call it."""
        with suppress(RuntimeError):  # the loop was closed, and the request ended before
            self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        affinity, pause = self._affinity, _PAUSE
        timeout = self._request.timeout
        deadline = None if timeout is None else self._submitted + timeout
        for attempt in range(1, _ATTEMPTS + 1):
            is_last = attempt == _ATTEMPTS
            try:
                await self._attempt(affinity, deadline)
                return
            except _NoReplica as error:  # the line is full, or there will be none: all replicas are alike
                raise OverloadedError(f"no replica is free for this request: {error} Send it again later.") from error
            except OverloadedError:
                if self.has_begun or is_last:
                    raise
            except _ReplicaGone as error:
                if self.has_begun or is_last:
                    raise EngineError(
                        f"the replica that ran this request has ended ({error.reason}); send it again."
                    ) from error
                _log.warning("a request is sent to another replica: %s", error.reason)
            await asyncio.sleep(pause)
            affinity, pause = "", 2 * pause  # its own replica has failed it

    async def _attempt(self, affinity: str, deadline: float | None) -> None:
        left = None if deadline is None else deadline - time.monotonic()
        expires = None if left is None else time.time() + left
        answers: Any = self._handle.options(multiplexed_model_id=affinity).remote(self._request, expires, affinity)
        try:
            async with asyncio.timeout(left):
                self._take(await self._next(answers))
            self._waited = time.monotonic() - self._submitted
            while self._open:
                self._take(await self._next(answers))
                self._unheard.deliver()
        except TimeoutError:
            _cancel(answers)
            self._end_all("timeout")
        except asyncio.CancelledError:
            _cancel(answers)
            raise

    async def _next(self, answers: DeploymentResponseGenerator[list[Event]]) -> list[Event]:
        """The next events, with the errors of Ray in our terms."""
        try:
            return await anext(answers)
        except RayTaskError as error:
            raise EngineError(f"a replica failed while it ran this request: {error.cause!r}; send it again.") from error
        except (RayError, RequestCancelledError, StopAsyncIteration) as error:
            raise _ReplicaGone(type(error).__name__) from error
        except RayServeException as error:
            raise _NoReplica(str(error)) from error

    def _take(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Piece):
                self._pieces[event.index].append(event.text)
                self.stream.piece(event)
            elif isinstance(event, Generation):
                self._open.discard(event.index)
                self.stream.finish(self._since_submission(event))
            else:
                raise event

    def _since_submission(self, generation: Generation) -> Generation:
        """With times that count from the submission here, not from that at the replica."""
        first, queue = generation.first_token_seconds, generation.queue_seconds
        return replace(
            generation,
            seconds=generation.seconds + self._waited,
            first_token_seconds=None if first is None else first + self._waited,
            queue_seconds=None if queue is None else queue + self._waited,
        )

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            self._end_all("aborted")
        elif (error := task.exception()) is not None:
            if not isinstance(error, LoraRetrieverError):
                _log.error("a request to a replica failed", exc_info=error)
                error = EngineError(f"the engine failed while it ran this request: {error!r}; send it again.")
            self.stream.fail(error)
        self._unheard.deliver()

    def _end_all(self, reason: str) -> None:
        """Complete the answers with what has come of them; no replica will tell how many tokens these have."""
        for index in sorted(self._open):
            pieces = self._pieces[index]
            seconds = time.monotonic() - self._submitted
            self.stream.piece(Piece("", index, finish_reason=reason))
            self.stream.finish(Generation("".join(pieces), reason, 0, len(pieces), seconds, index))
        self._open.clear()


def _cancel(answers: Any) -> None:
    with suppress(RayError, RayServeException):  # it has failed by itself
        answers.cancel()


class _NoReplica(Exception):
    """Ray Serve has no replica for a request."""


class _ReplicaGone(Exception):
    """A replica has died, or ends, with a request that it had not answered."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
