"""Evaluate fitted classifiers from plain arrays, which a detector's file holds and a reader can check.

A fitted estimator of scikit-learn is compiled once, right after its fit. From then on nothing depends on the library's
private state, so a saved detector reads back under every version, and hostile numbers in a file cannot lead a compiled
walk through trees out of its memory, or round in circles: every array is checked when it is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from stethoscope.detection.artifact import LARGEST_NUMBER, Arrays

if TYPE_CHECKING:  # what is compiled needs numpy alone, so that `stethoscope judge` starts at once
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.pipeline import Pipeline

NEURONS = 32  # of the small network; 8 and 16 do nearly as well
MAX_TREES, MAX_LEAVES = 250, 8
MAX_LOG_ODDS = math.log((1 - 1e-12) / (1 - (1 - 1e-12)))  # log-odds beyond which a network's are cut off
_LARGEST_ACTIVATION = 1e100  # so that no product of a deep network overflows
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
        C: inverse regularisation strength of the fit; None for classifiers that have none.
    """

    inputs: Preprocessing
    weights: np.ndarray
    intercept: np.ndarray
    C: float | None

    @classmethod
    def compile(cls, pipeline: Pipeline) -> LinearClassifier:
        """Compile a fitted pipeline that ends in a ``LogisticRegression`` or another linear classifier."""
        last = pipeline[-1]
        weights = np.array(np.atleast_2d(last.coef_).T, np.float64, order="C")
        intercept = np.zeros(weights.shape[1]) + last.intercept_  # a single 0.0 without an intercept
        return cls(Preprocessing.compile(pipeline), weights, intercept, read_C(last))

    @classmethod
    def restore(cls, arrays: Arrays, columns: int, outputs: int = 1) -> LinearClassifier:
        """Restore and check what ``arrays`` returned."""
        inputs, C = Preprocessing.restore(arrays, columns), restore_C(arrays)
        width = len(inputs.scale)
        return cls(inputs, arrays.numbers("weights", width, outputs), arrays.numbers("intercept", outputs), C)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name."""
        return vars(self.inputs) | {"weights": self.weights, "intercept": self.intercept} | C_array(self.C)

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


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda X: np.maximum(X, 0),
    "identity": lambda X: X,
    "tanh": np.tanh,
    "logistic": lambda X: np.tanh(X / 2) / 2 + 0.5,  # without overflow
}


@dataclass(frozen=True)
class NetworkClassifier:
    """A multi-layer perceptron behind ``Preprocessing``.

    Attributes:
        inputs: preprocessing of the columns.
        layers: weights, (inputs, outputs), and bias, (outputs,), of every layer; the last one has one output.
        C: inverse regularisation strength of the fit; None where it was not regularised.
        activation: key of ``ACTIVATIONS``, of all layers but the last.
    """

    inputs: Preprocessing
    layers: tuple[tuple[np.ndarray, np.ndarray], ...]
    C: float | None
    activation: str = "relu"

    @classmethod
    def compile(cls, pipeline: Pipeline) -> NetworkClassifier:
        """Compile a fitted pipeline that ends in an ``MLPClassifier``."""
        last = pipeline[-1]
        layers = tuple(
            (np.array(weights, np.float64, order="C"), np.array(bias, np.float64))
            for weights, bias in zip(last.coefs_, last.intercepts_, strict=True)
        )
        return cls(Preprocessing.compile(pipeline), layers, 1 / last.alpha if last.alpha else None, last.activation)

    @classmethod
    def restore(cls, arrays: Arrays, columns: int) -> NetworkClassifier:
        """Restore and check what ``arrays`` returned."""
        inputs, C = Preprocessing.restore(arrays, columns), restore_C(arrays)
        layers: list[tuple[np.ndarray, np.ndarray]] = []
        width: int = len(inputs.scale)
        while (name := _layer_name(len(layers))) in arrays or not layers:
            weights = arrays.numbers(name, width, None)
            width = weights.shape[1]
            layers.append((weights, arrays.numbers(f"{name}_bias", width)))
        layers.append((arrays.numbers("output", width)[:, None], arrays.numbers("bias")[None]))
        names = list(ACTIVATIONS)
        activation = names[arrays.counts("activation", below=len(names))] if "activation" in arrays else names[0]
        return cls(inputs, tuple(layers), C, activation)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name: ``hidden``, ``hidden_bias``, ``hidden_1``, ..., ``output`` and ``bias``."""
        *hidden, (output, bias) = self.layers
        own = {"output": output[:, 0], "bias": bias[0]}
        for index, (weights, hidden_bias) in enumerate(hidden):
            own |= {_layer_name(index): weights, f"{_layer_name(index)}_bias": hidden_bias}
        if self.activation != next(iter(ACTIVATIONS)):
            own["activation"] = np.array(list(ACTIVATIONS).index(self.activation))
        return vars(self.inputs) | own | C_array(self.C)

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Compute the log-odds of the second class, (rows,)."""
        *hidden, (output, output_bias) = self.layers
        values, activate = self.inputs.transform(X), ACTIVATIONS[self.activation]
        for weights, bias in hidden:
            values = np.minimum(activate(values @ weights + bias), _LARGEST_ACTIVATION)
        return np.clip((values @ output)[:, 0] + output_bias[0], -MAX_LOG_ODDS, MAX_LOG_ODDS)


def _layer_name(index: int) -> str:
    return f"hidden_{index}" if index else "hidden"


def read_C(classifier: Any) -> float | None:
    """Return the inverse regularisation strength of a classifier of scikit-learn; None where it has no such number."""
    C = getattr(classifier, "C", None)
    return float(C) if isinstance(C, (int, float)) and 0 < C < math.inf else None


def C_array(C: float | None) -> dict[str, np.ndarray]:
    """Return the array that holds C; 0 stands for None."""
    return {"C": np.array(float(C or 0))}


def restore_C(arrays: Arrays) -> float | None:
    """Restore what ``C_array`` returned."""
    C = float(arrays.numbers("C"))
    arrays.require(C == 0 or C >= 1 / LARGEST_NUMBER, "C", "should be above 0, or 0 for none")
    return C or None


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
