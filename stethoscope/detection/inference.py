"""Evaluate fitted classifiers from plain arrays, which a detector's file holds and a reader can check.

A fitted estimator of scikit-learn is compiled once, right after its fit. From then on nothing depends on the library's
private state, so a saved detector reads back under every version, and hostile numbers in a file cannot lead a compiled
walk through trees out of its memory, or round in circles: every array is checked when it is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from stethoscope.detection.arrays import LARGEST_NUMBER, Arrays

if TYPE_CHECKING:  # what is compiled needs numpy alone, so that `stethoscope judge` starts at once
    from sklearn.base import BaseEstimator
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.pipeline import Pipeline

NEURONS = 32  # of the small network; 8 and 16 do nearly as well
MAX_TREES, MAX_LEAVES = 250, 8
MAX_LOG_ODDS = math.log((1 - 1e-12) / (1 - (1 - 1e-12)))  # log-odds beyond which a network's are cut off
SUREST = 0.999  # share of a forest's trees, beyond which its log-odds do not rise
CHUNK = 1024  # rows whose tree nodes are compared at once: 14 MB
_FIRST_LEAF = np.array([(byte & -byte).bit_length() - 1 if byte else 0 for byte in range(256)])


@dataclass(frozen=True)
class Preprocessing:
    """Median imputation with indicators, clipping, standardisation: from (rows, columns) to (rows, columns + k).

    Attributes:
        fill: (columns,) values in place of NaN.
        missing: (k,) columns with an indicator of a missing value.
        low, high: (columns + k,) limits. ``mean``, ``scale``: (columns + k,) of the standardisation.
    """

    fill: np.ndarray
    missing: np.ndarray
    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def compile(cls, pipeline: Pipeline) -> Preprocessing:
        """Compile the fitted steps ``impute``, ``clip`` (both optional) and ``scale``."""
        steps = pipeline.named_steps
        scale = steps["scale"]
        width = len(scale.mean_)
        fill, missing = np.zeros(width), np.zeros(0, np.int64)
        low, high = np.full(width, -LARGEST_NUMBER), np.full(width, LARGEST_NUMBER)
        if "impute" in steps:
            fill, indicator = steps["impute"].statistics_, steps["impute"].indicator_
            missing = missing if indicator is None else indicator.features_
        if "clip" in steps:
            low, high = steps["clip"].low_, steps["clip"].high_
        numbers = (np.array(part, np.float64) for part in (low, high, scale.mean_, scale.scale_))
        return cls(np.array(fill, np.float64), np.array(missing, np.int64), *numbers)

    @classmethod
    def restore(cls, arrays: Arrays, columns: int) -> Preprocessing:
        """Restore and check what ``arrays`` returned."""
        missing = arrays.indices("missing", None, below=columns)
        width = columns + len(missing)
        low, high = arrays.numbers("low", width), arrays.numbers("high", width)
        arrays.require((low <= high).all(), "low", "should be nowhere above 'high'")
        mean, scale = arrays.numbers("mean", width), arrays.positive("scale", width)
        return cls(arrays.numbers("fill", columns), missing, low, high, mean, scale)

    def transform(self, X: np.ndarray) -> np.ndarray:
        """Impute, clip and standardise (rows, columns) to (rows, columns + k)."""
        gaps = np.isnan(X)
        if gaps.any():
            X = np.where(gaps, self.fill, X)
        if len(self.missing):
            X = np.hstack([X, gaps[:, self.missing]])
        return (np.minimum(np.maximum(X, self.low), self.high) - self.mean) / self.scale


@dataclass(frozen=True)
class LinearClassifier:
    """Logistic regression behind ``Preprocessing``.

    Attributes:
        inputs: preprocessing of the columns.
        weights, intercept: (columns + k, outputs) and (outputs,); one output for two classes.
        C: inverse regularisation strength of the fit.
    """

    inputs: Preprocessing
    weights: np.ndarray
    intercept: np.ndarray
    C: float

    @classmethod
    def compile(cls, pipeline: Pipeline) -> LinearClassifier:
        """Compile a fitted pipeline that ends in a ``LogisticRegression``."""
        last = pipeline[-1]
        weights, intercept = np.array(last.coef_.T, np.float64, order="C"), np.array(last.intercept_, np.float64)
        return cls(Preprocessing.compile(pipeline), weights, intercept, float(last.C))

    @classmethod
    def restore(cls, arrays: Arrays, columns: int, outputs: int = 1) -> LinearClassifier:
        """Restore and check what ``arrays`` returned."""
        inputs, C = Preprocessing.restore(arrays, columns), float(arrays.positive("C"))
        width = len(inputs.scale)
        return cls(inputs, arrays.numbers("weights", width, outputs), arrays.numbers("intercept", outputs), C)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name."""
        own = {"weights": self.weights, "intercept": self.intercept, "C": np.array(self.C)}
        return vars(self.inputs) | own

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Compute the log-odds of the second class, (rows,), or scores of more classes, (rows, outputs)."""
        scores = self.inputs.transform(X) @ self.weights + self.intercept
        return scores[:, 0] if scores.shape[1] == 1 else scores

    def terms(self, X: np.ndarray) -> np.ndarray:
        """Compute each column's contribution to the log-odds, (rows, columns), its missing indicator included."""
        terms, columns = self.inputs.transform(X) * self.weights[:, 0], X.shape[1]
        own = terms[:, :columns].copy()
        own[:, self.inputs.missing] += terms[:, columns:]
        return own


