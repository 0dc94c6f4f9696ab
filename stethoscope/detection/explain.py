"""Why a warning: evidence and prior as log-odds that add up, and for a linear model what every feature adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import logit

from stethoscope.detection.estimators import CalibratedModel
from stethoscope.detection.evidence_prior import Factored
from stethoscope.detection.inference import LinearClassifier
from stethoscope.detection.visual_consistency import VisualConsistency

REST = "(rest)"
"""What the pushes of single features leave of the evidence: the constant, and what is usual for such a mention."""


@dataclass(frozen=True)
class Explanation:
    """Why a detector gives its probabilities. Everything but the probability is in calibrated log-odds.

    Attributes:
        probability: (rows,) of hallucination.
        evidence: (rows,) what the model's own computation says, above 0 where it speaks for hallucination.
        prior: (rows,) what place and name of the mention say before one looks; without factorisation the share of
            hallucinated mentions in training. ``evidence + prior`` are the log-odds of ``probability``.
        pushes: (rows, features and ``REST``) what every feature adds to the evidence; None unless it is linear.
    """

    probability: np.ndarray
    evidence: np.ndarray
    prior: np.ndarray
    pushes: pd.DataFrame | None = None

    def top(self, row: int, count: int = 3) -> list[tuple[str, float]]:
        """The features that push a row the most, either way, strongest first; empty if the evidence is not linear."""
        if self.pushes is None:
            return []
        pushes = self.pushes.drop(columns=REST).iloc[row]
        order = np.argsort(-np.abs(pushes.to_numpy()), kind="stable")[:count]
        return [(str(pushes.index[at]), float(pushes.iloc[at])) for at in order]


def pushes(terms: np.ndarray, names: Sequence[str], evidence: np.ndarray, scale: float) -> pd.DataFrame:
    """Terms of the named first columns, scaled, and ``REST``, so that every row adds up to its evidence."""
    own = scale * terms[:, : len(names)]
    frame = pd.DataFrame(own, columns=list(names))
    frame[REST] = evidence - own.sum(axis=1)
    return frame


def explanation(
    fitted: CalibratedModel, matrix: np.ndarray, probability: np.ndarray, names: Sequence[str], base_rate: float
) -> Explanation:
    """Why a fitted classifier gives its probabilities.

    Args:
        fitted: the classifier, its calibration a line in log-odds.
        matrix: (rows, columns) what it reads; the first ones, after ``VisualConsistency``, are those of ``names``.
        probability: (rows,) what it gives.
        names: of features.
        base_rate: share of hallucinated mentions in training, the prior where none was learned.
    """
    if not len(matrix):
        return Explanation(probability, np.zeros(0), np.zeros(0))
    model, (slope, intercept) = fitted.model, fitted.line
    if isinstance(model, VisualConsistency):
        model, matrix = model.classifier_, model.joined(matrix)
    if isinstance(model, Factored):
        own, before = model.parts(matrix)
        evidence, prior = slope * own, slope * before + intercept
        model, matrix, scale = model.evidence_, model.joined(matrix), slope * model.scales_[0]
    else:
        prior = np.full(len(matrix), logit(base_rate))
        evidence = slope * model.decision_function(matrix) + intercept - prior
        scale = slope
    terms = model.terms(matrix) if isinstance(model, LinearClassifier) else None
    return Explanation(probability, evidence, prior, None if terms is None else pushes(terms, names, evidence, scale))
