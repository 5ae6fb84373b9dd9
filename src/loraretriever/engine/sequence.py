"""One answer on its way through the engine."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from typing import Any, Protocol

from loraretriever.batch import RowRoute
from loraretriever.engine.sampler import Sampled, make_generator
from loraretriever.engine.scheduler import Job
from loraretriever.engine.text import TextStream
from loraretriever.errors import EngineError, LoraRetrieverError
from loraretriever.types import Generation, Piece, Request, TokenLogprob


class Sink(Protocol):
    """Takes what becomes of a request's answers; called by the engine's thread."""

    def piece(self, piece: Piece) -> None:
        """The next part of an answer."""
        ...

    def finish(self, generation: Generation) -> None:
        """An answer is complete."""
        ...

    def fail(self, error: Exception) -> None:
        """The request cannot be answered."""
        ...


class Sequence:
    """The tokens of a prompt and of one answer to it, and how the next one is chosen."""

    def __init__(
        self,
        request: Request,
        index: int,
        prompt_ids: list[int],
        route: RowRoute,
        tokenizer: Any,
        sink: Sink,
        now: float,
        after: Sequence | None = None,
    ) -> None:
        """`index`: which of the request's answers; `after`: the first of them; `now`: seconds of a monotonic clock."""
        self.sampling = request.sampling
        self.index = index
        self.prompt_ids = prompt_ids
        self.output_ids: list[int] = []
        self.route = route
        self.beginnings: Hashable = (request.namespace, route)  # under which its prompt's beginning is known
        self.sink = sink
        self.generator = make_generator(request.sampling, index)
        self.job: Job = Job(
            tokens=len(prompt_ids),
            adapters=frozenset(route.refs),
            priority=request.priority,
            deadline=None if request.timeout is None else now + request.timeout,
            longest=len(prompt_ids) + request.sampling.max_tokens,
            after=None if after is None else after.job,
        )
        self.finish_reason: str | None = None
        self.cached: int | None = None  # tokens of the prompt that were not computed, once it is known
        self.blocks: list[int] = []  # of known beginnings, which the row begins with
        self.is_kept = False  # the prompt's own beginning is known to others
        self._tokenizer = tokenizer
        self._text = TextStream(tokenizer, request.sampling.stop)
        self._logprobs: list[TokenLogprob] = []
        self._shown = 0  # of the log-probabilities, those that are in a piece
        self._submitted = now
        self._queued: float | None = None  # seconds to the first step
        self._first: float | None = None  # seconds to the first token

    def admit(self, now: float) -> None:
        """It runs from now on, perhaps not for the first time."""
        if self._queued is None:
            self._queued = now - self._submitted

    def tokens(self, start: int, count: int) -> list[int]:
        """Tokens of prompt and answer from a position on."""
        prompt = len(self.prompt_ids)
        if start >= prompt:
            return self.output_ids[start - prompt : start - prompt + count]
        return (self.prompt_ids + self.output_ids if start + count > prompt else self.prompt_ids)[start : start + count]

    def append(self, sampled: Sampled, end_ids: Collection[int], now: float) -> None:
        """Take the next token; the sink gets the text that can be shown, and the answer if it is complete."""
        if self._first is None:
            self._first = now - self._submitted
        if sampled.token in end_ids and not self.sampling.ignore_end:
            self.end("stop", now)
            return
        self.output_ids.append(sampled.token)
        text = self._text.push(sampled.token)
        if sampled.logprob is not None:
            self._logprobs.append(self._logprob(sampled))
        if self._text.stopped:
            self.end("stop", now, text)
        elif len(self.output_ids) >= self.sampling.max_tokens:
            self.end("length", now, text)
        elif text:
            self.sink.piece(Piece(text, self.index, self._new_logprobs()))

    def end(self, reason: str, now: float, text: str = "") -> None:
        """Complete the answer; `text` is what has not been given to the sink yet."""
        if not self._text.stopped:
            text += self._text.finish()
        self.finish_reason = reason
        self.sink.piece(Piece(text, self.index, self._new_logprobs(), reason))
        generation = Generation(
            text=self._text.text,
            finish_reason=reason,
            prompt_tokens=len(self.prompt_ids),
            completion_tokens=len(self.output_ids),
            seconds=now - self._submitted,
            index=self.index,
            first_token_seconds=self._first,
            cached_tokens=self.cached or 0,
            logprobs=tuple(self._logprobs),
            queue_seconds=self._queued,
        )
        self.sink.finish(generation)

    def fail(self, error: Exception) -> None:
        """Give up; each caller gets an error of its own, of our kind."""
        self.finish_reason = "error"
        if isinstance(error, LoraRetrieverError):
            own = type(error)(*error.args)
        else:
            own = EngineError(f"the engine failed while it ran this request: {error!r}; send it again.")
        own.__cause__ = error
        self.sink.fail(own)

    def _logprob(self, sampled: Sampled) -> TokenLogprob:
        assert sampled.logprob is not None
        top = tuple(TokenLogprob(token, self._decode(token), logprob) for token, logprob in sampled.top)
        return TokenLogprob(sampled.token, self._decode(sampled.token), sampled.logprob, top)

    def _decode(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))

    def _new_logprobs(self) -> tuple[TokenLogprob, ...]:
        new = tuple(self._logprobs[self._shown :])
        self._shown = len(self._logprobs)
        return new