@dataclass(frozen=True)
class NetworkClassifier:
    """One hidden layer of ``NEURONS`` rectified units behind ``Preprocessing``.

    Attributes:
        inputs: preprocessing of the columns.
        hidden, hidden_bias: (columns + k, NEURONS) and (NEURONS,). ``output``, ``bias``: (NEURONS,) and a number.
        C: inverse regularisation strength of the fit.
    """

    inputs: Preprocessing
    hidden: np.ndarray
    hidden_bias: np.ndarray
    output: np.ndarray
    bias: np.ndarray
    C: float

    @classmethod
    def compile(cls, pipeline: Pipeline) -> NetworkClassifier:
        """Compile a fitted pipeline that ends in a ``Network``."""
        (hidden, output), (hidden_bias, bias) = pipeline[-1].coefs_, pipeline[-1].intercepts_
        return cls(
            inputs=Preprocessing.compile(pipeline),
            hidden=np.array(hidden, np.float64, order="C"),
            hidden_bias=np.array(hidden_bias, np.float64, order="C"),
            output=np.array(output[:, 0], np.float64, order="C"),
            bias=np.array(bias[0], np.float64, order="C"),
            C=1 / pipeline[-1].alpha,
        )

    @classmethod
    def restore(cls, arrays: Arrays, columns: int) -> NetworkClassifier:
        """Restore and check what ``arrays`` returned."""
        inputs, C = Preprocessing.restore(arrays, columns), float(arrays.positive("C"))
        hidden, hidden_bias = (
            arrays.numbers("hidden", len(inputs.scale), NEURONS),
            arrays.numbers("hidden_bias", NEURONS),
        )
        return cls(inputs, hidden, hidden_bias, arrays.numbers("output", NEURONS), arrays.numbers("bias"), C)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name."""
        own = {name: getattr(self, name) for name in ("hidden", "hidden_bias", "output", "bias")}
        return vars(self.inputs) | own | {"C": np.array(self.C)}

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Compute the log-odds of the second class, (rows,)."""
        activations = np.maximum(self.inputs.transform(X) @ self.hidden + self.hidden_bias, 0)
        return np.clip(activations @ self.output + self.bias, -MAX_LOG_ODDS, MAX_LOG_ODDS)


