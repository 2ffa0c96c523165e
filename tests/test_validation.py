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
    scores = {}
    fitted = train.fit_temperature(ANSWERS, LABELS)
    for temperature in (fitted, *np.arange(0.1, 10, 0.01)):
        powers = ANSWERS ** (1 / temperature)
        expected = powers / powers.sum(axis=1, keepdims=True)
        found = train.apply_temperature(ANSWERS, temperature)
        np.testing.assert_allclose(found, expected)
        scores[temperature] = ((expected - np.eye(6)[LABELS]) ** 2).sum()
    _, *grid = scores
    assert scores[fitted] == min(scores.values())
    assert fitted == pytest.approx(min(grid, key=scores.get), abs=0.01)


def test_changes_are_means_and_their_standard_errors() -> None:
    surer = train.apply_temperature(ANSWERS, 0.5)  # which is calibrated away
    unchanged = validation.compare(surer, ANSWERS, LABELS)
    np.testing.assert_allclose(unchanged, 0, atol=1e-5)
    worse = ANSWERS.copy()
    worse[:50] = np.roll(ANSWERS[:50], 1, axis=1)
    (accuracy, loss), (spread, _) = validation.compare(worse, ANSWERS, LABELS)
    right = [(p.argmax(axis=1) == LABELS).astype(int) for p in (worse, ANSWERS)]
    lost = right[0] - right[1]
    assert accuracy == pytest.approx(lost.mean())
    assert accuracy < 0 < loss
    variance = sum((lost - accuracy) ** 2) / 499
    assert spread == pytest.approx((variance / 500) ** 0.5)
