"""The spans of a request, by OpenTelemetry's conventions for HTTP and GenAI. Imported only where traces are wanted.

The names of attributes are written out: those of the GenAI conventions are in no stable module yet.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import Span
from starlette.types import Scope

import loraretriever
from loraretriever.types import Generation, Sampling

_NAME = "loraretriever"
_METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"})
# Finds the provider when it is first used.
_tracer = trace.get_tracer(_NAME, loraretriever.__version__)


class RequestSpan:
    """The server span of one request: the current one from `start` to `end`, which share one context."""

    __slots__ = ("_context", "_name", "_span", "_token")

    def __init__(self, span: Span, name: str, parent: Context | None) -> None:
        """`name`: the span's, as long as the route is not known."""
        self._span = span
        self._name = name
        self._context = trace.set_span_in_context(span, parent)
        self._token = otel_context.attach(self._context)

    @classmethod
    def start(cls, scope: Scope, headers: Mapping[str, str]) -> RequestSpan:
        """Begin the span of an HTTP request, below the caller's span if a header names one (W3C trace context)."""
        method = scope["method"]
        name = method if method in _METHODS else "HTTP"
        parent = propagate.extract(headers) if "traceparent" in headers else None
        span = _tracer.start_span(name, parent, trace.SpanKind.SERVER, _http_attributes(scope, headers))
        return cls(span, name, parent)

    @property
    def trace_id(self) -> str | None:
        """For the log: 32 hexadecimal digits; None if there is no trace."""
        context = self._span.get_span_context()
        return trace.format_trace_id(context.trace_id) if context.is_valid else None

    @property
    def is_recording(self) -> bool:
        """Whether anybody will see the attributes."""
        return self._span.is_recording()

    def set(self, attributes: Mapping[str, Any]) -> None:
        """Add what has become known; None is left out."""
        if self._span.is_recording():
            self._span.set_attributes({name: value for name, value in attributes.items() if value is not None})

    def record_generation(self, generation: Generation, submitted_ns: int) -> None:
        """Make the spans queue, prefill and decode of an answer, afterwards; what it never came to is left out.

        Args:
            generation: an answer that is complete; its times count from its submission.
            submitted_ns: nanoseconds since the epoch, when it was submitted.
        """
        if not self._span.is_recording():
            return
        computed = {
            "gen_ai.usage.input_tokens": generation.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": generation.cached_tokens,
        }
        generated = {"gen_ai.usage.output_tokens": generation.completion_tokens}
        stages: list[tuple[str, float | None, dict[str, int]]] = [
            ("queue", 0.0, {}),
            ("prefill", generation.queue_seconds, computed),
            ("decode", generation.first_token_seconds, generated),
        ]
        begun = [(name, start, attributes) for name, start, attributes in stages if start is not None]
        ends = [*(start for _, start, _ in begun[1:]), generation.seconds]
        for (name, start, attributes), end in zip(begun, ends, strict=True):
            span = _tracer.start_span(
                f"{_NAME}.{name}",
                self._context,
                attributes={f"{_NAME}.answer.index": generation.index, **attributes},
                start_time=submitted_ns + round(start * 1e9),
            )
            span.end(submitted_ns + round(end * 1e9))

    def end(self, route: str | None, status: int, error: BaseException | None) -> None:
        """The answer is complete.

        Args:
            route: the template of its path; None if no route took it.
            status: HTTP's.
            error: what nobody has handled.
        """
        if self._span.is_recording():
            if route is not None:
                self._span.set_attribute("http.route", route)
                self._span.update_name(f"{self._name} {route}")
            self._span.set_attribute("http.response.status_code", status)
            if error is not None:
                self._span.record_exception(error)
            if error is not None or status >= 500:
                self._span.set_attribute("error.type", str(status) if error is None else type(error).__qualname__)
                self._span.set_status(trace.StatusCode.ERROR)
        otel_context.detach(self._token)
        self._span.end()


def asked_attributes(operation: str, model: str, sampling: Sampling | None, stream: bool) -> dict[str, Any]:
    """What a request asks for, by the GenAI conventions."""
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": _NAME,
        "gen_ai.request.model": model,
    }
    if sampling is not None:
        attributes |= {
            "gen_ai.request.stream": stream,
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.top_k": sampling.top_k or None,
            "gen_ai.request.frequency_penalty": sampling.frequency_penalty or None,
            "gen_ai.request.presence_penalty": sampling.presence_penalty or None,
            "gen_ai.request.choice.count": None if sampling.n == 1 else sampling.n,
            "gen_ai.request.seed": sampling.seed,
            "gen_ai.request.stop_sequences": sampling.stop or None,
        }
    return attributes


def messages_json(role: str, texts: Sequence[str]) -> str:
    """Prompts or answers as the GenAI conventions want them: messages of parts, as JSON."""
    return json.dumps([{"role": role, "parts": [{"type": "text", "content": text}]} for text in texts])


def _http_attributes(scope: Scope, headers: Mapping[str, str]) -> dict[str, Any]:
    method = scope["method"]
    attributes: dict[str, Any] = {
        "http.request.method": method if method in _METHODS else "_OTHER",
        "url.path": scope["path"],
        "url.scheme": scope.get("scheme", "http"),
        "network.protocol.version": scope.get("http_version", "1.1"),
    }
    if method not in _METHODS:
        attributes["http.request.method_original"] = method
    server, client = scope.get("server"), scope.get("client")
    if server is not None:
        attributes["server.address"] = server[0]
        if server[1] is not None:  # a Unix socket has no port
            attributes["server.port"] = server[1]
    if client is not None:
        attributes["client.address"] = client[0]
    if "user-agent" in headers:
        attributes["user_agent.original"] = headers["user-agent"]
    return attributes
