"""From the engine's thread to the event loop, and on to the client."""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Generic, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from loraretriever.types import Generation, Piece

T = TypeVar("T")
Event = Piece | Generation | Exception
KEEP_ALIVE_SECONDS = 15.0
KEEP_ALIVE = b": still waiting\n\n"  # a comment, which clients skip; proxies see that the connection lives


class Inbox(Generic[T]):
    """The events of one client's request, on the event loop; each with a label that says whose it is."""

    def __init__(self) -> None:
        self._events: deque[tuple[T, Event]] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, label: T, event: Event) -> None:
        """Add an event; called on the event loop."""
        self._events.append((label, event))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def is_empty(self) -> bool:
        """Whether `get` would wait."""
        return not self._events

    async def get(self, timeout: float | None = None) -> tuple[T, Event] | None:
        """The next event; None when none came within `timeout` seconds."""
        while not self._events:
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            alarm = loop.call_later(timeout, self._ring, self._waiter) if timeout is not None else None
            try:
                await self._waiter
            finally:
                self._waiter = None
                if alarm is not None:
                    alarm.cancel()
            if not self._events:
                return None
        return self._events.popleft()

    @staticmethod
    def _ring(waiter: asyncio.Future[None]) -> None:
        if not waiter.done():
            waiter.set_result(None)


class Courier:
    """Carries events from the engine's thread to inboxes: one wake-up of the loop for all of a step's events."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._on_the_way: deque[tuple[Callable[[Event], None], Event]] = deque()
        self._is_called = False

    def listener(self, inbox: Inbox[T], label: T) -> Callable[[Event], None]:
        """A function for `Answers.listen` that brings the events to the inbox."""
        put = functools.partial(inbox.put, label)

        def listen(event: Event) -> None:
            self._on_the_way.append((put, event))
            if not self._is_called:
                self._is_called = True
                try:
                    self._loop.call_soon_threadsafe(self._deliver)
                except RuntimeError:  # the loop was closed: nobody waits any more
                    self._on_the_way.clear()

        return listen

    def _deliver(self) -> None:
        self._is_called = False  # first: what is added from here on calls again
        while self._on_the_way:
            put, event = self._on_the_way.popleft()
            put(event)


async def until_disconnect(receive: Receive) -> None:
    """Return when the client has gone; the request's body has been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. When the client goes, `on_gone` is called at once and the stream ends.

    The answer begins with the first events: an error before them is answered as any other, with its own status.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[tuple[bytes, bool]],
        on_gone: Callable[[], None],
        headers: dict[str, str] | None = None,
    ) -> None:
        """`events`: whole events, with their empty lines, and whether they are the last; `on_gone` must not block."""
        self._stream = events
        self._on_gone = on_gone
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        sending = asyncio.ensure_future(self._send(send))
        watching = asyncio.ensure_future(until_disconnect(receive))
        try:
            await asyncio.wait({sending, watching}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()
            if not sending.done():
                self._on_gone()
                sending.cancel()
            await asyncio.gather(sending, watching, return_exceptions=True)
        if not sending.cancelled():
            sending.result()

    async def _send(self, send: Send) -> None:
        is_first = True
        async for events, is_last in self._stream:
            if is_first:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                is_first = False
            await send({"type": "http.response.body", "body": events, "more_body": not is_last})
