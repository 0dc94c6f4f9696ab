"""Create, fit and calibrate the classifiers of detectors and baselines."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
from scipy.special import expit
from sklearn.base import BaseEstimator, clone
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline
from threadpoolctl import threadpool_limits

from stethoscope.core.errors import ConfigError, DataError
from stethoscope.detection.arrays import Arrays
from stethoscope.detection.compiled_classifiers import Classifier, compile_classifier, restore_classifier
from stethoscope.detection.estimator_classes import (
    BUILT_IN,
    GivenPipeline,
    given_pipeline,
    make_classifier,
    preparation,
)
from stethoscope.detection.inference import (
    MAX_LEAVES,
    MAX_LOG_ODDS,
    MAX_TREES,
    NEURONS,
    IsotonicSteps,
    PlattScaling,
)

CALIBRATIONS = ("platt", "isotonic", "none")
C_VALUES = (0.01, 0.1, 1.0, 10.0)
PER_HEAD_C_VALUES = (0.01, 0.03, 0.1, 0.3)
INNER_FOLDS, DRAFT_FOLDS = 5, 2
ENOUGH_IMAGES = 10  # of each class; with fewer, inner folds may lack a class and the choice of C would be noise


class Network(MLPClassifier):
    """A network of one hidden layer, fitted by L-BFGS with a deliberately limited number of steps."""

    def __init__(self, neurons: int = NEURONS, alpha: float = 10.0, max_iter: int = 200, random_state: int = 0) -> None:
        super().__init__((neurons,), solver="lbfgs", alpha=alpha, max_iter=max_iter, random_state=random_state)
        self.neurons = neurons

    def fit(self, X: np.ndarray, y: np.ndarray, sample_weight: np.ndarray | None = None) -> Network:
        """Fit on (rows, columns) without NaN."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return super().fit(X, y, sample_weight=sample_weight)

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Compute the log-odds of the second class, (rows,)."""
        hidden = np.maximum(X @ self.coefs_[0] + self.intercepts_[0], 0)
        return np.clip((hidden @ self.coefs_[1] + self.intercepts_[1])[:, 0], -MAX_LOG_ODDS, MAX_LOG_ODDS)


def make_estimator(kind: str | Mapping[str, Any], seed: int = 0) -> BaseEstimator:
    """Create an unfitted classifier.

    ``logistic``: median imputation with indicators, clipping, standardisation, L2 logistic regression without class
    weights (they would spoil the probabilities). ``boosting``: histogram gradient boosting with small trees, which
    treats missing values by itself; no early stopping, because its validation rows would not be split by image.
    ``per_head``: the inputs of ``logistic`` into a network of one hidden layer, fitted by L-BFGS with an L2 penalty,
    for tables with many columns that matter together, such as one for every attention head. On 7,211 first mentions of
    the embedded model with 118 columns, 64 of them heads, its AUROC was 0.969, against 0.965 of ``logistic``, 0.967 of
    ``boosting`` and 0.953 or less of a logistic regression on principal components. A class
    (``stethoscope.detection.estimator_classes``): the inputs of ``logistic`` into that classifier, with its settings.

    Raises:
        ConfigError: there is no such class, or it has no such setting.
    """
    if kind == "boosting":
        return HistGradientBoostingClassifier(
            max_iter=MAX_TREES,
            learning_rate=0.04,
            max_leaf_nodes=MAX_LEAVES,
            min_samples_leaf=40,
            l2_regularization=5.0,
            max_features=0.3,
            early_stopping=False,
            random_state=seed,
        )
    if kind not in BUILT_IN:
        return given_pipeline(make_classifier(kind, seed))
    logistic = LogisticRegression(max_iter=2000, random_state=seed)
    return Pipeline([*preparation(), ("classify", logistic if kind == "logistic" else Network(random_state=seed))])


def inner_folds(
    groups: np.ndarray, labels: np.ndarray, draft: bool = False
) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """Return (train, test) indices of inner folds by image, fewer for a draft; None if a class has too few images."""
    if min(len(np.unique(groups[labels == label])) for label in (0, 1)) < ENOUGH_IMAGES:
        return None
    folds = list(GroupKFold(DRAFT_FOLDS if draft else INNER_FOLDS).split(labels, labels, groups))
    return folds if all(len(np.unique(labels[train])) == 2 for train, _ in folds) else None


def set_C(estimator: BaseEstimator, C: float) -> BaseEstimator:
    """Set the inverse regularisation C, as the penalty 1 / C for a network; boosting has none.

    >>> set_C(make_estimator("per_head"), 0.1)["classify"].alpha
    10.0
    """
    if not isinstance(estimator, Pipeline) or isinstance(estimator, GivenPipeline):
        return estimator
    if isinstance(estimator[-1], Network):
        return estimator.set_params(classify__alpha=1 / C)
    return estimator.set_params(classify__C=C)


def C_choices(estimator: BaseEstimator) -> tuple[float, ...]:
    """Return the values of C to choose from; a network needs stronger regularisation than a linear model.

    >>> C_choices(make_estimator("boosting")), C_choices(make_estimator("logistic"))
    ((), (0.01, 0.1, 1.0, 10.0))
    """
    if not isinstance(estimator, Pipeline) or isinstance(estimator, GivenPipeline):
        return ()
    return PER_HEAD_C_VALUES if isinstance(estimator[-1], Network) else C_VALUES


def fit_weighted(
    estimator: BaseEstimator, matrix: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None
) -> BaseEstimator:
    """Fit a classifier, in a pipeline or not, to weighted rows."""
    if weights is None:
        return estimator.fit(matrix, labels)
    name = "classify__sample_weight" if isinstance(estimator, Pipeline) else "sample_weight"
    return estimator.fit(matrix, labels, **{name: weights})


def out_of_fold(
    estimator: BaseEstimator,
    matrix: np.ndarray,
    labels: np.ndarray,
    folds: list[tuple[np.ndarray, np.ndarray]],
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """Compute log-odds, (rows,), by copies of a classifier that were fitted without the row's image."""
    scores = np.zeros(len(labels))
    for train, test in folds:
        train_weights = None if weights is None else weights[train]
        fitted = fit_weighted(clone(estimator), matrix[train], labels[train], train_weights)
        scores[test] = fitted.decision_function(matrix[test])
    return scores


