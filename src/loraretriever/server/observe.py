"""What is seen of each request: its id, a line in the log, figures, and a span."""

from __future__ import annotations

import logging
import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraretriever.server import logs, tracing
from loraretriever.server.errors import to_api_error
from loraretriever.types import Generation, Sampling

if TYPE_CHECKING:
    from loraretriever.server.metrics import Metrics
    from loraretriever.server.spans import RequestSpan

_log = logging.getLogger("loraretriever.access")
_QUIET = frozenset({"/health", "/ready", "/metrics", "/v1/stats"})  # asked again and again: their usual answers are
_USUAL = frozenset({200, 503})  # logged only in debug; 503 is how a server that loads its models is not ready
UNKNOWN = "unknown"  # the endpoint of requests that no route takes
CLIENT_GONE = 499  # nginx's status for a client that did not wait for the beginning of an answer


@dataclass(slots=True)
class Record:
    """What is known of a request so far. Endpoints tell it; the middleware logs it when the answer is complete."""

    id: str
    span: RequestSpan | None = None
    keeps_texts: bool = False
    fields: dict[str, Any] = field(default_factory=dict)  # of the line in the log
    prompts: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)

    def asked(self, operation: str, model: str, sampling: Sampling | None = None, stream: bool = False) -> None:
        """What the client wants. `operation` by the GenAI conventions: chat, text_completion or embeddings."""
        self.fields["model"] = model
        if stream:
            self.fields["stream"] = True
        if self.span is not None:
            from loraretriever.server.spans import asked_attributes

            self.span.set(asked_attributes(operation, model, sampling, stream))

    def composed(self, composition: str, fallback: bool, prompt: str = "") -> None:
        """Which adapters answer one prompt of the request. The prompt is kept only where prompts are logged."""
        before = self.fields.setdefault("composition", composition)
        if before != composition:
            self.fields["composition"] = "several"
        self.fields["fallback"] = self.fields.get("fallback", False) or fallback
        if self.keeps_texts:
            self.prompts.append(prompt)

    def answered(self, generation: Generation, submitted_ns: int) -> None:
        """An answer is complete. `submitted_ns`: nanoseconds since the epoch, when it was submitted."""
        fields = self.fields
        if generation.index == 0:  # the n answers to a prompt share its tokens
            fields["prompt_tokens"] = fields.get("prompt_tokens", 0) + generation.prompt_tokens
            fields["cached_tokens"] = fields.get("cached_tokens", 0) + generation.cached_tokens
        fields["completion_tokens"] = fields.get("completion_tokens", 0) + generation.completion_tokens
        if generation.first_token_seconds is not None:
            first = round(generation.first_token_seconds, 6)
            fields["first_token_seconds"] = min(fields.get("first_token_seconds", first), first)
        self.finish_reasons.append(generation.finish_reason)
        if self.keeps_texts:
            self.answers.append(generation.text)
        if self.span is not None:
            self.span.record_generation(generation, submitted_ns)

    def finish(self) -> dict[str, Any]:
        """The fields of the line in the log; the span gets the same."""
        if self.finish_reasons:
            self.fields["finish_reason"] = ",".join(dict.fromkeys(self.finish_reasons))
        if self.keeps_texts and self.prompts:
            self.fields |= {"prompts": self.prompts, "answers": self.answers}
        if self.span is not None:
            if (trace_id := self.span.trace_id) is not None:
                self.fields["trace_id"] = trace_id
            if self.span.is_recording:
                self.span.set(self._attributes())
        return self.fields

    def _attributes(self) -> dict[str, Any]:
        get = self.fields.get
        attributes = {
            "loraretriever.request_id": self.id,
            "loraretriever.tenant": get("tenant"),
            "loraretriever.composition": get("composition"),
            "loraretriever.fallback": get("fallback"),
            "gen_ai.response.finish_reasons": self.finish_reasons or None,
            "gen_ai.response.time_to_first_chunk": get("first_token_seconds"),
            "gen_ai.usage.input_tokens": get("prompt_tokens"),
            "gen_ai.usage.cache_read.input_tokens": get("cached_tokens"),
            "gen_ai.usage.output_tokens": get("completion_tokens"),
        }
        if self.keeps_texts and self.prompts:
            from loraretriever.server.spans import messages_json

            attributes["gen_ai.input.messages"] = messages_json("user", self.prompts)
            attributes["gen_ai.output.messages"] = messages_json("assistant", self.answers)
        return attributes


