"""What every engine does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from loraretriever.types import EngineStats, Generation, Piece, Request


class Answers(Protocol):
    """A request that runs."""

    def __iter__(self) -> Iterator[Piece]:
        """The parts of its answers, as they come."""
        ...

    def result(self) -> list[Generation]:
        """Its answers; waits for them."""
        ...

    def listen(self, listener: Callable[[Piece | Generation | Exception], None]) -> None:
        """Hand every event to a listener, in order, from other threads: no thread has to wait for this request.

        An event is a piece, a complete answer (after its last piece), or the error that ends the request. Those that
        have come already are handed over at once. From then on nobody else can read the answers.
        """
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
            OverloadedError: too many wait already, or the engine is stopping; try again later.
        """
        ...

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Generation]]:
        """Yield (position in `requests`, answer) in the order of completion, `n` answers for each request.

        Raises:
            InvalidInputError: a request cannot be run as it is; nothing has been run then.
            LoraRetrieverError: a request failed on its way; the others have been aborted.
        """
        ...

    def effects(self, requests: Sequence[Request], adapters: Sequence[Sequence[str]]) -> list[tuple[float, ...]]:
        """How much each adapter would move the model at the last token of a prompt, without answering it.

        Args:
            requests: of which the prompts count, not the compositions.
            adapters: for each request the names of some.

        Returns:
            For each request the norms, in the order of its names (LoGo, arXiv 2511.07129).

        Raises:
            InvalidInputError: a prompt cannot be run, or the adapters have no module in common.
            AdapterNotFoundError: a name is not in the pool.
        """
        ...

    @property
    def max_length(self) -> int:
        """Tokens of the longest prompt and answer together."""
        ...

    @property
    def reduces_to(self) -> int | None:
        """The rank to which it reduces mixtures of a larger one, by the merge `svd`; None: it reduces nothing."""
        ...

    def count_tokens(self, request: Request) -> int:
        """Tokens of the request's prompt as the model reads it.

        Raises:
            InvalidInputError: the model does not know one, or the chat template refuses the messages.
        """
        ...

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without the special ones.

        Raises:
            InvalidInputError: the model does not know one of them.
        """
        ...

    def stats(self) -> EngineStats:
        """What it is doing, and what it has done so far. Quick, and for any thread."""
        ...

    def close(self) -> None:
        """End what runs and let go of the model."""
        ...
