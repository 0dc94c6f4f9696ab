"""Evidence x prior: what the picture says of a mention, and what its place and its name say before one looks.

HaloProbe (arXiv 2604.06165) observes that a detector trained in the natural way mixes the two: late mentions are
hallucinated more often, so whatever changes with the position looks like evidence. It trains the evidence f with
classes that are balanced for every value of the external features e, the prior g on e alone, and joins them by Bayes:

    p = f g / (f g + (1 - f)(1 - g)),    that is    logit p = logit f + logit g

Balanced like that, logit f is the logarithm of p(features | e, hallucinated) / p(features | e, grounded): by how much
the features speak against the object, compared with what is usual for such a mention.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from stethoscope.core.token_table import require
from stethoscope.detection.arrays import Arrays
from stethoscope.detection.estimators import (
    C_choices,
    Grouped,
    choose_C,
    fit_weighted,
    inner_folds,
    log_loss_of,
    make_estimator,
    out_of_fold,
    prefixed,
    restored,
    set_C,
)
from stethoscope.detection.inference import LinearClassifier, compile_classifier

EXTERNAL = ("token", "mention_index", "repeat_index", "object")
"""Key columns that the prior reads: position, mention number, earlier mentions of the object, the object."""
MOST = 5  # mention numbers and repetitions from here on share a column
QUINTILES = (0.2, 0.4, 0.6, 0.8)
HEAVIEST = 10.0  # weight of a mention, in means: a hallucination where hardly any is expected should not decide alone


def external(table: pd.DataFrame, objects: tuple[str, ...]) -> np.ndarray:
    """(rows, 4) float, the columns of ``EXTERNAL`` with the object as ``codes`` has it."""
    require(table, EXTERNAL)
    return np.column_stack([*(table[name].to_numpy(dtype=float) for name in EXTERNAL[:-1]), codes(table, objects)])


def codes(table: pd.DataFrame, objects: tuple[str, ...]) -> np.ndarray:
    """(rows,) float, the index in ``objects`` of what every row names, -1 for any other."""
    index = {name: number for number, name in enumerate(objects)}
    return table["object"].map(index).fillna(-1).to_numpy(dtype=float)


class ExternalInputs(TransformerMixin, BaseEstimator):
    """Columns for a linear model from ``external``: position (piecewise linear), and a column for every other value."""

    def __init__(self, objects: int = 0) -> None:
        self.objects = objects

    def fit(self, X: np.ndarray, y: np.ndarray | None = None) -> ExternalInputs:
        """Learns where the pieces of the position end: at its quintiles."""
        self.knots_ = np.unique(np.quantile(X[:, 0], QUINTILES))
        return self

    def transform(self, X: np.ndarray) -> np.ndarray:
        """(rows, columns) float."""
        position = X[:, :1]
        number, repeat = (X[:, column].clip(0, MOST).astype(int) for column in (1, 2))
        named = X[:, 3:] == np.arange(self.objects)
        bends = np.maximum(0, position - self.knots_)
        return np.hstack(
            [position, np.log1p(position), bends, np.eye(MOST + 1)[number], np.eye(MOST + 1)[repeat], named]
        )


class Factored(Grouped):
    """Evidence and prior as one classifier of rows whose last columns are ``external``.

    The evidence reads the features and the external columns, these only to know what is usual for such a mention. Its
    weights are 1 / g(label), with g from inner folds. Both are put together as ``a logit f + b logit g + c``, fitted
    to scores from inner folds too: an evidence that is too sure of itself (boosting) is toned down before it is added.
    a, b and c see the training images alone.

    Args:
        kind: of ``ESTIMATORS``, for the evidence.
        objects: number of objects that the last column tells apart.
        C: inverse regularisation strength of the evidence; None chooses it in inner folds.
        seed: of everything random.
    """

    def __init__(self, kind: str = "logistic", objects: int = 0, C: float | None = None, seed: int = 0) -> None:
        self.kind, self.objects, self.C, self.seed = kind, objects, C, seed

    def fit(self, X: np.ndarray, y: np.ndarray, groups: np.ndarray) -> Factored:
        """Learns from (rows, features + 4), labels and image ids; without inner folds where images are too few."""
        self.inputs_ = ExternalInputs(self.objects).fit(X[:, -len(EXTERNAL) :])
        matrix, outside = self.joined(X), self.inputs_.transform(X[:, -len(EXTERNAL) :])
        folds = inner_folds(groups, y)
        before = Pipeline([("scale", StandardScaler()), ("classify", LogisticRegression(max_iter=2000, C=0.1))])
        self.prior_ = compile_classifier(choose_C(before, outside, y, groups))
        prior = self.prior_.decision_function(outside) if folds is None else out_of_fold(before, outside, y, folds)
        weights = np.exp(np.logaddexp(0, np.where(y == 1, -prior, prior)))  # 1 / g(label)
        weights = np.minimum(weights / weights.mean(), HEAVIEST)
        evidence = make_estimator(self.kind, self.seed)
        if self.C is not None:
            set_C(evidence, self.C)
        self.scales_, self.offset_ = np.ones(2), 0.0
        if folds is not None:
            evidence = self._tune(evidence, matrix, y, weights, prior, folds)
        self.evidence_ = compile_classifier(fit_weighted(evidence, matrix, y, weights))
        return self

    def restore(self, arrays: Arrays, columns: int) -> Factored:
        """As ``Grouped.restore``."""
        knots = arrays.numbers("knots", None)
        increasing = len(knots) <= len(QUINTILES) and (np.diff(knots) > 0).all()
        arrays.require(increasing, "knots", f"should be at most {len(QUINTILES)} numbers that increase")
        self.inputs_ = ExternalInputs(self.objects)
        self.inputs_.knots_ = knots
        self.scales_, self.offset_ = arrays.numbers("scales", 2), float(arrays.numbers("offset"))
        outside = self.inputs_.transform(np.zeros((0, len(EXTERNAL)))).shape[1]
        self.prior_ = LinearClassifier.restore(arrays.under("prior"), outside)
        evidence = make_estimator(self.kind, self.seed)
        self.evidence_ = restored(evidence, arrays.under("evidence"), columns - len(EXTERNAL) + outside)
        return self

    def arrays(self) -> dict[str, np.ndarray]:
        """As ``Grouped.arrays``."""
        own = {"knots": self.inputs_.knots_, "scales": self.scales_, "offset": np.array(self.offset_)}
        parts = {"prior": self.prior_, "evidence": self.evidence_}
        return own | {
            key: value for name, part in parts.items() for key, value in prefixed(name, part.arrays()).items()
        }

    @property
    def C_(self) -> float | None:
        """As ``Grouped.C_``, of the evidence."""
        return self.evidence_.C

    def _tune(
        self,
        evidence: BaseEstimator,
        matrix: np.ndarray,
        y: np.ndarray,
        weights: np.ndarray,
        prior: np.ndarray,
        folds: list[tuple[np.ndarray, np.ndarray]],
    ) -> BaseEstimator:
        """The evidence with the best C, and the scales that go with it, by the log loss of both together."""
        choices = [clone(evidence)]
        if self.C is None and C_choices(evidence):
            choices = [set_C(clone(evidence), value) for value in C_choices(evidence)]
        best = np.inf
        for choice in choices:
            parts = np.column_stack([out_of_fold(choice, matrix, y, folds, weights), prior])
            blend = LogisticRegression(C=1e6).fit(parts, y)
            loss = log_loss_of(y, blend.decision_function(parts)).mean()
            if loss < best:
                best, evidence = loss, choice
                self.scales_, self.offset_ = blend.coef_[0], float(blend.intercept_[0])
        return evidence

    def joined(self, X: np.ndarray) -> np.ndarray:
        """(rows, features + columns of the external inputs) what the evidence reads."""
        return np.hstack([X[:, : -len(EXTERNAL)], self.inputs_.transform(X[:, -len(EXTERNAL) :])])

    def parts(self, X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(rows,) evidence and (rows,) prior, as log-odds that add up to ``decision_function``."""
        outside = self.inputs_.transform(X[:, -len(EXTERNAL) :])
        evidence, prior = self.evidence_.decision_function(self.joined(X)), self.prior_.decision_function(outside)
        return self.scales_[0] * evidence, self.scales_[1] * prior + self.offset_

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """(rows,) log-odds of hallucination."""
        return np.sum(self.parts(X), axis=0)
