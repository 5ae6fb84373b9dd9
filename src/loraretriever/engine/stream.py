"""What a caller holds of a request that runs: its pieces as they come, its answers, and a way to abort it."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue

from loraretriever.types import Generation, Piece

_log = logging.getLogger(__name__)

Event = Piece | Generation | Exception
Listener = Callable[[Event], None]


class Stream:
    """The answers of one request, for one reader.

    Iterate once over the pieces, or wait for the result, or both, from one thread; or give a listener, which is called
    with every event.
    """

    def __init__(self, answers: int, abort: Callable[[], None], unheard: Unheard) -> None:
        """`abort` ends those of the request's `answers` that still run; `unheard` is the engine's."""
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._done: dict[int, Generation] = {}
        self._answers = answers
        self._abort = abort
        self._error: Exception | None = None
        self._unheard = unheard
        self._listener: Listener | None = None
        self._delivery = threading.Lock()  # held by the thread that calls the listener: never two at once

    def __iter__(self) -> Iterator[Piece]:
        """The parts of all answers in the order in which they come.

        Raises:
            LoraRetrieverError: the request cannot be answered.
        """
        self._check_not_heard()
        while len(self._done) < self._answers:
            if self._error is not None:
                raise self._error
            event = self._events.get()
            if isinstance(event, Piece):
                yield event
            elif isinstance(event, Generation):
                self._done[event.index] = event
            else:
                self._error = event

    def result(self) -> list[Generation]:
        """All answers, in their order; waits for them.

        Raises:
            LoraRetrieverError: the request cannot be answered.
        """
        for _ in self:
            pass
        return [self._done[index] for index in range(self._answers)]

    def listen(self, listener: Listener) -> None:
        """Hand every event that has not been read to `listener`, in order: past ones now, the others as they come.

        An event is a piece, a complete answer (after its last piece), or the error that ends the request. After
        as many answers as were asked for, or an error, no more come. The thread that makes an event calls, mostly the
        engine's, so a listener must be quick and must not wait for the engine; it may abort the request. If it raises,
        that is logged, the request is aborted, and it is not called again.

        Raises:
            RuntimeError: there is a listener already.
        """
        self._check_not_heard()
        self._listener = listener
        self.deliver()

    def abort(self) -> None:
        """End the request, whatever it is doing; its room and its adapters are free at once. May be called twice."""
        self._abort()

    def _check_not_heard(self) -> None:
        if self._listener is not None:
            raise RuntimeError("this request's answers go to a listener; nobody else can read them.")

    # The engine's side.

    def piece(self, piece: Piece) -> None:
        """See `Sink`."""
        self._put(piece)

    def finish(self, generation: Generation) -> None:
        """See `Sink`."""
        self._put(generation)

    def fail(self, error: Exception) -> None:
        """See `Sink`."""
        self._put(error)

    def _put(self, event: Event) -> None:
        self._events.put(event)
        if self._listener is not None:  # one that is set from now on finds the event
            self._unheard.add(self)

    def deliver(self) -> None:
        """Call the listener with what it has not heard. Any thread may; it must not hold a lock."""
        # Whoever delivers looks for new events once it has let the others in again, so none is left behind.
        while self._listener is not None and not self._events.empty():
            if not self._delivery.acquire(blocking=False):
                return
            try:
                self._call(self._listener)
            finally:
                self._delivery.release()

    def _call(self, listener: Listener) -> None:
        while True:
            try:
                event = self._events.get_nowait()
            except Empty:
                return
            try:
                listener(event)
            except Exception:
                _log.exception("a listener of a request's answers failed; the request is aborted")
                self._listener = listener = _ignore
                self._abort()


class Unheard:
    """Streams whose listeners have something to hear: noted under the engine's lock, and told outside it."""

    def __init__(self) -> None:
        self._streams: deque[Stream] = deque()

    def add(self, stream: Stream) -> None:
        """Its listener is to be called soon."""
        self._streams.append(stream)

    def deliver(self) -> None:
        """Call the listeners. Any thread may; it must not hold a lock."""
        while self._streams:
            with suppress(IndexError):  # another thread took the last
                self._streams.popleft().deliver()


class Collector:
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


def _ignore(event: Event) -> None:
    """What is left of a listener that has raised."""
