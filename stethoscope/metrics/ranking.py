"""Rank labelled items by score, once for all bootstrap replicates, and compute what depends on the order alone.

A higher score means hallucinated; label 1 is hallucinated, 0 grounded. A weight of 2 is the same as having the item
twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.special import digamma

FloatOrArray = float | np.ndarray
"""A float for weights of shape (n,) or none, an array (replicates,) for weights of shape (replicates, n)."""

LOOKED_UP = 10**6  # largest count whose sum of harmonic numbers is looked up
BLOCK = 16  # rows of a block of sums


def checked(
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


def as_result(values: np.ndarray, single: bool) -> FloatOrArray:
    """Return the (replicates,) values, or the only one as a float."""
    return float(values[0]) if single else values


def divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divide element by element, with NaN where the denominator is 0."""
    shape = np.broadcast_shapes(numerator.shape, denominator.shape)
    return np.divide(numerator, denominator, out=np.full(shape, np.nan), where=denominator > 0)


def cumulate(matrix: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Sum up the first 0, 1, ..., k of some rows, (k + 1, replicates).

    ``np.cumsum`` over rows waits for every sum before the next; blocks of rows side by side take half the time.

    Args:
        matrix: (n, replicates), at least 0.
        rows: (k,) indices of rows, in the order of the sum.

    >>> cumulate(np.array([[1.0], [2.0], [4.0]]), np.array([2, 0])).T.tolist()
    [[0.0, 4.0, 5.0]]
    """
    count, replicates = len(rows), matrix.shape[1]
    blocks = -(-count // BLOCK)
    sums = np.zeros((1 + blocks * BLOCK, replicates))
    np.take(matrix, rows, axis=0, out=sums[1 : 1 + count], mode="clip")  # other modes copy
    parts = sums[1:].reshape(blocks, BLOCK, replicates)
    for row in range(1, BLOCK):
        parts[:, row] += parts[:, row - 1]
    parts[1:] += np.cumsum(parts[:-1, -1], axis=0)[:, None]
    return sums[: 1 + count]


def harmonic(count: np.ndarray) -> np.ndarray:
    """Compute the harmonic numbers H(n) = 1 + 1/2 + ... + 1/n of counts, also of counts that are not whole.

    >>> harmonic(np.array([0.0, 1.0, 2.0, 4.0])).round(4).tolist()
    [0.0, 1.0, 1.5, 2.0833]
    """
    return digamma(count + 1) + np.euler_gamma


def _harmonic_sums(count: np.ndarray) -> np.ndarray:
    """Compute H(0) + ... + H(n - 1) = n H(n) - n of counts; whole ones are looked up, which is ten times as fast."""
    whole = count.astype(np.intp)
    if not (whole == count).all() or whole.max(initial=0) > LOOKED_UP:
        return count * harmonic(count) - count
    numbers = np.arange(whole.max(initial=0) + 1, dtype=np.float64)
    return (numbers * harmonic(numbers) - numbers).take(whole)


def _dot(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Sum the product over rows, (replicates,)."""
    return np.einsum("kr,kr->r", first, second)


@dataclass(frozen=True)
class Order:
    """The order of labelled items by falling score, for any weights.

    Attributes:
        labels: (n,) bool, in this order.
        rows: (n,) index of every item.
        starts: (distinct scores,) where each score begins.
    """

    labels: np.ndarray
    rows: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, labels: np.ndarray, scores: np.ndarray) -> Order:
        """Sort items.

        Args:
            labels: (n,) bool.
            scores: (n,) finite.
        """
        rows = np.argsort(-scores, kind="stable")
        return cls(labels[rows], rows, np.flatnonzero(np.diff(scores[rows], prepend=np.nan) != 0))

    def by_score(self, weights: np.ndarray) -> np.ndarray:
        """Add up (n, replicates) in this order where scores are equal, (distinct scores, replicates)."""
        return weights if len(self.starts) == len(weights) else np.add.reduceat(weights, self.starts, axis=0)

    def cumulated(self, matrix: np.ndarray, kind: bool) -> np.ndarray:
        """Sum up the weights of a class at each score or above, (distinct scores, replicates)."""
        chosen = self.labels == kind
        counts = np.append(np.cumsum(chosen)[self.starts[1:] - 1], chosen.sum())[: len(self.starts)]
        return cumulate(matrix, self.rows[chosen]).take(counts, axis=0)


