"""What answers a server may give while its adapters change: references by the engine alone, and which of them hold."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from loraretriever.pipeline import LoraRetriever
from loraretriever.types import Sampling, TokenLogprob

# Where the two best tokens' log-probabilities are nearer than this, rounding may choose the other one; and so much may
# a token's log-probability differ from the reference's.
TOLERANCE = 0.01
_MOST_CHOICES = 64  # of contents for one composition


@dataclass(frozen=True, slots=True)
class Mix:
    """A composition by contents of adapters instead of names: one that stands there twice has the sum of its weights.

    A single one of weight 1 is the same in every strategy, and has none here; so has the base model.
    """

    strategy: str
    parts: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, strategy: str, parts: Iterable[tuple[str, float]]) -> Mix:
        """Of contents with weights, in any order."""
        weights: dict[str, float] = {}
        for content, weight in parts:
            weights[content] = weights.get(content, 0.0) + weight
        found = tuple(sorted((content, round(weight, 6)) for content, weight in weights.items()))
        return cls("" if not found or (len(found) == 1 and found[0][1] == 1) else strategy, found)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server, or the engine, answered. `tokens` is empty where log-probabilities were not asked for."""

    text: str
    finish_reason: str
    tokens: tuple[TokenLogprob, ...] = ()
    strategy: str = ""
    adapters: tuple[tuple[str, float], ...] = ()


class References:
    """The engine's answers, by mix and prompt."""

    def __init__(self) -> None:
        self._answers: dict[tuple[Mix, str], Answer] = {}
        self.greatest_difference = 0.0  # of log-probabilities, among answers that were accepted

    def make(self, retriever: LoraRetriever, mixes: Iterable[Mix], prompts: Sequence[str], max_tokens: int) -> None:
        """Let the engine alone answer all prompts by all mixes, greedily. Its pool's adapters are the contents."""
        sampling = Sampling(max_tokens=max_tokens, logprobs=2)
        for mix in mixes:
            completions = retriever.generate(
                prompts, adapters=dict(mix.parts), strategy=mix.strategy or None, sampling=sampling
            )
            for prompt, each in zip(prompts, completions, strict=True):
                self._answers[mix, prompt] = Answer(each.text, each.finish_reason, each.logprobs)

    def __len__(self) -> int:
        return len(self._answers)

    def indistinct(self) -> int:
        """How many pairs of references to one prompt could be taken for each other: for these nothing is tested."""
        by_prompt: dict[str, list[Answer]] = {}
        for (_, prompt), answer in self._answers.items():
            by_prompt.setdefault(prompt, []).append(answer)
        pairs = itertools.chain.from_iterable(itertools.combinations(each, 2) for each in by_prompt.values())
        return sum(_compare(one, other) is not None for one, other in pairs)

    def judge(self, answer: Answer, prompt: str, mixes: Iterable[Mix]) -> str:
        """`ok`: the answer is that of one of the mixes; `rounding`: it is up to a near tie; `wrong`: it is of none."""
        best = None
        for mix in mixes:
            reference = self._answers.get((mix, prompt))
            difference = None if reference is None else _compare(answer, reference)
            if difference is not None and (best is None or difference < best):
                best = difference
        if best is None:
            return "wrong"
        if math.isinf(best):
            return "rounding"
        self.greatest_difference = max(self.greatest_difference, best)
        return "ok"


def _compare(answer: Answer, reference: Answer) -> float | None:
    """The greatest difference of log-probabilities; infinite when they part at a near tie; None: they differ."""
    greatest = 0.0
    if not answer.tokens:
        if answer.text == reference.text and answer.finish_reason == reference.finish_reason:
            return greatest
        return math.inf if _parts_at_tie(answer.text, reference.tokens) else None
    for token, expected in zip(answer.tokens, reference.tokens, strict=False):
        if token.text != expected.text:
            ties = (each for each in _ties(expected) if each.text == token.text)
            return math.inf if any(abs(each.logprob - token.logprob) <= TOLERANCE for each in ties) else None
        greatest = max(greatest, abs(token.logprob - expected.logprob))
        if greatest > TOLERANCE:
            return None
    same = len(answer.tokens) == len(reference.tokens) and answer.finish_reason == reference.finish_reason
    return greatest if same and answer.text == reference.text else None


def _ties(token: TokenLogprob) -> list[TokenLogprob]:
    """The other tokens that rounding could have chosen."""
    return [each for each in token.top if each.token != token.token and token.logprob - each.logprob < TOLERANCE]


def _parts_at_tie(text: str, tokens: Sequence[TokenLogprob]) -> bool:
    before = ""
    for token in tokens:
        if any(text.startswith(before + other.text) for other in _ties(token)):
            return True
        before += token.text
        if not text.startswith(before):
            return False
    return False


@dataclass(slots=True)
class _Era:
    """A time in which a name had a content (None: there was no such adapter); it may have been shorter at both ends."""

    content: str | None
    since: float
    until: float = math.inf


@dataclass(slots=True)
class Change:
    """A change that was asked for, and may be in effect."""

    eras: list[_Era]
    era: _Era

    def succeeded(self) -> None:
        """It was answered: what was before is over."""
        for era in self.eras:
            if era is not self.era:
                era.until = min(era.until, time.perf_counter())

    def failed(self) -> None:
        """It was refused, and has not been in effect."""
        self.eras.remove(self.era)


@dataclass(slots=True)
class History:
    """Which content each name had when. A change takes effect somewhen between its request and its answer."""

    _eras: dict[str, list[_Era]] = field(default_factory=dict)

    @classmethod
    def of(cls, contents: Mapping[str, str | None]) -> History:
        """What the names have had from the beginning."""
        return cls({name: [_Era(content, -math.inf)] for name, content in contents.items()})

    def change(self, name: str, content: str | None) -> Change:
        """This is being asked for now. One change of a name at a time."""
        era = _Era(content, time.perf_counter())
        eras = self._eras[name]
        eras.append(era)
        return Change(eras, era)

    def contents(self, name: str, start: float, end: float) -> set[str | None]:
        """What the name may have meant at some moment between the two. Times are those of `time.perf_counter`."""
        eras = self._eras.get(name, [_Era(None, -math.inf)])
        return {era.content for era in eras if era.since <= end and era.until >= start}

    @property
    def names(self) -> list[str]:
        """All that are ever used."""
        return list(self._eras)

    def latest(self, name: str) -> str | None:
        """What the last change asked for."""
        return self._eras[name][-1].content

    def mixes(self, strategy: str, adapters: Sequence[tuple[str, float]], start: float, end: float) -> list[Mix]:
        """All mixes that a composition may have meant; none where an adapter was never there."""
        choices = [
            [(content, weight) for content in self.contents(name, start, end) if content is not None]
            for name, weight in adapters
        ]
        combinations = itertools.islice(itertools.product(*choices), _MOST_CHOICES)
        return list({Mix.of(strategy, parts) for parts in combinations})
