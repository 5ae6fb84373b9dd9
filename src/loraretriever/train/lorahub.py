"""LoRAHub (Huang et al., arXiv 2307.13269): weights of a composition, found without gradients on a few examples."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loraretriever.errors import InvalidInputError, require_extra
from loraretriever.evaluate.tasks import Example
from loraretriever.models import BaseModel
from loraretriever.train.adapters import tokenize_example
from loraretriever.train.likelihood import Likelihood
from loraretriever.types import AdapterWeights, Mixer


@dataclass(frozen=True, slots=True)
class LoraHubSettings:
    """The published code's numbers: weights within ±`bound`, `budget` compositions tried, `l1` times mean |w|."""

    budget: int = 40
    bound: float = 1.5
    l1: float = 0.05
    seed: int = 0


@dataclass(frozen=True, slots=True)
class LoraHubResult:
    """The weights of a fusion that the search recommends, their objective, and how long it took in seconds."""

    weights: dict[str, float]
    loss: float
    seconds: float


def fit_lorahub(
    base: BaseModel, adapters: Mapping[str, AdapterWeights], examples: Sequence[Example], settings: LoraHubSettings
) -> LoraHubResult:
    """Find weights for all adapters; the search begins with none of them, all weights zero.

    Args:
        base: left as it was.
        adapters: those to be composed.
        examples: the objective is their mean cross-entropy, each example counting the same.
        settings: of the search.

    Raises:
        InvalidInputError: no adapters, or no examples.

    Semantics: argmin_w mean_x CE(x; (Σ w s B)(Σ w A)) + l1 mean_p |w_p|, |w_p| <= bound
    """
    with require_extra("evaluate"):
        import nevergrad
    if not adapters or not examples:
        raise InvalidInputError(
            f"LoRAHub was given {len(adapters)} adapters and {len(examples)} examples; expected one of each at least."
        )
    start = time.perf_counter()
    names = list(adapters)
    tokens = [tokenize_example(base.tokenizer, example) for example in examples]
    likelihood = Likelihood(base, adapters)

    def objective(weights: Sequence[float]) -> float:
        route = likelihood.route(dict(zip(names, map(float, weights), strict=True)), mixer=Mixer.PARAMETERS)
        loss = float(np.mean(likelihood.losses([(route, each) for each in tokens])))
        return loss + settings.l1 * float(np.mean(np.abs(weights)))

    try:
        space = nevergrad.p.Array(init=[0.0] * len(names), lower=-settings.bound, upper=settings.bound)
        space.random_state.seed(settings.seed)
        optimizer = nevergrad.optimizers.NGOpt(parametrization=space, budget=settings.budget)
        with warnings.catch_warnings():
            # nevergrad gives scipy's COBYLA a radius that the newer ones correct, with a warning.
            warnings.filterwarnings("ignore", "COBYLA: Invalid RHOEND", UserWarning)
            best = optimizer.minimize(objective)
        loss = objective(best.value)
    finally:
        likelihood.close()
    weights = dict(zip(names, map(float, best.value), strict=True))
    return LoraHubResult(weights, round(loss, 4), round(time.perf_counter() - start, 1))
