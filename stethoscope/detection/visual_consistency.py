"""Score whether the image evidence that a token attended to is consistent with the object it names.

Relevancy says where in the picture the model looked when it wrote a name, and the feature ``attended_embedding`` holds
what it saw there. Mentions of objects that are present teach how every object looks to this model; hallucinated ones
teach what an image region looks like that evokes a name without showing the object. No label but the mention's own is
needed, and no pass but the one that gives the other features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import log_softmax
from sklearn.base import BaseEstimator, clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from stethoscope.detection.arrays import Arrays
from stethoscope.detection.estimators import Grouped, choose_C, inner_folds, prefixed, restored, set_C
from stethoscope.detection.inference import LinearClassifier, compile_classifier

FEATURE = "attended_embedding"
"""The feature whose columns are read here and nowhere else."""
COLUMNS = ("grounding_named", "grounding_other")
FIXED_C = 0.03
"""Inverse regularisation C; from 0.01 to 0.3 the AUROC on held-out mentions changes by less than 0.003."""
TOLERANCE = 1e-3
"""Of the fit: half the steps of the default, and the AUROC on held-out mentions changes by less than 0.0002."""
MOST_MENTIONS = 2**40
"""No count of a file is larger."""
NamedProbability = tuple[str | None, float]
"""An object, or None for none of those that are known, and the probability that a place looks like it."""


class GroundingClassifier(BaseEstimator):
    """What places look like: a multinomial logistic regression over the objects, and "none of them".

    Args:
        objects: number of objects that are told apart.
    """

    def __init__(self, objects: int = 0) -> None:
        self.objects = objects

    def fit(self, X: np.ndarray, y: np.ndarray) -> GroundingClassifier:
        """Learns from mentions.

        Args:
            X: (rows, dimensions of ``attended_embedding`` and the object's index, -1 for any that is not told apart).
            y: (rows,) labels: a hallucinated mention is one of nothing.
        """
        looks = np.where(y == 1, self.objects, X[:, -1]).astype(int)
        learned = (looks >= 0) & np.isfinite(X[:, :-1]).all(1)
        self.counts_ = np.bincount(looks[learned], minlength=self.objects + 1)
        self.classes_ = np.flatnonzero(self.counts_)
        self.model_ = None  # of one kind of place alone there is nothing to learn
        if len(self.classes_) > 1:
            classify = LogisticRegression(C=FIXED_C, tol=TOLERANCE, max_iter=1000)
            pipeline = Pipeline([("scale", StandardScaler()), ("classify", classify)])
            self.model_ = compile_classifier(pipeline.fit(X[learned, :-1], looks[learned]))
        return self

    def restore(self, arrays: Arrays, dimensions: int) -> GroundingClassifier:
        """Reads what ``arrays`` gave, of places with so many dimensions.

        Raises:
            ArtefactError: an array is missing, has another shape or type, or holds numbers that it cannot have.
        """
        self.counts_ = arrays.counts("counts", self.objects + 1, below=MOST_MENTIONS)
        self.classes_, self.model_ = np.flatnonzero(self.counts_), None
        if len(self.classes_) > 1:
            outputs = len(self.classes_) if len(self.classes_) > 2 else 1
            self.model_ = LinearClassifier.restore(arrays, dimensions, outputs)
        return self

    def arrays(self) -> dict[str, np.ndarray]:
        """What it has learned, by name."""
        return {"counts": self.counts_} | ({} if self.model_ is None else self.model_.arrays())

    def log_probabilities(self, X: np.ndarray) -> np.ndarray:
        """(rows, objects + 1) log-probability of what every place looks like, the last one nothing; -inf if never seen.

        Args:
            X: (rows, dimensions), without the object. A place with a NaN looks like nothing that is known: -inf.
        """
        found = np.full((len(X), self.objects + 1), -np.inf)
        known = np.flatnonzero(np.isfinite(X).all(1))
        if self.model_ is not None and len(known):
            scores = self.model_.decision_function(X[known])
            scores = scores if scores.ndim == 2 else np.stack([np.zeros(len(known)), scores], axis=1)
            found[np.ix_(known, self.classes_)] = log_softmax(scores, axis=1)
        return found

    def transform(self, X: np.ndarray) -> np.ndarray:
        """(rows, 2) how much more the place speaks for an object than for none, in nats; 0 where that is not known.

        log p(place | object) - log p(place | none), of the object that is named and the largest of all others. How
        often an object is named or invented has no part in it: that would be prejudice, not sight. (That an object was
        hardly ever there, so that its looks are not known, can still be told from the exact 0.)
        """
        looks = self.log_probabilities(X[:, :-1])
        likely = np.where(np.isfinite(looks), looks - np.log(np.maximum(self.counts_, 1)), np.nan)
        more, named = likely[:, :-1] - likely[:, -1:], X[:, -1].astype(int)
        made = np.zeros((len(X), len(COLUMNS)))
        there = np.flatnonzero(named >= 0)
        made[there, 0] = more[there, named[there]]
        more[there, named[there]] = np.nan
        made[there, 1] = np.where(np.isnan(more[there]), -np.inf, more[there]).max(1, initial=-np.inf)
        return np.where(np.isfinite(made), made, 0.0)


class VisualConsistency(Grouped):
    """Another classifier that reads, before its own columns, what ``GroundingClassifier`` makes of the last ones.

    It learns from columns that were made without the row's image, since a sight knows the places that it has learned
    from too well.

    Args:
        classifier: any of ``make_estimator`` or ``Factored``.
        size: number of the last columns, those of ``GroundingClassifier``.
        objects: as in ``GroundingClassifier``.
        C: inverse regularisation strength of the classifier; None chooses it in inner folds.
    """

    def __init__(self, classifier: BaseEstimator, size: int = 1, objects: int = 0, C: float | None = None) -> None:
        self.classifier, self.size, self.objects, self.C = classifier, size, objects, C

    def fit(self, X: np.ndarray, y: np.ndarray, groups: np.ndarray) -> VisualConsistency:
        """Learns from (rows, own columns, dimensions, object), labels and image ids."""
        own, places = X[:, : -self.size], X[:, -self.size :]
        self.grounding_ = GroundingClassifier(self.objects).fit(places, y)
        folds = inner_folds(groups, y)
        if folds is None:
            made = self.grounding_.transform(places)
        else:
            made = np.zeros((len(X), len(COLUMNS)))
            for learn, rest in folds:
                made[rest] = GroundingClassifier(self.objects).fit(places[learn], y[learn]).transform(places[rest])
        matrix, classifier = np.hstack([made, own]), clone(self.classifier)
        if isinstance(classifier, Grouped):
            self.classifier_ = classifier.fit(matrix, y, groups)
        elif self.C is None:
            self.classifier_ = compile_classifier(choose_C(classifier, matrix, y, groups))
        else:
            self.classifier_ = compile_classifier(set_C(classifier, self.C).fit(matrix, y))
        return self

    def restore(self, arrays: Arrays, columns: int) -> VisualConsistency:
        """As ``Grouped.restore``."""
        self.grounding_ = GroundingClassifier(self.objects).restore(arrays.under("grounding"), self.size - 1)
        self.classifier_ = restored(self.classifier, arrays.under("classifier"), columns - self.size + len(COLUMNS))
        return self

    def arrays(self) -> dict[str, np.ndarray]:
        """As ``Grouped.arrays``."""
        return prefixed("grounding", self.grounding_.arrays()) | prefixed("classifier", self.classifier_.arrays())

    @property
    def C_(self) -> float | None:
        """As ``Grouped.C_``, of the classifier."""
        own = self.classifier_
        return own.C_ if isinstance(own, Grouped) else own.C

    def joined(self, X: np.ndarray) -> np.ndarray:
        """(rows, 2 + own columns) what the classifier reads."""
        return np.hstack([self.grounding_.transform(X[:, -self.size :]), X[:, : -self.size]])

    def log_probabilities(self, X: np.ndarray) -> np.ndarray:
        """(rows, objects + 1) as ``GroundingClassifier.log_probabilities``."""
        return self.grounding_.log_probabilities(X[:, -self.size : -1])

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """(rows,) log-odds of hallucination."""
        return self.classifier_.decision_function(self.joined(X))


def most_likely(looks: np.ndarray, objects: Sequence[str], count: int = 3) -> list[tuple[NamedProbability, ...]]:
    """The most probable looks of every place.

    >>> most_likely(np.log([[0.2, 0.7, 0.1]]), ["cup", "fork"], 2)
    [(('fork', 0.7), ('cup', 0.2))]

    Args:
        looks: (rows, objects + 1) log-probabilities, the last one of nothing known.
        objects: their names.
        count: at most so many for a row; what was never seen in training is left out.
    """
    names = [*objects, None]
    best = np.argsort(-looks, axis=1, kind="stable")[:, :count]
    return [
        tuple((names[at], float(np.exp(row[at]))) for at in order if np.isfinite(row[at]))
        for row, order in zip(looks, best, strict=True)
    ]
