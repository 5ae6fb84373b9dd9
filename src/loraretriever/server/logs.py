"""Logs on standard error: one JSON object per line for machines, or text for terminals."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
FIELDS = "fields"  # logger.info(..., extra={FIELDS: {...}}): they stand beside the message

# Whoever wrote into a prompt or a header must not move the cursor of a terminal, or begin a new line of the log.
_CONTROLS = [*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_ESCAPES = {code: f"\\u{code:04x}" for code in _CONTROLS} | {0x0A: "\\n", 0x0D: "\\r", 0x09: "\\t"}
# ASCII only, so that control characters and halves of surrogate pairs are escaped by it.
_encode = json.JSONEncoder(default=str, separators=(",", ":")).encode


def escape(text: str) -> str:
    """Text on one line: control characters, line separators and changes of direction become visible escapes."""
    return text.translate(_ESCAPES)


class JsonFormatter(logging.Formatter):
    """One object per line: time (UTC), level, logger, message, request_id, the record's fields, error, stack."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return _encode(_content(record))


class TextFormatter(logging.Formatter):
    """Time, level, message, fields; a stack follows in lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """The line or lines."""
        content = _content(record)
        time, level, message = (content.pop(name) for name in ("time", "level", "message"))
        stack = content.pop("stack", None)
        del content["logger"]
        parts = [time, f"{level:<7}", escape(message), *(f"{name}={_plain(value)}" for name, value in content.items())]
        lines = [] if stack is None else [f"    {escape(line)}" for line in stack.splitlines()]
        return "\n".join([" ".join(parts), *lines])


def configure(level: str, form: Literal["auto", "json", "text"]) -> None:
    """Let all logs of this process, also those of other libraries and uvicorn, go to standard error in one form.

    `form` auto: text on a terminal, else JSON.

    `level` (debug, info, warning or error) is that of this package and of uvicorn; other libraries speak from warning
    on. uvicorn must be run with `log_config=None, access_log=False`: the middleware logs the requests.
    """
    handler = logging.StreamHandler(sys.stderr)
    is_text = sys.stderr.isatty() if form == "auto" else form == "text"
    handler.setFormatter(TextFormatter() if is_text else JsonFormatter())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.captureWarnings(True)
    for name in ("loraretriever", "uvicorn"):
        logging.getLogger(name).setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = name != "uvicorn.access"


def _content(record: logging.LogRecord) -> dict[str, Any]:
    content: dict[str, Any] = {
        "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": record.levelname.lower(),
        "logger": record.name,
        "message": record.getMessage(),
    }
    if (identity := request_id.get()) is not None:
        content["request_id"] = identity
    content |= getattr(record, FIELDS, {})
    if record.exc_info and record.exc_info[1] is not None:
        error = record.exc_info[1]
        content["error"] = type(error).__name__
        content["stack"] = "".join(traceback.format_exception(error)).rstrip()
    return content


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = escape(value if isinstance(value, str) else json.dumps(value, default=str))
    return json.dumps(text, ensure_ascii=False) if " " in text or not text else text