def choose_C(estimator: BaseEstimator, matrix: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> BaseEstimator:
    """Set C to the best of ``C_choices`` by log loss in inner folds by image, and fit the classifier.

    The loss has one minimum over C: behind it larger ones, whose fits take longest, are not tried. With fewer than
    ``ENOUGH_IMAGES`` images of a class C is left unchanged.
    """
    folds, choices = inner_folds(groups, labels), C_choices(estimator)
    if folds is not None and choices:
        prepare, prepared = clone(estimator)[:-1], []
        for train, test in folds:
            learned = prepare.fit_transform(matrix[train], labels[train])
            prepared.append((learned, labels[train], prepare.transform(matrix[test]), test))
        best, scores = np.inf, np.zeros(len(labels))
        for C in choices:
            for learned, known, held_out, test in prepared:
                scores[test] = set_C(clone(estimator), C)[-1].fit(learned, known).decision_function(held_out)
            loss = log_loss_of(labels, scores).mean()
            if loss >= best:
                break
            best = loss
            set_C(estimator, C)
    return estimator.fit(matrix, labels)


def log_loss_of(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Compute the negative log-likelihood, in nats, of labels under log-odds, (rows,) or (choices, rows).

    >>> log_loss_of(np.array([0, 1]), np.array([0.0, 0.0])).round(4).tolist()
    [0.6931, 0.6931]
    """
    return np.logaddexp(0, np.where(labels == 1, -scores, scores))


class GroupedEstimator(BaseEstimator):
    """A composite classifier whose ``fit`` also takes image ids, for inner folds by image."""

    def fit(self, X: np.ndarray, y: np.ndarray, groups: np.ndarray) -> GroupedEstimator:
        """Fit on (rows, columns), labels and image ids."""
        raise NotImplementedError

    def restore(self, arrays: Arrays, columns: int) -> GroupedEstimator:
        """Restore the fitted state from what ``arrays`` returned.

        Args:
            arrays: arrays of a file by name.
            columns: number of columns of the design matrix.

        Raises:
            ArtefactError: an array is missing, has another shape or type, or holds invalid numbers.
        """
        raise NotImplementedError

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the fitted state as arrays by name."""
        raise NotImplementedError

    @property
    def C_(self) -> float | None:
        """The inverse regularisation strength C that was given or chosen."""
        raise NotImplementedError


class Stacked(GroupedEstimator):
    """A classifier behind columns that another model makes of some of its inputs.

    Subclasses have ``classifier``, unfitted, and ``C``, its inverse regularisation strength or None to choose it; they
    make the columns and define ``join_inputs``.
    """

    classifier: BaseEstimator
    C: float | None
    held_out_: np.ndarray | None

    def join_inputs(self, X: np.ndarray) -> np.ndarray:
        """Build the classifier's inputs of (rows, columns)."""
        raise NotImplementedError

    def _fit_classifier(self, matrix: np.ndarray, y: np.ndarray, groups: np.ndarray) -> BaseEstimator:
        """Fit the classifier on its inputs; returns the estimator that was fitted, with its C."""
        classifier = clone(self.classifier)
        self.classifier_: Classifier | GroupedEstimator
        if isinstance(classifier, GroupedEstimator):
            self.classifier_ = classifier.fit(matrix, y, groups)
        elif self.C is None:
            self.classifier_ = compile_classifier(choose_C(classifier, matrix, y, groups))
        else:
            self.classifier_ = compile_classifier(set_C(classifier, self.C).fit(matrix, y))
        return classifier

    @property
    def C_(self) -> float | None:
        """Inverse regularisation strength C of the classifier."""
        own = self.classifier_
        return own.C_ if isinstance(own, GroupedEstimator) else own.C

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Compute the log-odds of hallucination, (rows,)."""
        return self.classifier_.decision_function(self.join_inputs(X))


def restore_estimator(estimator: BaseEstimator, arrays: Arrays, columns: int) -> Classifier | GroupedEstimator:
    """Restore the fitted form of an estimator from arrays; see ``restore_classifier``."""
    restore = estimator.restore if isinstance(estimator, GroupedEstimator) else partial(restore_classifier, estimator)
    return restore(arrays, columns)


def add_prefix(name: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Prefix the names of arrays, as ``Arrays.under`` expects them."""
    return {f"{name}.{key}": array for key, array in arrays.items()}


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

    def check(self, fold: str) -> None:
        """Check that there are rows of both labels.

        Args:
            fold: name of the fold, for messages.

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
    """A fitted classifier and the map from its scores to probabilities, both evaluated from plain arrays.

    Attributes:
        model: classifier with ``decision_function``.
        calibrator: map from scores to probabilities; None for the classifier's own.
        held_out_scores: (rows,) scores that the calibration was fitted on, of rows that the classifier was not fitted
            on; None without calibration and after loading.
    """

    model: Classifier | GroupedEstimator
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
            method: ``platt`` (Platt 1999, without target smoothing), ``isotonic`` or ``none``.
            C: inverse regularisation strength of a logistic regression or a network; None chooses it.

        Raises:
            DataError: a fold has no rows or only one label.
        """
        train.check("training")
        if isinstance(estimator, GroupedEstimator):
            model: Classifier | GroupedEstimator = estimator.fit(train.matrix, train.labels, train.groups)
        else:
            if C is None:
                estimator = choose_C(estimator, train.matrix, train.labels, train.groups)
            else:
                estimator = set_C(estimator, C).fit(train.matrix, train.labels)
            model = compile_classifier(estimator)
        if method == "none":
            return cls(model)
        if calibration is not None:
            calibration.check("calibration")
            scores, labels = model.decision_function(calibration.matrix), calibration.labels
        else:
            scores, labels = _out_of_fold_scores(estimator, train), train.labels
        if method == "isotonic":
            fitted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(scores, labels)
            return cls(model, IsotonicSteps(fitted.X_thresholds_, fitted.y_thresholds_), scores)
        fitted = LogisticRegression(C=1e6).fit(scores[:, None], labels)  # in effect without a penalty
        return cls(model, PlattScaling(float(fitted.coef_[0, 0]), float(fitted.intercept_[0])), scores)

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
        model = restore_estimator(estimator, arrays.under("model"), columns)
        kinds: dict[str, type[PlattScaling] | type[IsotonicSteps]] = {"platt": PlattScaling, "isotonic": IsotonicSteps}
        calibrator = kinds[method].restore(arrays.under("calibrator")) if method in kinds else None
        arrays.finish()
        return cls(model, calibrator)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the fitted state as arrays by name."""
        calibrator = {} if self.calibrator is None else self.calibrator.arrays()
        return {**add_prefix("model", self.model.arrays()), **add_prefix("calibrator", calibrator)}

    @property
    def C(self) -> float | None:
        """The inverse regularisation strength C that was given or chosen; None for boosting."""
        return self.model.C_ if isinstance(self.model, GroupedEstimator) else self.model.C

    def scores(self, matrix: np.ndarray) -> np.ndarray:
        """Compute the log-odds before calibration, (rows,); they depend on the training images alone."""
        return self.model.decision_function(matrix) if len(matrix) else np.zeros(0)

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


def best_threshold(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Choose the probability at or above which to warn, by the highest F1 of the hallucinated class.

    It lies halfway to the next lower probability, so that rounding cannot decide about a mention.

    Args:
        labels: (mentions,) of 0 and 1, or probabilities in their place, for the F1 that these expect.
        probabilities: (mentions,) of the detector.

    >>> round(best_threshold(np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.35, 0.8])), 3)
    0.225
    """
    values, index = np.unique(probabilities, return_inverse=True)
    flagged, wrong = np.bincount(index)[::-1].cumsum(), np.bincount(index, labels)[::-1].cumsum()
    best = int(np.argmax(2 * wrong / (flagged + labels.sum())))
    return float(values[::-1][best : best + 2].mean())
