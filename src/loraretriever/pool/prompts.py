"""What a pool knows of prompts: samples, their embeddings, feedback."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from loraretriever.pool import editing, embeddings, feedback, records
from loraretriever.pool.base import PoolBase
from loraretriever.pool.embeddings import SampleIds, Vectors
from loraretriever.pool.samples import new_samples
from loraretriever.types import Feedback, PoolEntry, Sample


class PromptMethods(PoolBase):
    """The methods of `Pool` about prompts."""

    def samples(self, name: str) -> list[Sample]:
        """An adapter's samples, in order."""
        with self._database.read() as session:
            found = records.samples_of(session, records.find_row(session, name))
        return [sample for sample in found if not sample.counter]

    def counter_samples(self, name: str) -> list[Sample]:
        """The prompts that an adapter must not be chosen for, in order."""
        with self._database.read() as session:
            found = records.samples_of(session, records.find_row(session, name))
        return [sample for sample in found if sample.counter]

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

    def entries(self, encoder_tag: str, names: Collection[str] | None = None) -> tuple[int, dict[str, PoolEntry]]:
        """The change number and, by name, what retrieval reads of the enabled adapters, all in one state of the pool.

        With `names` only those; one that is gone or disabled is absent.
        """
        with self._database.read() as session:
            return embeddings.load_entries(session, encoder_tag, names)

    def embeddings(self, encoder_tag: str, names: Collection[str] | None = None) -> dict[str, Vectors]:
        """For each enabled adapter whose samples are all embedded: their vectors, shape (samples, dimension)."""
        _, found = self.entries(encoder_tag, names)
        return {name: entry.vectors for name, entry in found.items() if entry.vectors is not None}

    def missing_embeddings(self, encoder_tag: str, names: Collection[str] | None = None) -> dict[str, list[Sample]]:
        """For each enabled adapter with samples or counter samples that this encoder has not embedded: those.

        With `names` only for these adapters.
        """
        with self._database.read() as session:
            found = embeddings.missing(session, encoder_tag, names)
        self._asked.ids = {name: ids for name, (ids, _) in found.items()}
        return {name: samples for name, (_, samples) in found.items()}

    def store_embeddings(self, encoder_tag: str, vectors: Mapping[str, Vectors]) -> None:
        """Store vectors for what `missing_embeddings` gave this thread, one per sample, in order.

        For an adapter that it did not give: one for each of its samples, and then of its counter samples. Samples
        that are gone since then are passed over. Vectors of a few encoders are kept.
        """
        asked: dict[str, SampleIds] = getattr(self._asked, "ids", {})
        with self._database.write() as session:
            embeddings.store(session, encoder_tag, vectors, asked)
        for name in vectors:
            asked.pop(name, None)
