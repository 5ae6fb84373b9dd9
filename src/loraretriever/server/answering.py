"""One client's request on its way: routed and submitted in a thread, its events gathered on the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace

from starlette.types import Receive

from loraretriever.compose import format_composition
from loraretriever.errors import InvalidInputError
from loraretriever.pipeline import Submission
from loraretriever.retrieve import Explanation
from loraretriever.server import observe
from loraretriever.server.auth import Caller, admit
from loraretriever.server.errors import STOPPING, ApiError
from loraretriever.server.schemas import AnswerBody, check_bias
from loraretriever.server.state import ServerState
from loraretriever.server.streaming import KEEP_ALIVE_SECONDS, Inbox, until_disconnect
from loraretriever.server.targets import Names, Target, filters, find_target
from loraretriever.server.wire import explanation_json
from loraretriever.types import Generation, Message, Piece, Request, Route, Sampling

DEFAULT_TEMPERATURE = 1.0  # OpenAI's; the library's own default is greedy


@dataclass(frozen=True, slots=True)
class Ask:
    """One prompt: what retrieval reads, and what the model reads where that is something else."""

    prompt: str
    messages: tuple[Message, ...] = ()
    tokens: tuple[int, ...] = ()
    chat: bool = False


@dataclass(slots=True)
class Answer:
    """What has become of one prompt so far."""

    submission: Submission
    submitted_ns: int  # since the epoch
    why: Explanation | None
    generations: list[Generation] = field(default_factory=list)

    @property
    def route(self) -> Route:
        """What retrieval said."""
        return self.submission.route


class Answering:
    """The answers to all prompts of one request. `start` it, then await `finish`, or iterate over `events`."""

    def __init__(
        self, state: ServerState, caller: Caller, body: AnswerBody, asks: Sequence[Ask], operation: str
    ) -> None:
        """`operation`: what this is, by the GenAI conventions of traces: chat or text_completion."""
        self.state = state
        self.body = body
        self.created = int(time.time())
        self.answers: list[Answer] = []
        self.names: Names  # these two are found in the thread, because they are looked up in the pool
        self._target: Target
        self._caller = caller
        self._asks = asks
        self._operation = operation
        self._inbox: Inbox[int] = Inbox()
        self._record = observe.current()
        self._left = len(asks) * (body.n or 1)  # answers to come
        self._is_over = False

    async def start(self) -> None:
        """Find out who may do what, route and submit all prompts.

        Raises:
            ApiError, LoraRetrieverError: one of them cannot be answered; none is then.
        """
        try:
            await self.state.run(self._submit_all)
        except BaseException:  # also when the server ends meanwhile
            self.abort()
            raise

    def abort(self) -> None:
        """End what still runs, and free its room; a moment later, because it may wait for the engine's lock."""
        self._is_over = True
        if not self.is_complete and self.answers:
            self.state.later(self._abort_all)

    def _abort_all(self) -> None:
        for answer in self.answers:
            answer.submission.answers.abort()

    async def finish(self, receive: Receive) -> bool:
        """Wait for all answers; False if the client has gone before, and the answers are aborted.

        Raises:
            LoraRetrieverError, ApiError: one of them failed; the others are aborted.
        """
        gone = asyncio.ensure_future(until_disconnect(receive))
        gathering = asyncio.ensure_future(self._gather())
        try:
            await asyncio.wait({gone, gathering}, return_when=asyncio.FIRST_COMPLETED)
            if not gathering.done():
                return False
            gathering.result()
            return True
        finally:
            if not gathering.done() or gathering.exception() is not None:
                self.abort()
            gone.cancel()
            gathering.cancel()
            await asyncio.gather(gone, gathering, return_exceptions=True)

    async def events(self) -> AsyncIterator[tuple[int, Piece] | None]:
        """(prompt, piece) as they come; None now and then while nothing comes.

        The last piece of an answer comes when the answer is complete: see `generations`.
        """
        last: dict[tuple[int, int], Piece] = {}
        while not self.is_complete:
            received = await self._inbox.get(KEEP_ALIVE_SECONDS)
            if received is None:
                yield None
                continue
            position, event = received
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Generation):
                self._done(position, event)
                yield position, last.pop((position, event.index))
            elif event.finish_reason is not None:
                last[position, event.index] = event
            else:
                yield position, event

    @property
    def is_complete(self) -> bool:
        """Whether all answers are complete."""
        return not self._left

    @property
    def is_waiting(self) -> bool:
        """Whether the next event has not come yet."""
        return self._inbox.is_empty

    @property
    def generations(self) -> list[Generation]:
        """All answers that are complete."""
        return [generation for answer in self.answers for generation in answer.generations]

    async def _gather(self) -> None:
        async for _ in self.events():
            pass

    def _submit_all(self) -> None:
        admit(self.state, self._caller)
        self.names = Names(self.state, self._caller, self.body.lora.tenant)
        self._target = find_target(self.state, self.names, self.body.model, self.body.lora)
        sampling = self._sampling()
        self._record.asked(self._operation, self.body.model, sampling, bool(self.body.stream))
        for position, ask in enumerate(self._asks):
            own = self._fitted(ask, sampling)
            asked_ns = time.time_ns()
            submission = self._submit(ask, own)
            # Not the time now: the engine may have begun long ago.
            submitted_ns = asked_ns + round(submission.retrieval_seconds * 1e9)
            answer = Answer(submission, submitted_ns, self._explain(ask))
            self.answers.append(answer)
            self._record.composed(self.composition(position), answer.route.fallback, ask.prompt)
            answer.submission.answers.listen(self.state.courier.listener(self._inbox, position))
            if self._is_over:
                answer.submission.answers.abort()
                return

    def _submit(self, ask: Ask, sampling: Sampling) -> Submission:
        target, options = self._target, self.body.lora
        submission = self.state.retriever.submit(
            ask.prompt,
            query=options.query,
            messages=ask.messages,
            tokens=ask.tokens,
            chat=ask.chat,
            strategy=target.strategy,
            weighting=options.weighting,
            adapters=target.adapters,
            sampling=sampling,
            priority=self.body.priority if self._caller.is_operator else 0,
            timeout=self.state.settings.request_timeout,
            namespace="" if target.view is None else f"tenant {target.view}",
            k=options.k,
            threshold=options.threshold,
            exclude=target.exclude,
            only=target.only,
            tags=options.tags,
            tenant=target.view,
        )
        if target.adapters is None:
            self.state.metrics.routed(submission.route, submission.retrieval_seconds)
        for name in submission.composition.adapters:
            self.state.metrics.adapter_used(name)
        return submission

    def _explain(self, ask: Ask) -> Explanation | None:
        options = self.body.lora
        if not options.explain or self._target.adapters is not None:
            return None
        exclude, only = filters(self.names, options)
        (why,) = self.state.retriever.explain(
            [options.query or ask.prompt],
            k=options.k, exclude=exclude, only=only, tags=options.tags, tenant=self._target.view,
        )  # fmt: skip
        return why

    def _sampling(self) -> Sampling:
        body, key = self.body, self._caller.key
        longest = body.longest or self.state.settings.default_tokens
        most = key.max_tokens if key is not None else None
        if most is not None and longest > most:
            if body.longest is not None:
                raise ApiError(
                    400, f"max_tokens is {longest}; this key's answers have at most {most}.", param="max_tokens"
                )
            longest = most
        try:
            bias = check_bias(body.logit_bias)
        except ValueError as error:
            raise ApiError(400, f"{error}.", param="logit_bias") from error
        stop = body.stop or ()
        return Sampling(
            max_tokens=longest,
            temperature=DEFAULT_TEMPERATURE if body.temperature is None else _temperature(body.temperature),
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=max(0, body.top_k or 0),
            min_p=body.min_p or 0.0,
            repetition_penalty=body.repetition_penalty or 1.0,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias=bias,
            seed=None if body.seed is None else body.seed % 2**63,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            logprobs=body.alternatives,
            n=body.n or 1,
            ignore_end=body.ignore_eos,
        )

    def _fitted(self, ask: Ask, sampling: Sampling) -> Sampling:
        """The sampling with an answer that fits behind the prompt, where the client left its length to us."""
        if self.body.longest is not None:
            return sampling
        engine = self.state.retriever.engine
        request = Request(ask.prompt, chat=ask.chat, messages=ask.messages, tokens=ask.tokens)
        room = engine.max_length - engine.count_tokens(request)
        if room < 1:
            raise InvalidInputError(
                f"the prompt has {engine.max_length - room} tokens; expected fewer than {engine.max_length}, which is "
                "all that the model reads."
            )
        return sampling if room >= sampling.max_tokens else replace(sampling, max_tokens=room)

    def _done(self, position: int, generation: Generation) -> None:
        if generation.finish_reason == "aborted":
            raise ApiError(503, STOPPING, code="stopping", retry_after=5.0)
        if generation.finish_reason == "timeout" and not generation.completion_tokens:
            seconds = self.state.settings.request_timeout
            raise ApiError(503, f"the request waited for {seconds:.0f} s; try again later.", retry_after=5.0)
        answer = self.answers[position]
        answer.generations.append(generation)
        self._left -= 1
        self.state.metrics.answered(generation, answer.submission.retrieval_seconds)
        self._record.answered(generation, answer.submitted_ns)
        self._charge(generation, is_first=len(answer.generations) == 1)

    def _charge(self, generation: Generation, is_first: bool) -> None:
        if self._caller.key is not None and self._caller.key.tokens_per_minute is not None:
            tokens = generation.completion_tokens + (generation.prompt_tokens if is_first else 0)
            self.state.later(self.state.limiter.charge, self._caller.key, tokens)

    # What clients are told of it.

    def usage(self) -> dict[str, object]:
        """OpenAI's `usage`: tokens of all prompts and answers."""
        firsts = [answer.generations[0] for answer in self.answers if answer.generations]
        prompt = sum(each.prompt_tokens for each in firsts)
        answered = sum(each.completion_tokens for each in self.generations)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answered,
            "total_tokens": prompt + answered,
            "prompt_tokens_details": {"cached_tokens": sum(each.cached_tokens for each in firsts)},
        }

    def composition(self, position: int = 0) -> str:
        """The composition of a prompt's answers, in the caller's names."""
        return format_composition(self.names.public_composition(self.answers[position].submission.composition))

    def model(self) -> str:
        """What answered, as the field `model` of a request could say it; `auto` where it differs among prompts."""
        compositions = {self.composition(position) for position in range(len(self.answers))}
        return compositions.pop() if len(compositions) == 1 else "auto"

    def lora(self, position: int = 0) -> dict[str, object]:
        """The extension field: which adapters answered, why, and how long it took so far."""
        answer = self.answers[position]
        route, composition = answer.route, self.names.public_composition(answer.submission.composition)
        pairs = zip(composition.adapters, composition.weights, strict=True)
        found: dict[str, object] = {
            "composition": format_composition(composition),
            "strategy": composition.strategy,
            "adapters": [{"name": name, "weight": weight} for name, weight in pairs],
            "hits": self.names.public_hits(route.hits),
            "fallback": route.fallback,
            "fit": route.fit,
            "threshold": route.threshold,
            "milliseconds": self._milliseconds(answer),
        }
        if any(generation.finish_reason == "timeout" for generation in answer.generations):
            found["timed_out"] = True
        if answer.why is not None:
            found["why"] = explanation_json(answer.why, self.names)
        return found

    def headers(self) -> dict[str, str]:
        """The same in headers; of the first prompt, if there are several."""
        route = self.answers[0].route
        hits = ",".join(f"{self.names.public(hit.adapter)}={hit.score:.4f}" for hit in route.hits)
        return {
            "x-lora-composition": self.composition(),
            "x-lora-hits": hits,
            "x-lora-fallback": "true" if route.fallback else "false",
            "x-lora-retrieve-ms": f"{self.answers[0].submission.retrieval_seconds * 1000:.2f}",
        }

    def _milliseconds(self, answer: Answer) -> dict[str, float | None]:
        times: dict[str, float | None] = {"retrieve": answer.submission.retrieval_seconds}
        if answer.generations:
            first = answer.generations[0]
            times["queue"] = first.queue_seconds
            times["first_token"] = first.first_token_seconds
            times["total"] = max(each.seconds for each in answer.generations) + answer.submission.retrieval_seconds
        return {name: None if seconds is None else round(seconds * 1000, 3) for name, seconds in times.items()}


def _temperature(value: float) -> float:
    return 0.0 if value < 1e-5 else value  # what is nearly greedy is meant to be
