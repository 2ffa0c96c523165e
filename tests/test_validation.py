"""Temperatures and differences between models are those of a slow, plain calculation.

The references: a grid of temperatures, and probabilities that were cooled on purpose.
"""

import numpy as np
import pytest
import validation

import train

RANDOM = np.random.default_rng(1)
LABELS = RANDOM.integers(6, size=500)
LOGITS = RANDOM.normal(size=(500, 6)) + 2 * np.eye(6)[LABELS]
ANSWERS = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)


def test_no_temperature_of_a_grid_is_better() -> None:
    def brier_score(temperature: float) -> float:
        errors = train.apply_temperature(ANSWERS, temperature) - np.eye(6)[LABELS]
        return (errors**2).sum() / 500

    best = train.fit_temperature(ANSWERS, LABELS)
    grid = [brier_score(t) for t in np.arange(0.1, 10, 0.01)]
    assert brier_score(best) <= min(grid)
    assert best == pytest.approx(0.1 + 0.01 * np.argmin(grid), abs=0.01)


def test_a_temperature_changes_only_confidence() -> None:
    powers = ANSWERS**0.5
    expected = powers / powers.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(train.apply_temperature(ANSWERS, 2), expected)


def test_confidence_alone_is_no_change() -> None:
    surer = train.apply_temperature(ANSWERS, 0.5)
    changes, errors = validation.compare(surer, ANSWERS, LABELS)
    np.testing.assert_allclose([*changes, *errors], 0, atol=1e-5)


def test_changes_are_means_and_their_standard_errors() -> None:
    worse = ANSWERS.copy()
    worse[:50] = np.roll(ANSWERS[:50], 1, axis=1)
    (accuracy, loss), (spread, _) = validation.compare(worse, ANSWERS, LABELS)
    right = [(p.argmax(axis=1) == LABELS).astype(int) for p in (worse, ANSWERS)]
    lost = right[0] - right[1]
    assert accuracy == pytest.approx(lost.mean())
    assert accuracy < 0 < loss
    variance = sum((lost - accuracy) ** 2) / 499
    assert spread == pytest.approx((variance / 500) ** 0.5)
