"""From scores to probabilities that can be relied on, learnt from samples that were left out one at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

Floats = NDArray[np.float64]

# Where a pool has too few samples to tell: about what the demo's pool and the paper's 48 tasks gave.
_SLOPE, _MIDDLE, _LEAST_COSINE = 25.0, 0.66, 0.65
_OFF_TOPIC = 0.1  # the share of prompts that no adapter is meant for, assumed: no pool can tell
_LEAST_SAMPLES = 20
_FIRMNESS = 20.0  # how many samples' worth the values above count


@dataclass(frozen=True, slots=True)
class Calibration:
    """How a pool's scores become probabilities.

    `temperature` divides the logits of the adapters. The probability that any adapter fits is
    1 / (1 + exp(-slope (cosine - middle))), with the cosine of the prompt and the nearest adapter's mean. `cosines`
    are those of the pool's own samples, each left out, ascending.
    """

    temperature: float = 1.0
    slope: float = _SLOPE
    middle: float = _MIDDLE
    cosines: Floats | None = None

    def fit(self, cosines: Floats | NDArray[np.float32]) -> Floats:
        """The probability that an adapter fits, from the greatest cosine."""
        return np.asarray(special.expit(self.slope * (np.asarray(cosines, dtype=np.float64) - self.middle)))

    def threshold(self, false_fallback: float, drift: float) -> float:
        """The fit below which the base model answers.

        This share of the pool's own samples, each left out, would lie below it if their cosines were all lower by
        `drift`: prompts in words of their own are further away than samples are from one another.
        """
        least = _LEAST_COSINE if self.cosines is None else float(np.quantile(self.cosines, false_fallback)) - drift
        return float(self.fit(np.array(least)))


def calibrate(logits: Floats, own: NDArray[np.int64], cosines: Floats) -> Calibration:
    """Learn from left-out samples.

    Args:
        logits: of each sample for each adapter, the sample left out. Shape: (n, adapters).
        own: each sample's adapter. Shape: (n,).
        cosines: with each adapter's mean, the sample left out. Shape: (n, adapters).

    In-pool prompts are the samples; out-of-pool ones, taken for one prompt in ten, the same samples with their own
    adapter hidden.
    """
    if len(own) < _LEAST_SAMPLES or logits.shape[1] < 2:
        return Calibration()
    rows = np.arange(len(own))
    inside = cosines.max(axis=1)
    hidden = cosines.copy()
    hidden[rows, own] = -np.inf
    slope, middle = _logistic(inside, hidden.max(axis=1))
    return Calibration(_temperature(logits, own), slope, middle, np.sort(inside))


def _temperature(logits: Floats, own: NDArray[np.int64]) -> float:
    """Minimises the negative log-likelihood, drawn towards 1: where nothing is confused, nothing can be learnt."""
    rows = np.arange(len(own))

    def loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        likelihood = scaled[rows, own] - special.logsumexp(scaled, axis=1)
        return float(-likelihood.sum() + _FIRMNESS * log_temperature**2)

    return float(np.exp(optimize.minimize_scalar(loss, bounds=(-2, 2), method="bounded").x))


def _logistic(inside: Floats, outside: Floats) -> tuple[float, float]:
    """Slope and middle of the logistic curve that tells the two apart, drawn towards the defaults."""
    values = np.concatenate([inside, outside])
    signs = np.concatenate([np.ones(len(inside)), -np.ones(len(outside))])
    weights = np.where(signs > 0, 1, _OFF_TOPIC / (1 - _OFF_TOPIC))

    def loss(parameters: Floats) -> float:
        slope, middle = np.exp(parameters[0]), parameters[1]
        likelihood = -(weights * np.logaddexp(0, -signs * slope * (values - middle))).sum()
        prior = (parameters[0] - np.log(_SLOPE)) ** 2 + ((middle - _MIDDLE) * 10) ** 2
        return float(-likelihood + _FIRMNESS * prior)

    found = optimize.minimize(loss, np.array([np.log(_SLOPE), _MIDDLE]), method="Nelder-Mead").x
    return float(np.exp(found[0])), float(found[1])
