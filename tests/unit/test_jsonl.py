from __future__ import annotations

from pathlib import Path

import pytest

from loraretriever.errors import InvalidInputError
from loraretriever.jsonl import parse_jsonl, read_jsonl


def test_lines_are_numbered_and_blank_ones_skipped(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes('\ufeff{"a": "\u2028\x85"}\r\n \n\n{"b": 1}'.encode())
    assert list(read_jsonl(tmp_path / "f")) == [(1, {"a": "\u2028\x85"}), (4, {"b": 1})]
    assert list(parse_jsonl('\ufeff{"a": 1}\n', "stdin")) == [(1, {"a": 1})]
    assert list(parse_jsonl("", "stdin")) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "f:2 is not JSON"),
        ("[" * 100_000, "f:2 is not JSON"),
        ('{"a": ' + "1" * 5000 + "}", "f:2 is not JSON"),
        ("[1]", "f:2 is '[1]'; expected a JSON object"),
        ("null", "f:2 is 'null'"),
    ],
)
def test_bad_lines_are_named(line: str, message: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        list(parse_jsonl("{}\n" + line, "f"))
    assert message in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", tmp_path / ("x" * 300)):
        with pytest.raises(InvalidInputError, match="cannot read"):
            read_jsonl(path)
    (tmp_path / "f").write_bytes(b'{"a": "\xfc"}')
    with pytest.raises(InvalidInputError, match="UTF-8"):
        read_jsonl(tmp_path / "f")
    with pytest.raises(InvalidInputError, match="more than 3 bytes"):
        read_jsonl(Path("/dev/zero"), max_bytes=3)
