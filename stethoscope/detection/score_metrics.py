"""Compute all metrics of the leaderboard for scores of labelled mentions, with and without controls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from stethoscope.metrics import classification
from stethoscope.metrics.bootstrap import Resamples
from stethoscope.metrics.ranking import FloatOrArray, Order, Ranking, as_result, checked, divide

if TYPE_CHECKING:
    import pandas as pd

CONTROL_WIDTH = 10  # token positions per bin, as in the published position-controlled re-evaluation
AREAS = ("auroc", "auroc_controlled", "auroc_same_position", "auroc_within_word", "auroc_matched")

METRICS = {
    "auroc": "area under the ROC curve; hallucinated is the positive class",
    "auroc_controlled": f"mean AUROC within bins of {CONTROL_WIDTH} token positions, by number of pairs",
    "auroc_same_position": "the same with bins of one token: only mentions at equal positions are compared",
    "auroc_within_word": "the same for mentions of one object, wherever they stand: the within-word AUROC",
    "auroc_matched": f"the same for mentions of one object within {CONTROL_WIDTH} token positions",
    "auroc_first": "AUROC of the first mention of every object in an answer (where others are measured as well)",
    "auprc_hallucinated": "average precision, hallucinated mentions as the positive class",
    "auprc_grounded": "average precision, grounded mentions as the positive class",
    "fpr_at_95tpr": "false alarms among grounded mentions when 95 % of the hallucinated ones are found",
    "tpr_at_1fpr": "hallucinated mentions found when 1 % of the grounded ones are flagged",
    "tpr_at_5fpr": "hallucinated mentions found when 5 % of the grounded ones are flagged",
    "prr": "prediction-rejection ratio: 0 for a random order of rejection, 1 for a perfect one",
    "aurc": "area under the risk-coverage curve: mean share of hallucinated mentions among the kept; lower is better",
    "recall_at_90precision": "hallucinated mentions found when 90 % of the warnings are to be right",
    "ece": "expected calibration error, ten bins of equal width",
    "brier": "mean squared error of the probability",
    "base_rate": "share of hallucinated mentions: what the AUPRC of a score without information is",
}
"""Columns of the leaderboard. Calibration error and Brier score are for probabilities only, not for single features."""


def control_bins(rows: pd.DataFrame) -> dict[str, np.ndarray]:
    """Return (rows,) integer bins by controlled AUROC; only mentions of equal bins are compared."""
    positions = rows["token"].to_numpy(dtype=int)
    objects = np.unique(rows["object"].to_numpy(dtype=str), return_inverse=True)[1]
    wide = positions // CONTROL_WIDTH
    return {
        "auroc_controlled": wide,
        "auroc_same_position": positions,
        "auroc_within_word": objects,
        "auroc_matched": objects * (wide.max(initial=0) + 1) + wide,
    }


@dataclass(frozen=True)
class LabelledMentions:
    """The mentions of a fold as metrics read them.

    Attributes:
        labels: (rows,) 1 hallucinated, 0 grounded.
        bins: the mentions in bins, by controlled AUROC.
        first: (rows,) whether it is the first mention of its object in the answer.
    """

    labels: np.ndarray
    bins: Mapping[str, classification.Bins]
    first: np.ndarray

    @classmethod
    def of(cls, rows: pd.DataFrame) -> LabelledMentions:
        """Read labels, bins and repetitions of labelled mention rows."""
        labels = rows["label"].to_numpy(dtype=int)
        bins = {name: classification.Bins.of(labels == 1, bins) for name, bins in control_bins(rows).items()}
        return cls(labels, bins, rows["repeat_index"].to_numpy() == 0)

    def weighted(self, weights: np.ndarray) -> WeightedMentions:
        """Sum up what the metrics of all scores have in common, for (replicates, rows) weights."""
        matrix = np.ascontiguousarray(weights.T)
        return WeightedMentions(matrix, {name: bins.totals(matrix) for name, bins in self.bins.items()})

    def areas(self, scores: np.ndarray, weights: np.ndarray | None = None) -> dict[str, FloatOrArray]:
        """Compute the metrics of ``AREAS`` that compare mentions within bins, each in [0, 1]."""
        _, scores, matrix, single = checked(self.labels, scores, weights)
        order = np.argsort(-scores, kind="stable")
        return {
            name: as_result(bins.sort(scores, order).auroc(matrix, bins.totals(matrix)), single)
            for name, bins in self.bins.items()
        }

    def sort(self, scores: np.ndarray, probability: bool) -> SortedScores:
        """Sort the mentions by (rows,) scores, once for all replicates."""
        labels, scores, _, _ = checked(self.labels, scores, None)
        order = np.argsort(-scores, kind="stable")
        bins = {name: bins.sort(scores, order) for name, bins in self.bins.items()}
        return SortedScores(self, scores, probability, Order.of(labels, scores), bins)


class WeightedMentions(NamedTuple):
    """Weights of the mentions of a fold, in a chunk of replicates.

    Attributes:
        matrix: (rows, replicates).
        totals: ``Bins.totals`` of these weights, by controlled AUROC.
    """

    matrix: np.ndarray
    totals: Mapping[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class SortedScores:
    """Scores of labelled mentions, in order.

    Attributes:
        mentions: that are scored.
        scores: (rows,) of the mentions.
        probability: whether they are probabilities, with calibration error and Brier score.
        order: of all mentions.
        bins: the order within bins, by controlled AUROC.
    """

    mentions: LabelledMentions
    scores: np.ndarray
    probability: bool
    order: Order
    bins: Mapping[str, classification.BinOrder]

    def figures(self, weighted: WeightedMentions) -> dict[str, np.ndarray]:
        """Compute all metrics for a chunk of replicates, (replicates,) each."""
        matrix, mentions = weighted.matrix, self.mentions
        ranking = Ranking(self.order, matrix)
        figures: dict[str, FloatOrArray] = {"auroc": ranking.auroc()}
        for name, bins in self.bins.items():
            figures[name] = bins.auroc(matrix, weighted.totals[name])
        if not mentions.first.all():
            figures["auroc_first"] = Ranking(self.order, matrix * mentions.first[:, None]).auroc()
        figures |= {
            "auprc_hallucinated": ranking.auprc(),
            "auprc_grounded": ranking.auprc_grounded(),
            "fpr_at_95tpr": ranking.fpr_at_tpr(0.95),
            "tpr_at_1fpr": ranking.tpr_at_fpr(0.01),
            "tpr_at_5fpr": ranking.tpr_at_fpr(0.05),
            "prr": ranking.prr(),
            "aurc": ranking.aurc(),
            "recall_at_90precision": ranking.recall_at_precision(0.9),
        }
        if self.probability:
            figures |= {
                "ece": classification.ece(mentions.labels, self.scores, matrix.T),
                "brier": classification.brier(mentions.labels, self.scores, matrix.T),
            }
        figures["base_rate"] = divide(ranking.totals[0], matrix.sum(axis=0))
        return {name: np.asarray(figure) for name, figure in figures.items()}


def evaluate_scores(
    test: pd.DataFrame,
    probabilities: Mapping[str, np.ndarray],
    resamples: Resamples,
    scores: Mapping[str, np.ndarray] | None = None,
) -> dict[tuple[str, str], np.ndarray]:
    """Compute replicate arrays by (name, metric) of several scores of the same mentions.

    Args:
        test: labelled rows of a token table.
        probabilities: (rows,) probabilities by name.
        resamples: resampled images of the rows.
        scores: (rows,) other scores by name, without calibration error and Brier score.
    """
    mentions = LabelledMentions.of(test)
    ordered = {name: mentions.sort(values, True) for name, values in probabilities.items()}
    ordered |= {name: mentions.sort(values, False) for name, values in (scores or {}).items()}

    # chunks of replicates are the outer loop, so that what weights alone decide is computed once
    def evaluate_chunk(weights: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
        weighted = mentions.weighted(weights)
        return {
            (name, metric): figure
            for name, values in ordered.items()
            for metric, figure in values.figures(weighted).items()
        }

    return resamples.apply(evaluate_chunk)
