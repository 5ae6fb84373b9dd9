"""What every engine does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from loraretriever.types import Generation, Request


class Engine(Protocol):
    """Runs requests, each with its own composition, and yields each result as soon as it is there."""

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Generation]]:
        """Yield (position in `requests`, result) in the order of completion, every request exactly once.

        Raises:
            InvalidInputError: a request cannot be run as it is (too long, say); nothing has been run then.
        """
        ...
