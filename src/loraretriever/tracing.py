"""Spans of OpenTelemetry around the steps of a request, where the program has set it up; nothing at all elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

Attribute = str | int | float | bool


@contextmanager
def span(name: str, **attributes: Attribute) -> Iterator[None]:
    """A span `loraretriever.NAME` around the block, with attributes `loraretriever.ATTRIBUTE`.

    An error that leaves the block is recorded in it. Prompts and answers are never attributes.
    """
    # Who has set up tracing has imported its API: without that there is nobody to tell, and no import to wait for.
    api = sys.modules.get("opentelemetry.trace")
    if api is None:
        yield
        return
    found = {f"loraretriever.{key}": value for key, value in attributes.items()}
    with api.get_tracer("loraretriever").start_as_current_span(f"loraretriever.{name}", attributes=found):
        yield
