"""Controls for methods that say less, by hand and against scikit-learn's Poisson regression."""

import math

import numpy as np
import pytest
from sklearn.linear_model import PoissonRegressor

from stethoscope.metrics.bootstrap import group_weights
from stethoscope.metrics.caption_controls import beyond_front, expected_counts, front_band, length_adjusted


def adjusted_at(words, mentions, hallucinated, length):
    """Both forms on the original data, every answer being of another image."""
    resamples = group_weights([str(index) for index in range(len(words))], 20)
    forms = length_adjusted(words, mentions, hallucinated, length, resamples)
    assert {name: values.shape for name, values in forms.items()} == {"raw": (21,), "fitted": (21,)}
    return {name: float(values[0]) for name, values in forms.items()}


def test_chair_i_at_another_length_is_what_one_computes_by_hand():
    words = np.array([10.0, 10, 20, 20])
    hallucinated = np.array([0.0, 2, 3, 5])  # 1 at 10 words, 4 at 20: at 15, halfway in logs, 2
    mentions = np.array([3.0, 5, 16, 16])  # 4 at 10, 16 at 20: 8 at 15; 10 on average
    adjusted = adjusted_at(words, mentions, hallucinated, 15)
    assert adjusted["raw"] == pytest.approx(2 / 10, rel=1e-5)
    assert adjusted["fitted"] == pytest.approx(2 / 8, rel=1e-5)
    at_the_mean = adjusted_at(words, mentions, hallucinated, 20)
    assert at_the_mean["fitted"] == pytest.approx(4 / 16, rel=1e-5)


def test_a_length_that_no_answer_has_is_not_extrapolated_to():
    counts = np.array([1.0, 1, 2])
    assert all(map(math.isnan, adjusted_at(np.array([5.0, 6, 7]), counts, counts, 9).values()))
    assert all(map(math.isnan, adjusted_at(np.array([5.0, 6, 7]), 0 * counts, 0 * counts, 6).values()))
    assert adjusted_at(np.array([5.0, 6, 7]), counts, 0 * counts, 6) == {"raw": 0.0, "fitted": 0.0}
    same = adjusted_at(np.array([6.0, 6, 6]), 4 * counts, counts, 6)
    assert same == {"raw": pytest.approx(0.25), "fitted": pytest.approx(0.25)}


def test_recall_beyond_the_front_is_measured_at_the_same_chair_i():
    trivial = [(np.array([0.2, 0.2]), np.array([0.8, 0.8])), (np.array([0.1, np.nan]), np.array([0.5, 0.0]))]
    beyond = beyond_front(np.array([0.15, 0.1]), np.array([0.7, 0.7]), trivial)
    assert beyond == pytest.approx([0.7 - 0.65, 0.7 - 0.4])  # the second replicate: halfway to saying nothing
    assert np.isnan(beyond_front(np.array([0.3, 0.1]), np.array([0.9, 0.9]), trivial)).all()
    assert math.isnan(beyond_front(np.array([np.nan]), np.array([0.0]), [])[0])


def test_fits_of_all_resamples_are_those_of_scikit_learn():
    chance = np.random.default_rng(0)
    words = chance.integers(20, 60, 80).astype(float)
    counts = chance.poisson(np.exp(-2 + 0.05 * words)).astype(float)
    weights = chance.integers(0, 3, (4, 80)).astype(float)
    lengths, index = np.unique(words, return_inverse=True)
    answers, totals = np.zeros((2, 4, len(lengths)))
    for row in range(4):
        np.add.at(answers[row], index, weights[row])
        np.add.at(totals[row], index, weights[row] * counts)
    expected = expected_counts(lengths, answers, totals, 41.5)
    for row in range(4):
        fit = PoissonRegressor(alpha=0, solver="newton-cholesky", tol=1e-10, max_iter=1000)
        fit.fit((words[:, None] - 40) / 10, counts, weights[row])
        assert expected[row] == pytest.approx(fit.predict([[0.15]])[0], rel=1e-6)


def test_a_fit_without_a_maximum_stays_finite():
    """All that is counted is in the longest answers: the slope has no end."""
    lengths, answers = np.array([1.0, 2.0, 900.0]), np.array([[5.0, 5.0, 1.0]])
    expected = expected_counts(lengths, answers, np.array([[0.0, 0.0, 4.0]]), 450.0)
    assert expected == pytest.approx(0, abs=1e-6)
    assert expected_counts(lengths, answers, np.zeros((1, 3)), 450.0) == [0.0]


def test_the_band_of_the_front_holds_its_replicates():
    chance = np.random.default_rng(1)
    chair_i, recall = (np.r_[mean, mean + 0.02 * chance.standard_normal(400)] for mean in (0.2, 0.8))
    grid, low, high = front_band([(chair_i, recall)])
    assert grid[0] == low[0] == high[0] == 0
    assert grid[-1] == pytest.approx(0.2)
    middle = np.interp(0.1, grid, low), np.interp(0.1, grid, high)
    halves = np.sort(recall[1:] * 0.1 / chair_i[1:])
    assert middle == pytest.approx((halves[10], halves[-10]), abs=0.01)
