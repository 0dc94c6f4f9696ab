"""Rank labelled items by score, once for all bootstrap replicates, and compute what depends on the order alone.

A higher score means hallucinated; label 1 is hallucinated, 0 grounded. A weight of 2 is the same as having the item
twice.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

FloatOrArray = float | Any
"""A float for weights of shape (n,) or none, an array (replicates,) for weights of shape (replicates, n).

Types know no shapes: ``float | Any`` lets a caller, who knows them, use either without a cast.
"""

LOOKED_UP = 10**6  # largest count whose sum of harmonic numbers is looked up
BLOCK = 16  # rows of a block of sums
SMALLEST = np.finfo(np.float64).tiny  # instead of a divisor of 0, where what is divided is 0 too


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
    """Divide element by element, with NaN where the denominator is 0.

    >>> divide(np.array([1, 0]), np.array([4, 0])).tolist()
    [0.25, nan]
    """
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
    from scipy.special import digamma  # tasks, which import scipy for nothing else, divide by this module too

    return digamma(count + 1) + np.euler_gamma


def _harmonic_sums(count: np.ndarray) -> np.ndarray:
    """Compute H(0) + ... + H(n - 1) = n H(n) - n of counts; whole ones are looked up, which is ten times as fast."""
    whole = count.astype(np.intp)
    if not (whole == count).all() or whole.max(initial=0) > LOOKED_UP:
        return count * harmonic(count) - count
    return _harmonic_table(int(whole.max(initial=0)).bit_length()).take(whole)


@lru_cache
def _harmonic_table(bits: int) -> np.ndarray:
    """Return n H(n) - n of all numbers of at most so many bits."""
    numbers = np.arange(2**bits, dtype=np.float64)
    return numbers * harmonic(numbers) - numbers


def _dot(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Sum the product over rows, (replicates,)."""
    return np.einsum("kr,kr->r", first, second)


@dataclass(frozen=True)
class ClassOrder:
    """The items of one class by falling score, and where their scores lie among those of the other class.

    Attributes:
        rows: (k,) index of every item.
        starts: (scores,) first item of each of the class's distinct scores.
        level: (scores,) index of each among the distinct scores of all items.
        above: (scores,) number of distinct scores of the other class that are higher.
        at_least: (scores,) number of those that are as high or higher.
    """

    rows: np.ndarray
    starts: np.ndarray
    level: np.ndarray
    above: np.ndarray
    at_least: np.ndarray

    def sums(self, matrix: np.ndarray) -> np.ndarray:
        """Sum up (n, replicates) over the first 0, 1, ... distinct scores, (scores + 1, replicates)."""
        sums = cumulate(matrix, self.rows)
        return sums if len(self.starts) == len(self.rows) else sums.take(np.append(self.starts, len(self.rows)), axis=0)

    def weights(self, matrix: np.ndarray) -> np.ndarray:
        """Add up (n, replicates) where scores are equal, (scores, replicates)."""
        weights = matrix.take(self.rows, axis=0)
        return weights if len(self.starts) == len(weights) else np.add.reduceat(weights, self.starts, axis=0)