@dataclass(frozen=True)
class TreeEnsemble:
    """Boosted trees without pointers: every node knows which leaves it rules out (QuickScorer, Lucchese et al. 2015).

    Leaves are numbered from left to right. A node whose test fails sends the row to the right and rules out the leaves
    on its left; the first leaf that no node rules out is the one that the row reaches. Trees with fewer nodes are
    filled up with tests that never fail.

    Attributes:
        feature, threshold: (trees, ``MAX_LEAVES`` - 1) column and largest value that goes to the left.
        missing_left: (trees, ``MAX_LEAVES`` - 1) whether NaN goes to the left.
        remaining: (trees, ``MAX_LEAVES`` - 1) the leaves that are left when the test fails, a bit each.
        value: (trees, ``MAX_LEAVES``) log-odds to add. ``baseline``: log-odds to begin with.
    """

    C: ClassVar[None] = None

    feature: np.ndarray
    threshold: np.ndarray
    missing_left: np.ndarray
    remaining: np.ndarray
    value: np.ndarray
    baseline: np.ndarray

    @classmethod
    def compile(cls, model: HistGradientBoostingClassifier) -> TreeEnsemble:
        """Compile a fitted model; the only function that reads its private trees."""
        trees = [tree.nodes for (tree,) in model._predictors]
        shape = (len(trees), MAX_LEAVES - 1)
        feature, threshold = np.zeros(shape, np.int64), np.full(shape, np.finfo(np.float64).max)
        missing_left, remaining = np.ones(shape, bool), np.full(shape, 255, np.uint8)
        value = np.zeros((len(trees), MAX_LEAVES))
        for index, nodes in enumerate(trees):
            leaves, splits = 0, 0
            # nodes to visit, left before right, and the (split, first leaf) whose left part ends before them
            pending: list[tuple[int, tuple[int, int] | None]] = [(0, None)]
            while pending:
                node, closes = pending.pop()
                if closes is not None:  # all leaves of that split's left part are numbered
                    split, start = closes
                    remaining[index, split] = 255 & ~((1 << leaves) - (1 << start))
                if nodes[node]["is_leaf"]:
                    value[index, leaves] = nodes[node]["value"]
                    leaves += 1
                    continue
                feature[index, splits] = nodes[node]["feature_idx"]
                # a limit of infinity splits off missing values alone
                threshold[index, splits] = min(nodes[node]["num_threshold"], np.finfo(np.float64).max)
                missing_left[index, splits] = nodes[node]["missing_go_to_left"]
                pending += [(int(nodes[node]["right"]), (splits, leaves)), (int(nodes[node]["left"]), None)]
                splits += 1
        baseline = np.array(float(model._baseline_prediction.item()))
        return cls(feature, threshold, missing_left, remaining, value, baseline)

    @classmethod
    def restore(cls, arrays: Arrays, columns: int) -> TreeEnsemble:
        """Restore and check what ``arrays`` returned."""
        value = arrays.numbers("value", None, MAX_LEAVES)
        shape = (len(value), MAX_LEAVES - 1)
        arrays.require(1 <= len(value) <= MAX_TREES, "value", f"should have 1 to {MAX_TREES} rows, one for each tree")
        return cls(
            arrays.counts("feature", *shape, below=columns),
            arrays.numbers("threshold", *shape, largest=np.inf),  # is only compared with
            arrays.bits("missing_left", np.bool_, *shape),
            arrays.bits("remaining", np.uint8, *shape),
            value,
            arrays.numbers("baseline"),
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name."""
        return vars(self)

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Compute the log-odds of the second class, (rows,)."""
        parts = [self._scores(X[start : start + CHUNK]) for start in range(0, len(X), CHUNK)]
        return np.concatenate(parts) if parts else np.zeros(0)

    def _scores(self, X: np.ndarray) -> np.ndarray:
        """Compute the log-odds of at most ``CHUNK`` rows."""
        values = X[:, self.feature]
        right = ~(values <= self.threshold)  # NaN is not
        gaps = np.isnan(values)
        if gaps.any():
            right &= ~(gaps & self.missing_left)
        leaves = np.bitwise_and.reduce(np.where(right, self.remaining, np.uint8(255)), axis=2)
        return self.value[np.arange(len(self.value)), _FIRST_LEAF[leaves]].sum(1) + self.baseline


@dataclass(frozen=True)
class ForestClassifier:
    """The mean of the probabilities of trees of any size, behind ``Preprocessing``, as log-odds.

    The nodes of all trees stand one after another, a child behind its parent, so that every walk ends.

    Attributes:
        inputs: preprocessing of the columns.
        roots: (trees,) first node of every tree.
        left, right: (nodes,) children of a node; of a leaf, the leaf itself.
        feature, threshold: (nodes,) column and largest value that goes to the left.
        value: (nodes,) probability of the second class, which counts at leaves.
    """

    C: ClassVar[None] = None

    inputs: Preprocessing
    roots: np.ndarray
    left: np.ndarray
    right: np.ndarray
    feature: np.ndarray
    threshold: np.ndarray
    value: np.ndarray

    @classmethod
    def compile(cls, pipeline: Pipeline) -> ForestClassifier:
        """Compile a fitted pipeline that ends in a tree or a forest of scikit-learn."""
        trees = [tree.tree_ for tree in getattr(pipeline[-1], "estimators_", [pipeline[-1]])]
        roots = np.cumsum([0, *(tree.node_count for tree in trees[:-1])]).astype(np.int64)
        parts: list[tuple[np.ndarray, ...]] = []
        for root, tree in zip(roots, trees, strict=True):
            own, leaf = np.arange(tree.node_count), tree.children_left < 0
            children = (np.where(leaf, own, side) + root for side in (tree.children_left, tree.children_right))
            shares = tree.value[:, 0, 1] / tree.value[:, 0].sum(1)
            parts.append((*children, np.where(leaf, 0, tree.feature), np.where(leaf, 0.0, tree.threshold), shares))
        left, right, feature, threshold, value = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        left, right, feature = (column.astype(np.int64) for column in (left, right, feature))
        inputs = Preprocessing.compile(pipeline)
        return cls(inputs, roots, left, right, feature, threshold.astype(np.float64), value)

    @classmethod
    def restore(cls, arrays: Arrays, columns: int) -> ForestClassifier:
        """Restore and check what ``arrays`` returned."""
        inputs, value = Preprocessing.restore(arrays, columns), arrays.numbers("value", None)
        count = len(value)
        arrays.require(count and ((value >= 0) & (value <= 1)).all(), "value", "should be there and lie from 0 to 1")
        left, right = (arrays.counts(side, count, below=count) for side in ("left", "right"))
        own = np.arange(count)
        for name, child in (("left", left), ("right", right)):
            arrays.require((child >= own).all(), name, "should lead to no earlier node")
        arrays.require(((left == own) == (right == own)).all(), "right", "should be a leaf where 'left' is")
        roots = arrays.counts("roots", None, below=count)
        arrays.require(len(roots), "roots", "should be there")
        feature = arrays.counts("feature", count, below=len(inputs.scale))
        return cls(inputs, roots, left, right, feature, arrays.numbers("threshold", count), value)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name."""
        names = ("roots", "left", "right", "feature", "threshold", "value")
        return vars(self.inputs) | {name: getattr(self, name) for name in names}

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Compute the log-odds of the second class, (rows,)."""
        parts = [self._probability(X[start : start + CHUNK]) for start in range(0, len(X), CHUNK)]
        return share_log_odds(np.concatenate(parts) if parts else np.zeros(0))

    def _probability(self, X: np.ndarray) -> np.ndarray:
        values = self.inputs.transform(X).astype(np.float32)  # as scikit-learn's trees read them
        rows, nodes = np.arange(len(values))[:, None], np.repeat(self.roots[None], len(values), 0)
        while True:
            goes_left = values[rows, self.feature[nodes]] <= self.threshold[nodes]
            following = np.where(goes_left, self.left[nodes], self.right[nodes])
            if (following == nodes).all():
                return self.value[nodes].mean(1)
            nodes = following


def share_log_odds(shares: np.ndarray) -> np.ndarray:
    """Convert shares of trees to log-odds; none is surer than ``SUREST``.

    >>> share_log_odds(np.array([0.5, 1.0])).round(2)
    array([0.  , 6.91])
    """
    limited = np.clip(shares, 1 - SUREST, SUREST)
    return np.log(limited / (1 - limited))


Classifier = LinearClassifier | NetworkClassifier | TreeEnsemble | ForestClassifier
_COMPILED: dict[str, type[Classifier]] = {  # by the class of scikit-learn, which is not imported for it
    "LogisticRegression": LinearClassifier,
    "MLPClassifier": NetworkClassifier,
    "HistGradientBoostingClassifier": TreeEnsemble,
    **dict.fromkeys(("RandomForestClassifier", "ExtraTreesClassifier", "DecisionTreeClassifier"), ForestClassifier),
}


def _compiled_class(estimator: BaseEstimator) -> type[Classifier]:
    last = estimator[-1] if hasattr(estimator, "named_steps") else estimator
    return next(_COMPILED[kind.__name__] for kind in type(last).__mro__ if kind.__name__ in _COMPILED)


def compile_classifier(estimator: BaseEstimator) -> Classifier:
    """Compile a fitted estimator of ``make_estimator``, or a pipeline of ``scale`` and a logistic regression."""
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
    return _compiled_class(estimator).restore(arrays, columns)


@dataclass(frozen=True)
class PlattScaling:
    """Calibration that is linear in log-odds (Platt 1999)."""

    slope: float
    intercept: float

    @classmethod
    def restore(cls, arrays: Arrays) -> PlattScaling:
        """Restore and check what ``arrays`` returned."""
        return cls(float(arrays.numbers("slope")), float(arrays.numbers("intercept")))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name."""
        return {"slope": np.array(self.slope), "intercept": np.array(self.intercept)}


@dataclass(frozen=True)
class IsotonicSteps:
    """Calibration by non-decreasing linear interpolation, constant outside the points.

    Attributes:
        scores, probabilities: (points,).
    """

    scores: np.ndarray
    probabilities: np.ndarray

    @classmethod
    def restore(cls, arrays: Arrays) -> IsotonicSteps:
        """Restore and check what ``arrays`` returned."""
        scores = arrays.numbers("scores", None)
        probabilities = arrays.numbers("probabilities", len(scores))
        arrays.require(len(scores) and (np.diff(scores) >= 0).all(), "scores", "should be there and rise")
        rising = (np.diff(probabilities, prepend=0, append=1) >= 0).all()
        arrays.require(rising, "probabilities", "should rise from 0 to 1")
        return cls(scores, probabilities)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name."""
        return vars(self)

    def predict(self, scores: np.ndarray) -> np.ndarray:
        """Map scores to probabilities, (rows,)."""
        return np.interp(scores, self.scores, self.probabilities)
