"""The text of one answer while its tokens come, cut before the first stop string."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import Any

_UNDECODED = "\ufffd"  # what decoders write for bytes that are no character, or not yet
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Enough tokens for their end to be decoded as in the whole answer: four bytes decide about the last character, and
# some decoders treat the first token apart.
_CONTEXT = 6
# What transformers' `clean_up_tokenization` replaces, in its order, each by itself without the outer spaces.
_CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class TextStream:
    """Turns the tokens of one answer into pieces of text, each given out as soon as it is certain.

    The joined pieces are `tokenizer.decode(tokens, skip_special_tokens=True)`, cut right before the stop string that
    a token completes first; of several completed by the same token, before the one that begins first. A piece never
    ends inside a character, and no beginning of a stop string is given out while it can still be completed. The time
    is linear in the number of tokens.

    The text of the tokens so far must begin the text of more tokens, but for bytes and for transformers' clean-up of
    spaces: so do all decoders of the `tokenizers` library for language models.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        """Begin an answer. `tokenizer` is one of transformers'; stop strings are not empty."""
        assert not isinstance(stop, str) and all(stop)
        self.stopped = False
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._window = _Window(tokenizer)
        self._clean_up = _CleanUp() if _cleans_up(tokenizer) else None
        self._held = ""
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """All that was given out so far."""
        return "".join(self._pieces)

    def push(self, token: int) -> str:
        """The new text that can be shown once `token` is there; perhaps empty, and always after a stop string."""
        return "" if self.stopped else self._give(self._window.push(token))

    def finish(self) -> str:
        """What was held back. No token follows."""
        return "" if self.stopped else self._give(self._window.finish(), is_last=True)

    def _give(self, text: str, is_last: bool = False) -> str:
        run = self._window.run
        if self._clean_up:
            text = self._clean_up.push(text, is_last)
            run = []  # what the clean-up makes of it is not known yet
        text = self._held + text
        recent = text + "".join(run) if len(run) <= self._longest else "".join(run[-self._longest :])
        if any(stop in recent for stop in self._stop):
            self.stopped = True
            text += "".join(run)
            end = min(place for stop in self._stop if (place := text.find(stop)) >= 0)
        else:
            end = len(text) if is_last else min((_open_end(text, stop) for stop in self._stop), default=len(text))
        piece, self._held = text[:end], text[end:]
        self._pieces.append(piece)
        return piece


class _Window:
    """Decodes the last tokens of an answer, and gives the difference to what it gave before."""

    def __init__(self, tokenizer: Any) -> None:
        self.run: list[str] = []  # the characters of an unfinished run of byte tokens, up to a byte that does not fit
        self._tokenizer = tokenizer
        self._has_byte_tokens = _has_byte_tokens(tokenizer)
        self._is_run = False
        self._utf8: codecs.IncrementalDecoder | None = None  # None from such a byte on
        self._ids: list[int] = []
        self._text = ""
        self._given = 0  # characters of the window's text

    def push(self, token: int) -> str:
        """The text that `token` makes certain."""
        byte = self._byte(token)
        if byte is not None:
            # A later byte that does not fit turns the whole run into U+FFFD: only the text before it is certain.
            self._extend_run(byte)
            self._ids.append(token)
            before, self._given = self._text[self._given :], len(self._text)
            return before
        if self._is_run and self._is_skipped(token):
            return ""
        text = self._decode([*self._ids, token])
        if text == self._text and self._is_skipped(token):
            return ""  # it would push tokens with text out of the window
        self._ids.append(token)
        return self._advance(text, len(text.removesuffix(_UNDECODED)))

    def finish(self) -> str:
        """The text that was not certain."""
        text = self._decode(self._ids)
        return self._advance(text, len(text))

    def _advance(self, text: str, end: int) -> str:
        piece = text[self._given : end]
        self._text, self._given = text, end
        self._is_run = False
        self.run.clear()
        if len(self._ids) > 2 * _CONTEXT:
            self._shorten()
        return piece

    def _shorten(self) -> None:
        context = self._decode(self._ids[-_CONTEXT:])
        if context or not self._text:  # else the text of the next tokens might lose spaces, as at an answer's start
            self._given += len(context) - len(self._text)
            self._text = context
            del self._ids[:-_CONTEXT]

    def _extend_run(self, byte: int) -> None:
        if not self._is_run:
            self._is_run = True
            self._utf8 = codecs.getincrementaldecoder("utf-8")()
        if self._utf8:
            try:
                self.run += self._utf8.decode(bytes([byte]))
            except UnicodeDecodeError:
                self._utf8 = None

    def _byte(self, token: int) -> int | None:
        if not self._has_byte_tokens:
            return None
        match = _BYTE_TOKEN.fullmatch(self._tokenizer.convert_ids_to_tokens(token) or "")
        return int(match[1], 16) if match else None

    def _is_skipped(self, token: int) -> bool:
        """Whether the token, special or not of the vocabulary, leaves no trace in the text."""
        if self._decode([token]):
            return False
        return bool(self._decode([token], skip=False)) or self._tokenizer.convert_ids_to_tokens(token) is None

    def _decode(self, ids: list[int], skip: bool = True) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False))


class _CleanUp:
    """transformers' `clean_up_tokenization` on a text that comes in parts."""

    def __init__(self) -> None:
        self._held = [""] * len(_CLEANED)

    def push(self, text: str, is_last: bool) -> str:
        """The clean text that is certain."""
        for place, pattern in enumerate(_CLEANED):
            text = (self._held[place] + text).replace(pattern, pattern.strip())
            end = len(text) if is_last else _open_end(text, pattern)
            text, self._held[place] = text[:end], text[end:]
        return text


def _cleans_up(tokenizer: Any) -> bool:
    """Whether `decode` cleans up spaces: later versions of transformers spare byte-pair encodings, unless told."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    is_spared = type(getattr(backend, "model", None)).__name__ == "BPE" and not getattr(
        tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", True
    )
    return bool(tokenizer.clean_up_tokenization_spaces) and not is_spared


def _has_byte_tokens(tokenizer: Any) -> bool:
    """Whether tokens such as <0x41> stand for bytes."""
    token = tokenizer.convert_tokens_to_ids("<0x41>")
    return token is not None and tokenizer.decode([token]) == "A"


def _open_end(text: str, pattern: str) -> int:
    """Where the longest end of `text` begins that begins `pattern` without being all of it; else the text's length."""
    place = text.find(pattern[0], max(0, len(text) - len(pattern) + 1))
    while place >= 0 and not pattern.startswith(text[place:]):
        place = text.find(pattern[0], place + 1)
    return place if place >= 0 else len(text)
