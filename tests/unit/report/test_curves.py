"""Curves against scikit-learn, bins against their mentions."""

import numpy as np
import pytest
from helpers.token_tables import token_table
from sklearn import metrics as sklearn

from stethoscope.core.token_table import mention_rows
from stethoscope.report import curves


@pytest.fixture(scope="module")
def rows():
    """Mentions with probabilities, some of them equal."""
    table = mention_rows(token_table(150, seed=1))
    return table.assign(probability=(1 / (1 + np.exp(-table["nll"]))).round(2))


def test_areas_under_the_curves_are_scikit_learns(rows):
    labels, scores = rows["label"].to_numpy(), rows["probability"].to_numpy()
    false, true = curves.roc(labels, scores)
    assert np.trapezoid(true, false) == pytest.approx(sklearn.roc_auc_score(labels, scores))
    recall, precision = curves.precision_recall(labels, scores)
    area = np.sum(np.diff(recall, prepend=0) * precision)
    assert area == pytest.approx(sklearn.average_precision_score(labels, scores))


def test_a_long_curve_keeps_its_ends():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 5000), rng.random(5000)
    x, y = curves.roc(labels, scores)
    assert len(x) == curves.POINTS
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(y, x) == pytest.approx(sklearn.roc_auc_score(labels, scores), abs=0.005)


def test_bins_hold_every_mention_once(rows):
    positions, bins = curves.by_position(rows), curves.reliability(rows)
    for groups in (positions, bins):
        assert sum(group.mentions for group in groups) == len(rows)
        assert sum(group.hallucinated for group in groups) == rows["label"].sum()
    part = rows[rows["token"] // 10 == 1]
    second = next(group for group in positions if group.name == "10–19")
    assert second.interval.value == pytest.approx(sklearn.roc_auc_score(part["label"], part["probability"]))
    assert second.interval.low < second.interval.value < second.interval.high
    for group in bins:
        low = float(group.name[:3])
        inside = rows[(rows["probability"] >= low - 1e-9) & (rows["probability"] < low + 0.1 - 1e-9)]
        assert group.mentions == len(inside)
        assert group.interval.value == pytest.approx(inside["label"].mean())


def test_a_bin_of_one_kind_has_no_area_and_long_answers_wider_bins(rows):
    faithful = rows.assign(label=0)
    assert all(group.interval is None for group in curves.by_position(faithful))
    wide = curves.by_position(rows.assign(token=rows["token"] * 50))
    assert len(wide) <= curves.MOST_BINS
    assert wide[0].name == "90–179"  # the first mentions are at 150
