"""Compile the classifiers that are chosen by their class: forests, boosted trees, kernel machines, and one's own.

Linear classifiers and networks have the compiled forms of ``logistic`` and ``per_head`` (``array_classifiers``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from stethoscope.core.errors import ArtefactError, ConfigError, first_line
from stethoscope.detection.array_classifiers import (
    CHUNK,
    C_array,
    LinearClassifier,
    NetworkClassifier,
    Preprocessing,
    TreeEnsemble,
    read_C,
    restore_C,
)
from stethoscope.detection.artifact import Arrays
from stethoscope.detection.base import Estimator, check_probabilities, class_path

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator
    from sklearn.pipeline import Pipeline

SUREST = 0.999  # share of a forest's trees, beyond which its log-odds do not rise
_PREFIX = "own"  # of the arrays of an estimator of one's own


def share_log_odds(shares: np.ndarray, surest: float = SUREST) -> np.ndarray:
    """Convert shares of trees, or other probabilities, to log-odds; none is surer than ``surest``.

    >>> share_log_odds(np.array([0.5, 1.0])).round(2)
    array([0.  , 6.91])
    """
    limited = np.clip(shares, 1 - surest, surest)
    return np.log(limited / (1 - limited))


@dataclass(frozen=True)
class Trees:
    """The nodes of trees of any size, one tree after another, a child behind its parent, so that every walk ends.

    Attributes:
        roots: (trees,) first node of every tree.
        left, right: (nodes,) children of a node; of a leaf, the leaf itself.
        feature, threshold: (nodes,) column and largest value that goes to the left.
        value: (nodes,) value, which counts at leaves.
    """

    roots: np.ndarray
    left: np.ndarray
    right: np.ndarray
    feature: np.ndarray
    threshold: np.ndarray
    value: np.ndarray

    @classmethod
    def join(cls, trees: list[tuple[np.ndarray, ...]]) -> Trees:
        """Join trees, each its left and right children (0 or less for a leaf), columns, limits and values."""
        sizes = [len(tree[0]) for tree in trees]
        roots = np.cumsum([0, *sizes[:-1]]).astype(np.int64)
        parts: list[tuple[np.ndarray, ...]] = []
        for root, (left, right, feature, threshold, value) in zip(roots, trees, strict=True):
            own, leaf = np.arange(len(left)), left <= 0
            children = (np.where(leaf, own, side).astype(np.int64) + root for side in (left, right))
            columns = np.where(leaf, 0, feature).astype(np.int64)
            parts.append((*children, columns, np.where(leaf, 0.0, threshold), np.array(value, np.float64)))
        return cls(roots, *(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    @classmethod
    def restore(cls, arrays: Arrays, columns: int) -> Trees:
        """Restore and check what ``vars`` returned; every child stands behind its parent."""
        value = arrays.numbers("value", None)
        count = len(value)
        arrays.require(count, "value", "should be there")
        left, right = (arrays.counts(side, count, below=count) for side in ("left", "right"))
        own = np.arange(count)
        for name, child in (("left", left), ("right", right)):
            arrays.require((child >= own).all(), name, "should lead to no earlier node")
        arrays.require(((left == own) == (right == own)).all(), "right", "should be a leaf where 'left' is")
        roots = arrays.counts("roots", None, below=count)
        arrays.require(len(roots), "roots", "should be there")
        feature = arrays.counts("feature", count, below=columns)
        return cls(roots, left, right, feature, arrays.numbers("threshold", count), value)

    def leaves(self, X: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the values of the leaves that at most ``CHUNK`` rows of (rows, columns) reach, (rows, trees)."""
        for start in range(0, len(X), CHUNK):
            values = X[start : start + CHUNK]
            rows, nodes = np.arange(len(values))[:, None], np.repeat(self.roots[None], len(values), 0)
            while True:
                goes_left = values[rows, self.feature[nodes]] <= self.threshold[nodes]
                following = np.where(goes_left, self.left[nodes], self.right[nodes])
                if (following == nodes).all():
                    break
                nodes = following
            yield self.value[nodes]


def _plain_trees(trees: list[Any]) -> list[tuple[np.ndarray, ...]]:
    """Return children, columns and limits of ``tree_`` objects of scikit-learn, and their raw values."""
    return [(t.children_left, t.children_right, t.feature, t.threshold, t.value) for t in (e.tree_ for e in trees)]


