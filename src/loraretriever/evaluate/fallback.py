"""Whether probabilities can be relied on, and whether prompts that no adapter is meant for go to the base model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loraretriever.errors import require_extra
from loraretriever.evaluate.retrieval_data import RetrievalData, TaskSamples
from loraretriever.evaluate.retrieval_methods import MemoryPool
from loraretriever.retrieve import Retriever
from loraretriever.types import Ranking

SEED = 0
FOLDS = 4
LEAST_ADAPTERS = 4  # to leave some out
BINS = 15
_FALSE_FALLBACKS = (0.0, 0.001, 0.002, 0.005, *(i / 100 for i in range(1, 21)))
_FALSE_FALLBACK = 0.05

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Adapters were left out in turn; their test prompts are off-topic then. All values are shares of prompts.

    `curve`: pairs of the share of in-pool prompts that go to the base model by mistake, and of off-topic ones that
    do rightly, for thresholds on the fit that all folds share. `default_*`: at the product's own threshold, which each
    fold learns from its samples.
    """

    auroc: float
    off_topic_to_base_at_5_percent_false_fallback: float
    default_false_fallback: float
    default_off_topic_to_base: float
    folds: int
    in_pool: int
    off_topic: int
    curve: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Calibration:
    """How far probabilities and fits can be relied on; None where there is nothing to measure it on.

    `ece`: expected calibration error of the first hit's score, in 15 bins, on the test prompts; `confidence`: the mean
    score. None for scores that are no probabilities. The score is the fit times the probability given that some
    adapter fits. As one does for every test prompt, the figures `*_given_fit` of that factor say more of it.
    `fit_auroc`, `off_topic_to_base_default`: on the off-topic prompts that were given.
    """

    ece: float | None
    confidence: float | None
    ece_given_fit: float | None
    confidence_given_fit: float | None
    fit_auroc: float | None
    false_fallback_default: float
    off_topic_to_base_default: float | None
    leave_adapters_out: LeftOut | None
    leave_domains_out: LeftOut | None


def measure(
    make: Callable[[MemoryPool], Retriever],
    data: RetrievalData,
    rankings: Sequence[Ranking],
    has_probabilities: bool,
    advance: Callable[[], None],
) -> Calibration:
    """Measure one method. Advances once per fold.

    Args:
        make: gives the retriever over a pool.
        data: samples and prompts.
        rankings: what the retriever over all adapters says of the test prompts, then of the off-topic ones.
        has_probabilities: whether the scores are meant to be probabilities.
        advance: called once per fold.
    """
    inside, outside = rankings[: len(data.prompts)], rankings[len(data.prompts) :]
    adapters, domains = (
        [_left_out(make, data, fold, advance) for fold in folds] for folds in (adapter_folds(data), domain_folds(data))
    )
    return Calibration(
        *(_reliability(inside, data.tasks) if has_probabilities else _NO_RELIABILITY),
        auroc(_fits(inside), _fits(outside)) if outside else None,
        _share_below(inside),
        _share_below(outside) if outside else None,
        _pooled(adapters),
        _pooled(domains),
    )


def adapter_folds(data: RetrievalData) -> list[frozenset[str]]:
    """Adapters to leave out in turn; none where there are too few."""
    return _folds(sorted(data.samples)) if len(data.samples) >= LEAST_ADAPTERS else []


def domain_folds(data: RetrievalData) -> list[frozenset[str]]:
    """The same by whole domains, where all adapters have one."""
    domains = sorted({samples.domain or "" for samples in data.samples.values()})
    if "" in domains or len(domains) < 2 or len(data.samples) < LEAST_ADAPTERS:
        return []
    return [
        frozenset(name for name, samples in data.samples.items() if samples.domain in fold) for fold in _folds(domains)
    ]


def auroc(inside: Floats, outside: Floats) -> float:
    """The probability that an in-pool prompt's fit is greater than an off-topic one's.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    with require_extra("evaluate"):
        from sklearn.metrics import roc_auc_score
    is_inside = np.repeat([1, 0], [len(inside), len(outside)])
    return round(float(roc_auc_score(is_inside, np.concatenate([inside, outside]))), 4)


def calibration_error(probabilities: Floats, is_right: NDArray[np.bool_]) -> float:
    """Semantics: sum over bins of equal width of (share of prompts in it) |mean probability - share that is right|."""
    bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, probabilities - is_right, BINS)
    return round(float(np.abs(gaps).sum() / len(probabilities)), 4)


_Reliability = tuple[float | None, float | None, float | None, float | None]
_NO_RELIABILITY: _Reliability = (None, None, None, None)


def _reliability(rankings: Sequence[Ranking], tasks: Sequence[str]) -> _Reliability:
    """Calibration error and mean of the first hits' scores, and of the scores given that some adapter fits."""
    first = [ranking.hits[0] for ranking in rankings]
    is_right = np.array([hit.adapter == task for hit, task in zip(first, tasks, strict=True)])
    scores = np.array([hit.score for hit in first])
    given_fit = np.minimum(scores / np.maximum(_fits(rankings), 1e-12), 1)
    return (
        calibration_error(scores, is_right),
        round(float(scores.mean()), 4),
        calibration_error(given_fit, is_right),
        round(float(given_fit.mean()), 4),
    )


def _folds(names: Sequence[str]) -> list[frozenset[str]]:
    mixed = np.random.default_rng(SEED).permutation(len(names))
    parts = np.array_split(mixed, min(FOLDS, len(names)))
    return [frozenset(names[i] for i in part) for part in parts]


@dataclass(frozen=True, slots=True)
class _Fold:
    inside: list[Ranking]
    outside: list[Ranking]


def _left_out(
    make: Callable[[MemoryPool], Retriever], data: RetrievalData, fold: frozenset[str], advance: Callable[[], None]
) -> _Fold:
    rest: Mapping[str, TaskSamples] = {name: of for name, of in data.samples.items() if name not in fold}
    rankings = make(MemoryPool(rest)).rank(data.prompts, 1)
    advance()
    pairs = list(zip(rankings, data.tasks, strict=True))
    return _Fold(
        [ranking for ranking, task in pairs if task not in fold], [ranking for ranking, task in pairs if task in fold]
    )


def _pooled(folds: Sequence[_Fold]) -> LeftOut | None:
    inside = [ranking for fold in folds for ranking in fold.inside]
    outside = [ranking for fold in folds for ranking in fold.outside]
    if not inside or not outside:
        return None
    kept, sent = _fits(inside), _fits(outside)
    return LeftOut(
        auroc(kept, sent),
        _sent_at(kept, sent, _FALSE_FALLBACK),
        _share_below(inside),
        _share_below(outside),
        len(folds),
        len(inside),
        len(outside),
        tuple((share, _sent_at(kept, sent, share)) for share in _FALSE_FALLBACKS),
    )


def _sent_at(inside: Floats, outside: Floats, false_fallback: float) -> float:
    """The share of off-topic prompts below the threshold that this share of in-pool ones is below."""
    return round(float((outside < np.quantile(inside, false_fallback)).mean()), 4)


def _fits(rankings: Sequence[Ranking]) -> Floats:
    return np.array([ranking.fit for ranking in rankings], dtype=np.float64)


def _share_below(rankings: Sequence[Ranking]) -> float:
    return round(sum(ranking.fit < ranking.threshold for ranking in rankings) / len(rankings), 4)
