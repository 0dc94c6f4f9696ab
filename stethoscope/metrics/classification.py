"""Compute detection metrics of scores. A higher score means hallucinated; label 1 is hallucinated, 0 grounded.

Every function takes ``weights`` of shape (n,), or (replicates, n) for a value per replicate, so that the bootstrap
evaluates all replicates at once. A weight of 2 is the same as having the item twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

FloatOrArray = float | np.ndarray
"""A float for weights of shape (n,) or none, an array (replicates,) for weights of shape (replicates, n)."""


def _checked(
    labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """Validate labels, scores and weights and convert them to arrays.

    Weights have one row per item: sorting then moves whole rows and sums over items run over all replicates at once,
    which is several times faster than one row per replicate.

    Returns:
        Labels as bool (n,), scores as float64 (n,), weights (n, replicates), and whether a single value is expected.
    """
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if labels.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(f"labels {labels.shape} and scores {scores.shape} should have one common dimension")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels should be 0 or 1")
    if not np.isfinite(scores).all():
        raise ValueError(f"{int((~np.isfinite(scores)).sum())} of {scores.size} scores are not finite")
    matrix = np.ones((1, labels.size)) if weights is None else np.atleast_2d(np.asarray(weights, dtype=np.float64))
    if matrix.ndim != 2 or matrix.shape[1] != labels.size:
        raise ValueError(f"weights {matrix.shape} should have {labels.size} columns, one per item")
    if matrix.size and not (matrix.min() >= 0 and matrix.max() < np.inf):  # a NaN fails both
        raise ValueError("weights should be finite and not negative")
    return labels.astype(bool), scores, np.ascontiguousarray(matrix.T), weights is None or np.ndim(weights) == 1


def _result(values: np.ndarray, single: bool) -> FloatOrArray:
    return float(values[0]) if single else values


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divide element by element, with NaN where the denominator is 0."""
    shape = np.broadcast_shapes(numerator.shape, denominator.shape)
    return np.divide(numerator, denominator, out=np.full(shape, np.nan), where=denominator > 0)


