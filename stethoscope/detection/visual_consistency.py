"""Score whether the image evidence that a token attended to is consistent with the object it names.

Relevancy gives the image regions that the model used to write a name; the feature read here is their embedding.
Grounded mentions show how each object looks to the model, hallucinated ones how evidence looks that leads to a name
without the object. The classifier, a multinomial logistic regression cross-fitted by image, needs no labels but
those of mentions, and no further forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from scipy.special import log_softmax
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from stethoscope.detection.array_classifiers import LinearClassifier
from stethoscope.detection.artifact import Arrays
from stethoscope.detection.compiled_classifiers import compile_classifier
from stethoscope.detection.estimators import (
    SharedFits,
    Stacked,
    add_prefix,
    cross_fit,
    inner_folds,
    make_once,
    restore_estimator,
)

FEATURE = "attended_embedding"
"""The feature whose columns are read here and nowhere else."""
COLUMNS = ("grounding_named", "grounding_other")
FIXED_C = 0.03
"""Inverse regularisation C; from 0.01 to 0.3 the AUROC on held-out mentions changes by less than 0.003."""
TOLERANCE, DRAFT_TOLERANCE = 1e-3, 3e-3
"""Tolerance of the fit: half the default's steps; the AUROC on held-out mentions changes by less than 0.0002. Drafts
take half of these again; their columns correlate to 0.998 with the others."""
MAX_MENTIONS = 2**40
"""Upper bound of a count in a file."""
NamedProbability = tuple[str | None, float]
"""An object, or None for no known object, and the probability that the evidence shows it."""


class GroundingClassifier(BaseEstimator):
    """Multinomial logistic regression of evidence over the objects and the class "none of them".

    Args:
        objects: number of objects with a class of their own.
        tolerance: of the fit.
    """

    def __init__(self, objects: int = 0, tolerance: float = TOLERANCE) -> None:
        self.objects, self.tolerance = objects, tolerance

    def fit(self, X: np.ndarray, y: np.ndarray) -> GroundingClassifier:
        """Fit on labelled mentions.

        Args:
            X: (rows, dimensions of ``attended_embedding`` and the object's index, -1 for any other object).
            y: (rows,) labels; a hallucinated mention counts as "none of them".
        """
        classes = np.where(y == 1, self.objects, X[:, -1]).astype(int)
        usable = (classes >= 0) & np.isfinite(X[:, :-1]).all(1)
        self.counts_ = np.bincount(classes[usable], minlength=self.objects + 1)
        self.classes_ = np.flatnonzero(self.counts_)
        self.model_ = None  # a single class cannot be fitted
        if len(self.classes_) > 1:
            classify = LogisticRegression(C=FIXED_C, tol=self.tolerance, max_iter=1000)
            pipeline = Pipeline([("scale", StandardScaler()), ("classify", classify)])
            self.model_ = compile_classifier(pipeline.fit(X[usable, :-1], classes[usable]))
        return self

    def restore(self, arrays: Arrays, dimensions: int) -> GroundingClassifier:
        """Restore the fitted state from what ``arrays`` returned.

        Args:
            arrays: arrays of a file by name.
            dimensions: number of dimensions of the evidence.

        Raises:
            ArtefactError: an array is missing, has another shape or type, or holds invalid numbers.
        """
        self.counts_ = arrays.counts("counts", self.objects + 1, below=MAX_MENTIONS)
        self.classes_, self.model_ = np.flatnonzero(self.counts_), None
        if len(self.classes_) > 1:
            outputs = len(self.classes_) if len(self.classes_) > 2 else 1
            self.model_ = LinearClassifier.restore(arrays, dimensions, outputs)
        return self

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the fitted state as arrays by name."""
        return {"counts": self.counts_} | ({} if self.model_ is None else self.model_.arrays())

    def log_probabilities(self, X: np.ndarray) -> np.ndarray:
        """Compute log-probabilities, (rows, objects + 1), in nats, the last for "none"; -inf if never seen.

        Args:
            X: (rows, dimensions) evidence without the object; rows with a NaN are -inf throughout.
        """
        log_probabilities = np.full((len(X), self.objects + 1), -np.inf)
        known = np.flatnonzero(np.isfinite(X).all(1))
        if self.model_ is not None and len(known):
            scores = self.model_.decision_function(X[known])
            scores = scores if scores.ndim == 2 else np.stack([np.zeros(len(known)), scores], axis=1)
            log_probabilities[np.ix_(known, self.classes_)] = log_softmax(scores, axis=1)
        return log_probabilities

    def transform(self, X: np.ndarray) -> np.ndarray:
        """Compute log-likelihood ratios of objects against "none", (rows, 2), in nats; 0 if unknown.

        log p(evidence | object) - log p(evidence | none), of the named object and the largest of all others. Class
        frequencies are divided out, so that how often an object is named or hallucinated has no influence. (An exact 0
        still reveals that an object was too rare to be known.)
        """
        posterior = self.log_probabilities(X[:, :-1])
        likelihood = np.where(np.isfinite(posterior), posterior - np.log(np.maximum(self.counts_, 1)), np.nan)
        ratios, objects = likelihood[:, :-1] - likelihood[:, -1:], X[:, -1].astype(int)
        columns = np.zeros((len(X), len(COLUMNS)))
        rows = np.flatnonzero(objects >= 0)
        columns[rows, 0] = ratios[rows, objects[rows]]
        ratios[rows, objects[rows]] = np.nan
        columns[rows, 1] = np.where(np.isnan(ratios[rows]), -np.inf, ratios[rows]).max(1, initial=-np.inf)
        return np.where(np.isfinite(columns), columns, 0.0)


def fit_grounding(
    evidence: np.ndarray,
    evidence_labels: np.ndarray,
    further_evidence: np.ndarray,
    further_labels: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    objects: int,
    draft: bool,
) -> tuple[GroundingClassifier, np.ndarray]:
    """Fit a classifier of evidence on mentions, and reduce each of them by one that was fitted without its image.

    Args:
        evidence: (rows, dimensions and the object) of ``GroundingClassifier.fit``.
        evidence_labels: (rows,) that it learns.
        further_evidence: (others, dimensions and the object) of further mentions, of which every classifier learns.
        further_labels: (others,) of theirs.
        labels: (rows,) of 0 and 1, by which the folds are made.
        groups: (rows,) image ids.
        objects: as in ``GroundingClassifier``.
        draft: as in ``VisualConsistency``.

    Returns:
        The classifier and (rows, 2) columns, which are its own where there are too few images for folds.
    """

    def fitted_on(rows: np.ndarray | slice) -> GroundingClassifier:
        parts = np.vstack([evidence[rows], further_evidence]), np.concatenate([evidence_labels[rows], further_labels])
        return GroundingClassifier(objects, DRAFT_TOLERANCE if draft else TOLERANCE).fit(*parts)

    folds = inner_folds(groups, labels, draft)
    return cross_fit(fitted_on, partial(fitted_on, slice(None)), evidence, len(COLUMNS), folds, draft)


class VisualConsistency(Stacked):
    """A classifier whose first columns are the output of ``GroundingClassifier`` on the last ones.

    It is fitted on cross-fitted columns, made without the row's image, because a ``GroundingClassifier`` is
    overconfident on its own training mentions.

    Args:
        classifier: unfitted result of ``make_estimator``, or ``Factored``.
        size: number of last columns, which ``GroundingClassifier`` reads.
        objects: as in ``GroundingClassifier``.
        C: inverse regularisation strength of the classifier; None chooses it in inner folds.
        taught: take the labels of the evidence from the last own column, the model's log-odds of a yes when it is asked
            whether the object is there.
        unlabelled: (rows, columns) of further mentions for the evidence, with ``taught``; None for none.
        draft: cross-fit in fewer folds, with ``DRAFT_TOLERANCE``, and judge others by the classifier of the last fold.
        shared: fits in common with other detectors; None for none.
    """

    def __init__(
        self,
        classifier: BaseEstimator,
        size: int = 1,
        objects: int = 0,
        C: float | None = None,
        taught: bool = False,
        unlabelled: np.ndarray | None = None,
        draft: bool = False,
        shared: SharedFits | None = None,
    ) -> None:
        self.classifier, self.size, self.objects, self.C = classifier, size, objects, C
        self.taught, self.unlabelled, self.draft, self.shared = taught, unlabelled, draft, shared

    def fit(self, X: np.ndarray, y: np.ndarray, groups: np.ndarray) -> VisualConsistency:
        """Fit on (rows, own columns + dimensions + object), labels and image ids."""
        own, evidence = X[:, : -self.size], X[:, -self.size :]
        more = X[:0] if self.unlabelled is None else self.unlabelled
        labels, further = self._evidence_labels(X, y), self._evidence_labels(more, np.zeros(len(more)))
        data = (evidence, labels, more[:, -self.size :], further, y, groups)
        self.grounding_, grounding = make_once(self.shared, fit_grounding, *data, self.objects, self.draft)
        self._fit_classifier(np.hstack([grounding, own]), y, groups)
        self.held_out_ = getattr(self.classifier_, "held_out_", None)
        return self

    def _evidence_labels(self, X: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return the labels that the evidence is fitted to, (rows,)."""
        return (X[:, -self.size - 1] < 0).astype(int) if self.taught else y

    def restore(self, arrays: Arrays, columns: int) -> VisualConsistency:
        """Restore the fitted state; see ``GroupedEstimator.restore``."""
        self.grounding_ = GroundingClassifier(self.objects).restore(arrays.under("grounding"), self.size - 1)
        self.classifier_ = restore_estimator(
            self.classifier, arrays.under("classifier"), columns - self.size + len(COLUMNS)
        )
        return self

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the fitted state; see ``GroupedEstimator.arrays``."""
        return add_prefix("grounding", self.grounding_.arrays()) | add_prefix("classifier", self.classifier_.arrays())

    def join_inputs(self, X: np.ndarray) -> np.ndarray:
        """Build the classifier's inputs, (rows, 2 + own columns)."""
        return np.hstack([self.grounding_.transform(X[:, -self.size :]), X[:, : -self.size]])

    def log_probabilities(self, X: np.ndarray) -> np.ndarray:
        """Compute log-probabilities, (rows, objects + 1); see ``GroundingClassifier.log_probabilities``."""
        return self.grounding_.log_probabilities(X[:, -self.size : -1])


def most_likely(
    log_probabilities: np.ndarray, objects: Sequence[str], count: int = 3
) -> list[tuple[NamedProbability, ...]]:
    """Return the most probable objects of every row.

    >>> most_likely(np.log([[0.2, 0.7, 0.1]]), ["cup", "fork"], 2)
    [(('fork', 0.7), ('cup', 0.2))]

    Args:
        log_probabilities: (rows, objects + 1), in nats, the last column for no known object.
        objects: names of the objects.
        count: maximum number of objects per row; those never seen in training are left out.
    """
    names = [*objects, None]
    best = np.argsort(-log_probabilities, axis=1, kind="stable")[:, :count]
    return [
        tuple((names[index], float(np.exp(row[index]))) for index in order if np.isfinite(row[index]))
        for row, order in zip(log_probabilities, best, strict=True)
    ]
