"""Retrieval where prompts are misspelt or long, samples are few, or adapters came one after the other."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from loraretriever.evaluate.retrieval_data import RetrievalData
from loraretriever.evaluate.retrieval_methods import MemoryPool
from loraretriever.retrieve import HybridRetriever, Retriever

SEED = 0
TYPO_SHARE = 0.1
CONTEXT_WORDS = 1000
SAMPLES = (1, 3, 5, 10, 20)
STEPS = 5  # of `measure`, besides one per number of samples

Make = Callable[[MemoryPool], Retriever]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Per cent of prompts whose adapter came first, or among three."""

    top1: float
    top3: float


@dataclass(frozen=True, slots=True)
class Incremental:
    """Half of the adapters, the others added one by one: before the retriever learnt anew, after it, and all at once.

    `delta_*`: before it, of the adapters that were there, and of those that were added.
    """

    at_once: Accuracy
    delta: Accuracy
    delta_first_half: Accuracy
    delta_added: Accuracy
    settled: Accuracy


@dataclass(frozen=True, slots=True)
class Robustness:
    """Accuracy on the test prompts as they are, and under each hardship. `samples_per_adapter`: the first m of each.

    The long context is generated prose of 1000 words about nothing in particular, another one for each prompt.
    """

    plain: Accuracy
    typos: Accuracy
    context_before: Accuracy
    context_after: Accuracy
    samples_per_adapter: dict[int, Accuracy]
    incremental: Incremental | None  # for retrievers that learn from all adapters together


def measure(make: Make, data: RetrievalData, advance: Callable[[], None]) -> Robustness:
    """Measure one method. Advances `steps` times.

    Args:
        make: gives the retriever over a pool.
        data: samples and prompts.
        advance: called after each measurement.
    """

    def tell(accuracy: Accuracy) -> Accuracy:
        advance()
        return accuracy

    full = make(MemoryPool(data.samples))
    typos = [with_typos(prompt, random.Random(f"{SEED} {i}")) for i, prompt in enumerate(data.prompts)]
    prose = [neutral_prose(CONTEXT_WORDS, random.Random(f"{SEED} {i}")) for i in range(len(data.prompts))]
    pairs = list(zip(prose, data.prompts, strict=True))
    plain = tell(_accuracy(full, data.prompts, data.tasks))
    return Robustness(
        plain,
        tell(_accuracy(full, typos, data.tasks)),
        tell(_accuracy(full, [f"{context}\n\n{prompt}" for context, prompt in pairs], data.tasks)),
        tell(_accuracy(full, [f"{prompt}\n\n{context}" for context, prompt in pairs], data.tasks)),
        {m: tell(_accuracy(make(_first(data, m)), data.prompts, data.tasks)) for m in _counts(data)},
        _incremental(make, data, plain, advance),
    )


def steps(data: RetrievalData) -> int:
    """How often `measure` advances."""
    return STEPS + len(_counts(data))


def with_typos(text: str, rng: random.Random) -> str:
    """In a tenth of the words two neighbouring characters swapped, or a character dropped or doubled."""
    pieces = []
    for word in text.split(" "):
        pieces.append(_misspelt(word, rng) if len(word) > 1 and rng.random() < TYPO_SHARE else word)
    return " ".join(pieces)


def _misspelt(word: str, rng: random.Random) -> str:
    place = rng.randrange(len(word) - 1)
    one, two = word[place], word[place + 1]
    new = rng.choice((two + one, two, one + one + two))
    return word[:place] + new + word[place + 2 :]


_WHO = ("gardener", "neighbour", "captain", "teacher", "baker", "painter", "traveller", "clerk", "farmer", "musician")
_HOW = ("old", "quiet", "tall", "patient", "curious", "tired", "cheerful", "young", "careful", "absent-minded")
_DID = ("walked past", "looked at", "remembered", "waited near", "talked about", "painted", "repaired", "found")
_WHAT = ("bridge", "garden", "lamp", "window", "harbour", "letter", "train", "staircase", "market", "clock", "boat")
_WHEN = ("in the morning", "after the rain", "late in the evening", "on a cold day", "before lunch", "last summer")


def neutral_prose(words: int, rng: random.Random) -> str:
    """Sentences about nothing in particular, of so many words at least."""
    sentences: list[str] = []
    count = 0
    while count < words:
        how, who, did, what = (rng.choice(of) for of in (_HOW, _WHO, _DID, _WHAT))
        sentence = f"The {how} {who} {did} the {rng.choice(_HOW)} {what} {rng.choice(_WHEN)}."
        sentences.append(sentence)
        count += len(sentence.split())
    return " ".join(sentences)


def _counts(data: RetrievalData) -> list[int]:
    """Numbers of samples that some adapter has."""
    most = max(len(samples.texts) for samples in data.samples.values())
    return [m for m in SAMPLES if m <= most]


def _first(data: RetrievalData, m: int) -> MemoryPool:
    return MemoryPool({name: replace(samples, texts=samples.texts[:m]) for name, samples in data.samples.items()})


def _incremental(make: Make, data: RetrievalData, at_once: Accuracy, advance: Callable[[], None]) -> Incremental | None:
    names = sorted(data.samples)
    mixed = [names[i] for i in np.random.default_rng(SEED).permutation(len(names))]
    first, added = mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :]
    pool = MemoryPool({name: data.samples[name] for name in first})
    retriever = make(pool)
    if not isinstance(retriever, HybridRetriever) or not first:
        advance()
        return None
    retriever.rank(data.prompts[:1], 1)  # learns from the first half
    for name in added:
        pool.add(name, data.samples[name])
    # One call keeps the state that it began with, whatever is learnt meanwhile.
    hits = _ranked(retriever, data.prompts)
    delta, halves = _share(hits, data.tasks), []
    for half in (first, added):
        pairs = [(names, task) for names, task in zip(hits, data.tasks, strict=True) if task in set(half)]
        halves.append(_share([names for names, _ in pairs], [task for _, task in pairs]))
    retriever.settle()
    settled = _accuracy(retriever, data.prompts, data.tasks)
    advance()
    return Incremental(at_once, delta, halves[0], halves[1], settled)


def _accuracy(retriever: Retriever, prompts: Sequence[str], tasks: Sequence[str]) -> Accuracy:
    return _share(_ranked(retriever, prompts), tasks)


def _ranked(retriever: Retriever, prompts: Sequence[str]) -> list[list[str]]:
    return [[hit.adapter for hit in ranking.hits] for ranking in retriever.rank(prompts, 3)]


def _share(ranked: Sequence[Sequence[str]], tasks: Sequence[str]) -> Accuracy:
    top1, top3 = (
        round(100 * sum(task in names[:k] for names, task in zip(ranked, tasks, strict=True)) / max(len(tasks), 1), 1)
        for k in (1, 3)
    )
    return Accuracy(top1, top3)