def _gather(
    labels: np.ndarray, matrix: np.ndarray, order: np.ndarray, fresh: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Order the (rows, replicates) weights of both classes; rows not ``fresh`` join the row above."""
    weights = matrix[order]
    positive = weights * labels[order, None]
    negative = np.subtract(weights, positive, out=weights)
    if fresh.all():
        return positive, negative
    runs = np.flatnonzero(fresh)
    return np.add.reduceat(positive, runs, axis=0), np.add.reduceat(negative, runs, axis=0)


def _dot(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Sum the product over rows, (replicates,)."""
    return np.einsum("kr,kr->r", first, second)


@dataclass(frozen=True)
class Ranking:
    """Weight of either class at each distinct score, from the highest score to the lowest.

    Attributes:
        positive: (distinct scores, replicates) weight of the hallucinated items.
        negative: (distinct scores, replicates) weight of the grounded items.
    """

    positive: np.ndarray
    negative: np.ndarray

    @classmethod
    def of(cls, labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> Ranking:
        """Sort the items once for all replicates.

        Args:
            labels: (n,) of 0 and 1.
            scores: (n,) finite.
            weights: None, (n,) or (replicates, n), at least 0.

        Raises:
            ValueError: shapes, labels, scores or weights are not as stated.
        """
        labels, scores, matrix, _ = _checked(labels, scores, weights)
        order = np.argsort(-scores, kind="stable")
        return cls(*_gather(labels, matrix, order, np.diff(scores[order], prepend=np.nan) != 0))

    @cached_property
    def true(self) -> np.ndarray:
        """(distinct scores, replicates) weight of the hallucinated items at this score or above."""
        return np.cumsum(self.positive, axis=0)

    @cached_property
    def false(self) -> np.ndarray:
        """(distinct scores, replicates) weight of the grounded items at this score or above."""
        return np.cumsum(self.negative, axis=0)

    @cached_property
    def totals(self) -> tuple[np.ndarray, np.ndarray]:
        """(replicates,) weight of all hallucinated and of all grounded items."""
        return self.positive.sum(axis=0), self.negative.sum(axis=0)

    def auroc(self) -> np.ndarray:
        """Compute the area under the ROC curve, (replicates,) in [0, 1]."""
        pairs = np.prod(self.totals, axis=0)
        # pairs in the wrong order: grounded items above each hallucinated one, and half of those at the same score
        wrong = _dot(self.positive, self.false) - _dot(self.positive, self.negative) / 2
        return _divide(pairs - wrong, pairs)

    def auprc(self) -> np.ndarray:
        """Compute the average precision, (replicates,) in [0, 1], of the hallucinated items."""
        flagged = self.true + self.false
        precision = np.divide(self.true, flagged, out=flagged, where=flagged > 0)
        return self._both(_dot(self.positive, precision), self.totals[0])

    def swapped(self) -> Ranking:
        """Reverse the ranking and exchange the classes: grounded items become the positive class."""
        return Ranking(self.negative[::-1], self.positive[::-1])

    def fpr_at_tpr(self, level: float) -> np.ndarray:
        """Compute the lowest false-positive rate, (replicates,), at which the true-positive rate is ``level``."""
        if not len(self.positive):
            return np.full(self.positive.shape[1], np.nan)
        # the slack keeps rounding of level * total from requiring one more item
        first = np.argmax(self.true >= level * self.totals[0] * (1 - 1e-12), axis=0)
        return self._both(self.false[first, np.arange(first.size)], self.totals[1])

    def recall_at_precision(self, level: float) -> np.ndarray:
        """Compute the highest recall, (replicates,), at a precision of at least ``level``; else 0."""
        precise = self.true >= level * (self.true + self.false) * (1 - 1e-12)
        return self._both(np.max(self.true * precise, axis=0, initial=0.0), self.totals[0])

    def _both(self, numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
        """Divide, with NaN in replicates that lack one of the classes."""
        lacking = np.minimum(*self.totals) <= 0
        return np.where(lacking, np.nan, _divide(numerator, denominator))


def auroc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> FloatOrArray:
    """Compute the area under the ROC curve, in [0, 1]; 0.5 is chance.

    It is the probability that a hallucinated item scores higher than a grounded one. Ties count one half. NaN if a
    class is missing. Arguments and errors are those of ``Ranking.of``.

    >>> auroc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    0.75
    >>> auroc([0, 1], [0.5, 0.5])
    0.5
    """
    single = weights is None or np.ndim(weights) == 1
    return _result(Ranking.of(labels, scores, weights).auroc(), single)


def auprc(
    labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None, positive: Literal[0, 1] = 1
) -> FloatOrArray:
    """Compute the average precision in [0, 1]: the sum of (recall step) x (precision).

    There is no interpolation. A score without information gets the share of the positive class. With ``positive=0``
    grounded items are the positive class and low scores speak for them (the convention of GLSim and HaloProbe).
    NaN if a class is missing.

    >>> round(auprc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]), 4)
    0.8333
    >>> auprc([0, 0, 0, 1], [0.5, 0.5, 0.5, 0.5])
    0.25
    """
    single = weights is None or np.ndim(weights) == 1
    ranking = Ranking.of(labels, scores, weights)
    return _result((ranking if positive else ranking.swapped()).auprc(), single)


def fpr_at_tpr(
    labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None, level: float = 0.95
) -> FloatOrArray:
    """Compute the false-positive rate at the threshold that flags ``level`` of the hallucinated items.

    >>> fpr_at_tpr([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    0.5
    """
    single = weights is None or np.ndim(weights) == 1
    return _result(Ranking.of(labels, scores, weights).fpr_at_tpr(level), single)


def recall_at_precision(
    labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None, level: float = 0.9
) -> FloatOrArray:
    """Compute the highest recall of a threshold whose precision is at least ``level``, in [0, 1].

    >>> recall_at_precision([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    0.5
    """
    single = weights is None or np.ndim(weights) == 1
    return _result(Ranking.of(labels, scores, weights).recall_at_precision(level), single)


def auroc_controlled(
    labels: np.ndarray,
    scores: np.ndarray,
    positions: np.ndarray,
    weights: np.ndarray | None = None,
    width: int = 10,
    average: Literal["pairs", "bins"] = "pairs",
) -> FloatOrArray:
    """Compute the position-controlled AUROC: the mean AUROC within bins of ``width`` token positions.

    Only items at similar positions of an answer are compared, so a score that merely follows the position (late
    mentions are hallucinated more often) gets 0.5. With ``average="pairs"`` a bin counts by its number of
    (hallucinated, grounded) pairs, which makes the result the share of all comparable pairs that are in the right
    order and keeps nearly empty bins from adding noise; with ``"bins"`` every bin that has both classes counts the
    same. NaN if no bin has both classes.

    Args:
        labels: (n,) of 0 and 1.
        scores: (n,) finite.
        weights: None, (n,) or (replicates, n), at least 0.
        positions: (n,) token positions, integers from 0.
        width: positions per bin, at least 1.
        average: how bins are averaged: by number of ``pairs``, or all ``bins`` alike.

    >>> auroc_controlled([0, 1, 0, 1], [1, 2, 11, 12], [1, 2, 11, 12])
    1.0
    >>> auroc_controlled([0, 0, 1, 1], [1, 2, 11, 12], [1, 2, 11, 12])
    nan
    """
    positions = np.asarray(positions)
    if width < 1:
        raise ValueError(f"width={width} should be at least 1")
    return auroc_within(labels, scores, positions // width, weights, average)


def auroc_within(
    labels: np.ndarray,
    scores: np.ndarray,
    bins: np.ndarray,
    weights: np.ndarray | None = None,
    average: Literal["pairs", "bins"] = "pairs",
) -> FloatOrArray:
    """Compute the mean of the AUROCs within bins, in [0, 1].

    Only items of the same bin are compared, so whatever defines the bins cannot raise the score.

    Args:
        labels: (n,) of 0 and 1.
        scores: (n,) finite.
        weights: None, (n,) or (replicates, n), at least 0.
        bins: (n,) integers, equal for items that may be compared.
        average: a bin counts by its number of (hallucinated, grounded) ``pairs``, or all ``bins`` count the same.

    >>> auroc_within([0, 1, 0, 1], [0.1, 0.2, 0.9, 0.8], [7, 7, 8, 8])
    0.5
    """
    labels, scores, matrix, single = _checked(labels, scores, weights)
    bins = np.asarray(bins)
    if bins.shape != labels.shape or average not in ("pairs", "bins"):
        raise ValueError(f"bins {bins.shape} should be {labels.shape} and average={average!r} pairs or bins")
    if not labels.size:
        return _result(np.full(matrix.shape[1], np.nan), single)
    right, pairs = _pairs_within(labels, scores, bins, matrix)
    if average == "bins":
        right, pairs = np.nan_to_num(_divide(right, pairs)), (pairs > 0).astype(float)
    return _result(_divide(right.sum(axis=0), pairs.sum(axis=0)), single)


def comparable(labels: np.ndarray, bins: np.ndarray) -> dict[str, float]:
    """Count the ``pairs`` that ``auroc_within`` compares, the ``items`` in them and their ``share``.

    >>> comparable([0, 1, 1, 0], [7, 7, 7, 8])
    {'pairs': 2, 'items': 3, 'share': 0.75}
    """
    labels = np.asarray(labels)
    index = np.unique(np.asarray(bins), return_inverse=True)[1].ravel()
    positives, negatives = (np.bincount(index[labels == kind], minlength=labels.size) for kind in (1, 0))
    items = int(((positives > 0) & (negatives > 0))[index].sum())
    share = items / labels.size if labels.size else 0.0
    return {"pairs": int((positives * negatives).sum()), "items": items, "share": share}


def _pairs_within(
    labels: np.ndarray, scores: np.ndarray, bins: np.ndarray, matrix: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sum the weights of pairs within bins, (bins, replicates): those in the right order, and all."""
    order = np.lexsort((-scores, bins))
    bins, scores = bins[order], scores[order]
    opens = np.diff(bins, prepend=bins[0] - 1) != 0
    fresh = opens | (np.diff(scores, prepend=np.nan) != 0)
    positive, negative = _gather(labels, matrix, order, fresh)
    starts = np.flatnonzero(opens[fresh])
    positives, negatives = (np.add.reduceat(part, starts, axis=0) for part in (positive, negative))
    # grounded items above each row and half of those at its score; those of earlier bins are subtracted bin by bin
    above = np.cumsum(negative, axis=0)
    above -= negative / 2
    earlier = np.cumsum(negatives, axis=0) - negatives
    wrong = np.add.reduceat(np.multiply(positive, above, out=above), starts, axis=0) - positives * earlier
    return positives * negatives - wrong, positives * negatives


def _check_probabilities(scores: np.ndarray) -> None:
    """Raise ``ValueError`` unless all scores are in [0, 1]."""
    if scores.size and not (scores.min() >= 0 and scores.max() <= 1):
        raise ValueError(f"scores from {scores.min():.4g} to {scores.max():.4g} should be probabilities in [0, 1]")


def _bin_edges(scores: np.ndarray, bins: int, equal: str) -> np.ndarray:
    """Return the (bins - 1,) inner edges of bins; a score on an edge belongs to the bin below it."""
    if bins < 1 or equal not in ("width", "mass"):
        raise ValueError(f"bins={bins} should be at least 1 and equal={equal!r} should be width or mass")
    inner = np.linspace(0, 1, bins + 1)[1:-1]
    return np.quantile(scores, inner) if equal == "mass" and scores.size else inner


def _bin_sums(
    labels: np.ndarray, scores: np.ndarray, matrix: np.ndarray, bins: int, equal: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sum weights, weighted labels and weighted scores within bins, (replicates, bins) each."""
    _check_probabilities(scores)
    member = np.zeros((scores.size, bins))
    member[np.arange(scores.size), np.searchsorted(_bin_edges(scores, bins, equal), scores)] = 1
    return matrix.T @ member, matrix.T @ (member * labels[:, None]), matrix.T @ (member * scores[:, None])


def ece(
    labels: np.ndarray,
    scores: np.ndarray,
    weights: np.ndarray | None = None,
    bins: int = 10,
    equal: Literal["width", "mass"] = "width",
) -> FloatOrArray:
    """Compute the expected calibration error, in [0, 1]; 0 is perfect calibration.

    It is the mean over bins, weighted by size, of |share of hallucinated items - mean probability|. Default: ten bins
    of equal width (Naeini et al. 2015, eq. 3; Guo et al. 2017, eq. 3, in its L1 form). Their edges do not depend on the
    data, so that detectors and bootstrap replicates share them; bins of equal mass spread the items evenly when most
    probabilities are small. The plug-in estimate is biased upwards in small samples, and its bootstrap replicates are
    biased once more: read the interval as a conservative one.

    Args:
        labels: (n,) of 0 and 1.
        weights: None, (n,) or (replicates, n), at least 0.
        scores: (n,) probabilities of hallucination in [0, 1].
        bins: number of bins.
        equal: bins of equal ``width`` on [0, 1], or of equal ``mass`` (quantiles of the unweighted scores).

    Raises:
        ValueError: a score is not a probability.

    >>> round(ece([0, 1, 1, 1], [0.75, 0.75, 0.75, 0.75]), 4), round(ece([0, 1], [0.2, 0.9]), 4)
    (0.0, 0.15)
    """
    labels, scores, matrix, single = _checked(labels, scores, weights)
    weight, hits, mean = _bin_sums(labels, scores, matrix, bins, equal)
    return _result(_divide(np.abs(hits - mean).sum(axis=1), weight.sum(axis=1)), single)


def reliability(
    labels: np.ndarray, scores: np.ndarray, bins: int = 10, equal: Literal["width", "mass"] = "width"
) -> list[dict[str, float]]:
    """Compute the points of the reliability diagram, one for each bin that is not empty.

    >>> reliability([0, 1, 1], [0.1, 0.95, 0.97])
    [{'probability': 0.1, 'share': 0.0, 'count': 1}, {'probability': 0.96, 'share': 1.0, 'count': 2}]
    """
    labels, scores, matrix, _ = _checked(labels, scores, None)
    weight, hits, mean = (sums[0] for sums in _bin_sums(labels, scores, matrix, bins, equal))
    return [
        {"probability": float(m / w), "share": float(h / w), "count": int(w)}
        for w, h, m in zip(weight, hits, mean, strict=True)
        if w
    ]


def brier(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> FloatOrArray:
    """Compute the mean squared difference between probability and label, in [0, 1]; lower is better.

    Source: Brier 1950, for two classes.

    >>> brier([0, 1], [0.5, 0.5])
    0.25
    """
    labels, scores, matrix, single = _checked(labels, scores, weights)
    _check_probabilities(scores)
    return _result(_divide(matrix.T @ (scores - labels) ** 2, matrix.sum(axis=0)), single)


def base_rate(labels: np.ndarray, weights: np.ndarray | None = None) -> FloatOrArray:
    """Compute the share of hallucinated items, in [0, 1].

    >>> base_rate([0, 0, 0, 1])
    0.25
    """
    labels, _, matrix, single = _checked(labels, np.zeros(np.shape(labels)), weights)
    return _result(_divide(matrix.T @ labels.astype(float), matrix.sum(axis=0)), single)
