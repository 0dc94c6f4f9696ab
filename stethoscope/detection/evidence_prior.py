"""Fit evidence and prior of a hallucination separately, and join them by Bayes' rule.

The prior depends on the position and the object of a mention alone. HaloProbe (arXiv 2604.06165) observes that a
detector trained in the usual way mixes the two: late mentions are hallucinated more often, so whatever changes with the
position looks like evidence. It trains the evidence f with
classes that are balanced for every value of the external features e, the prior g on e alone, and joins them:

    p = f g / (f g + (1 - f)(1 - g)),    that is    logit p = logit f + logit g

With this balance, logit f is the logarithm of p(features | e, hallucinated) / p(features | e, grounded), in nats: above
0 the features are more typical of a hallucination than is usual for such a mention.

``explanation`` splits the probabilities of any detector into evidence and prior, and those of linear ones by feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import logit
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from stethoscope.core.token_table import object_index, require
from stethoscope.detection.array_classifiers import LinearClassifier
from stethoscope.detection.artifact import Arrays
from stethoscope.detection.calibrated_model import CalibratedModel
from stethoscope.detection.compiled_classifiers import compile_classifier
from stethoscope.detection.estimators import (
    C_choices,
    GroupedEstimator,
    Stacked,
    add_prefix,
    choose_C,
    fit_weighted,
    inner_folds,
    log_loss_of,
    make_estimator,
    out_of_fold,
    restore_estimator,
    set_C,
)

EXTERNAL = ("token", "mention_index", "repeat_index", "object")
"""Key columns that the prior reads: position, mention number, earlier mentions of the object, the object."""
MAX_CATEGORY = 5  # mention indices and repetitions from here on share a column
QUINTILES = (0.2, 0.4, 0.6, 0.8)
MAX_WEIGHT = 10.0  # of a mention, in mean weights: a single unlikely hallucination should not decide alone


def balance(prior: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Compute weights that balance the classes for every value of the prior: 1 / g(label), in mean weights, (rows,).

    Args:
        prior: (rows,) log-odds of hallucination, logit g.
        labels: (rows,) of 0 and 1.

    >>> balance(np.log([1 / 3, 1 / 3]), np.array([1, 0])).round(3).tolist()
    [1.5, 0.5]
    """
    weights = np.exp(log_loss_of(labels, prior))
    return np.minimum(weights / weights.mean(), MAX_WEIGHT)


def external_columns(table: pd.DataFrame, objects: tuple[str, ...]) -> np.ndarray:
    """Return the columns of ``EXTERNAL``, (rows, 4) float, the object as its ``object_index``."""
    require(table, EXTERNAL)
    plain = (table[name].to_numpy(dtype=float) for name in EXTERNAL[:-1])
    return np.column_stack([*plain, object_index(table, objects)])


class ExternalInputs(TransformerMixin, BaseEstimator):
    """Expand ``external_columns`` for a linear model: piecewise-linear position, indicators of other values."""

    def __init__(self, objects: int = 0) -> None:
        self.objects = objects

    def fit(self, X: np.ndarray, y: np.ndarray | None = None) -> ExternalInputs:
        """Place the knots of the position at its quintiles."""
        self.knots_ = np.unique(np.quantile(X[:, 0], QUINTILES))
        return self

    def transform(self, X: np.ndarray) -> np.ndarray:
        """Expand (rows, 4) external columns to (rows, columns) float."""
        position = X[:, :1]
        number, repeat = (X[:, column].clip(0, MAX_CATEGORY).astype(int) for column in (1, 2))
        indicators = X[:, 3:] == np.arange(self.objects)
        hinges = np.maximum(0, position - self.knots_)
        return np.hstack(
            [
                position,
                np.log1p(position),
                hinges,
                np.eye(MAX_CATEGORY + 1)[number],
                np.eye(MAX_CATEGORY + 1)[repeat],
                indicators,
            ]
        )