_current: ContextVar[Record | None] = ContextVar("record", default=None)


def current() -> Record:
    """The record of the request in whose context this is called; outside of requests one that nobody reads."""
    return _current.get() or Record("")


class ObserveMiddleware:
    """Watches the requests to an application; it must be the outermost middleware.

    Errors that nobody has handled are answered here, so that they are logged once, with the request's id.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, log_prompts: bool = False) -> None:
        """`log_prompts`: prompts and answers stand in the log and in the spans."""
        self._app = app
        self._metrics = metrics
        self._log_prompts = log_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; connections of other kinds pass."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        identity = _request_id(headers.get("x-request-id"))
        record = Record(identity, tracing.start_request(scope, headers), self._log_prompts)
        exchange = _Exchange(identity.encode(), receive, send)
        tokens = _current.set(record), logs.request_id.set(identity)
        self._metrics.request_started()
        error: BaseException | None = None
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except Exception as caught:
            error = caught
            answer = to_api_error(caught).response()  # logs it, too
            if not exchange.status:
                await answer(scope, exchange.receive, exchange.send)
        except BaseException as caught:  # the task was cancelled
            error = caught
            raise
        finally:
            self._done(scope, record, exchange, time.perf_counter() - started, error)
            _current.reset(tokens[0])
            logs.request_id.reset(tokens[1])

    def _done(
        self, scope: Scope, record: Record, exchange: _Exchange, seconds: float, error: BaseException | None
    ) -> None:
        method, route = scope["method"], template(scope)
        status = exchange.status or (CLIENT_GONE if exchange.client_gone else 500 if error is None else 503)
        self._metrics.request_done(route or UNKNOWN, method, status, seconds)
        caller = scope.get("loraretriever.caller")
        if caller is not None:
            record.fields["key"] = caller.key.id if caller.key else None
            record.fields["tenant"] = caller.tenant
        if exchange.client_gone:
            record.fields["client_gone"] = True
        elif not exchange.complete:
            record.fields["broken"] = True  # the answer broke off
        fields = record.finish()
        if record.span is not None:
            record.span.end(route, status, error)
        level = logging.DEBUG if route in _QUIET and status in _USUAL else logging.INFO
        if _log.isEnabledFor(level):
            place = route or UNKNOWN
            shown = {"method": method, "route": place, "status": status, "seconds": round(seconds, 6)}
            _log.log(level, "%s %s %d", method, place, status, extra={logs.FIELDS: shown | fields})


class _Exchange:
    """What passes between server and application during one request."""

    __slots__ = ("_id", "_receive", "_send", "client_gone", "complete", "status")

    def __init__(self, identity: bytes, receive: Receive, send: Send) -> None:
        self._id = identity
        self._receive = receive
        self._send = send
        self.status = 0  # until the answer begins
        self.complete = False
        self.client_gone = False  # before the answer was complete

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self.complete:
            self.client_gone = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self._id)]
        elif not message.get("more_body", False):
            self.complete = True
        await self._send(message)


def template(scope: Scope) -> str | None:
    """The path of the route that took a request, as it was declared; None if none did."""
    path: str | None = getattr(scope.get("route"), "path", None)
    if path is None and scope.get("endpoint") is not None and not scope.get("path_params"):  # a mounted application
        mounted = scope.get("root_path", "").removeprefix(scope.get("app_root_path", ""))
        path = mounted + "/*" if mounted else None
    return path


def _request_id(given: str | None) -> str:
    """The client's own id for its request, if it is a short word of printable characters, else a new one."""
    if given and len(given) <= 128 and given.isascii() and given.isprintable() and " " not in given:
        return given
    return uuid.uuid4().hex
