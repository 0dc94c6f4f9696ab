"""Compute a detector's curves: ROC, precision and recall, AUROC by position, reliability."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from stethoscope.metrics.bootstrap import Interval, bootstrap, mean_interval
from stethoscope.metrics.classification import auroc
from stethoscope.metrics.ranking import Ranking

POINTS = 400  # of a curve at most: more than a screen can show
BIN_WIDTH, MOST_BINS = 10, 12  # tokens per bin of positions; with longer answers bins are wider


@dataclass(frozen=True)
class Bin:
    """Mentions of similar position or probability.

    Attributes:
        x: position of the bin on its axis: its index, or the mean probability.
        name: range of the bin, such as ``10–19``.
        mentions: number of mentions in the bin.
        hallucinated: number of hallucinated ones among them.
        interval: AUROC, or the share that is hallucinated; None if it is not defined.
    """

    x: float
    name: str
    mentions: int
    hallucinated: int
    interval: Interval | None


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keep at most ``POINTS`` points of a curve, both ends among them."""
    if len(x) <= POINTS:
        return x, y
    keep = np.unique(np.linspace(0, len(x) - 1, POINTS).round().astype(int))
    return x[keep], y[keep]


def roc(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute false-positive and true-positive rate at every threshold, from (0, 0) to (1, 1).

    Args:
        labels: (n,) 1 for hallucinated, else 0; both must occur.
        scores: (n,) higher means hallucinated.

    >>> [points.tolist() for points in roc([0, 1, 1], [0.2, 0.9, 0.2])]
    [[0.0, 0.0, 1.0], [0.0, 0.5, 1.0]]
    """
    ranking = Ranking.of(labels, scores)
    positive, negative = ranking.totals
    true, false = ranking.true[:, 0] / positive, ranking.false[:, 0] / negative
    return _thin(np.r_[0.0, false], np.r_[0.0, true])


def precision_recall(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute recall and precision at every threshold, from the highest threshold down.

    Args:
        labels: (n,) 1 for hallucinated, the positive class, else 0; both must occur.
        scores: (n,) higher means hallucinated.

    >>> [points.round(2).tolist() for points in precision_recall([0, 1, 1], [0.2, 0.9, 0.2])]
    [[0.5, 1.0], [1.0, 0.67]]
    """
    ranking = Ranking.of(labels, scores)
    true, false = ranking.true[:, 0], ranking.false[:, 0]
    return _thin(true / ranking.totals[0][0], true / (true + false))


def by_position(rows: pd.DataFrame) -> list[Bin]:
    """Compute the AUROC by token position of the mentions, with intervals over images.

    Args:
        rows: mentions with ``token``, ``label``, ``probability`` and ``group``.
    """
    positions = rows["token"].to_numpy(dtype=int)
    width = BIN_WIDTH * (1 + positions.max(initial=0) // (BIN_WIDTH * MOST_BINS))
    return [
        Bin(
            x=float(index),
            name=f"{start}–{start + width - 1}",
            mentions=len(part),
            hallucinated=int(part["label"].sum()),
            interval=bootstrap(
                auroc, part["label"].to_numpy(), part["probability"].to_numpy(), part["group"].to_numpy()
            )
            if part["label"].nunique() == 2
            else None,
        )
        for index, (start, part) in enumerate(rows.groupby(positions // width * width, sort=True))
    ]


def reliability(rows: pd.DataFrame, count: int = 10) -> list[Bin]:
    """Compute the share of hallucinated mentions by probability, with intervals over images.

    Args:
        rows: mentions with ``label``, ``probability`` and ``group``.
        count: bins of equal width; empty ones are left out.
    """
    indices = np.minimum((rows["probability"].to_numpy() * count).astype(int), count - 1)
    bins = []
    for index in np.unique(indices).tolist():
        part = rows[indices == index]
        interval = mean_interval(part["label"].to_numpy(), part["group"].to_numpy())
        name = f"{index / count:.1f}–{(index + 1) / count:.1f}"
        bins.append(Bin(float(part["probability"].mean()), name, len(part), int(part["label"].sum()), interval))
    return bins
