"""Scores of one answer against one reference, each between 0 and 1.

Exact match follows the paper's script: lower case, full stops removed, the reference cut at its first
blank line. ROUGE-L (F measure, no stemming) and BLEU (sentence level, exponential smoothing) come from
`rouge-score` and `sacrebleu`; the paper's script took unsmoothed BLEU over white-space tokens from nltk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from loraretriever.errors import InvalidInputError, require_extra


def exact_match(answer: str, reference: str) -> float:
    """1 if the normalised texts are equal, else 0."""
    return float(_normalise(answer) == _normalise(reference.split("\n\n")[0]))


def _normalise(text: str) -> str:
    return text.lower().replace(".", "").strip()


def rouge_l(answer: str, reference: str) -> float:
    """F measure of the longest common subsequence of words."""
    return rouge(answer, reference)[2]


def rouge(answer: str, reference: str) -> tuple[float, float, float]:
    """F measures of single words, pairs of words, and the longest common subsequence: ROUGE-1, ROUGE-2, ROUGE-L."""
    scores = _rouge_scorer().score(reference, answer)
    one, two, longest = (float(scores[kind].fmeasure) for kind in _ROUGE)
    return one, two, longest


_ROUGE = ("rouge1", "rouge2", "rougeL")


@functools.cache
def _rouge_scorer() -> Any:
    with require_extra("evaluate"):
        from rouge_score.rouge_scorer import RougeScorer
    return RougeScorer(list(_ROUGE))


def bleu(answer: str, reference: str) -> float:
    """Sentence BLEU, smoothed."""
    return float(_bleu_metric().sentence_score(answer, [reference]).score) / 100


@functools.cache
def _bleu_metric() -> Any:
    with require_extra("evaluate"):
        from sacrebleu.metrics.bleu import BLEU
    return BLEU(effective_order=True)


_METRICS: dict[str, Callable[[str, str], float]] = {"em": exact_match, "rouge": rouge_l, "bleu": bleu}


def score(metric: str, answer: str, reference: str) -> float:
    """Score of `answer` under a metric by its name in the task files (`em`, `rouge`, `bleu`)."""
    if metric not in _METRICS:
        raise InvalidInputError(f"unknown metric {metric!r}; expected one of {', '.join(_METRICS)}.")
    return _METRICS[metric](answer, reference)


def score_all(answer: str, reference: str) -> tuple[float, float, float, float, float]:
    """Exact match, ROUGE-1, ROUGE-2, ROUGE-L and BLEU of an answer, white space around it aside."""
    answer = answer.strip()
    return exact_match(answer, reference), *rouge(answer, reference), bleu(answer, reference)
