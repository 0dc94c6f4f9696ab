"""Fit a classifier on some images and calibrate it on others: labelled rows in, probabilities out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy.special import expit
from sklearn.base import BaseEstimator, clone
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from stethoscope.core.errors import ConfigError, DataError
from stethoscope.core.token_table import require
from stethoscope.detection.array_classifiers import IsotonicSteps, PlattScaling
from stethoscope.detection.artifact import Arrays
from stethoscope.detection.compiled_classifiers import Classifier, compile_classifier
from stethoscope.detection.estimators import (
    ENOUGH_IMAGES,
    GroupedEstimator,
    add_prefix,
    choose_C,
    inner_folds,
    out_of_fold,
    restore_estimator,
    set_C,
)

if TYPE_CHECKING:
    import pandas as pd

CALIBRATIONS = ("platt", "isotonic", "none")


@dataclass(frozen=True)
class Examples:
    """Labelled rows in the form that classifiers read.

    Attributes:
        matrix: (rows, columns) float, NaN where a value is missing.
        labels: (rows,) of 0 and 1.
        groups: (rows,) image ids.
    """

    matrix: np.ndarray
    labels: np.ndarray
    groups: np.ndarray

    @classmethod
    def of(cls, matrix: np.ndarray, rows: pd.DataFrame) -> Examples:
        """Join (rows, columns) inputs with the labels and images of as many rows of a token table."""
        require(rows, ("label", "group"))
        return cls(matrix, rows["label"].to_numpy(dtype=int), rows["group"].to_numpy(dtype=str))

    def select(self, rows: np.ndarray) -> Examples:
        """Select rows by a mask or by indices."""
        return Examples(self.matrix[rows], self.labels[rows], self.groups[rows])


def check_labels(labels: np.ndarray, fold: str) -> None:
    """Check that both labels occur.

    Args:
        labels: (rows,) of 0 and 1.
        fold: name of the fold, for messages.

    Raises:
        DataError: there are no rows, or all have one label.
    """
    if not len(labels):
        raise DataError(f"the {fold} fold has no judged mention; run the task on more samples")
    if labels.min() == labels.max():
        kind = "hallucinated" if labels[0] else "grounded"
        raise DataError(
            f"all {len(labels)} mentions of the {fold} fold are {kind}; both kinds are needed: "
            "run the task on more samples"
        )


def fit_platt(scores: np.ndarray, labels: np.ndarray) -> PlattScaling:
    """Fit the line from (rows,) scores to log-odds of (rows,) labels of 0 and 1, without target smoothing.

    Source: Platt 1999.
    """
    fitted = LogisticRegression(C=1e6).fit(scores[:, None], labels)  # in effect without a penalty
    return PlattScaling(float(fitted.coef_[0, 0]), float(fitted.intercept_[0]))


@dataclass(frozen=True)
class CalibratedModel:
    """A fitted classifier and the map from its scores to probabilities, both evaluated from plain arrays.

    Attributes:
        classifier: fitted, with ``decision_function``.
        calibrator: map from scores to probabilities; None for the classifier's own.
        held_out_scores: (rows,) scores that the calibration was fitted on, of rows that the classifier was not fitted
            on; None without calibration and after loading.
    """

    classifier: Classifier | GroupedEstimator
    calibrator: PlattScaling | IsotonicSteps | None = None
    held_out_scores: np.ndarray | None = field(default=None, repr=False, compare=False)

    @classmethod
    @threadpool_limits.wrap(limits=1, user_api="blas")  # the matrices are small: threads would only wait for each other
    def fit(
        cls,
        estimator: BaseEstimator,
        train: Examples,
        calibration: Examples | None = None,
        method: Literal["platt", "isotonic", "none"] = "platt",
        C: float | None = None,
    ) -> CalibratedModel:
        """Fit the classifier on one set of images and its calibration on another.

        Args:
            estimator: result of ``make_estimator``, or any pipeline that ends in a step ``classify``.
            train: examples to fit the classifier on.
            calibration: examples of other images to calibrate on; None uses out-of-fold scores of ``train``.
            method: one of ``CALIBRATIONS``; see ``fit_platt``.
            C: inverse regularisation strength of a logistic regression or a network; None chooses it.

        Raises:
            DataError: a fold has no rows or only one label.
        """
        check_labels(train.labels, "training")
        if isinstance(estimator, GroupedEstimator):
            classifier: Classifier | GroupedEstimator = estimator.fit(train.matrix, train.labels, train.groups)
        else:
            if C is None:
                estimator = choose_C(estimator, train.matrix, train.labels, train.groups)
            else:
                estimator = set_C(estimator, C).fit(train.matrix, train.labels)
            classifier = compile_classifier(estimator)
        if method == "none":
            return cls(classifier)
        if calibration is not None:
            check_labels(calibration.labels, "calibration")
            scores, labels = classifier.decision_function(calibration.matrix), calibration.labels
        else:
            scores, labels = _out_of_fold_scores(estimator, train), train.labels
        if method == "isotonic":
            fitted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(scores, labels)
            return cls(classifier, IsotonicSteps(fitted.X_thresholds_, fitted.y_thresholds_), scores)
        return cls(classifier, fit_platt(scores, labels), scores)

    @classmethod
    def restore(cls, estimator: BaseEstimator, method: str, arrays: Arrays, columns: int) -> CalibratedModel:
        """Restore a model from what ``arrays`` returned.

        Args:
            estimator: unfitted estimator of the same kind.
            method: its calibration.
            arrays: arrays of a file by name.
            columns: number of columns of the design matrix.

        Raises:
            ArtefactError: an array is missing, not needed, has another shape or type, or holds
                invalid numbers.
        """
        classifier = restore_estimator(estimator, arrays.under("model"), columns)
        kinds: dict[str, type[PlattScaling] | type[IsotonicSteps]] = {"platt": PlattScaling, "isotonic": IsotonicSteps}
        calibrator = kinds[method].restore(arrays.under("calibrator")) if method in kinds else None
        arrays.finish()
        return cls(classifier, calibrator)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the fitted state as arrays by name."""
        calibrator = {} if self.calibrator is None else self.calibrator.arrays()
        return {**add_prefix("model", self.classifier.arrays()), **add_prefix("calibrator", calibrator)}

    @property
    def C(self) -> float | None:
        """The inverse regularisation strength C that was given or chosen; None for boosting."""
        return self.classifier.C_ if isinstance(self.classifier, GroupedEstimator) else self.classifier.C

    def scores(self, matrix: np.ndarray) -> np.ndarray:
        """Compute the log-odds before calibration, (rows,); they depend on the training images alone."""
        return self.classifier.decision_function(matrix) if len(matrix) else np.zeros(0)

    def calibrate(self, scores: np.ndarray) -> np.ndarray:
        """Map scores to probabilities, (rows,)."""
        if not len(scores):
            return np.zeros(0)
        if isinstance(self.calibrator, IsotonicSteps):
            return self.calibrator.predict(scores)
        slope, intercept = self.line
        return expit(slope * scores + intercept)

    @property
    def line(self) -> tuple[float, float]:
        """Slope and intercept from the scores to calibrated log-odds; 1 and 0 without calibration.

        Raises:
            ConfigError: the calibration is isotonic, which is no line.
        """
        if self.calibrator is None:
            return 1.0, 0.0
        if isinstance(self.calibrator, IsotonicSteps):
            raise ConfigError("isotonic calibration has no slope; use detector.calibration=platt or none")
        return self.calibrator.slope, self.calibrator.intercept

    def predict(self, matrix: np.ndarray) -> np.ndarray:
        """Compute the probability of hallucination, (rows,) in [0, 1]."""
        return self.calibrate(self.scores(matrix))


def _out_of_fold_scores(estimator: BaseEstimator, train: Examples) -> np.ndarray:
    """Compute scores, (rows,), by copies of an estimator that were fitted without the row's image."""
    folds = inner_folds(train.groups, train.labels)
    if folds is None:
        raise DataError(
            f"fewer than {ENOUGH_IMAGES} training images with mentions of each kind are too few to calibrate on; "
            "give a calibration fold, more samples or calibration=none"
        )
    made_in_fit: np.ndarray | None = getattr(estimator, "held_out_", None)
    if made_in_fit is not None:
        return made_in_fit
    if not isinstance(estimator, GroupedEstimator):
        return out_of_fold(estimator, train.matrix, train.labels, folds)
    scores = np.zeros(len(train.labels))
    for learn, test in folds:
        fitted = clone(estimator).fit(train.matrix[learn], train.labels[learn], train.groups[learn])
        scores[test] = fitted.decision_function(train.matrix[test])
    return scores
