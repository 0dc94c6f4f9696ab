"""Points of the plots: ROC, precision and recall, reliability, AUROC by token position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from stethoscope.metrics import classification
from stethoscope.metrics.bootstrap import Interval, bootstrap, group_weights
from stethoscope.metrics.classification import Ranking

POINTS = 400  # of a curve: more than a screen shows
WIDTH, MOST_BINS = 10, 12  # tokens per bin of positions; with longer answers bins are wider


@dataclass(frozen=True)
class Bin:
    """Some mentions of similar position or probability.

    Attributes:
        at: where the bin stands: its middle, or the mean probability.
        name: what it is called, such as ``10–19``.
        mentions: how many there are.
        hallucinated: how many of these are hallucinated.
        figure: AUROC, or the share that is hallucinated; None where it is not defined.
    """

    at: float
    name: str
    mentions: int
    hallucinated: int
    figure: Interval | None


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most ``POINTS`` points of a curve, both ends among them."""
    if len(x) <= POINTS:
        return x, y
    keep = np.unique(np.linspace(0, len(x) - 1, POINTS).round().astype(int))
    return x[keep], y[keep]


def roc(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False-positive and true-positive rate at every threshold, from (0, 0) to (1, 1); both classes must be there.

    >>> [points.tolist() for points in roc([0, 1, 1], [0.2, 0.9, 0.2])]
    [[0.0, 0.0, 1.0], [0.0, 0.5, 1.0]]
    """
    ranking = Ranking.of(labels, scores)
    positive, negative = ranking.totals
    true, false = ranking.true[:, 0] / positive, ranking.false[:, 0] / negative
    return _thin(np.r_[0.0, false], np.r_[0.0, true])


def precision_recall(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision at every threshold, from the highest down; hallucinated mentions are the positive class.

    >>> [points.round(2).tolist() for points in precision_recall([0, 1, 1], [0.2, 0.9, 0.2])]
    [[0.5, 1.0], [1.0, 0.67]]
    """
    ranking = Ranking.of(labels, scores)
    true, false = ranking.true[:, 0], ranking.false[:, 0]
    return _thin(true / ranking.totals[0][0], true / (true + false))


def by_position(rows: pd.DataFrame) -> list[Bin]:
    """AUROC of mentions of similar token position, with its interval over images.

    Args:
        rows: mentions with ``token``, ``label``, ``probability`` and ``group``.
    """
    positions = rows["token"].to_numpy(dtype=int)
    width = WIDTH * (1 + positions.max(initial=0) // (WIDTH * MOST_BINS))
    return [
        Bin(
            at=float(index),
            name=f"{number * width}–{number * width + width - 1}",
            mentions=len(part),
            hallucinated=int(part["label"].sum()),
            figure=bootstrap(classification.auroc, part["label"], part["probability"], part["group"])
            if part["label"].nunique() == 2
            else None,
        )
        for index, (number, part) in enumerate(rows.groupby(positions // width, sort=True))
    ]


def reliability(rows: pd.DataFrame, bins: int = 10) -> list[Bin]:
    """Share of hallucinated mentions by probability, in bins of equal width, with its interval over images.

    Args:
        rows: mentions with ``label``, ``probability`` and ``group``.
        bins: their number; empty ones are left out.
    """
    number = np.minimum((rows["probability"].to_numpy() * bins).astype(int), bins - 1)
    found = []
    for index, part in rows.groupby(number, sort=True):
        wrong, drawn = part["label"].to_numpy(dtype=float), group_weights(part["group"])

        def share(weights: np.ndarray, wrong: np.ndarray = wrong) -> dict[str, np.ndarray]:
            return {"share": weights @ wrong / weights.sum(axis=1)}

        figure = drawn.interval(drawn.apply(share)["share"])
        name = f"{index / bins:.1f}–{(index + 1) / bins:.1f}"
        found.append(Bin(float(part["probability"].mean()), name, len(part), int(wrong.sum()), figure))
    return found
