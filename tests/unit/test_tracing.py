from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from loraretriever.tracing import span


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    pytest.importorskip("opentelemetry.sdk.trace")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    found: list[object] = []
    monkeypatch.setattr(exporter, "export", lambda spans: found.extend(spans))
    yield found
    provider.shutdown()


def test_spans_and_errors_are_recorded(exported: list[object]) -> None:
    with pytest.raises(ValueError, match="no vector"), span("route"), span("encode", texts=2):
        raise ValueError("no vector")
    inner, outer = exported
    assert (inner.name, outer.name) == ("loraretriever.encode", "loraretriever.route")  # type: ignore[attr-defined]
    assert dict(inner.attributes) == {"loraretriever.texts": 2}  # type: ignore[attr-defined]
    assert inner.parent.span_id == outer.context.span_id  # type: ignore[attr-defined]
    assert inner.events[0].attributes["exception.message"] == "no vector"  # type: ignore[attr-defined]


def test_without_opentelemetry_nothing_is_loaded_for_it() -> None:
    code = (
        "import sys; from loraretriever.tracing import span\n"
        "with span('encode', texts=1): pass\n"
        "assert not any(name.startswith('opentelemetry') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
