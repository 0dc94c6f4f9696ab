"""Compare descriptions at equal length, and with what trivial methods reach: controls for methods that say less.

Who says less errs less. The share of hallucinated objects of a method is therefore also computed at a length that all
methods share, and its recall is compared with that of trivial methods (answers cut off, a question that asks for less,
another temperature) at the same share (after Yin et al. 2025, arXiv 2504.10020).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from stethoscope.metrics.bootstrap import Resamples

STEEPEST = 50.0  # slope of a fit at most, in logs per standard deviation of lengths
HALVINGS = 60

Trivial = Sequence[tuple[np.ndarray, np.ndarray]]
"""CHAIR_i and recall of trivial methods as replicate arrays."""


def length_adjusted(
    words: np.ndarray, mentions: np.ndarray, hallucinated: np.ndarray, length: float, resamples: Resamples
) -> dict[str, np.ndarray]:
    """Compute CHAIR_i as it would be if the answers had another mean length, in two forms.

    Hallucinated mentions of an answer of w words are fitted as Poisson(exp(a + b w)), by maximum likelihood, and
    expected at ``length``. ``raw`` divides that by the mean number of mentions as it is, ``fitted`` by the number that
    a fit of the same kind expects at that length.

    Args:
        words: (n,) length of every answer.
        mentions: (n,) objects that it names.
        hallucinated: (n,) those among them that are not there.
        length: in words. Beyond the shortest and the longest answer nothing is known: NaN.
        resamples: resampled images of the n answers.

    Returns:
        ``raw`` and ``fitted`` as replicate arrays (1 + R,), in [0, inf) and lower is better; NaN where there is no
        mention.
    """
    undefined = np.full(len(resamples.counts), math.nan)
    if not len(words) or not words.min() <= length <= words.max() or not mentions.sum():
        return {"raw": undefined, "fitted": undefined}
    lengths, index = np.unique(words, return_inverse=True)
    sums = np.zeros((3, len(resamples.names), len(lengths)))  # answers and counts by image and length
    for part, values in zip(sums, (np.ones(len(words)), mentions, hallucinated), strict=True):
        np.add.at(part, (resamples.index, index), values)
    answers, named, invented = (resamples.counts @ part for part in sums)
    expected = expected_counts(lengths, answers, invented, length)
    with np.errstate(all="ignore"):  # a replicate without a mention divides 0 by 0
        mean = named.sum(1) / answers.sum(1)
        return {"raw": expected / mean, "fitted": expected / expected_counts(lengths, answers, named, length)}


def expected_counts(lengths: np.ndarray, answers: np.ndarray, counts: np.ndarray, length: float) -> np.ndarray:
    """Fit counts as Poisson(exp(a + b w)) by maximum likelihood, and return what the fit expects at one length.

    At the maximum the mean length of the answers, weighted by exp(b w), is that of the counts. It grows with b, so that
    halving finds it; a follows from the total.

    Args:
        lengths: (L,) different lengths w.
        answers: (R, L) number of answers of each length.
        counts: (R, L) what they count together.
        length: at which the count of an answer is expected.

    Returns:
        (R,) expected counts.

    >>> expected_counts(np.array([10.0, 20.0]), np.array([[2.0, 2.0]]), np.array([[2.0, 8.0]]), 15.0).round(6)
    array([2.])
    """
    centre = answers.sum(0) @ lengths / answers.sum()
    spread = math.sqrt(answers.sum(0) @ (lengths - centre) ** 2 / answers.sum()) or 1.0
    standard, wanted = (lengths - centre) / spread, (length - centre) / spread
    total = counts.sum(1)
    target = counts @ standard / np.maximum(total, 1e-300)
    low, high = np.full((2, len(counts)), [[-STEEPEST], [STEEPEST]])
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        weights = answers * _powers(middle, standard)
        below = weights @ standard < target * weights.sum(1)
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    slope = (low + high) / 2
    largest = (slope[:, None] * standard).max(1)  # taken out of the powers, so that none overflows
    return total * np.exp(slope * wanted - largest) / (answers * _powers(slope, standard)).sum(1)


def _powers(slopes: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return exp(slope x length) over the largest of the row, (R, L)."""
    logs = slopes[:, None] * lengths
    return np.exp(logs - logs.max(1, keepdims=True))


def trivial_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the corners of the best recall that trivial methods reach at no more than a CHAIR_i.

    Args:
        points: CHAIR_i and recall of each; those that are not finite count for nothing. To say nothing, (0, 0), is
            always among them.

    Returns:
        Corners with increasing CHAIR_i and recall; methods between two corners are mixtures of them.

    >>> trivial_front([(0.2, 0.8), (0.1, 0.5), (0.15, 0.4)])
    [(0.0, 0.0), (0.1, 0.5), (0.2, 0.8)]
    """
    corners = [(0.0, 0.0)]
    for chair_i, recall in sorted(point for point in points if np.isfinite(point).all()):
        if recall <= corners[-1][1]:
            continue
        if chair_i == corners[-1][0]:
            corners.pop()
        corners.append((float(chair_i), float(recall)))
    return corners


def front_recall(trivial: Trivial, chair_i: np.ndarray) -> np.ndarray:
    """Compute the recall of the trivial front at some CHAIR_i, in every replicate.

    Args:
        trivial: replicate arrays (1 + R,) of the trivial methods.
        chair_i: (1 + R,), one for each replicate, or (1 + R, k) for k of them.

    Returns:
        Recall, of the same shape as ``chair_i``. Beyond all trivial methods that of the last corner.
    """
    recall = np.full(chair_i.shape, math.nan)
    for index in range(len(chair_i)):
        corners = trivial_front([(float(x[index]), float(y[index])) for x, y in trivial])
        recall[index] = np.interp(chair_i[index], *np.array(corners).T)
    return recall


def beyond_front(chair_i: np.ndarray, recall: np.ndarray, trivial: Trivial) -> np.ndarray:
    """Compute how much recall a method has above the trivial front at its own CHAIR_i, in every replicate.

    Args:
        chair_i: (1 + R,) replicate array of the method.
        recall: (1 + R,) its own.
        trivial: those of the trivial methods.

    Returns:
        (1 + R,), NaN where the method's CHAIR_i is not defined, and everywhere where it is above that of all trivial
        methods, as nothing tells what they would recall there.
    """
    last = trivial_front([(float(x[0]), float(y[0])) for x, y in trivial])[-1][0]
    if not chair_i[0] <= last:
        return np.full(len(chair_i), math.nan)
    return recall - np.where(np.isfinite(chair_i), front_recall(trivial, chair_i), math.nan)


def front_band(trivial: Trivial, points: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute a 95 % bootstrap band of the trivial front, from nothing to its last corner.

    Args:
        trivial: replicate arrays of the trivial methods.
        points: number of CHAIR_i at which it is computed.

    Returns:
        CHAIR_i, lower and upper recall, (points,) each.
    """
    last = trivial_front([(float(x[0]), float(y[0])) for x, y in trivial])[-1][0]
    grid = np.linspace(0, last, points)
    recall = front_recall(trivial, np.broadcast_to(grid, (len(trivial[0][0]), points)))[1:]
    low, high = np.percentile(recall, [2.5, 97.5], axis=0)
    return grid, low, high
