from __future__ import annotations

import numpy as np
import pytest
from scipy import special

from loraretriever.retrieve.calibration import Calibration, calibrate


def synthetic(
    count: int = 3000, adapters: int = 8, factor: float = 1.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits that are `factor` times the true log-probabilities, the adapters drawn by these, and cosines."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(count, adapters))
    own = (
        (rng.random(count)[:, None] > special.softmax(logits, axis=1).cumsum(axis=1)).sum(axis=1).clip(max=adapters - 1)
    )
    cosines = 0.5 + 0.05 * rng.normal(size=(count, adapters))
    cosines[np.arange(count), own] += 0.35
    return factor * logits, own, cosines


@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
def test_the_temperature_undoes_a_factor(factor: float) -> None:
    assert calibrate(*synthetic(factor=factor)).temperature == pytest.approx(factor, rel=0.08)


def test_probabilities_are_reliable_after_it() -> None:
    logits, own, cosines = synthetic(factor=3.0)
    probabilities = special.softmax(logits / calibrate(logits, own, cosines).temperature, axis=1)
    best = probabilities.argmax(axis=1)
    assert probabilities.max(axis=1).mean() == pytest.approx((best == own).mean(), abs=0.02)


@pytest.mark.parametrize("gap", [5.0, 50.0, 5000.0])
def test_where_nothing_is_confused_the_temperature_stays_near_one(gap: float) -> None:
    own = np.arange(40) % 4
    calibration = calibrate(gap * np.eye(4)[own], own, 0.5 + 0.4 * np.eye(4)[own])
    assert 0.5 < calibration.temperature < 1.5


def test_where_everything_is_wrong_it_is_finite() -> None:
    own = np.arange(40) % 4
    calibration = calibrate(-50 * np.eye(4)[own], own, 0.9 - 0.4 * np.eye(4)[own])
    assert np.isfinite([calibration.temperature, calibration.slope, calibration.middle]).all()
    assert calibration.temperature > 1 and calibration.slope > 0


def test_fit_rises_from_nought_to_one_and_tells_the_two_apart() -> None:
    logits, own, cosines = synthetic()
    calibration = calibrate(logits, own, cosines)
    fits = calibration.fit(np.linspace(-1, 1, 201))
    assert (np.diff(fits) >= 0).all() and fits[0] >= 0 and fits[-1] <= 1
    assert calibration.fit(np.array([0.85]))[0] > 0.9 and calibration.fit(np.array([0.58]))[0] < 0.1
    assert calibration.fit(np.array(calibration.middle)) == pytest.approx(0.5)


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.25])
def test_the_threshold_is_the_quantile_of_the_left_out_samples(rate: float) -> None:
    logits, own, cosines = synthetic()
    calibration = calibrate(logits, own, cosines)
    fits = calibration.fit(cosines.max(axis=1))
    below = (fits < calibration.threshold(rate, drift=0.0)).mean()
    assert below == pytest.approx(rate, abs=1 / len(own))
    drifted = calibration.fit(cosines.max(axis=1) - 0.05)
    assert (drifted < calibration.threshold(rate, drift=0.05)).mean() == pytest.approx(rate, abs=1 / len(own))
    assert calibration.threshold(rate, 0.05) < calibration.threshold(rate, 0.0)


def test_few_samples_or_one_adapter_give_the_defaults() -> None:
    logits, own, cosines = synthetic(count=19)
    for found in (calibrate(logits, own, cosines), calibrate(np.zeros((99, 1)), np.zeros(99, int), np.zeros((99, 1)))):
        assert (found.temperature, found.slope, found.middle, found.cosines) == (1.0, 25.0, 0.66, None)
    assert 0 < Calibration().threshold(0.01, 0.07) < 0.5
