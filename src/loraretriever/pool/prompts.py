"""Changes to what a pool knows of prompts: samples and feedback."""

from __future__ import annotations

from collections.abc import Iterable

from loraretriever.errors import InvalidInputError
from loraretriever.pool import editing, feedback
from loraretriever.pool.base import PoolBase
from loraretriever.pool.samples import new_samples
from loraretriever.types import Feedback, Sample


class PromptMethods(PoolBase):
    """The methods of `Pool` about prompts."""

    def add_samples(
        self, name: str, texts: Iterable[str], *, counter: bool = False, source: str = "given"
    ) -> list[Sample]:
        """Add samples, or counter samples, to an adapter. In a plain folder they go to its `samples.jsonl`.

        Returns: those that it did not have yet.

        Raises:
            AdapterNotFoundError: there is none of that name.
            InvalidInputError: a text cannot be a sample, or is one of the other kind already, or there are too many.
            PoolError: the pool cannot be written.
        """
        new = new_samples(texts, counter, source)
        with self._editing(f"change the samples of {name!r}") as session:
            return editing.add_samples(session, self._layout, name, new)

    def replace_samples(
        self, name: str, texts: Iterable[str], counter_texts: Iterable[str] | None = None
    ) -> list[Sample]:
        """Give an adapter other samples, all at once. Those that it has already stay first, with source and embeddings.

        `counter_texts`: its counter samples; None: those that it has.

        Returns: the samples and the counter samples that it has now.

        Raises:
            AdapterNotFoundError: there is none of that name.
            InvalidInputError: a text cannot be a sample, is one of both kinds, or there are none or too many.
            PoolError: the pool cannot be written.
        """
        for each in (texts, counter_texts):
            if isinstance(each, str):
                raise InvalidInputError(f"samples is the string {each[:80]!r}; expected a list of strings.")
        with self._editing(f"change the samples of {name!r}") as session:
            return editing.replace_samples(session, self._layout, name, texts, counter_texts)

    def remove_samples(self, name: str, positions: Iterable[int]) -> None:
        """Remove samples by their places, from 0, in `samples(name)` followed by `counter_samples(name)`.

        Raises:
            AdapterNotFoundError: there is none of that name.
            InvalidInputError: there is no sample at a place, or no sample but counter samples would be left.
            PoolError: the pool cannot be written.
        """
        with self._editing(f"change the samples of {name!r}") as session:
            editing.remove_samples(session, self._layout, name, frozenset(positions))

    def give_feedback(self, prompt: str, right: str | None = None, wrong: str | None = None) -> Feedback:
        """Say which adapter is right for a prompt, which one is wrong, or both. It has no effect until approved.

        Raises:
            AdapterNotFoundError: an adapter is not in the pool.
            InvalidInputError: the prompt cannot be a sample, no adapter is named, or one as right and as wrong.
        """
        with self._database.write() as session:
            return feedback.give(session, prompt, right, wrong)

    def feedback(self, state: str | None = "pending") -> list[Feedback]:
        """Feedback that is "pending", "approved" or "rejected", or all of it (None), oldest first."""
        with self._database.read() as session:
            return feedback.of_state(session, state)

    def approve_feedback(self, ids: Iterable[int]) -> list[Feedback]:
        """Make pending feedback samples of the right adapters and counter samples of the wrong ones, all or none.

        In a plain folder several files cannot change at once: killed meanwhile, approve the same feedback again.

        Raises:
            AdapterNotFoundError: an adapter was removed since; the message names the feedback.
            InvalidInputError: an id is not that of pending feedback, or its prompt is a sample of the other kind.
            PoolError: the pool cannot be written.
        """
        with self._editing("approve feedback") as session:
            return feedback.approve(session, self._layout, ids)

    def reject_feedback(self, ids: Iterable[int]) -> list[Feedback]:
        """Put pending feedback aside.

        Raises:
            InvalidInputError: an id is not that of pending feedback.
        """
        with self._database.write() as session:
            return feedback.reject(session, ids)