@dataclass(frozen=True)
class ForestClassifier:
    """The mean of the probabilities of trees behind ``Preprocessing``, as log-odds."""

    C: ClassVar[None] = None

    inputs: Preprocessing
    trees: Trees

    @classmethod
    def compile(cls, pipeline: Pipeline) -> ForestClassifier:
        """Compile a fitted pipeline that ends in a tree or a forest of scikit-learn."""
        trees = _plain_trees(list(getattr(pipeline[-1], "estimators_", [pipeline[-1]])))
        shares = [(*tree[:-1], tree[-1][:, 0, 1] / tree[-1][:, 0].sum(1)) for tree in trees]
        return cls(Preprocessing.compile(pipeline), Trees.join(shares))

    @classmethod
    def restore(cls, arrays: Arrays, columns: int) -> ForestClassifier:
        """Restore and check what ``arrays`` returned."""
        inputs = Preprocessing.restore(arrays, columns)
        trees = Trees.restore(arrays, len(inputs.scale))
        arrays.require(((trees.value >= 0) & (trees.value <= 1)).all(), "value", "should lie from 0 to 1")
        return cls(inputs, trees)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name."""
        return vars(self.inputs) | vars(self.trees)

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Compute the log-odds of the second class, (rows,)."""
        values = self.inputs.transform(X).astype(np.float32)  # as scikit-learn's trees read them
        return share_log_odds(np.concatenate([np.zeros(0), *(leaf.mean(1) for leaf in self.trees.leaves(values))]))


@dataclass(frozen=True)
class BoostedTrees:
    """The sum of the values of trees behind ``Preprocessing``: gradient boosting of scikit-learn with any settings.

    Attributes:
        inputs: preprocessing of the columns.
        trees: with log-odds to add as values.
        baseline: log-odds to begin with.
        single: whether the trees read numbers in single precision.
    """

    C: ClassVar[None] = None

    inputs: Preprocessing
    trees: Trees
    baseline: np.ndarray
    single: np.ndarray

    @classmethod
    def compile(cls, pipeline: Pipeline) -> BoostedTrees:
        """Compile a fitted pipeline that ends in a (histogram) gradient boosting classifier.

        Raises:
            ConfigError: it treats columns as categories, or has no trees.
        """
        last, inputs = pipeline[-1], Preprocessing.compile(pipeline)
        if hasattr(last, "_predictors"):
            nodes = [tree.nodes for trees in last._predictors for tree in trees]
            if any(node["is_categorical"].any() for node in nodes):
                raise ConfigError("detector.estimator: categorical_features cannot be written as numbers; leave it out")
            names = ("left", "right", "feature_idx", "num_threshold", "value")
            trees = [tuple(node[name] for name in names) for node in nodes]
        else:
            plain = _plain_trees(list(np.ravel(last.estimators_)))
            trees = [(*tree[:-1], last.learning_rate * tree[-1][:, 0, 0]) for tree in plain]
        single = not hasattr(last, "_predictors")
        unset = cls(inputs, Trees.join(trees), np.array(0.0), np.array(single))
        row = np.zeros((1, len(inputs.fill)))
        baseline = last.decision_function(inputs.transform(row)) - unset.decision_function(row)
        return cls(inputs, unset.trees, np.array(float(baseline[0])), unset.single)

    @classmethod
    def restore(cls, arrays: Arrays, columns: int) -> BoostedTrees:
        """Restore and check what ``arrays`` returned."""
        inputs = Preprocessing.restore(arrays, columns)
        trees = Trees.restore(arrays, len(inputs.scale))
        return cls(inputs, trees, arrays.numbers("baseline"), arrays.bits("single", np.bool_))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name."""
        return vars(self.inputs) | vars(self.trees) | {"baseline": self.baseline, "single": self.single}

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Compute the log-odds of the second class, (rows,)."""
        values = self.inputs.transform(X).astype(np.float32 if self.single else np.float64)
        sums = [leaves.sum(1) for leaves in self.trees.leaves(values)]
        return np.concatenate([np.zeros(0), *sums]) + self.baseline


KERNELS = ("linear", "poly", "rbf", "sigmoid")
MAX_DEGREE = 8  # of a polynomial kernel, so that no power overflows
_LARGEST_BASE = 1e30


