"""PRR, AURC, TPR at a low FPR: against definitions item by item, repetition of items, scikit-learn, and the edges."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from stethoscope.detection.score_metrics import LabelledMentions, control_bins
from stethoscope.metrics import classification
from stethoscope.metrics.ranking import Ranking, cumulate, harmonic


def data(seed, n=60, distinct=True):
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < 0.3).astype(int)
    scores = rng.normal(size=n) + labels
    return labels, scores if distinct else np.round(scores), rng.integers(0, 4, n)


def rejection_area(uncertainty, quality):
    """lm-polygraph's ``PredictionRejectionArea`` without a limit: the most uncertain are rejected first."""
    order = np.argsort(uncertainty, kind="stable")
    cumulated = np.cumsum(np.asarray(quality, dtype=float)[order])
    return float(np.mean(cumulated / np.arange(1, len(order) + 1)))


def ratio(labels, scores):
    """The area less that of a random order, over the same of the oracle."""
    quality = 1 - np.asarray(labels)
    oracle, random = rejection_area(-quality, quality), quality.mean()
    return (rejection_area(scores, quality) - random) / (oracle - random)


@pytest.mark.parametrize("seed", range(4))
def test_prr_and_aurc_are_those_of_the_definition(seed):
    labels, scores, weights = data(seed)
    again = np.repeat(np.arange(labels.size), weights)
    risks = [labels[np.argsort(scores)][:k].mean() for k in range(1, labels.size + 1)]
    assert classification.aurc(labels, scores) == pytest.approx(np.mean(risks))
    assert classification.prr(labels, scores) == pytest.approx(ratio(labels, scores))
    assert classification.prr(labels, scores, weights) == pytest.approx(ratio(labels[again], scores[again]))


def test_ties_are_rejected_in_random_order():
    """The mean over all orders of equal scores, which the definition leaves to the sorting."""
    labels, scores = np.array([0, 1, 1, 0, 0, 1]), np.array([0.1, 0.5, 0.5, 0.5, 0.9, 0.9])
    ratios = []
    for order in itertools.permutations(range(6)):
        order = list(order)
        ratios.append(ratio(labels[order], scores[order]))
    assert classification.prr(labels, scores) == pytest.approx(np.mean(ratios))


def test_a_random_order_has_no_ratio_and_a_perfect_one_all():
    labels = np.array([0, 0, 1, 1, 0])
    assert classification.prr(labels, labels) == pytest.approx(1)
    assert classification.prr(labels, np.zeros(5)) == pytest.approx(0)
    assert classification.prr(labels, 1 - labels) < 0
    assert classification.aurc(labels, np.zeros(5)) == pytest.approx(0.4)


NEW = {
    "prr": classification.prr,
    "aurc": classification.aurc,
    "tpr_at_fpr": lambda y, s, w=None: classification.tpr_at_fpr(y, s, w, level=0.1),
}


@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("name", NEW)
def test_a_weight_counts_like_repeating_the_item(name, distinct):
    labels, scores, weights = data(5, distinct=distinct)
    again = np.repeat(np.arange(labels.size), weights)
    expected = NEW[name](labels[again], scores[again])
    assert NEW[name](labels, scores, weights) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("name", NEW)
def test_a_matrix_of_weights_gives_every_row_by_itself(name, distinct):
    labels, scores, _ = data(6, distinct=distinct)
    weights = np.random.default_rng(1).integers(0, 3, (7, labels.size)).astype(float)
    single = [NEW[name](labels, scores, row) for row in weights]
    assert NEW[name](labels, scores, weights) == pytest.approx(single, abs=1e-12)


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("labels", [[1, 1], [0, 0], []])
def test_one_class_is_not_defined(name, labels):
    assert math.isnan(NEW[name](np.array(labels, int), np.linspace(0, 1, len(labels))))


def test_weights_that_are_not_whole_lie_between_their_neighbours():
    labels, scores, _ = data(7)
    low, middle, high = (Ranking.of(labels, scores, np.full(60, w)).accuracy_kept[0] for w in (1, 1.5, 2))
    assert min(low, high) < middle < max(low, high)
    assert harmonic(np.array([9.0]))[0] == pytest.approx(sum(1 / k for k in range(1, 10)))


@pytest.mark.parametrize("level", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("distinct", [False, True])
def test_tpr_at_fpr_equals_scikit_learns_curve(level, distinct):
    labels, scores, weights = data(8, n=400, distinct=distinct)
    fpr, tpr, _ = roc_curve(labels, scores, sample_weight=weights, drop_intermediate=False)
    expected = tpr[fpr <= level + 1e-12].max()
    assert classification.tpr_at_fpr(labels, scores, weights, level) == pytest.approx(expected)


def test_within_word_auroc_compares_mentions_of_one_word():
    """The mean over words of the AUROC among their mentions, weighted by pairs."""
    labels, scores, weights = data(9, n=300)
    words = np.random.default_rng(2).choice(["cat", "dog", "kite"], 300)
    rows = pd.DataFrame({"label": labels, "token": np.arange(300), "object": words, "repeat_index": 0})
    areas, pairs = [], []
    for word in ("cat", "dog", "kite"):
        y, s, w = labels[words == word], scores[words == word], weights[words == word]
        areas.append(roc_auc_score(y, s, sample_weight=w))
        pairs.append((w * y).sum() * (w * (1 - y)).sum())
    figures = LabelledMentions.of(rows).areas(scores, weights.astype(float))
    assert figures["auroc_within_word"] == pytest.approx(np.average(areas, weights=pairs))
    assert len(np.unique(control_bins(rows)["auroc_within_word"])) == 3


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 48, 300])
def test_sums_of_blocks_are_those_of_numpy(count):
    rng = np.random.default_rng(count)
    whole, parts = rng.integers(0, 5, (320, 3)).astype(float), rng.random((320, 3))
    rows = rng.permutation(320)[:count]
    expected = [np.vstack([np.zeros((1, 3)), np.cumsum(matrix[rows], axis=0)]) for matrix in (whole, parts)]
    assert np.array_equal(cumulate(whole, rows), expected[0])
    np.testing.assert_allclose(cumulate(parts, rows), expected[1], atol=1e-12)
    assert (np.diff(cumulate(parts, rows), axis=0) >= 0).all()
