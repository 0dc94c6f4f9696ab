"""Metrics against scikit-learn, against repetition of items, and at the edges."""

import math

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)

from stethoscope.metrics import classification


def data(seed, n=300, ties=False):
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < 0.3).astype(int)
    scores = rng.normal(size=n) + labels
    if ties:
        scores = np.round(scores)
    return labels, scores, rng.integers(0, 40, n), rng.integers(0, 4, n).astype(float)


def sigmoid(scores):
    return 1 / (1 + np.exp(-scores))


def sk_fpr(labels, scores, weights):
    fpr, tpr, _ = roc_curve(labels, scores, sample_weight=weights, drop_intermediate=False)
    return fpr[tpr >= 0.95 - 1e-12].min()


def sk_recall(labels, scores, weights):
    precision, recall, _ = precision_recall_curve(labels, scores, sample_weight=weights)
    return recall[precision >= 0.6].max()


REFERENCES = {
    "auroc": (classification.auroc, lambda y, s, w: roc_auc_score(y, s, sample_weight=w)),
    "auprc": (classification.auprc, lambda y, s, w: average_precision_score(y, s, sample_weight=w)),
    "auprc of the other class": (
        lambda y, s, w: classification.auprc(y, s, w, positive=0),
        lambda y, s, w: average_precision_score(1 - y, -s, sample_weight=w),
    ),
    "fpr_at_tpr": (classification.fpr_at_tpr, sk_fpr),
    "recall_at_precision": (lambda y, s, w: classification.recall_at_precision(y, s, w, level=0.6), sk_recall),
    "brier": (
        lambda y, s, w: classification.brier(y, sigmoid(s), w),
        lambda y, s, w: brier_score_loss(y, sigmoid(s), sample_weight=w),
    ),
}


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", REFERENCES)
def test_equals_scikit_learn(name, weighted, ties):
    ours, theirs = REFERENCES[name]
    for seed in range(5):
        labels, scores, _, weights = data(seed, ties=ties)
        weights = weights if weighted else None
        assert ours(labels, scores, weights) == pytest.approx(theirs(labels, scores, weights), abs=1e-12)