@dataclass(frozen=True)
class KernelClassifier:
    """A support vector machine behind ``Preprocessing``: a weighted sum of kernels with the support vectors.

    Attributes:
        inputs: preprocessing of the columns.
        vectors, weights: (vectors, columns + k) and (vectors,).
        intercept, gamma, coef0: numbers of the decision function and of the kernel.
        kernel, degree: index in ``KERNELS``, and the power of a polynomial.
        C: inverse regularisation strength of the fit; None for ``NuSVC``.
    """

    inputs: Preprocessing
    vectors: np.ndarray
    weights: np.ndarray
    intercept: np.ndarray
    gamma: np.ndarray
    coef0: np.ndarray
    kernel: np.ndarray
    degree: np.ndarray
    C: float | None

    @classmethod
    def compile(cls, pipeline: Pipeline) -> KernelClassifier:
        """Compile a fitted pipeline that ends in an ``SVC`` or ``NuSVC``.

        Raises:
            ConfigError: the kernel is another one, or a polynomial of a degree above ``MAX_DEGREE``.
        """
        last = pipeline[-1]
        if last.kernel not in KERNELS or not 0 <= last.degree <= MAX_DEGREE:
            raise ConfigError(
                f"detector.estimator: kernel={last.kernel} degree={last.degree} should be {', '.join(KERNELS)}, "
                f"of degree {MAX_DEGREE} at most"
            )
        vectors, weights = np.array(last.support_vectors_, np.float64), np.array(last.dual_coef_[0], np.float64)
        return cls(
            inputs=Preprocessing.compile(pipeline),
            vectors=vectors,
            weights=weights,
            intercept=np.array(float(last.intercept_[0])),
            gamma=np.array(float(last._gamma)),
            coef0=np.array(float(last.coef0)),
            kernel=np.array(KERNELS.index(last.kernel)),
            degree=np.array(int(last.degree)),
            C=read_C(last),
        )

    @classmethod
    def restore(cls, arrays: Arrays, columns: int) -> KernelClassifier:
        """Restore and check what ``arrays`` returned."""
        inputs, weights = Preprocessing.restore(arrays, columns), arrays.numbers("weights", None)
        return cls(
            inputs=inputs,
            vectors=arrays.numbers("vectors", len(weights), len(inputs.scale)),
            weights=weights,
            intercept=arrays.numbers("intercept"),
            gamma=arrays.numbers("gamma"),
            coef0=arrays.numbers("coef0"),
            kernel=arrays.counts("kernel", below=len(KERNELS)),
            degree=arrays.counts("degree", below=MAX_DEGREE + 1),
            C=restore_C(arrays),
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name."""
        own = {name: value for name, value in vars(self).items() if name not in ("inputs", "C")}
        return vars(self.inputs) | own | C_array(self.C)

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Compute the signed distance from the boundary, (rows,), above 0 for the second class."""
        values = self.inputs.transform(X)
        parts = [self._kernel(values[start : start + CHUNK]) @ self.weights for start in range(0, len(values), CHUNK)]
        return np.concatenate([np.zeros(0), *parts]) + self.intercept

    def _kernel(self, values: np.ndarray) -> np.ndarray:
        """Compute the kernel of (rows, columns) with all support vectors, (rows, vectors)."""
        products, kernel = values @ self.vectors.T, KERNELS[self.kernel]
        if kernel == "rbf":
            squares = (values**2).sum(1)[:, None] + (self.vectors**2).sum(1) - 2 * products
            return np.exp(-np.abs(self.gamma) * np.maximum(squares, 0))
        if kernel == "linear":
            return products
        base = self.gamma * products + self.coef0
        return np.tanh(base) if kernel == "sigmoid" else np.clip(base, -_LARGEST_BASE, _LARGEST_BASE) ** self.degree


@dataclass(frozen=True)
class OwnClassifier:
    """An estimator of one's own behind ``Preprocessing``, as log-odds of its probabilities.

    Attributes:
        inputs: preprocessing of the columns.
        estimator: fitted, or restored from arrays.
    """

    C: ClassVar[None] = None
    SUREST: ClassVar[float] = 1 - 1e-12

    inputs: Preprocessing
    estimator: Estimator

    @classmethod
    def compile(cls, pipeline: Pipeline) -> OwnClassifier:
        """Compile a fitted pipeline that ends in an ``Estimator``."""
        return cls(Preprocessing.compile(pipeline), pipeline[-1])

    @classmethod
    def restore(cls, arrays: Arrays, columns: int, estimator: Estimator) -> OwnClassifier:
        """Restore what ``arrays`` returned; the estimator checks its own arrays, and has to judge a row.

        Raises:
            ArtefactError: it refuses its arrays, or judges the row by something else than two probabilities.
        """
        inputs = Preprocessing.restore(arrays, columns)
        try:
            estimator.from_arrays(arrays.under(_PREFIX).everything())
            check_probabilities(estimator, estimator.predict_proba(np.zeros((1, len(inputs.scale)))), 1)
        except ArtefactError:
            raise
        except Exception as error:  # the user's own code may raise anything
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise ArtefactError(f"{class_path(type(estimator))} refuses its arrays: {reason}") from error
        return cls(inputs, estimator)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name.

        Raises:
            ConfigError: ``to_arrays`` returns something else than arrays of numbers.
        """
        name, own = class_path(type(self.estimator)), self.estimator.to_arrays()
        if not isinstance(own, dict) or not all(isinstance(key, str) and key.isidentifier() for key in own):
            raise ConfigError(f"{name}.to_arrays should return arrays by name, as in {{'weights': ...}}")
        for key, array in own.items():
            if not isinstance(array, np.ndarray) or array.dtype.str[1:] not in ("f8", "f4", "i8", "b1", "u1"):
                kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
                raise ConfigError(
                    f"{name}.to_arrays: {key!r} should be an array of float64, float32, int64, bool or uint8, "
                    f"got {kind}"
                )
            if not np.isfinite(array).all():
                raise ConfigError(f"{name}.to_arrays: {key!r} holds numbers that are not finite")
        return vars(self.inputs) | {f"{_PREFIX}.{key}": array for key, array in own.items()}

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Compute the log-odds of the second class, (rows,)."""
        if not len(X):
            return np.zeros(0)
        probabilities = self.estimator.predict_proba(self.inputs.transform(X))
        return share_log_odds(check_probabilities(self.estimator, probabilities, len(X)), self.SUREST)


LibraryClassifier = (
    LinearClassifier | NetworkClassifier | TreeEnsemble | ForestClassifier | BoostedTrees | KernelClassifier
)
Classifier = LibraryClassifier | OwnClassifier
_FORMS: dict[type[LibraryClassifier], tuple[str, ...]] = {  # of classes of scikit-learn, not imported for it
    LinearClassifier: (
        "sklearn.linear_model.LogisticRegression",
        "sklearn.linear_model.SGDClassifier",
        "sklearn.linear_model.RidgeClassifier",
        "sklearn.svm.LinearSVC",
        "sklearn.discriminant_analysis.LinearDiscriminantAnalysis",
    ),
    KernelClassifier: ("sklearn.svm.SVC", "sklearn.svm.NuSVC"),
    NetworkClassifier: ("sklearn.neural_network.MLPClassifier",),
    BoostedTrees: (
        "sklearn.ensemble.HistGradientBoostingClassifier",
        "sklearn.ensemble.GradientBoostingClassifier",
    ),
    ForestClassifier: (
        "sklearn.ensemble.RandomForestClassifier",
        "sklearn.ensemble.ExtraTreesClassifier",
        "sklearn.tree.DecisionTreeClassifier",
        "sklearn.tree.ExtraTreeClassifier",
    ),
}
SKLEARN = tuple(path for paths in _FORMS.values() for path in paths)
"""Classifiers of scikit-learn that are chosen by their class: what they learn can be written as numbers."""


def _compiled_class(estimator: BaseEstimator) -> type[LibraryClassifier]:
    """Return the compiled form of a pipeline's last step, or that of ``boosting``, which is no pipeline."""
    if not hasattr(estimator, "named_steps"):
        return TreeEnsemble
    kinds = {kind.__name__ for kind in type(estimator[-1]).__mro__}
    return next(form for form, paths in _FORMS.items() if kinds & {path.rpartition(".")[2] for path in paths})


def compile_classifier(estimator: BaseEstimator) -> Classifier:
    """Compile a fitted estimator of ``make_estimator``, or a pipeline of ``scale`` and a logistic regression."""
    if hasattr(estimator, "named_steps") and isinstance(estimator[-1], Estimator):
        return OwnClassifier.compile(estimator)
    return _compiled_class(estimator).compile(estimator)


def restore_classifier(estimator: BaseEstimator, arrays: Arrays, columns: int) -> Classifier:
    """Restore the compiled form of an estimator from a file.

    Args:
        estimator: unfitted estimator of the same kind.
        arrays: arrays of its compiled form.
        columns: number of columns of the design matrix.

    Raises:
        ArtefactError: an array is missing, has another shape or type, or holds invalid numbers.
    """
    if hasattr(estimator, "named_steps") and isinstance(estimator[-1], Estimator):
        return OwnClassifier.restore(arrays, columns, estimator[-1])
    return _compiled_class(estimator).restore(arrays, columns)
