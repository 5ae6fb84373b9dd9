"""What a model reads of a request: its tokens, and the text of tokens. For any thread, and without the model."""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from typing import Any

from loraretriever.errors import InvalidInputError
from loraretriever.models import render_prompt
from loraretriever.types import Request

_LIKELY_CHARACTERS = 8  # of a token: few texts have more


class PromptReader:
    """A model's tokenizer, and what it knows."""

    def __init__(self, tokenizer: Any, known_ids: int, longest: int) -> None:
        """`known_ids`: the model knows the tokens below; `longest`: tokens that it takes in all."""
        self.tokenizer = tokenizer
        # The first call resets what the tokenizer's file says of truncation, which no other thread may see half done.
        self.tokenizer("")
        self._known_ids = known_ids
        self._longest = longest

    def tokenize(self, request: Request, position: int = 0) -> list[int]:
        """The tokens that the model reads for a request; `position`: its place among others, for messages.

        Raises:
            InvalidInputError: the model does not know one, there are far too many, or the chat template refuses the
                messages.
        """
        if request.tokens:
            ids = list(request.tokens)
        else:
            text = render_prompt(self.tokenizer, request.prompt, request.chat, request.messages)
            self._check_beginnings(text, position)
            rendered = request.chat and bool(self.tokenizer.chat_template)  # which writes the special tokens itself
            ids = self.tokenizer(text, add_special_tokens=not rendered).input_ids
        self._check_known(ids, f"prompt {position + 1}")
        return ids

    def detokenize(self, tokens: Ordered[int]) -> str:
        """The text of tokens, without the special ones.

        Raises:
            InvalidInputError: the model does not know one of them.
        """
        self._check_known(tokens, "the prompt")
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def _check_beginnings(self, text: str, position: int) -> None:
        """Refuse what is far too long by a part of it: reading all would take memory and time without need."""
        size = _LIKELY_CHARACTERS * self._longest
        while size < len(text):
            count = len(self.tokenizer(text[:size]).input_ids)
            if count > self._longest:
                raise InvalidInputError(
                    f"prompt {position + 1} has more than {count} tokens; the model takes {self._longest} in all. "
                    "Shorten the prompt."
                )
            size *= 4

    def _check_known(self, ids: Ordered[int], name: str) -> None:
        for token in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= token < self._known_ids:
                raise InvalidInputError(
                    f"{name} has the token {token}, but the model knows only those from 0, below {self._known_ids}; "
                    "use the model's own tokenizer, or leave that special token out."
                )


def check_length(prompt: int, answer: int, longest: int, position: int) -> None:
    """Refuse a prompt without tokens, or one that with its answer is too long.

    Raises:
        InvalidInputError: it is so.
    """
    if prompt == 0:
        raise InvalidInputError(f"prompt {position + 1} is empty; expected at least one token.")
    if prompt + answer > longest:
        raise InvalidInputError(
            f"prompt {position + 1} has {prompt} tokens and asks for up to {answer} more; the model takes "
            f"{longest} in all. Shorten the prompt or lower max_tokens."
        )