@dataclass(frozen=True)
class Ranking:
    """Weight of either class at each distinct score, from the highest score to the lowest.

    Attributes:
        order: of the items.
        matrix: (n, replicates) weights, in the order before sorting.
    """

    order: Order
    matrix: np.ndarray

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
        labels, scores, matrix, _ = checked(labels, scores, weights)
        return cls(Order.of(labels, scores), matrix)

    @cached_property
    def _classes(self) -> tuple[np.ndarray, np.ndarray]:
        weights = self.matrix.take(self.order.rows, axis=0)
        positive = weights * self.order.labels[:, None]
        negative = np.subtract(weights, positive, out=weights)
        return self.order.by_score(positive), self.order.by_score(negative)

    @property
    def positive(self) -> np.ndarray:
        """(distinct scores, replicates) weight of the hallucinated items."""
        return self._classes[0]

    @property
    def negative(self) -> np.ndarray:
        """(distinct scores, replicates) weight of the grounded items."""
        return self._classes[1]

    @cached_property
    def true(self) -> np.ndarray:
        """(distinct scores, replicates) weight of the hallucinated items at this score or above."""
        return self.order.cumulated(self.matrix, True)

    @cached_property
    def false(self) -> np.ndarray:
        """(distinct scores, replicates) weight of the grounded items at this score or above."""
        return self.order.cumulated(self.matrix, False)

    @cached_property
    def totals(self) -> tuple[np.ndarray, np.ndarray]:
        """(replicates,) weight of all hallucinated and of all grounded items."""
        if not len(self.order.starts):
            return np.zeros(self.matrix.shape[1]), np.zeros(self.matrix.shape[1])
        return self.true[-1], self.false[-1]

    def auroc(self) -> np.ndarray:
        """Compute the area under the ROC curve, (replicates,) in [0, 1]."""
        pairs = np.prod(self.totals, axis=0)
        # pairs in the wrong order: grounded items above each hallucinated one, and half of those at the same score
        wrong = _dot(self.positive, self.false) - _dot(self.positive, self.negative) / 2
        return divide(pairs - wrong, pairs)

    def auprc(self) -> np.ndarray:
        """Compute the average precision, (replicates,) in [0, 1], of the hallucinated items."""
        flagged = self.true + self.false
        precision = np.divide(self.true, flagged, out=flagged, where=flagged > 0)
        return self._both(_dot(self.positive, precision), self.totals[0])

    def auprc_grounded(self) -> np.ndarray:
        """Compute the average precision, (replicates,) in [0, 1], of the grounded items, for which low scores speak."""
        hallucinated, grounded = self.totals
        right = grounded - self.false
        right += self.negative  # at this score or below
        flagged = hallucinated - self.true
        flagged += self.positive
        flagged += right
        precision = np.divide(right, flagged, out=flagged, where=flagged > 0)
        return self._both(_dot(self.negative, precision), grounded)

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

    def tpr_at_fpr(self, level: float) -> np.ndarray:
        """Compute the highest true-positive rate, (replicates,), at a false-positive rate of at most ``level``."""
        count = (self.false <= level * self.totals[1] * (1 + 1e-12)).sum(axis=0)  # scores at which that holds
        if not len(self.true):
            return np.full(count.size, np.nan)
        reached = np.where(count > 0, self.true[count - 1, np.arange(count.size)], 0)
        return self._both(reached, self.totals[0])

    @cached_property
    def accuracy_kept(self) -> np.ndarray:
        """(replicates,) area under the accuracy-rejection curve: mean share of grounded items kept, in [0, 1].

        The k items of the lowest scores are kept, k = 1 ... n, and the shares of grounded ones are averaged over k. The
        item that is kept as the p-th adds the sum of 1 / k over k = p ... n, so that the items of one score (kept in
        random order, of which this is the expectation), after b items of lower scores, add their share of grounded ones
        times the sum of that over p = b + 1 ... b + w. With harmonic numbers H it is w H(n) - (S(b + w) - S(b)), where
        S(m) = H(0) + ... + H(m - 1) = m H(m) - m.
        """
        wrong, right = self.totals
        total = wrong + right
        below = self.true + self.false
        np.maximum(np.subtract(total, below, out=below), 0, out=below)  # items of lower scores
        sums, first = _harmonic_sums(below), _harmonic_sums(total)
        grounded, both = np.asarray(self.negative.any(axis=1)), np.asarray(self.positive.any(axis=1))
        both = np.asarray(both & grounded)
        # rows of one class have a share of 0 or 1: only those where the share changes count
        changes = np.diff(np.append(grounded & ~both, False).astype(np.float64))
        area = right * harmonic(total) - changes @ sums
        if len(grounded) and grounded[0] and not both[0]:
            area -= first
        if both.any():
            before = np.concatenate([first[None], sums])[:-1][both] - sums[both]
            area -= _dot(np.nan_to_num(divide(self.negative[both], self.negative[both] + self.positive[both])), before)
        return divide(area, total)

    def aurc(self) -> np.ndarray:
        """Compute the area under the risk-coverage curve, (replicates,) in [0, 1]; lower is better.

        The risk is the share of hallucinated items among the kept ones; see ``accuracy_kept``.
        """
        return self._defined(1 - self.accuracy_kept)

    def prr(self) -> np.ndarray:
        """Compute the prediction-rejection ratio, (replicates,) at most 1; 0 is chance.

        (A - A_random) / (A_oracle - A_random), where A is ``accuracy_kept``, of a random order the share of grounded
        items, and of the oracle that of an order with all grounded items before all hallucinated ones.
        """
        wrong, right = self.totals
        total = wrong + right
        random = divide(right, total)
        oracle = divide(right + right * (harmonic(total) - harmonic(right)), total)
        return self._defined(divide(self.accuracy_kept - random, oracle - random))

    def _defined(self, values: np.ndarray) -> np.ndarray:
        """Put NaN in replicates that lack one of the classes."""
        return np.where(np.minimum(*self.totals) <= 0, np.nan, values)

    def _both(self, numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
        """Divide, with NaN in replicates that lack one of the classes."""
        return self._defined(divide(numerator, denominator))
