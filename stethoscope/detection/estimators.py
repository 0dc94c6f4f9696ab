"""Create the classifiers of detectors and baselines, choose their regularisation, and fit them in folds by image."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
from sklearn.base import BaseEstimator, clone
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline

from stethoscope.detection.array_classifiers import MAX_LEAVES, MAX_LOG_ODDS, MAX_TREES, NEURONS
from stethoscope.detection.artifact import Arrays
from stethoscope.detection.compiled_classifiers import Classifier, compile_classifier, restore_classifier
from stethoscope.detection.estimator_classes import (
    BUILT_IN,
    GivenPipeline,
    given_pipeline,
    make_classifier,
    preparation,
)

C_VALUES = (0.01, 0.1, 1.0, 10.0)
PER_HEAD_C_VALUES = (0.01, 0.03, 0.1, 0.3)
INNER_FOLDS, DRAFT_FOLDS = 5, 2
DRAFT_TREES = 50
"""Trees of a draft, which takes a fifth of the time. On 400 captions with shuffled labels the mean AUROC of 48 fits of
50 trees was .525 (standard error .013), that of 24 fits of 250 trees .500 (.014): no difference beyond chance."""
ENOUGH_IMAGES = 10  # of each class; with fewer, inner folds may lack a class and the choice of C would be noise
Result = TypeVar("Result")


class Perceptron(MLPClassifier):
    """A multi-layer perceptron of rectified units that gives log-odds."""

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Compute the log-odds of the second class, (rows,)."""
        layers = list(zip(self.coefs_, self.intercepts_, strict=True))
        for weights, bias in layers[:-1]:
            X = np.maximum(X @ weights + bias, 0)
        return (X @ layers[-1][0] + layers[-1][1])[:, 0]


class Network(Perceptron):
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
        """Compute the log-odds of the second class, (rows,), which are cut off as in the compiled form."""
        return np.clip(super().decision_function(X), -MAX_LOG_ODDS, MAX_LOG_ODDS)


def make_estimator(kind: str | Mapping[str, Any], seed: int = 0, draft: bool = False) -> BaseEstimator:
    """Create an unfitted classifier.

    ``logistic``: median imputation with indicators, clipping, standardisation, L2 logistic regression without class
    weights (they would spoil the probabilities). ``boosting``: histogram gradient boosting with small trees, which
    treats missing values by itself; no early stopping, because its validation rows would not be split by image.
    ``per_head``: the inputs of ``logistic`` into a network of one hidden layer, fitted by L-BFGS with an L2 penalty,
    for tables with many columns that matter together, such as one for every attention head. On 7,211 first mentions of
    the embedded model with 118 columns, 64 of them heads, its AUROC was 0.969, against 0.965 of ``logistic``, 0.967 of
    ``boosting`` and 0.953 or less of a logistic regression on principal components. A class
    (``stethoscope.detection.estimator_classes``): the inputs of ``logistic`` into that classifier, with its settings.

    Args:
        kind: one of these.
        seed: of everything random.
        draft: boost with ``DRAFT_TREES``.

    Raises:
        ConfigError: there is no such class, or it has no such setting.
    """
    if kind == "boosting":
        return HistGradientBoostingClassifier(
            max_iter=DRAFT_TREES if draft else MAX_TREES,
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


class Reducer(Protocol):
    """A fitted part of a classifier that reduces its inputs to a few columns."""

    def transform(self, X: np.ndarray, /) -> np.ndarray:
        """Return (rows, outputs) of (rows, columns)."""


Reduced = TypeVar("Reduced", bound=Reducer)


def cross_fit(
    fit: Callable[[np.ndarray], Reduced],
    fit_all: Callable[[], Reduced],
    inputs: np.ndarray,
    outputs: int,
    folds: list[tuple[np.ndarray, np.ndarray]] | None,
    draft: bool,
) -> tuple[Reduced, np.ndarray]:
    """Fit a part of a classifier, and reduce every row by one that was fitted without its image.

    Args:
        fit: fits it on the rows of these indices.
        fit_all: fits it on all rows.
        inputs: (rows, columns) to reduce.
        outputs: number of columns that it reduces them to.
        folds: of ``inner_folds``.
        draft: judge others by the one of the last fold, instead of by one that is fitted on all rows.

    Returns:
        The part for other rows, and (rows, outputs), which are its own where there are no folds.
    """
    columns = np.zeros((len(inputs), outputs))
    for train, test in folds or ():
        part = fit(train)
        columns[test] = part.transform(inputs[test])
    if folds is None or not draft:
        part = fit_all()
    return part, part.transform(inputs) if folds is None else columns


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


class SharedFits:
    """Fits that detectors of the same mentions have in common, such as the probe of hidden states; each is made once.

    A fit is known by its function and the bytes of all that it reads, so that only equal ones are shared.
    """

    def __init__(self) -> None:
        self._results: dict[bytes, Any] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedFits:
        """Return itself: ``clone`` copies the settings of an estimator, and its copies share as well."""
        return self

    def make(self, fit: Callable[..., Result], *inputs: Any) -> Result:
        """Return what ``fit(*inputs)`` returns or has returned before; nobody may write to it.

        Args:
            fit: function whose result depends on its inputs alone.
            inputs: arrays, numbers, texts, None, and sequences of these.
        """
        digest = hashlib.blake2b(f"{fit.__module__}.{fit.__qualname__}".encode())
        _update(digest, inputs)
        key = digest.digest()
        if key not in self._results:
            self._results[key] = fit(*inputs)
        return self._results[key]


def _update(digest: hashlib.blake2b, value: Any) -> None:
    """Add a value to a digest, with its type and size, so that no two values look alike."""
    if isinstance(value, np.ndarray):
        digest.update(f"{value.dtype.str}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    elif isinstance(value, (list, tuple)):
        digest.update(f"{type(value).__name__} of {len(value)}:".encode())
        for item in value:
            _update(digest, item)
    else:
        digest.update(f"{value!r};".encode())


def make_once(shared: SharedFits | None, fit: Callable[..., Result], *inputs: Any) -> Result:
    """Return ``fit(*inputs)``, which is made once for all that share it; None shares nothing."""
    return fit(*inputs) if shared is None else shared.make(fit, *inputs)


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
