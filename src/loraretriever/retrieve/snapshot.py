"""The pool as the hybrid retriever sees it at one moment: immutable, made anew from the last one at each change."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from loraretriever.retrieve.block import Block, Query, Scores
from loraretriever.retrieve.encoder import Vectors
from loraretriever.retrieve.model import Member, Model, Parts, learn
from loraretriever.types import AdapterFilter

MAX_ADDED = 256  # members beside the main block; more are learnt and compiled together


@dataclass(frozen=True, slots=True, eq=False)
class Ranked:
    """All that was found for one text, best first. Shape: (found,) each."""

    text: str
    names: list[str]
    dense: NDArray[np.float64]
    sparse: NDArray[np.float64]
    penalty: NDArray[np.float64]
    logits: NDArray[np.float64]  # divided by the temperature
    probabilities: NDArray[np.float64]
    fit: float


class Snapshot:
    """A model and the members under it: those it was learnt from, and those that came since."""

    def __init__(self, model: Model | None, main: Block | None, added: Block | None, gone: frozenset[str]) -> None:
        """Use `learnt` and `changed`."""
        self._model, self._main, self._added, self._gone = model, main, added, gone

    @classmethod
    def learnt(cls, members: Sequence[Member], parts: Parts, index_folder: Path | None = None) -> Snapshot:
        """Learn from all members, in the order of their names. The index over many is kept in the folder."""
        if not members:
            return cls(None, None, None, frozenset())
        ordered = sorted(members, key=lambda member: member.name)
        model = learn(ordered, parts)
        return cls(model, Block(ordered, model, index_folder), None, frozenset())

    def changed(self, members: Mapping[str, Member], removed: Collection[str]) -> Snapshot | None:
        """The snapshot after members were added or revised, and others removed; None if all must be learnt anew."""
        if self._model is None or self._main is None:
            return None
        since = {member.name: member for member in (self._added.members if self._added else ())} | dict(members)
        since = {name: member for name, member in since.items() if name not in removed}
        gone = (self._gone | {*removed, *members}) & self._main.row.keys()
        if len(since) > MAX_ADDED or (not since and len(gone) == len(self._main.members)):
            return None
        model, main = self._model, self._main
        if since and model.head is not None:
            # The head knows nothing of what was added; until it is learnt anew, centroids speak for all alike.
            model = replace(model, head=None)
            main = Block(main.members, model)
        added = Block([since[name] for name in sorted(since)], model) if since else None
        return Snapshot(model, main, added, frozenset(gone))

    def threshold(self, false_fallback: float, drift: float) -> float:
        """The fit below which the base model answers: see `Calibration.threshold`."""
        return self._model.calibration.threshold(false_fallback, drift) if self._model else 0.0

    def rank(self, vectors: Vectors, texts: Sequence[str], wanted: AdapterFilter) -> list[Ranked]:
        """All candidates for each prompt, best first. Shape: vectors (prompts, d), rows of length 1."""
        if self._model is None or self._main is None:
            return [_nothing(text) for text in texts]
        hidden = replace(wanted, exclude=wanted.exclude | self._gone) if self._gone else wanted
        blocks = [(self._main, self._main.allowed(hidden))]
        if self._added is not None:
            blocks.append((self._added, self._added.allowed(wanted)))
        points = self._model.dense.project(vectors)
        found = []
        for position, vector in enumerate(vectors):
            query = Query(vector, points[position], self._model.weights.read(texts[position]))
            found.append(
                self._join(texts[position], [(block, block.score(query, allowed)) for block, allowed in blocks])
            )
        return found

    def whiten(self, vectors: NDArray[Any]) -> NDArray[np.float64]:
        """Into the space that the dense part searches. Shape: (n, d) -> (n, reduced); (n, 0) where nothing is learnt.

        Adapters' vectors may be placed as prompts are: without what `DenseModel.place` adds for few samples.
        """
        if self._model is None or not len(vectors):
            return np.zeros((len(vectors), self._model.dense.dimension if self._model else 0))
        return self._model.dense.project(vectors)[:, :-1].astype(np.float64)

    def term_parts(self, text: str, name: str) -> dict[int, float]:
        """What each term of a text, by its bucket, adds to the sparse part of a member's logit."""
        assert self._model is not None and self._main is not None
        block = self._added if self._added is not None and name in self._added.row else self._main
        read = self._model.weights.read(text)
        parts = block.term_parts(Query(_EMPTY32, _EMPTY32, read), block.row[name]) / self._model.calibration.temperature
        return dict(zip(read.buckets.tolist(), parts.tolist(), strict=True))

    def _join(self, text: str, parts: Sequence[tuple[Block, Scores]]) -> Ranked:
        assert self._model is not None
        calibration = self._model.calibration
        joined = np.concatenate([scores.logits for _, scores in parts]).astype(np.float64) / calibration.temperature
        if not len(joined):
            return _nothing(text)
        order = np.argsort(-joined, kind="stable")
        names = [block.members[row].name for block, scores in parts for row in scores.members]
        dense, terms, penalty = (np.concatenate([part(scores) for _, scores in parts])[order] for part in _PARTS)
        fit = float(calibration.fit(np.concatenate([scores.cosines for _, scores in parts]).max()))
        logits = joined[order]
        dense, terms, penalty = (part / calibration.temperature for part in (dense, terms, penalty))
        return Ranked(
            text, [names[i] for i in order], dense, terms, penalty, logits, fit * special.softmax(logits), fit
        )


_PARTS: tuple[Callable[[Scores], NDArray[np.float32]], ...] = (
    lambda scores: scores.dense,
    lambda scores: scores.sparse,
    lambda scores: np.broadcast_to(scores.penalty, scores.dense.shape),
)
_EMPTY, _EMPTY32 = np.zeros(0), np.zeros(0, dtype=np.float32)


def _nothing(text: str) -> Ranked:
    return Ranked(text, [], _EMPTY, _EMPTY, _EMPTY, _EMPTY, _EMPTY, 0.0)