class Factored(GroupedEstimator):
    """Evidence and prior as one classifier of rows whose last columns are ``external_columns``.

    The evidence reads the features and, to know what is usual for such a mention, the external columns. Its rows are
    weighted by 1 / g(label), with g from inner folds. The two are joined as ``a logit f + b logit g + c``, fitted to
    scores from inner folds as well, so that an overconfident evidence (boosting) is scaled down. a, b and c depend on
    the training images alone.

    Args:
        kind: for the evidence, see ``make_estimator``.
        objects: number of objects with a code of their own in the last column.
        C: inverse regularisation strength of the evidence; None chooses it in inner folds.
        seed: seed of everything random.
    """

    def __init__(
        self, kind: str | Mapping[str, Any] = "logistic", objects: int = 0, C: float | None = None, seed: int = 0
    ) -> None:
        self.kind, self.objects, self.C, self.seed = kind, objects, C, seed

    def fit(self, X: np.ndarray, y: np.ndarray, groups: np.ndarray) -> Factored:
        """Fit on (rows, features + 4), labels and image ids; without inner folds if images are too few."""
        self.inputs_ = ExternalInputs(self.objects).fit(X[:, -len(EXTERNAL) :])
        matrix, external = self.join_inputs(X), self.inputs_.transform(X[:, -len(EXTERNAL) :])
        folds = inner_folds(groups, y)
        prior_estimator = Pipeline(
            [("scale", StandardScaler()), ("classify", LogisticRegression(max_iter=2000, C=0.1))]
        )
        self.prior_ = compile_classifier(choose_C(prior_estimator, external, y, groups))
        prior = self.prior_.decision_function(external)
        if folds is not None:
            prior = out_of_fold(prior_estimator, external, y, folds)
        weights = balance(prior, y)
        evidence = make_estimator(self.kind, self.seed)
        if self.C is not None:
            set_C(evidence, self.C)
        self.scales_, self.offset_ = np.ones(2), 0.0
        if folds is not None:
            evidence = self._tune(evidence, matrix, y, weights, prior, folds)
        self.evidence_ = compile_classifier(fit_weighted(evidence, matrix, y, weights))
        return self

    def restore(self, arrays: Arrays, columns: int) -> Factored:
        """Restore the fitted state; see ``GroupedEstimator.restore``."""
        knots = arrays.numbers("knots", None)
        increasing = len(knots) <= len(QUINTILES) and (np.diff(knots) > 0).all()
        arrays.require(increasing, "knots", f"should be at most {len(QUINTILES)} numbers that increase")
        self.inputs_ = ExternalInputs(self.objects)
        self.inputs_.knots_ = knots
        self.scales_, self.offset_ = arrays.numbers("scales", 2), float(arrays.numbers("offset"))
        external = self.inputs_.transform(np.zeros((0, len(EXTERNAL)))).shape[1]
        self.prior_ = LinearClassifier.restore(arrays.under("prior"), external)
        evidence = make_estimator(self.kind, self.seed)
        self.evidence_ = restore_estimator(evidence, arrays.under("evidence"), columns - len(EXTERNAL) + external)
        return self

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the fitted state; see ``GroupedEstimator.arrays``."""
        own = {"knots": self.inputs_.knots_, "scales": self.scales_, "offset": np.array(self.offset_)}
        parts = {"prior": self.prior_, "evidence": self.evidence_}
        return own | {
            key: value for name, part in parts.items() for key, value in add_prefix(name, part.arrays()).items()
        }

    @property
    def C_(self) -> float | None:
        """Inverse regularisation strength C of the evidence."""
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
        """Choose the evidence's C and set the scales, by the log loss of evidence and prior together."""
        choices = [clone(evidence)]
        if self.C is None and C_choices(evidence):
            choices = [set_C(clone(evidence), value) for value in C_choices(evidence)]
        best = np.inf
        for choice in choices:
            parts = np.column_stack([out_of_fold(choice, matrix, y, folds, weights), prior])
            blend = LogisticRegression(C=1e6).fit(parts, y)
            loss = log_loss_of(y, blend.decision_function(parts)).mean()
            if loss >= best:
                break  # as in ``choose_C``
            best, evidence = loss, choice
            self.scales_, self.offset_ = blend.coef_[0], float(blend.intercept_[0])
        return evidence

    def join_inputs(self, X: np.ndarray) -> np.ndarray:
        """Build the evidence's inputs: features and expanded external columns, (rows, columns)."""
        return np.hstack([X[:, : -len(EXTERNAL)], self.inputs_.transform(X[:, -len(EXTERNAL) :])])

    def parts(self, X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (rows,) evidence and (rows,) prior, log-odds that add up to ``decision_function``."""
        external = self.inputs_.transform(X[:, -len(EXTERNAL) :])
        evidence, prior = self.evidence_.decision_function(self.join_inputs(X)), self.prior_.decision_function(external)
        return self.scales_[0] * evidence, self.scales_[1] * prior + self.offset_

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Compute the log-odds of hallucination, (rows,)."""
        return np.sum(self.parts(X), axis=0)


REST = "(rest)"
"""Column of the remaining evidence: the intercept and the contributions of external columns."""


@dataclass(frozen=True)
class Explanation:
    """The parts of a detector's probabilities. Everything but the probability is in calibrated log-odds.

    Attributes:
        probability: (rows,) probability of hallucination, in [0, 1].
        evidence: (rows,) share of the model's own computation; above 0 it speaks for hallucination.
        prior: (rows,) share of the mention's position and object; without factorisation the share of hallucinated
            mentions in the fold that it was calibrated on. ``evidence + prior`` are the log-odds of ``probability``.
        contributions: (rows, features and ``REST``) terms of the features in the evidence; None unless it is linear.
    """

    probability: np.ndarray
    evidence: np.ndarray
    prior: np.ndarray
    contributions: pd.DataFrame | None = None

    def top(self, row: int, count: int = 3) -> list[tuple[str, float]]:
        """Return the features with the largest absolute contributions to a row; empty if not linear."""
        if self.contributions is None:
            return []
        values = self.contributions.drop(columns=REST).iloc[row]
        order = np.argsort(-np.abs(values.to_numpy()), kind="stable")[:count]
        return [(str(values.index[index]), float(values.iloc[index])) for index in order]


def explanation(
    fitted: CalibratedModel, matrix: np.ndarray, probability: np.ndarray, names: Sequence[str], base_rate: float
) -> Explanation:
    """Split the probabilities of a fitted classifier into their parts.

    Args:
        fitted: classifier with a calibration that is linear in log-odds.
        matrix: (rows, columns) design matrix; the first columns that the final classifier reads are those of ``names``.
        probability: (rows,) predictions of the classifier.
        names: names of the features.
        base_rate: share of hallucinated mentions where it was calibrated, the prior if none was fitted.
    """
    if not len(matrix):
        return Explanation(probability, np.zeros(0), np.zeros(0))
    model, (slope, intercept) = fitted.classifier, fitted.line
    while isinstance(model, Stacked):
        matrix, model = model.join_inputs(matrix), model.classifier_
    if isinstance(model, Factored):
        log_evidence, log_prior = model.parts(matrix)
        evidence, prior = slope * log_evidence, slope * log_prior + intercept
        scale = slope * model.scales_[0]
        matrix = model.join_inputs(matrix)
        model = model.evidence_
    else:
        prior = np.full(len(matrix), logit(base_rate))
        evidence = slope * model.decision_function(matrix) + intercept - prior
        scale = slope
    if not isinstance(model, LinearClassifier):
        return Explanation(probability, evidence, prior)
    own = scale * model.terms(matrix)[:, : len(names)]
    contributions = pd.DataFrame(own, columns=list(names)).assign(**{REST: evidence - own.sum(axis=1)})
    return Explanation(probability, evidence, prior, contributions)
