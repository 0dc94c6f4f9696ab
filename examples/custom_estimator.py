"""Add an estimator, the classifier inside a detector: here the share of hallucinations among the nearest mentions.

    PYTHONPATH=examples stethoscope train plugins=[custom_estimator] run=runs/first \
        detector.estimator._target_=custom_estimator.NearestMentions detector.estimator.neighbours=30
"""

from typing import Self

import numpy as np

from stethoscope.detection.base import Estimator


class NearestMentions(Estimator):
    """Give a mention the share of hallucinated ones among the nearest mentions of the training images."""

    def __init__(self, neighbours: int = 50) -> None:
        self.neighbours = neighbours

    def fit(self, X: np.ndarray, y: np.ndarray, sample_weight: np.ndarray | None = None) -> Self:
        """Keep the rows; they are standardised already, without gaps."""
        self.rows_, self.labels_ = X, y.astype(np.int64)
        self.weights_ = np.ones(len(y)) if sample_weight is None else sample_weight
        return self

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """Return (rows, 2) shares of grounded and hallucinated neighbours; one more of each kind is assumed."""
        distances = (X**2).sum(1)[:, None] + (self.rows_**2).sum(1) - 2 * X @ self.rows_.T
        nearest = np.argsort(distances, axis=1, kind="stable")[:, : self.neighbours]
        weights = self.weights_[nearest]
        share = (1 + (weights * self.labels_[nearest]).sum(1)) / (2 + weights.sum(1))
        return np.column_stack([1 - share, share])

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return what was learned; the detector's file holds these arrays, and the name of this class."""
        return {"rows": self.rows_, "labels": self.labels_, "weights": self.weights_}

    def from_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        """Restore it, and check that the arrays belong together."""
        self.rows_, self.labels_, self.weights_ = arrays["rows"], arrays["labels"], arrays["weights"]
        if not len(self.rows_) == len(self.labels_) == len(self.weights_):
            raise ValueError("rows, labels and weights should be of one length")
