"""Arithmetic on totals that metrics share."""

from __future__ import annotations

import numpy as np

from stethoscope.task import Totals


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Element-wise quotient of two arrays of one shape, NaN where the divisor is 0.

    >>> ratio(np.array([1, 0]), np.array([4, 0])).tolist()
    [0.25, nan]
    """
    part, whole = np.asarray(part, float), np.asarray(whole, float)
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def accuracy(totals: Totals) -> np.ndarray:
    """Right answers (``tp``, ``tn``) among those that could be read (``fp`` and ``fn`` as well).

    >>> float(accuracy({"tp": np.array(2), "fp": np.array(1), "tn": np.array(1), "fn": np.array(0)}))
    0.75
    """
    return ratio(totals["tp"] + totals["tn"], totals["tp"] + totals["fp"] + totals["tn"] + totals["fn"])


def precision(totals: Totals) -> np.ndarray:
    """How many of the answers that claim the positive class are right."""
    return ratio(totals["tp"], totals["tp"] + totals["fp"])


def recall(totals: Totals) -> np.ndarray:
    """How many of the questions of which the positive class is the truth get that answer."""
    return ratio(totals["tp"], totals["tp"] + totals["fn"])


def f1(totals: Totals) -> np.ndarray:
    """Harmonic mean of precision and recall."""
    return ratio(2 * totals["tp"], 2 * totals["tp"] + totals["fp"] + totals["fn"])


CONFUSION = ("tp", "fp", "tn", "fn")
"""Names of the counts that these functions take."""


def confusion(reply: str | None, label: str, positive: str) -> dict[str, float]:
    """The counts of one answer to a question with two possible replies; all 0 for an answer that was not read.

    >>> confusion("no", "yes", positive="yes")
    {'tp': 0.0, 'fp': 0.0, 'tn': 0.0, 'fn': 1.0}
    """
    counts = dict.fromkeys(CONFUSION, 0.0)
    if reply is not None:
        counts[("t" if reply == label else "f") + ("p" if reply == positive else "n")] = 1.0
    return counts
