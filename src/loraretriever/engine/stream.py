"""What a caller holds of a request that runs: its pieces as they come, its answers, and a way to abort it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from queue import SimpleQueue

from loraretriever.types import Generation, Piece


class Stream:
    """The answers of one request. Iterate once over the pieces, or wait for the result, or both; from one thread."""

    def __init__(self, answers: int, abort: Callable[[], None]) -> None:
        """`abort` ends those of the request's `answers` that still run."""
        self._events: SimpleQueue[Piece | Generation | Exception] = SimpleQueue()
        self._done: dict[int, Generation] = {}
        self._answers = answers
        self._abort = abort
        self._error: Exception | None = None

    def __iter__(self) -> Iterator[Piece]:
        """The parts of all answers in the order in which they come.

        Raises:
            LoraRetrieverError: the request cannot be answered.
        """
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

    def abort(self) -> None:
        """End the request, whatever it is doing; its room and its adapters are free at once. May be called twice."""
        self._abort()

    # The engine's side.

    def piece(self, piece: Piece) -> None:
        """See `Sink`."""
        self._events.put(piece)

    def finish(self, generation: Generation) -> None:
        """See `Sink`."""
        self._events.put(generation)

    def fail(self, error: Exception) -> None:
        """See `Sink`."""
        self._events.put(error)
