"""Explain warnings: evidence and prior in additive log-odds, and feature contributions of linear models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import logit

from stethoscope.detection.calibrated_model import CalibratedModel
from stethoscope.detection.estimators import Stacked
from stethoscope.detection.evidence_prior import Factored
from stethoscope.detection.inference import LinearClassifier

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
    model, (slope, intercept) = fitted.model, fitted.line
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