ALL = {
    **{name: ours for name, (ours, _) in REFERENCES.items()},
    "within": lambda y, s, w: classification.auroc_within(y, s, data(0)[2] // 10, w),
    "ece": lambda y, s, w: classification.ece(y, sigmoid(s), w),
    "base_rate": lambda y, s, w: classification.base_rate(y, w),
}


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_a_matrix_of_weights_gives_every_row_by_itself(name, ties):
    labels, scores, _, _ = data(0, ties=ties)
    weights = np.random.default_rng(1).integers(0, 3, (7, labels.size)).astype(float)
    together = ALL[name](labels, scores, weights)
    assert together.shape == (7,)
    assert together == pytest.approx([ALL[name](labels, scores, row) for row in weights], abs=1e-12)


def test_a_weight_counts_like_repeating_the_item():
    labels, scores, positions, weights = data(3, ties=True)
    again = np.repeat(np.arange(labels.size), weights.astype(int))
    chances = sigmoid(scores)
    assert classification.auroc_within(labels, scores, positions // 10, weights) == pytest.approx(
        classification.auroc_within(labels[again], scores[again], positions[again] // 10)
    )
    assert classification.ece(labels, chances, weights) == pytest.approx(
        classification.ece(labels[again], chances[again])
    )


def test_the_auroc_within_bins_is_the_mean_of_theirs():
    labels, scores, positions, weights = data(4)
    areas, pairs = [], []
    for index in range(4):
        inside = positions // 10 == index
        areas.append(roc_auc_score(labels[inside], scores[inside], sample_weight=weights[inside]))
        pairs.append((weights * labels)[inside].sum() * (weights * (1 - labels))[inside].sum())
    assert classification.auroc_within(labels, scores, positions // 10, weights) == pytest.approx(
        np.average(areas, weights=pairs)
    )


def test_the_auroc_within_positions_takes_position_away():
    rng = np.random.default_rng(0)
    positions = rng.integers(0, 100, 5000)
    labels = (rng.random(5000) < positions / 100).astype(int)
    assert classification.auroc(labels, positions) > 0.8
    assert classification.auroc_within(labels, positions, positions) == 0.5
    # within ten positions the rate still rises, so a little of the position is left
    assert 0.5 < classification.auroc_within(labels, positions, positions // 10) < 0.6


@pytest.mark.parametrize("equal", ["width", "mass"])
def test_ece_equals_scikit_learns_curve(equal):
    labels, scores, _, _ = data(5, n=1000)
    probabilities = sigmoid(scores)
    strategy = "uniform" if equal == "width" else "quantile"
    share, mean = calibration_curve(labels, probabilities, n_bins=10, strategy=strategy)
    points = classification.reliability(labels, probabilities, equal=equal)
    assert [point["share"] for point in points] == pytest.approx(share)
    assert [point["probability"] for point in points] == pytest.approx(mean)
    sizes = [point["count"] for point in points]
    expected = np.average(np.abs(share - mean), weights=sizes)
    assert classification.ece(labels, probabilities, equal=equal) == pytest.approx(expected)


def test_probabilities_at_the_ends_have_a_bin():
    assert classification.ece([0, 1], [0.0, 1.0]) == 0
    assert classification.ece([1, 0], [0.0, 1.0]) == 1


@pytest.mark.parametrize("score", [0.0, 0.3, 1.0])
def test_constant_scores_carry_no_information(score):
    labels = np.array([0, 0, 0, 1])
    scores = np.full(4, score)
    assert classification.auroc(labels, scores) == 0.5
    assert classification.auroc_within(labels, scores, [0, 0, 0, 0]) == 0.5
    assert classification.auprc(labels, scores) == 0.25
    assert classification.auprc(labels, scores, positive=0) == 0.75
    assert classification.fpr_at_tpr(labels, scores) == 1
    assert classification.recall_at_precision(labels, scores) == 0


def test_random_scores_have_the_base_rate_as_auprc():
    rng = np.random.default_rng(0)
    labels = (rng.random(20_000) < 0.2).astype(int)
    scores = rng.random(20_000)
    rate = classification.base_rate(labels)
    assert classification.auprc(labels, scores) == pytest.approx(rate, abs=0.02)
    assert classification.auprc(labels, scores, positive=0) == pytest.approx(1 - rate, abs=0.02)
    assert 0.45 < classification.auroc(rng.permutation(labels), scores) < 0.55


RANKING = [
    classification.auroc,
    classification.auprc,
    classification.fpr_at_tpr,
    classification.recall_at_precision,
    lambda y, s: classification.auroc_within(y, s, np.zeros(len(y), int)),
]


@pytest.mark.parametrize("metric", RANKING)
@pytest.mark.parametrize("labels", [[1, 1], [0, 0], []])
def test_one_class_is_not_defined(metric, labels):
    assert math.isnan(metric(np.array(labels, int), np.linspace(0, 1, len(labels))))


@pytest.mark.parametrize("metric", [*RANKING, classification.ece, classification.brier])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_refused(metric, bad):
    with pytest.raises(ValueError, match="1 of 3 scores are not finite"):
        metric([0, 1, 1], [0.1, 0.2, bad])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 2], [0.1, 0.2]), "labels should be 0 or 1"),
        (([0, 1], [0.1]), "common dimension"),
        (([0, 1], [0.1, 0.2], [1.0]), "2 columns"),
        (([0, 1], [0.1, 0.2], [1.0, -1.0]), "not negative"),
        (([0, 1], [0.1, 0.2], [1.0, np.nan]), "finite"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        classification.auroc(*arguments)


@pytest.mark.parametrize("metric", [classification.ece, classification.brier])
def test_calibration_wants_probabilities(metric):
    with pytest.raises(ValueError, match="should be probabilities"):
        metric([0, 1], [0.5, 1.5])
