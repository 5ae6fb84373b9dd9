"""Traces by OpenTelemetry, where somebody wants them: the settings name a collector, or the program has set it up."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import loraretriever
from loraretriever.errors import require_extra

if TYPE_CHECKING:
    from starlette.types import Scope

    from loraretriever.server.spans import RequestSpan

_CLOSE_SECONDS = 5.0  # for the last spans to reach the collector, should it answer


def configure(endpoint: str | None) -> Callable[[], None]:
    """Send this process's traces to a collector, by OTLP over HTTP; call what is returned at the end.

    The environment's OTEL_ variables hold for the rest: sampling, headers, the service's name. OpenTelemetry knows one
    tracer provider per process: one that the program has set is used, and sends its spans to this collector, too.

    Args:
        endpoint: the collector's address, such as http://localhost:4318. None: nothing is set up.

    Raises:
        MissingExtraError: the extra `otel` is not installed.
    """
    if endpoint is None:
        return lambda: None
    with require_extra("otel"):
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        resource = Resource.create({"service.version": loraretriever.__version__})
        if str(resource.attributes["service.name"]).startswith("unknown_service"):  # the environment gives no name
            resource = resource.merge(Resource({"service.name": "loraretriever"}))
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        trace.set_tracer_provider(provider)
    processor = BatchSpanProcessor(OTLPSpanExporter(endpoint=traces_address(endpoint)))
    provider.add_span_processor(processor)

    def close() -> None:
        """Send what is left. A collector that does not answer is not waited for."""
        sending = threading.Thread(target=processor.shutdown, name="last-spans", daemon=True)
        sending.start()
        sending.join(_CLOSE_SECONDS)

    return close


def traces_address(endpoint: str) -> str:
    """Where traces are posted to, at the collector of this address: /v1/traces is added, if it is not there."""
    address = endpoint.rstrip("/")
    return address if address.endswith("/v1/traces") else address + "/v1/traces"


def start_request(scope: Scope, headers: Mapping[str, str]) -> RequestSpan | None:
    """Begin the span of an HTTP request. None where nobody wants traces: it costs nothing there."""
    api = sys.modules.get("opentelemetry.trace")  # whoever has set up tracing has imported it
    if api is None or isinstance(api.get_tracer_provider(), api.ProxyTracerProvider):
        return None
    from loraretriever.server.spans import RequestSpan

    return RequestSpan.start(scope, headers)
