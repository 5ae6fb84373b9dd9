from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator

import pytest

from loraretriever.server import logs

NASTY = "a\nb\rc\td\x1b[31me\x00f\x7fg\x9bh\u2028i\u202ej"


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Leave logging as it was: pytest listens at the root, too."""
    names = ("loraretriever", "uvicorn", "uvicorn.error", "uvicorn.access")
    root = logging.getLogger()
    before = root.handlers[:], root.level, [(each := logging.getLogger(name)).level for name in names]
    propagate = [logging.getLogger(name).propagate for name in names]
    yield
    root.handlers[:], level, levels = before
    root.setLevel(level)
    logging.captureWarnings(False)
    for name, own, passes in zip(names, levels, propagate, strict=True):
        logging.getLogger(name).setLevel(own)
        logging.getLogger(name).propagate = passes
    assert each is logging.getLogger("uvicorn.access")


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    token = logs.request_id.set("r1")
    logging.getLogger("loraretriever.server").info("%d things", 3, extra={logs.FIELDS: {"status": 200, "tenant": None}})
    logs.request_id.reset(token)
    (line,) = lines(capsys)
    content = json.loads(line)
    assert list(content) == ["time", "level", "logger", "message", "request_id", "status", "tenant"]
    assert content["message"] == "3 things"
    assert content["request_id"] == "r1"
    assert content["tenant"] is None
    assert content["time"].endswith("Z") and len(content["time"]) == len("2026-01-01T00:00:00.000Z")


@pytest.mark.parametrize("form", ["json", "text"])
def test_nobody_can_begin_a_line_or_command_a_terminal(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", form)  # type: ignore[arg-type]
    logging.getLogger("loraretriever").info("%s", NASTY, extra={logs.FIELDS: {"model": NASTY, "prompts": [NASTY]}})
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert all(character.isprintable() for character in text[:-1])
    if form == "json":
        content = json.loads(text)
        assert content["message"] == NASTY
        assert content["prompts"] == [NASTY]
    else:
        assert "a\\nb\\rc\\td\\u001b[31me" in text


def test_half_of_a_surrogate_pair_can_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    logging.getLogger("loraretriever").info("%s", "\ud800")
    assert json.loads(capsys.readouterr().err)["message"] == "\ud800"


def test_an_error_is_one_line_of_json_with_its_stack_and_cause(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    try:
        try:
            raise KeyError("deep")
        except KeyError as error:
            raise ValueError("high") from error
    except ValueError:
        logging.getLogger("loraretriever").exception("it failed")
    (line,) = lines(capsys)
    content = json.loads(line)
    assert content["level"] == "error"
    assert content["error"] == "ValueError"
    assert "KeyError: 'deep'" in content["stack"]
    assert content["stack"].endswith("ValueError: high")


def test_text_for_terminals(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "text")
    try:
        raise ValueError("no\x1b[31m")
    except ValueError:
        fields = {"seconds": 0.123456, "model": "a b", "tenant": None}
        logging.getLogger("loraretriever").warning("slow", exc_info=True, extra={logs.FIELDS: fields})
    first, *stack = lines(capsys)
    assert first.split(" ", 1)[1] == 'warning slow seconds=0.1235 model="a b" tenant=null error=ValueError'
    assert stack[0] == "    Traceback (most recent call last):"
    assert stack[-1] == "    ValueError: no\\u001b[31m"


def test_levels_of_us_uvicorn_and_others(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("debug", "json")
    logging.getLogger("loraretriever.pool").debug("ours")
    logging.getLogger("uvicorn.error").info("uvicorn's")
    logging.getLogger("uvicorn.access").info("the middleware says it better")
    logging.getLogger("urllib3").info("chatter")
    logging.getLogger("urllib3").warning("trouble")
    assert [json.loads(line)["message"] for line in lines(capsys)] == ["ours", "uvicorn's", "trouble"]
    logs.configure("error", "json")
    logging.getLogger("loraretriever.pool").warning("ours")
    assert lines(capsys) == []


def test_configuring_again_does_not_write_twice(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    logs.configure("info", "json")
    logging.getLogger("loraretriever").info("once")
    assert len(lines(capsys)) == 1


def test_warnings_are_logged(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        logging.captureWarnings(False)
    content = json.loads(capsys.readouterr().err)
    assert content["logger"] == "py.warnings"
    assert "DeprecationWarning: old" in content["message"]


def test_what_json_cannot_say_is_written_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    logging.getLogger("loraretriever").info("x", extra={logs.FIELDS: {"folder": frozenset({1})}})
    assert json.loads(capsys.readouterr().err)["folder"] == "frozenset({1})"
