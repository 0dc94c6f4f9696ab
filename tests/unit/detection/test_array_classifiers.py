"""Compiled classifiers say what scikit-learn's say, whose trees and layers they were made from."""

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression

from stethoscope.detection.calibrated_model import CalibratedModel, Examples
from stethoscope.detection.compiled_classifiers import compile_classifier
from stethoscope.detection.estimators import make_estimator, set_C


def drawn(seed, rows=600, columns=5, gaps=0.2):
    """(rows, columns) with gaps in all columns but the first, and labels that depend on values and on gaps."""
    random = np.random.default_rng(seed)
    X = random.normal(size=(rows, columns))
    labels = (X[:, 0] + X[:, 1] * X[:, 2] + 0.5 * random.normal(size=rows) > 0).astype(int)
    hidden = random.random(size=X.shape) < gaps
    hidden[:, 0] = False
    labels[hidden[:, 3]] = 1  # so that trees split gaps off
    return np.where(hidden, np.nan, X), labels


@pytest.mark.parametrize("kind", ["logistic", "per_head", "boosting"])
@pytest.mark.parametrize("gaps", [0.0, 0.2])
def test_it_is_the_estimator(kind, gaps):
    X, labels = drawn(0, gaps=gaps)
    estimator = set_C(make_estimator(kind), 0.1).fit(X, labels)
    compiled = compile_classifier(estimator)
    for rows in (X, drawn(1, 3000)[0], X[:1], X[:0], np.full((2, 5), np.nan)):
        expected = estimator.decision_function(rows) if len(rows) else np.zeros(0)
        assert compiled.decision_function(rows) == pytest.approx(expected, rel=0, abs=1e-12)


def test_values_on_a_limit_and_beyond_every_one_go_where_the_trees_send_them():
    X, labels = drawn(2)
    labels = np.where(labels, np.isnan(X[:, 3]), np.isnan(X[:, 4])).astype(int)
    estimator = make_estimator("boosting").fit(np.round(X, 1), labels)
    compiled = compile_classifier(estimator)
    limits = np.concatenate([tree.nodes["num_threshold"] for (tree,) in estimator._predictors])
    values = np.unique(np.concatenate([limits[np.isfinite(limits)], np.nextafter(limits[np.isfinite(limits)], 9)]))
    rows = np.random.default_rng(0).choice(np.concatenate([values, [-1e300, 1e300]]), size=(4000, 5))
    assert np.isinf(limits).any(), "a split between gaps and all values"
    assert compiled.decision_function(rows) == pytest.approx(estimator.decision_function(rows), rel=0, abs=1e-12)


def test_few_rows_make_trees_of_a_single_leaf():
    X, labels = drawn(3, rows=20)
    estimator = make_estimator("boosting").fit(X, labels)
    assert compile_classifier(estimator).decision_function(X) == pytest.approx(estimator.decision_function(X))


def test_isotonic_steps_are_those_of_the_regression():
    X, labels = drawn(4)
    examples = Examples(X[:300], labels[:300], np.arange(300)), Examples(X[300:], labels[300:], np.arange(300, 600))
    fitted = CalibratedModel.fit(make_estimator("logistic"), *examples, method="isotonic", C=1.0)
    scores = np.linspace(-9, 9, 1001)
    regression = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(fitted.held_out_scores, labels[300:])
    assert fitted.calibrate(scores) == pytest.approx(regression.predict(scores), rel=0, abs=1e-12)
