"""Receives the files of an adapter: from the network straight to a folder, within limits, in little memory.

Starlette's own form parser puts files into the system's temporary folder first, and knows no limit for them. The size
of the whole request is bounded in `bodies.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from starlette.requests import ClientDisconnect, Request

from loraretriever.errors import require_extra
from loraretriever.pool.files import MAX_CARD_BYTES, file_errors
from loraretriever.pool.peft_config import CONFIG_FILE, MAX_CONFIG_BYTES
from loraretriever.pool.samples import MAX_FILE_BYTES, SAMPLES_FILE
from loraretriever.pool.weights import CARD_FILE, WEIGHTS_FILE
from loraretriever.server.errors import ApiError
from loraretriever.server.state import ServerState

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

# part of the form -> (the file's name in an adapter's folder, its greatest size in bytes)
FILES = {
    "config": (CONFIG_FILE, MAX_CONFIG_BYTES),
    "weights": (WEIGHTS_FILE, None),  # by the settings
    "samples": (SAMPLES_FILE, MAX_FILE_BYTES),
    "card": (CARD_FILE, MAX_CARD_BYTES),
}
FIELDS = ("name", "description", "tags", "tenant", "allow_base_mismatch")
MAX_FIELDS = 128
MAX_FIELD_BYTES = 64 << 10  # of all fields together
_BLOCK = 1 << 20  # bytes that are taken apart in one go

Form = dict[str, str | list[str]]  # "tags" has a list


async def receive(request: Request, state: ServerState, folder: Path) -> Form:
    """Write the files of a multipart request into a folder, under the names that PEFT gives them.

    Returns: the values of the form's fields.

    Raises:
        ApiError: a file is too large, the request is cut short, or not such a form.
    """
    form = _Form(request.headers["content-type"], folder, state.settings.max_upload_mib << 20)
    block = bytearray()  # a change of threads for each of them
    try:
        async for chunk in request.stream():
            block += chunk
            if len(block) >= _BLOCK:
                await state.run(form.feed, bytes(block))
                block.clear()
        await state.run(form.feed, bytes(block))
        return form.finish()
    except ClientDisconnect as error:
        raise ApiError(400, "the connection ended before the upload did.") from error
    finally:
        form.close()


def _too_large(what: str, most: int) -> ApiError:
    return ApiError(413, f"{what} is too large; expected at most {most:,} bytes.")


def _bad_form(reason: str, param: str | None = None) -> ApiError:
    parts = ", ".join((*FILES, *FIELDS))
    return ApiError(400, f"the form cannot be read: {reason}; expected multipart/form-data with {parts}.", param=param)


class _Form:
    """Takes a multipart body apart as it comes, one block at a time, in any thread."""

    def __init__(self, content_type: str, folder: Path, max_weights: int) -> None:
        with require_extra("serve"):
            from python_multipart import MultipartParser
            from python_multipart.exceptions import FormParserError
            from python_multipart.multipart import parse_options_header
        self._parse_options, self._error = parse_options_header, FormParserError
        self._folder, self._max_weights = folder, max_weights
        self._fields: dict[str, list[str]] = {}
        self._written: set[str] = set()
        self._field_count = self._field_bytes = 0
        self._header, self._value, self._disposition = bytearray(), bytearray(), b""
        self._part, self._most, self._size = "", 0, 0
        self._file: BinaryIO | None = None
        self._text = bytearray()
        self._is_whole = False
        callbacks: MultipartCallbacks = {
            "on_part_begin": self._begin_part,
            "on_header_field": self._read_header,
            "on_header_value": self._read_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._open_part,
            "on_part_data": self._take,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }
        try:
            self._parser = MultipartParser(parse_options_header(content_type)[1][b"boundary"], callbacks)
        except (KeyError, FormParserError) as error:
            raise _bad_form("its header Content-Type has no boundary that can be used") from error

    def feed(self, block: bytes) -> None:
        """Go on with these bytes."""
        try:
            with file_errors("keep an upload"):
                self._parser.write(block)
        except self._error as error:
            raise _bad_form("it is not in the form of multipart/form-data") from error

    def finish(self) -> Form:
        """The fields, once everything was fed."""
        if not self._is_whole:
            raise _bad_form("it is cut short")
        for name in ("config", "weights"):
            if name not in self._written:
                raise _bad_form(f"it has no {FILES[name][0]}", param=name)
        return {name: texts if name == "tags" else texts[0] for name, texts in self._fields.items()}

    def close(self) -> None:
        """Close the file that is being written."""
        if self._file is not None:
            self._file.close()
            self._file = None

    # What the parser calls.

    def _begin_part(self) -> None:
        self._disposition = b""

    def _read_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _read_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _open_part(self) -> None:
        name = self._parse_options(self._disposition)[1].get(b"name", b"").decode("utf-8", "replace")
        self._part, self._size = name, 0
        self._text.clear()
        if name in FILES:
            file, most = FILES[name]
            if name in self._written:
                raise _bad_form(f"it has {name} twice", param=name)
            self._written.add(name)
            self._most = self._max_weights if most is None else most
            self._file = (self._folder / file).open("xb", buffering=0)
        elif name in FIELDS:
            self._field_count += 1
            if self._field_count > MAX_FIELDS:
                raise _bad_form(f"it has more than {MAX_FIELDS} fields")
            if name in self._fields and name != "tags":
                raise _bad_form(f"it has {name} twice", param=name)
        else:
            raise _bad_form(f"it has a part {name!r:.80}")

    def _take(self, data: bytes, start: int, end: int) -> None:
        self._size += end - start
        if self._file is None:
            self._field_bytes += end - start
            if self._field_bytes > MAX_FIELD_BYTES:
                raise _too_large("the text in the form", MAX_FIELD_BYTES)
            self._text += data[start:end]
            return
        if self._size > self._most:
            raise _too_large(FILES[self._part][0], self._most)
        rest = memoryview(data)[start:end]
        while rest:
            rest = rest[self._file.write(rest) :]

    def _end_part(self) -> None:
        if self._file is not None:
            self.close()
            return
        try:
            self._fields.setdefault(self._part, []).append(self._text.decode())
        except UnicodeDecodeError as error:
            raise _bad_form(f"{self._part} is not UTF-8", param=self._part) from error

    def _end(self) -> None:
        self._is_whole = True
