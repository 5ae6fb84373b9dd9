"""One request on its way through the engine."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from loraretriever.errors import InvalidInputError
from loraretriever.models import render_prompt
from loraretriever.types import Generation, Request


class Sequence:
    """A request as tokens: those of the prompt, and those generated so far."""

    def __init__(self, position: int, request: Request, tokenizer: Any, max_length: int) -> None:
        """Tokenise the request.

        Args:
            position: the request's place in the call that brought it.
            max_length: tokens of prompt and answer together that the model can take.

        Raises:
            InvalidInputError: the prompt has no tokens, or prompt and answer can be longer than `max_length`.
        """
        text = render_prompt(tokenizer, request.prompt, request.chat)
        rendered = request.chat and bool(tokenizer.chat_template)  # the template writes the special tokens itself
        self.position = position
        self.request = request
        self.prompt_ids: list[int] = tokenizer(text, add_special_tokens=not rendered).input_ids
        self.output_ids: list[int] = []
        self.finish_reason: str | None = None
        self._tokenizer = tokenizer
        self._check_length(max_length)

    def _check_length(self, max_length: int) -> None:
        prompt, answer = len(self.prompt_ids), self.request.sampling.max_tokens
        if prompt == 0:
            raise InvalidInputError(f"prompt {self.position + 1} is empty; expected at least one token.")
        if prompt + answer > max_length:
            raise InvalidInputError(
                f"prompt {self.position + 1} has {prompt} tokens and asks for up to {answer} more; the model takes "
                f"{max_length} in all. Shorten the prompt or lower max_tokens."
            )

    def append(self, token: int, end_ids: Collection[int]) -> None:
        """Take the next token; set `finish_reason` if it is the last."""
        if token in end_ids:
            self.finish_reason = "stop"
            return
        self.output_ids.append(token)
        if self.request.sampling.stop and self._stop_at(self._decode()) is not None:
            self.finish_reason = "stop"
        elif len(self.output_ids) >= self.request.sampling.max_tokens:
            self.finish_reason = "length"

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self.output_ids, skip_special_tokens=True))

    def _stop_at(self, text: str) -> int | None:
        """Where the first stop string begins."""
        return min((at for stop in self.request.sampling.stop if (at := text.find(stop)) >= 0), default=None)

    def result(self, seconds: float) -> Generation:
        """The finished request; the text ends before the stop string."""
        assert self.finish_reason is not None, "the sequence is still running"
        text = self._decode()
        return Generation(
            text=text[: self._stop_at(text)],
            finish_reason=self.finish_reason,
            prompt_tokens=len(self.prompt_ids),
            completion_tokens=len(self.output_ids),
            seconds=seconds,
        )
