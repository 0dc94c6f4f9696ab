"""Compiled classifiers of scikit-learn's classes: they score as the library does, and hostile arrays are refused."""

import warnings

import numpy as np
import pytest

from stethoscope.core.errors import ArtefactError
from stethoscope.detection.artifact import Arrays
from stethoscope.detection.compiled_classifiers import SKLEARN, compile_classifier, restore_classifier
from stethoscope.detection.estimators import make_estimator

SETTINGS = [
    *({"_target_": name} for name in SKLEARN),
    {"_target_": "sklearn.linear_model.LogisticRegression", "solver": "saga", "l1_ratio": 0.5, "C": 0.05},
    {"_target_": "sklearn.linear_model.SGDClassifier", "loss": "log_loss", "fit_intercept": False},
    {"_target_": "sklearn.svm.LinearSVC", "fit_intercept": False},
    {"_target_": "sklearn.svm.SVC", "kernel": "poly", "degree": 2, "coef0": 1, "gamma": 0.3},
    {"_target_": "sklearn.svm.SVC", "kernel": "sigmoid", "gamma": 0.05},
    {"_target_": "sklearn.svm.SVC", "kernel": "linear", "C": 0.1},
    {"_target_": "sklearn.neural_network.MLPClassifier", "hidden_layer_sizes": [7, 5, 3], "activation": "tanh"},
    {"_target_": "sklearn.neural_network.MLPClassifier", "hidden_layer_sizes": [4], "activation": "logistic"},
    {"_target_": "sklearn.neural_network.MLPClassifier", "activation": "identity", "alpha": 0},
    {"_target_": "sklearn.ensemble.HistGradientBoostingClassifier", "max_leaf_nodes": None, "max_iter": 20},
    {"_target_": "sklearn.ensemble.GradientBoostingClassifier", "loss": "exponential", "max_depth": 5},
    {"_target_": "sklearn.ensemble.GradientBoostingClassifier", "init": "zero", "n_estimators": 10},
    {"_target_": "sklearn.ensemble.RandomForestClassifier", "max_depth": 6, "n_estimators": 20},
]


def fitted(settings, rows=300):
    """A fitted pipeline, its compiled form, and the rows, with gaps, that it was fitted to."""
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(rows, 5))
    labels = (matrix[:, 0] + matrix[:, 1] ** 2 + rng.normal(size=rows) > 0.5).astype(int)
    matrix[rng.random(matrix.shape) < 0.1] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few rounds
        estimator = make_estimator(settings, seed=3).fit(matrix, labels)
    return estimator, compile_classifier(estimator), matrix


def ident(settings):
    return "-".join(str(value).rpartition(".")[2] for value in settings.values())


@pytest.mark.parametrize("settings", SETTINGS, ids=ident)
def test_a_compiled_classifier_scores_as_scikit_learn_does(settings):
    """Of rows it was not fitted to, with gaps too; restored from its arrays it gives the very same numbers."""
    estimator, compiled, seen = fitted(settings)
    matrix = np.vstack([seen, np.random.default_rng(1).normal(size=(1500, 5)) * 3])
    classifier, inputs = estimator[-1], estimator[:-1].transform(matrix)
    if hasattr(classifier, "decision_function"):
        expected = classifier.decision_function(inputs)
    else:
        trees = "Tree" in settings["_target_"] or "Forest" in settings["_target_"]
        least = 1e-3 if trees else 1e-12
        shares = np.clip(classifier.predict_proba(inputs)[:, 1], least, 1 - least)
        expected = np.log(shares / (1 - shares))
    scores = compiled.decision_function(matrix)
    assert scores == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert estimator.decision_function(matrix) == pytest.approx(scores, rel=0, abs=1e-12)
    again = restore_classifier(make_estimator(settings), Arrays(compiled.arrays()), 5)
    assert (again.decision_function(matrix) == scores).all()
    assert compiled.decision_function(matrix[:0]).shape == (0,)


FOREST, BOOSTING, KERNEL, NETWORK = (
    next(name for name in SKLEARN if name.endswith(end))
    for end in ("RandomForestClassifier", ".HistGradientBoostingClassifier", ".SVC", "MLPClassifier")
)


@pytest.mark.parametrize(
    ("name", "array", "change"),
    [
        (FOREST, "left", lambda array: array * 0),  # round in circles
        (FOREST, "right", lambda array: array + 1),
        (FOREST, "feature", lambda array: array + 99),
        (FOREST, "roots", lambda array: array[:0]),
        (FOREST, "value", lambda array: array + 2),
        (BOOSTING, "left", lambda array: array * 0),
        (BOOSTING, "threshold", lambda array: array * np.nan),
        (BOOSTING, "single", lambda array: array.astype(np.int64)),
        (KERNEL, "kernel", lambda array: array + 9),
        (KERNEL, "degree", lambda array: array + 99),
        (KERNEL, "vectors", lambda array: array[:, :2]),
        (NETWORK, "hidden", lambda array: array[:, :3]),
        (NETWORK, "output", lambda array: array * np.inf),
        (NETWORK, "C", lambda array: array * 0 - 1),
    ],
)
def test_numbers_that_lead_astray_are_refused(name, array, change):
    estimator, compiled, _ = fitted({"_target_": name}, rows=80)
    arrays = compiled.arrays()
    with np.errstate(invalid="ignore"), pytest.raises(ArtefactError, match=f"array '{array}|array 'right'"):
        restore_classifier(estimator, Arrays({**arrays, array: change(arrays[array])}), 5)


@pytest.mark.parametrize(
    "settings", [s for s in SETTINGS if "SVC" in s["_target_"] or "MLP" in s["_target_"]], ids=ident
)
def test_the_largest_numbers_that_a_file_may_hold_give_no_nan(settings):
    estimator, compiled, matrix = fitted(settings, rows=80)
    largest = {
        key: array if array.dtype.kind != "f" or key in ("low", "high", "C") else np.where(array < 0, -1e50, 1e50)
        for key, array in compiled.arrays().items()
    }
    scores = restore_classifier(estimator, Arrays(largest | {"scale": largest["scale"] * 1e-100}), 5)
    with np.errstate(over="ignore"):
        assert np.isfinite(scores.decision_function(np.nan_to_num(matrix) * 1e300)).all()
