"""What every engine does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from loraretriever.types import Generation, Piece, Request


class Answers(Protocol):
    """A request that runs."""

    def __iter__(self) -> Iterator[Piece]:
        """The parts of its answers, as they come."""
        ...

    def result(self) -> list[Generation]:
        """Its answers; waits for them."""
        ...

    def abort(self) -> None:
        """End it, and free what it holds."""
        ...


class Engine(Protocol):
    """Runs requests, each with its own composition."""

    def submit(self, request: Request) -> Answers:
        """Let a request join those that run. Any thread may call it.

        Raises:
            InvalidInputError: it cannot be run as it is (too long, say).
            OverloadedError: too many wait already; try again later.
        """
        ...

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Generation]]:
        """Yield (position in `requests`, answer) in the order of completion, `n` answers for each request.

        Raises:
            InvalidInputError: a request cannot be run as it is; nothing has been run then.
            LoraRetrieverError: a request failed on its way; the others have been aborted.
        """
        ...

    def close(self) -> None:
        """End what runs and let go of the model."""
        ...