@dataclass(frozen=True)
class Order:
    """The order of labelled items by falling score, for any weights.

    Attributes:
        levels: number of distinct scores.
        hallucinated, grounded: the items of either class.
    """

    levels: int
    hallucinated: ClassOrder
    grounded: ClassOrder

    @classmethod
    def of(cls, labels: np.ndarray, scores: np.ndarray) -> Order:
        """Sort items.

        Args:
            labels: (n,) bool.
            scores: (n,) finite.
        """
        rows = np.argsort(-scores, kind="stable")
        level = np.cumsum(np.diff(scores[rows], prepend=np.nan) != 0) - 1
        chosen = [rows[labels[rows] == kind] for kind in (True, False)]
        levels_of = [level[labels[rows] == kind] for kind in (True, False)]
        starts = [np.flatnonzero(np.diff(of_class, prepend=-1)) for of_class in levels_of]
        own, other = (of_class[first] for of_class, first in zip(levels_of, starts, strict=True))
        parts = [
            ClassOrder(chosen[i], starts[i], mine, *(np.searchsorted(others, mine, side) for side in ("left", "right")))
            for i, (mine, others) in enumerate(((own, other), (other, own)))
        ]
        return cls(int(level[-1]) + 1 if len(level) else 0, *parts)

    @cached_property
    def common(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices, among the distinct scores of either class, of those that both classes have."""
        shared = self.hallucinated.at_least > self.hallucinated.above
        return np.flatnonzero(shared), self.hallucinated.above[shared]

    def counts(self, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Count the distinct scores of either class that are as high as some of all items' or higher.

        Args:
            levels: (k,) indices among the distinct scores of all items.
        """
        hallucinated, grounded = self.hallucinated.level, self.grounded.level
        return np.searchsorted(hallucinated, levels, "right"), np.searchsorted(grounded, levels, "right")

    @cached_property
    def changes(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices of distinct scores behind which a run of grounded items alone begins (1) or ends (-1), and which."""
        alone = np.zeros(self.levels + 2)  # nothing before the first score and behind the last
        alone[1 + self.grounded.level[self.grounded.at_least == self.grounded.above]] = 1
        steps = np.diff(alone)
        return np.flatnonzero(steps) - 1, steps[steps != 0]


@dataclass(frozen=True)
class Ranking:
    """Weight of either class at each distinct score, from the highest score to the lowest.

    Sums over items are taken over the distinct scores of one class, at which alone they change.

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
    def hallucinated(self) -> np.ndarray:
        """(scores, replicates) weight of the hallucinated items at each of their distinct scores."""
        return self.order.hallucinated.weights(self.matrix)

    @cached_property
    def grounded(self) -> np.ndarray:
        """(scores, replicates) weight of the grounded items at each of their distinct scores."""
        return self.order.grounded.weights(self.matrix)

    @cached_property
    def _hallucinated_sums(self) -> np.ndarray:
        return self.order.hallucinated.sums(self.matrix)

    @cached_property
    def _grounded_sums(self) -> np.ndarray:
        return self.order.grounded.sums(self.matrix)

    @property
    def _true(self) -> np.ndarray:
        """(scores, replicates) weight of the hallucinated items at each of their scores or above."""
        return self._hallucinated_sums[1:]

    @cached_property
    def _false(self) -> np.ndarray:
        """(scores, replicates) weight of the grounded items at each score of hallucinated ones or above."""
        return self._grounded_sums.take(self.order.hallucinated.at_least, axis=0)

    @cached_property
    def _flagged(self) -> np.ndarray:
        """(scores, replicates) weight of all items at each score of hallucinated ones or above."""
        return self._true + self._false

    @property
    def true(self) -> np.ndarray:
        """(distinct scores, replicates) weight of the hallucinated items at this score or above."""
        return self._hallucinated_sums.take(self.order.counts(np.arange(self.order.levels))[0], axis=0)

    @property
    def false(self) -> np.ndarray:
        """(distinct scores, replicates) weight of the grounded items at this score or above."""
        return self._grounded_sums.take(self.order.counts(np.arange(self.order.levels))[1], axis=0)

    @cached_property
    def totals(self) -> tuple[np.ndarray, np.ndarray]:
        """(replicates,) weight of all hallucinated and of all grounded items."""
        return self._hallucinated_sums[-1], self._grounded_sums[-1]

    def auroc(self) -> np.ndarray:
        """Compute the area under the ROC curve, (replicates,) in [0, 1]."""
        pairs = np.prod(self.totals, axis=0)
        # pairs in the wrong order: grounded items above each hallucinated one, and half of those at the same score
        wrong, (own, other) = _dot(self.hallucinated, self._false), self.order.common
        if len(own):
            wrong -= _dot(self.hallucinated[own], self.grounded[other]) / 2
        return divide(pairs - wrong, pairs)

    def auprc(self) -> np.ndarray:
        """Compute the average precision, (replicates,) in [0, 1], of the hallucinated items."""
        precision = self._true / np.maximum(self._flagged, SMALLEST)
        return self._both(_dot(self.hallucinated, precision), self.totals[0])

    def auprc_grounded(self) -> np.ndarray:
        """Compute the average precision, (replicates,) in [0, 1], of the grounded items, for which low scores speak."""
        hallucinated, grounded = self.totals
        right = grounded - self._grounded_sums[:-1]  # at this score or below
        flagged = (hallucinated - self._hallucinated_sums).take(self.order.grounded.above, axis=0)
        flagged += right
        right /= np.maximum(flagged, SMALLEST, out=flagged)
        return self._both(_dot(self.grounded, right), grounded)

    def fpr_at_tpr(self, level: float) -> np.ndarray:
        """Compute the lowest false-positive rate, (replicates,), at which the true-positive rate is ``level``."""
        if not len(self._true):
            return np.full(self.matrix.shape[1], np.nan)
        # the slack keeps rounding of level * total from requiring one more item
        first = np.argmax(self._true >= level * self.totals[0] * (1 - 1e-12), axis=0)
        return self._both(self._false[first, np.arange(first.size)], self.totals[1])

    def recall_at_precision(self, level: float) -> np.ndarray:
        """Compute the highest recall, (replicates,), at a precision of at least ``level``; else 0."""
        precise = self._true >= level * self._flagged * (1 - 1e-12)
        return self._both(np.max(self._true * precise, axis=0, initial=0.0), self.totals[0])

    def tpr_at_fpr(self, level: float) -> np.ndarray:
        """Compute the highest true-positive rate, (replicates,), at a false-positive rate of at most ``level``."""
        sums, most = self._grounded_sums[1:], level * self.totals[1] * (1 + 1e-12)
        rows = bisect_left(range(len(sums)), True, key=lambda row: bool((sums[row] > most).all()))  # others are above
        count = (sums[:rows] <= most).sum(axis=0)  # scores at which it is
        above = np.append(self.order.grounded.above, len(self._true))  # the next one
        return self._both(self._hallucinated_sums[above[count], np.arange(count.size)], self.totals[0])

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
        # rows of one class have a share of 0 or 1: only those where the share changes count
        levels, steps = self.order.changes
        area = right * harmonic(total) - steps @ self._sums_below(levels)
        own, other = self.order.common
        if len(own):
            levels, positive, negative = (
                self.order.hallucinated.level[own],
                self.hallucinated[own],
                self.grounded[other],
            )
            parts = self._sums_below(levels - 1) - self._sums_below(levels)
            area -= _dot(np.nan_to_num(divide(negative, negative + positive)), parts)
        return divide(area, total)

    def _sums_below(self, levels: np.ndarray) -> np.ndarray:
        """Compute S (``accuracy_kept``) of the weight of lower scores than some, (k, replicates); -1 is before all."""
        true, false = self.order.counts(levels)
        below = self._hallucinated_sums.take(true, axis=0)
        below += self._grounded_sums.take(false, axis=0)
        np.maximum(np.subtract(np.add(*self.totals), below, out=below), 0, out=below)
        return _harmonic_sums(below)

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
