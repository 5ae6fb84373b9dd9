"""Why an adapter was found for a prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loraretriever.retrieve import sparse
from loraretriever.retrieve.encoder import Vectors
from loraretriever.retrieve.reader import Reader
from loraretriever.retrieve.snapshot import Ranked, Snapshot

_SAMPLES, _TERMS = 3, 8


@dataclass(frozen=True, slots=True)
class NearSample:
    """One of the adapter's samples and its cosine with the prompt."""

    text: str
    cosine: float


@dataclass(frozen=True, slots=True)
class TermPart:
    """A word, a pair of words or a mark of the prompt, and what it adds to the adapter's logit."""

    term: str
    part: float


@dataclass(frozen=True, slots=True)
class HitExplanation:
    """Why one adapter was found. Its logit is `dense + sparse - penalty`.

    `dense` is relative to that of the first hit, because only differences between adapters count.
    """

    adapter: str
    probability: float
    dense: float
    sparse: float
    penalty: float  # from counter samples
    samples: tuple[NearSample, ...]  # the nearest, nearest first
    terms: tuple[TermPart, ...]  # those that count most, for or against


@dataclass(frozen=True, slots=True)
class Explanation:
    """How a prompt was routed. Below `threshold` the base model answers."""

    prompt: str
    fit: float
    threshold: float
    hits: tuple[HitExplanation, ...]

    @property
    def margin(self) -> float:
        """How far the fit is from the threshold; negative: the base model answers."""
        return self.fit - self.threshold


def explain(
    prompt: str,
    vector: Vectors,
    found: Ranked,
    k: int,
    threshold: float,
    snapshot: Snapshot,
    pool: Reader,
    tag: str,
) -> Explanation:
    """Explain the k best of what was found. Shape: vector (d,), of `found.text`, of length 1."""
    names = found.names[:k]
    _, entries = pool.entries(tag, names)
    hits = []
    for place, name in enumerate(names):
        entry = entries.get(name)  # None: removed a moment ago
        near: tuple[NearSample, ...] = ()
        if entry is not None and entry.vectors is not None:
            cosines = entry.vectors @ vector
            near = tuple(NearSample(entry.texts[i], float(cosines[i])) for i in np.argsort(-cosines)[:_SAMPLES])
        hits.append(
            HitExplanation(
                name,
                float(found.probabilities[place]),
                float(found.dense[place] - found.dense[0]),
                float(found.sparse[place]),
                float(found.penalty[place]),
                near,
                _terms(found.text, snapshot.term_parts(found.text, name)),
            )
        )
    return Explanation(prompt, found.fit, threshold, tuple(hits))


def _terms(prompt: str, parts: dict[int, float]) -> tuple[TermPart, ...]:
    found = {term: parts[sparse.bucket(term)] for term in sparse.terms(prompt)}
    best = sorted(found.items(), key=lambda item: -abs(item[1]))[:_TERMS]
    return tuple(TermPart(term, part) for term, part in best if part)
