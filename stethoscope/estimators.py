"""What detectors and baselines share: two kinds of classifier, the choice of C, calibration on other images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, make_scorer
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_predict
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from stethoscope.errors import ConfigError, DataError
from stethoscope.metrics import Ranking

ESTIMATORS = ("logistic", "boosting")
CALIBRATIONS = ("platt", "isotonic", "none")
STRENGTHS = (0.01, 0.1, 1.0, 10.0)
INNER_FOLDS = 5
ENOUGH_IMAGES = 10  # of each class; with fewer, inner folds may lack a class and their choice would be noise


class Clip(TransformerMixin, BaseEstimator):
    """Limits every column to the range between two quantiles of the training data.

    A value far outside of what was seen (a logit-lens rank of 30,000) would otherwise decide alone. On 4,005 real
    mentions clipping at 0.1 % costs nothing (AUROC 0.871 with and without), clipping at 1 % or a quantile transform
    costs 0.2-0.4 points.
    """

    def __init__(self, quantile: float = 0.001) -> None:
        self.quantile = quantile

    def fit(self, X: np.ndarray, y: np.ndarray | None = None) -> Clip:
        """Learns the limits from (rows, columns) without NaN."""
        self.low_, self.high_ = np.quantile(X, [self.quantile, 1 - self.quantile], axis=0)
        return self

    def transform(self, X: np.ndarray) -> np.ndarray:
        """Applies them."""
        return np.clip(X, self.low_, self.high_)


def make_estimator(kind: str, seed: int = 0) -> BaseEstimator:
    """A classifier that has not been fitted.

    ``logistic``: median imputation with indicators, clipping, standardisation, L2 logistic regression without class
    weights (they would spoil the probabilities). ``boosting``: histogram gradient boosting with small trees, which
    treats missing values by itself; no early stopping, because its validation rows would not be split by image.

    Raises:
        ConfigError: the kind is unknown.
    """
    if kind == "logistic":
        return Pipeline(
            [
                ("impute", SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True)),
                ("clip", Clip()),
                ("scale", StandardScaler()),
                ("classify", LogisticRegression(max_iter=2000, random_state=seed)),
            ]
        )
    if kind == "boosting":
        return HistGradientBoostingClassifier(
            max_iter=250,
            learning_rate=0.04,
            max_leaf_nodes=8,
            min_samples_leaf=40,
            l2_regularization=5.0,
            max_features=0.3,
            early_stopping=False,
            random_state=seed,
        )
    raise ConfigError(f"estimator={kind!r} should be one of {', '.join(ESTIMATORS)}")


def _inner_folds(
    matrix: np.ndarray, labels: np.ndarray, groups: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """(train, test) indices of inner folds by image, or None if there are too few images of a class."""
    if min(len(np.unique(groups[labels == label])) for label in (0, 1)) < ENOUGH_IMAGES:
        return None
    return list(GroupKFold(INNER_FOLDS).split(matrix, labels, groups))


def choose_strength(estimator: Pipeline, matrix: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> Pipeline:
    """Sets C of a logistic pipeline to the best of ``STRENGTHS`` by log loss in inner folds by image, and fits it.

    With fewer than ``ENOUGH_IMAGES`` images of a class C stays as it is.
    """
    folds = _inner_folds(matrix, labels, groups)
    if folds is None:
        return estimator.fit(matrix, labels)
    scoring = make_scorer(log_loss, response_method="predict_proba", greater_is_better=False, labels=[0, 1])
    search = GridSearchCV(estimator, {"classify__C": STRENGTHS}, scoring=scoring, cv=folds)
    return search.fit(matrix, labels).best_estimator_


@dataclass(frozen=True)
class Examples:
    """Judged rows in the form that classifiers read.

    Attributes:
        matrix: (rows, columns) float, NaN where a value is missing.
        labels: (rows,) of 0 and 1.
        groups: (rows,) image ids.
    """

    matrix: np.ndarray
    labels: np.ndarray
    groups: np.ndarray

    def check(self, fold: str) -> None:
        """Checks that there is something to learn from.

        Raises:
            DataError: there are no rows, or all have one label.
        """
        if not len(self.labels):
            raise DataError(f"the {fold} fold has no judged mention; run the task on more samples")
        if self.labels.min() == self.labels.max():
            kind = "hallucinated" if self.labels[0] else "grounded"
            raise DataError(
                f"all {len(self.labels)} mentions of the {fold} fold are {kind}; both kinds are needed: "
                "run the task on more samples"
            )


@dataclass(frozen=True)
class CalibratedModel:
    """A fitted classifier and the map from its scores to probabilities.

    Attributes:
        model: classifier with ``decision_function`` and ``predict_proba``.
        calibrator: Platt's logistic regression or an isotonic regression of the decision function; None for the
            classifier's own probabilities.
    """

    model: BaseEstimator
    calibrator: LogisticRegression | IsotonicRegression | None = None

    @classmethod
    def fit(
        cls,
        estimator: BaseEstimator,
        train: Examples,
        calibration: Examples | None = None,
        method: Literal["platt", "isotonic", "none"] = "platt",
        strength: float | None = None,
    ) -> CalibratedModel:
        """Fits the classifier on one set of images and its calibration on another.

        Args:
            estimator: what ``make_estimator`` gives, or any pipeline that ends in a step ``classify``.
            train: what the classifier learns from.
            calibration: other images, for the calibration; without them it uses out-of-fold scores of ``train``.
            method: ``platt`` (Platt 1999, without target smoothing), ``isotonic`` or ``none``.
            strength: inverse regularisation C of a logistic regression, None to choose it.

        Raises:
            DataError: a fold has no rows or only one label.
        """
        train.check("training")
        if not isinstance(estimator, Pipeline):
            model = estimator.fit(train.matrix, train.labels)
        elif strength is None:
            model = choose_strength(estimator, train.matrix, train.labels, train.groups)
        else:
            model = estimator.set_params(classify__C=strength).fit(train.matrix, train.labels)
        if method == "none":
            return cls(model)
        if calibration is not None:
            calibration.check("calibration")
            scores, labels = model.decision_function(calibration.matrix), calibration.labels
        else:
            scores, labels = _out_of_fold(model, train), train.labels
        if method == "isotonic":
            calibrator = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(scores, labels)
        else:
            calibrator = LogisticRegression(C=1e6).fit(scores[:, None], labels)  # in effect without a penalty
        return cls(model, calibrator)

    def predict(self, matrix: np.ndarray) -> np.ndarray:
        """(rows,) probabilities of hallucination."""
        if not len(matrix):
            return np.zeros(0)
        if self.calibrator is None:
            return self.model.predict_proba(matrix)[:, 1]
        scores = self.model.decision_function(matrix)
        if isinstance(self.calibrator, IsotonicRegression):
            return self.calibrator.predict(scores).astype(np.float64)
        return self.calibrator.predict_proba(scores[:, None])[:, 1]


def _out_of_fold(model: BaseEstimator, train: Examples) -> np.ndarray:
    """(rows,) scores of copies of the classifier that were fitted without the row's image."""
    folds = _inner_folds(train.matrix, train.labels, train.groups)
    if folds is None:
        raise DataError(
            f"fewer than {ENOUGH_IMAGES} training images with mentions of each kind are too few to calibrate on; "
            "give a calibration fold, more samples or calibration=none"
        )
    return cross_val_predict(model, train.matrix, train.labels, cv=folds, method="decision_function")


def best_threshold(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The probability at or above which to warn, by the highest F1 of the hallucinated class.

    >>> best_threshold(np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.35, 0.8]))
    0.35
    """
    ranking = Ranking.of(labels, probabilities)
    flagged = ranking.true[:, 0] + ranking.false[:, 0]
    f1 = 2 * ranking.true[:, 0] / (flagged + labels.sum())
    return float(np.unique(probabilities)[::-1][np.argmax(f1)])
