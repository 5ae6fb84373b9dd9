"""POST /v1/chat/completions and /v1/completions."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from loraretriever.server.answering import Answering, Ask
from loraretriever.server.auth import Caller, require
from loraretriever.server.errors import ApiError, to_api_error
from loraretriever.server.schemas import AnswerBody, ChatBody, CompletionBody
from loraretriever.server.state import ServerState, State
from loraretriever.server.streaming import KEEP_ALIVE, EventStream
from loraretriever.server.wire import DONE, FINISH_REASONS, chat_logprobs, dump, event, plain_logprobs
from loraretriever.types import Generation, Message, Piece, TokenLogprob

router = APIRouter(tags=["answers"])
Generating = Annotated[Caller, Depends(require("generate"))]


_STREAMS: dict[int | str, dict[str, Any]] = {  # for the OpenAPI document
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
}


class ChatForm:
    """How chat completions look."""

    operation, prefix, whole, part = "chat", "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, generation: Generation, logprobs: bool) -> dict[str, Any]:
        """A whole answer."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": generation.text, "refusal": None},
            "logprobs": chat_logprobs(generation.logprobs) if logprobs else None,
            "finish_reason": FINISH_REASONS[generation.finish_reason],
        }

    def first(self, index: int) -> dict[str, Any]:
        """What a stream begins with."""
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def text(self, text: str) -> str:
        """JSON of a choice's text in a stream, as the middle of an object."""
        return f'"delta":{{"content":{dump(text)}}}' if text else '"delta":{}'

    def logprobs(self, logprobs: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
        """Log-probabilities of a piece."""
        return chat_logprobs(logprobs)


class PlainForm:
    """How plain completions look."""

    operation, prefix, whole, part = "text_completion", "cmpl-", "text_completion", "text_completion"

    def choice(self, index: int, generation: Generation, logprobs: bool) -> dict[str, Any]:
        """A whole answer."""
        return {
            "index": index,
            "text": generation.text,
            "logprobs": plain_logprobs(generation.logprobs) if logprobs else None,
            "finish_reason": FINISH_REASONS[generation.finish_reason],
        }

    def first(self, index: int) -> dict[str, Any]:
        """What a stream begins with."""
        return {"index": index, "text": "", "logprobs": None, "finish_reason": None}

    def text(self, text: str) -> str:
        """JSON of a choice's text in a stream, as the middle of an object."""
        return f'"text":{dump(text)}'

    def logprobs(self, logprobs: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
        """Log-probabilities of a piece; `offset`: characters of the answer before it."""
        return plain_logprobs(logprobs, offset)


Form = ChatForm | PlainForm


@router.post("/v1/chat/completions", responses=_STREAMS)
async def chat_completions(request: Request, body: ChatBody, state: State, caller: Generating) -> Response:
    """Answer a conversation, by the adapters that fit its last user's turn."""
    users = [message.text for message in body.messages if message.role == "user"]
    query = next((text for text in reversed(users) if text.strip()), None)
    if query is None and body.lora.query is None:
        raise ApiError(400, "messages has no text of a user; expected some.", param="messages")
    messages = tuple(Message(message.role, message.text) for message in body.messages)
    asks = [Ask(query or body.lora.query or "", messages=messages, chat=True)]
    return await _answer(request, state, caller, body, asks, ChatForm())


@router.post("/v1/completions", responses=_STREAMS)
async def completions(request: Request, body: CompletionBody, state: State, caller: Generating) -> Response:
    """Go on with texts as they are, each by the adapters that fit it."""
    prompts = body.prompts
    if len(prompts) > state.settings.max_prompts:
        message = f"prompt has {len(prompts)} prompts; expected at most {state.settings.max_prompts}."
        raise ApiError(400, message, param="prompt")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(400, f"best_of is {body.best_of}; expected n, or leave it out.", param="best_of")
    state.check_serving()
    asks = [await _ask(state, prompt) for prompt in prompts]
    return await _answer(request, state, caller, body, asks, PlainForm())


async def _ask(state: ServerState, prompt: str | tuple[int, ...]) -> Ask:
    if isinstance(prompt, str):
        return Ask(prompt)
    text = await state.run(state.retriever.engine.detokenize, prompt)
    return Ask(text, tokens=prompt)


async def _answer(
    request: Request, state: ServerState, caller: Caller, body: AnswerBody, asks: Sequence[Ask], form: Form
) -> Response:
    state.check_serving()
    answering = Answering(state, caller, body, asks, form.operation)
    await answering.start()
    if body.stream:
        return EventStream(_stream(answering, body, form), answering.abort, answering.headers())
    if not await answering.finish(request.receive):
        return Response(status_code=499)  # nobody reads it; the log does
    return JSONResponse(_whole(answering, body, form), headers=answering.headers())


def _whole(answering: Answering, body: AnswerBody, form: Form) -> dict[str, Any]:
    n = body.n or 1
    choices = []
    for position, answer in enumerate(answering.answers):
        for generation in sorted(answer.generations, key=lambda each: each.index):
            choice = form.choice(position * n + generation.index, generation, body.alternatives is not None)
            if len(answering.answers) > 1:
                choice["lora"] = answering.lora(position)
            choices.append(choice)
    found = {
        "id": form.prefix + uuid.uuid4().hex,
        "object": form.whole,
        "created": answering.created,
        "model": answering.model(),
        "choices": choices,
        "usage": answering.usage(),
        "system_fingerprint": None,
    }
    if len(answering.answers) == 1:
        found["lora"] = answering.lora()
    return found


async def _stream(answering: Answering, body: AnswerBody, form: Form) -> AsyncIterator[tuple[bytes, bool]]:
    """The answers as server-sent events, those together that are there together; True with the last.

    After an error there is an event that tells it, and nothing more. An error before all events is raised.
    """
    writer = _Writer(answering, body, form)
    ready = writer.beginning()
    has_begun = False
    try:
        async for received in answering.events():
            ready.append(KEEP_ALIVE if received is None else writer.piece(*received))
            if answering.is_waiting and not answering.is_complete:
                has_begun = True
                yield b"".join(ready), False
                ready.clear()
        yield b"".join([*ready, *writer.ending()]), True
    except Exception as error:
        if not has_begun:
            raise
        yield event(to_api_error(error).body()), True
    finally:
        answering.abort()


class _Writer:
    """Writes the events of one stream. What all of them share is written once: this runs at every token."""

    def __init__(self, answering: Answering, body: AnswerBody, form: Form) -> None:
        self._answering, self._form = answering, form
        self._n = body.n or 1
        self._with_logprobs = body.alternatives is not None
        self._with_usage = body.stream_options is not None and body.stream_options.include_usage
        self._base: dict[str, Any] = {
            "id": form.prefix + uuid.uuid4().hex,
            "object": form.part,
            "created": answering.created,
            "model": answering.model(),
        }
        self._head = f'data: {dump(self._base)[:-1]},"choices":[{{"index":'
        self._tail = '}],"usage":null}\n\n' if self._with_usage else "}]}\n\n"
        self._written = dict.fromkeys(range(len(answering.answers) * self._n), 0)  # characters, by choice

    def beginning(self) -> list[bytes]:
        """Which adapters answer, before there is any text."""
        return [
            self._chunk([self._form.first(index)], self._lora(index // self._n) if index % self._n == 0 else {})
            for index in self._written
        ]

    def piece(self, position: int, piece: Piece) -> bytes:
        """A part of an answer."""
        index = position * self._n + piece.index
        logprobs = "null"
        if self._with_logprobs and piece.logprobs:
            logprobs = dump(self._form.logprobs(piece.logprobs, self._written[index]))
        self._written[index] += len(piece.text)
        reason = "null" if piece.finish_reason is None else dump(FINISH_REASONS[piece.finish_reason])
        middle = f'{index},{self._form.text(piece.text)},"logprobs":{logprobs},"finish_reason":{reason}'
        if piece.finish_reason is None or len(self._answering.answers[position].generations) < self._n:
            return f"{self._head}{middle}{self._tail}".encode()
        lora = dump(self._lora(position))[1:-1]  # the prompt's last chunk says how it was answered
        return f"{self._head}{middle}}}],{lora}{self._tail.removeprefix('}]')}".encode()

    def ending(self) -> list[bytes]:
        """The usage, if it was asked for, and the end."""
        if not self._with_usage:
            return [DONE]
        return [event({**self._base, "choices": [], "usage": self._answering.usage()}), DONE]

    def _chunk(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> bytes:
        usage = {"usage": None} if self._with_usage else {}
        return event({**self._base, "choices": choices, **more, **usage})

    def _lora(self, position: int) -> dict[str, Any]:
        own = {"prompt": position} if len(self._answering.answers) > 1 else {}
        return {"lora": {**own, **self._answering.lora(position)}}
