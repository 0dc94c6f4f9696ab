"""Compute detection metrics of scores. A higher score means hallucinated; label 1 is hallucinated, 0 grounded.

Every function takes ``weights`` of shape (n,), or (replicates, n) for a value per replicate, so that the bootstrap
evaluates all replicates at once. A weight of 2 is the same as having the item twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.sparse import csr_array

from stethoscope.metrics.ranking import FloatOrArray, Ranking, as_result, checked, divide


def _ranked(
    labels: np.ndarray,
    scores: np.ndarray,
    weights: np.ndarray | None,
    metric: Callable[[Ranking], np.ndarray],
) -> FloatOrArray:
    """Compute a metric of the order of items by score."""
    single = weights is None or np.ndim(weights) == 1
    return as_result(metric(Ranking.of(labels, scores, weights)), single)


def auroc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> FloatOrArray:
    """Compute the area under the ROC curve, in [0, 1]; 0.5 is chance.

    It is the probability that a hallucinated item scores higher than a grounded one. Ties count one half. NaN if a
    class is missing. Arguments and errors are those of ``Ranking.of``.

    >>> auroc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    0.75
    >>> auroc([0, 1], [0.5, 0.5])
    0.5
    """
    return _ranked(labels, scores, weights, Ranking.auroc)


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
    return _ranked(labels, scores, weights, Ranking.auprc if positive else Ranking.auprc_grounded)


def fpr_at_tpr(
    labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None, level: float = 0.95
) -> FloatOrArray:
    """Compute the false-positive rate at the threshold that flags ``level`` of the hallucinated items.

    >>> fpr_at_tpr([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    0.5
    """
    return _ranked(labels, scores, weights, lambda ranking: ranking.fpr_at_tpr(level))


def recall_at_precision(
    labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None, level: float = 0.9
) -> FloatOrArray:
    """Compute the highest recall of a threshold whose precision is at least ``level``, in [0, 1].

    >>> recall_at_precision([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    0.5
    """
    return _ranked(labels, scores, weights, lambda ranking: ranking.recall_at_precision(level))


def tpr_at_fpr(
    labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None, level: float = 0.05
) -> FloatOrArray:
    """Compute the share of hallucinated items flagged when at most ``level`` of the grounded ones are, in [0, 1].

    >>> tpr_at_fpr([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    0.5
    """
    return _ranked(labels, scores, weights, lambda ranking: ranking.tpr_at_fpr(level))


def aurc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> FloatOrArray:
    """Compute the area under the risk-coverage curve in [0, 1]; lower is better.

    The mean over k of the share of hallucinated items among the k that score lowest, ties in random order.
    Source: Geifman et al., ICLR 2019.

    >>> round(aurc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]), 4)
    0.3333
    """
    return _ranked(labels, scores, weights, Ranking.aurc)


def prr(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> FloatOrArray:
    """Compute the prediction-rejection ratio, at most 1: 0 is a random order, 1 a perfect one, below 0 worse.

    Items are rejected from the highest score down, and quality is the share of grounded ones among the kept; see
    ``Ranking.prr``. Source: Malinin et al. 2017; as in lm-polygraph, up to the rejection of all.

    >>> round(prr([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]), 4)
    0.5714
    """
    return _ranked(labels, scores, weights, Ranking.prr)


def auroc_within(
    labels: np.ndarray,
    scores: np.ndarray,
    bins: np.ndarray,
    weights: np.ndarray | None = None,
) -> FloatOrArray:
    """Compute the mean of the AUROCs within bins, in [0, 1], by their numbers of (hallucinated, grounded) pairs.

    Only items of the same bin are compared, so whatever defines the bins (a token's position, the object that it names)
    cannot raise the score. It is the share of all pairs within bins that are in the right order, so that nearly empty
    bins add little noise. NaN if no bin has both classes.

    Args:
        labels: (n,) of 0 and 1.
        scores: (n,) finite.
        weights: None, (n,) or (replicates, n), at least 0.
        bins: (n,) integers, equal for items that may be compared.

    >>> auroc_within([0, 1, 0, 1], [0.1, 0.2, 0.9, 0.8], [7, 7, 8, 8])
    0.5
    >>> auroc_within([0, 0, 1, 1], [0.1, 0.2, 0.9, 0.8], [7, 7, 8, 8])
    nan
    """
    labels, scores, matrix, single = checked(labels, scores, weights)
    bins = np.asarray(bins)
    if bins.shape != labels.shape:
        raise ValueError(f"bins {bins.shape} should be {labels.shape}, one for each item")
    grouped, order = Bins.of(labels, bins), np.argsort(-scores, kind="stable")
    return as_result(grouped.sort(scores, order).auroc(matrix, grouped.totals(matrix)), single)


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


@dataclass(frozen=True)
class Bins:
    """Labelled items in bins, of which those with items of both classes count, for any scores and weights.

    Attributes:
        labels: (n,) bool.
        index: (n,) bin of every item, from 0; -1 if its bin has one class only.
        positive: (hallucinated,) index of every hallucinated item that counts, by bin.
        grounded: (grounded,) index of every grounded item that counts, by bin.
    """

    labels: np.ndarray
    index: np.ndarray
    positive: np.ndarray
    grounded: np.ndarray

    @classmethod
    def of(cls, labels: np.ndarray, bins: np.ndarray) -> Bins:
        """Group items.

        Args:
            labels: (n,) bool.
            bins: (n,) integers.
        """
        index = np.unique(bins, return_inverse=True)[1].ravel()
        size = int(index.max(initial=-1)) + 1
        both = np.bincount(index[labels], minlength=size) * np.bincount(index[~labels], minlength=size) > 0
        index = np.where(both, np.cumsum(both) - 1, -1)[index]
        index = index.astype(np.int16 if size < 2**15 else np.int64)  # short ones are sorted five times as fast
        order = np.argsort(index, kind="stable")
        order = order[index[order] >= 0]
        return cls(labels, index, order[labels[order]], order[~labels[order]])

    def totals(self, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sum up pairs of a hallucinated and a grounded item, (replicates,) each.

        Args:
            matrix: (n, replicates) weights.

        Returns:
            Pairs whose grounded item is in the bin of the other one or in one before it, and pairs within bins.
        """
        positive, grounded = (self._by_bin(matrix, rows) for rows in (self.positive, self.grounded))
        upto, within = (np.einsum("br,br->r", positive, part) for part in (np.cumsum(grounded, axis=0), grounded))
        return upto, within

    def _by_bin(self, matrix: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Add up (n, replicates) weights of some rows, sorted by bin, within bins, (bins, replicates)."""
        starts = np.flatnonzero(np.diff(self.index[rows], prepend=-1))
        return np.add.reduceat(matrix.take(rows, axis=0), starts, axis=0) if len(rows) else matrix[:0]

    def sort(self, scores: np.ndarray, order: np.ndarray) -> BinOrder:
        """Sort the items by falling score within bins.

        Args:
            scores: (n,) finite.
            order: (n,) indices of the items by falling score.
        """
        order = order[np.argsort(self.index[order], kind="stable")]
        order = order[self.index[order] >= 0]
        index, scores, positive = self.index[order], scores[order], self.labels[order]
        before = np.append(0, np.cumsum(~positive))  # grounded items before each row
        fresh = (np.diff(index, prepend=-1) != 0) | (np.diff(scores, prepend=np.nan) != 0)
        starts, run = np.append(np.flatnonzero(fresh), len(fresh)), (np.cumsum(fresh) - 1)[positive]
        cuts = before[starts[run]], before[starts[run + 1]]
        return BinOrder.of(order[positive], order[~positive], *cuts, len(self.labels))


@dataclass(frozen=True)
class BinOrder:
    """The order by falling score within bins, for any weights; see ``Bins.sort``.

    Grounded items by bin and falling score are cut where a hallucinated one stands among them: all that lies between
    two cuts goes into every pair alike.

    Attributes:
        grounded: (cuts, n) 1 for the grounded items between the cut before and this one, else 0.
        hallucinated: (cuts, n) 1 for those at a cut, 1/2 at each of the two cuts around grounded items of their score.
    """

    grounded: csr_array
    hallucinated: csr_array

    @classmethod
    def of(
        cls, positive: np.ndarray, grounded: np.ndarray, above: np.ndarray, at_least: np.ndarray, items: int
    ) -> BinOrder:
        """Cut the grounded items of an order.

        Args:
            positive: (hallucinated,) index of every hallucinated item.
            grounded: (grounded,) index of every grounded item.
            above: (hallucinated,) how many grounded items come before the hallucinated one's score.
            at_least: (hallucinated,) how many come up to its score.
            items: number of all items.
        """
        cuts, rows = np.unique(np.concatenate([above, at_least]), return_inverse=True)
        counted = grounded[: cuts.max(initial=0)]
        between = csr_array((np.ones(len(counted)), counted, np.append(0, cuts)), (len(cuts), items))
        halves = np.full(len(rows), 0.5), (rows.ravel(), np.tile(positive, 2))
        return cls(between, csr_array(halves, (len(cuts), items)))

    def auroc(self, matrix: np.ndarray, totals: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """Compute the share of pairs within bins in the right order, with half of those at one score, (replicates,).

        Args:
            matrix: (n, replicates) weights.
            totals: ``Bins.totals`` of these weights.
        """
        upto, within = totals
        wrong = np.einsum("kr,kr->r", np.cumsum(self.grounded @ matrix, axis=0), self.hallucinated @ matrix)
        return divide(upto - wrong, within)


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
    labels, scores, matrix, single = checked(labels, scores, weights)
    weight, hits, mean = _bin_sums(labels, scores, matrix, bins, equal)
    return as_result(divide(np.abs(hits - mean).sum(axis=1), weight.sum(axis=1)), single)


def reliability(
    labels: np.ndarray, scores: np.ndarray, bins: int = 10, equal: Literal["width", "mass"] = "width"
) -> list[dict[str, float]]:
    """Compute the points of the reliability diagram, one for each bin that is not empty.

    >>> reliability([0, 1, 1], [0.1, 0.95, 0.97])
    [{'probability': 0.1, 'share': 0.0, 'count': 1}, {'probability': 0.96, 'share': 1.0, 'count': 2}]
    """
    labels, scores, matrix, _ = checked(labels, scores, None)
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
    labels, scores, matrix, single = checked(labels, scores, weights)
    _check_probabilities(scores)
    return as_result(divide(matrix.T @ (scores - labels) ** 2, matrix.sum(axis=0)), single)


def base_rate(labels: np.ndarray, weights: np.ndarray | None = None) -> FloatOrArray:
    """Compute the share of hallucinated items, in [0, 1].

    >>> base_rate([0, 0, 0, 1])
    0.25
    """
    labels, _, matrix, single = checked(labels, np.zeros(np.shape(labels)), weights)
    return as_result(divide(matrix.T @ labels.astype(float), matrix.sum(axis=0)), single)
