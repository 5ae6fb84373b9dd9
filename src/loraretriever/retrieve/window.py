"""What an encoder reads of a text: all of it, or its first and last tokens.

Instructions stand at the beginning or at the end of a prompt, and what they are about between them. Of a long text
therefore the middle is left out, not the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CHARACTERS_PER_TOKEN = 16  # more than text has; the middle is cut in characters first, because tokenising costs time
_LONGEST_WORD = 256


class Window:
    """Turns texts into token ids, at most `size` of them, special tokens included."""

    def __init__(self, tokenizer: Any, size: int | None) -> None:
        """Take over the rules of a fast `PreTrainedTokenizer`, but not its truncation and padding.

        Args:
            tokenizer: with a `backend_tokenizer`, which is copied.
            size: the most tokens of a text; None for all.
        """
        self._tokenizer = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # For a text without any token, such as an empty one where the tokenizer adds no special tokens.
        known = (tokenizer.unk_token_id, tokenizer.pad_token_id, 0)
        self._nothing = next(token for token in known if token is not None)
        self.size = size

    def read(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids that the model is to see of each text, at least one."""
        encodings = self._tokenizer.encode_batch_fast([cut_characters(text, self.size) for text in texts])
        return [cut_middle(encoding.ids, self.size) or [self._nothing] for encoding in encodings]


def cut_middle(ids: list[int], size: int | None) -> list[int]:
    """The first and the last ids, `size` together; all when there are no more."""
    if size is None or len(ids) <= size:
        return ids
    tail = size // 2
    return ids[: size - tail] + ids[len(ids) - tail :]


def cut_characters(text: str, size: int | None) -> str:
    """The text without its middle when it is far longer than `size` tokens, cut between words where there are any.

    The window over the result is the window over the whole text unless half the window takes more than
    `CHARACTERS_PER_TOKEN` characters per token, as runs of blanks may.
    """
    if size is None or len(text) <= size * CHARACTERS_PER_TOKEN:
        return text
    half = (size + 1) // 2 * CHARACTERS_PER_TOKEN
    head, tail = text[:half], text[-half:]
    whole_head, whole_tail = head.rsplit(None, 1)[:1], tail.split(None, 1)[-1:]
    return f"{_unless_short(whole_head, head)} {_unless_short(whole_tail, tail)}"


def _unless_short(words: list[str], text: str) -> str:
    """The whole words of a text, or the text if its word at the cut is too long to be one."""
    return words[0] if words and len(words[0]) >= len(text) - _LONGEST_WORD else text
