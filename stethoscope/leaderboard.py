"""Detectors, baselines and single features measured on the same held-out mentions, under the same resampled images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from stethoscope import metrics
from stethoscope.baselines import Predictor, baselines
from stethoscope.detector import Detector
from stethoscope.errors import DataError
from stethoscope.metrics import Ranking
from stethoscope.stats import REPLICATES, Interval, Resamples, group_weights, split_groups
from stethoscope.table import FeatureSchema, feature_matrix, mention_rows, require

CONTROL_WIDTH = 10  # token positions per bin, as in the published position-controlled re-evaluation
AREAS = ("auroc", "auroc_controlled", "auroc_same_position")

METRICS = {
    "auroc": "area under the ROC curve; hallucinated is the positive class",
    "auroc_controlled": f"mean AUROC within bins of {CONTROL_WIDTH} token positions, by number of pairs",
    "auroc_same_position": "the same with bins of one token: only mentions at equal positions are compared",
    "auprc_hallucinated": "average precision, hallucinated mentions as the positive class",
    "auprc_grounded": "average precision, grounded mentions as the positive class",
    "fpr_at_95tpr": "false alarms among grounded mentions when 95 % of the hallucinated ones are found",
    "ece": "expected calibration error, ten bins of equal width",
    "brier": "mean squared error of the probability",
    "base_rate": "share of hallucinated mentions: what the AUPRC of a score without information is",
}
"""Columns of the leaderboard. Calibration error and Brier score are for probabilities only, not for single features."""


@dataclass(frozen=True)
class Row:
    """One line of the leaderboard.

    Attributes:
        name: of the detector, the baseline or the feature.
        kind: ``detector``, ``baseline`` or ``feature``.
        sign: 1, or -1 for a feature of which low values speak for hallucination (on the training fold).
        metrics: intervals by name, of ``METRICS``.
    """

    name: str
    kind: str
    sign: int
    metrics: Mapping[str, Interval]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        figures = {name: interval.to_dict() for name, interval in self.metrics.items()}
        return {"name": self.name, "kind": self.kind, "sign": self.sign, "metrics": figures}


@dataclass(frozen=True)
class Difference:
    """By how much a detector is ahead of something else, paired: on the same mentions and resampled images."""

    detector: str
    other: str
    metric: str
    interval: Interval

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"detector": self.detector, "other": self.other, "metric": self.metric, **self.interval.to_dict()}


@dataclass(frozen=True)
class Leaderboard:
    """What was measured on the test fold.

    Attributes:
        rows: detectors, baselines, then features by falling AUROC on the training fold.
        differences: every detector against the best single feature, position only and the text prior.
        best_features: for every metric of ``AREAS`` the feature that was best on the training fold.
        skipped: features without any value in the training fold.
    """

    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]
    best_features: Mapping[str, str]
    skipped: tuple[str, ...] = ()

    def row(self, name: str) -> Row:
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)

    def to_dict(self) -> dict[str, Any]:
        """For ``metrics.json``."""
        return {
            "rows": [row.to_dict() for row in self.rows],
            "differences": [difference.to_dict() for difference in self.differences],
            "best_features": dict(self.best_features),
            "skipped_features": list(self.skipped),
            "columns": METRICS,
        }


@dataclass(frozen=True)
class _Scores:
    """Everything to be measured: (mentions,) scores of the test fold by name, and what they are."""

    kinds: Mapping[str, str]
    signs: Mapping[str, int]
    values: Mapping[str, np.ndarray]


def _figures(
    labels: np.ndarray, scores: np.ndarray, positions: np.ndarray, weights: np.ndarray, probability: bool
) -> dict[str, np.ndarray]:
    """All metrics of one score for a chunk of replicates, in one sorting of the mentions."""
    ranking = Ranking.of(labels, scores, weights)
    figures = {
        "auroc": ranking.auroc(),
        "auroc_controlled": metrics.auroc_controlled(labels, scores, positions, weights, CONTROL_WIDTH),
        "auroc_same_position": metrics.auroc_controlled(labels, scores, positions, weights, 1),
        "auprc_hallucinated": ranking.auprc(),
        "auprc_grounded": ranking.swapped().auprc(),
        "fpr_at_95tpr": ranking.fpr_at_tpr(0.95),
    }
    if probability:
        figures |= {
            "ece": metrics.ece(labels, scores, weights),
            "brier": metrics.brier(labels, scores, weights),
        }
    return figures | {"base_rate": metrics.base_rate(labels, weights)}


def _measure(scores: _Scores, test: pd.DataFrame, drawn: Resamples) -> dict[tuple[str, str], np.ndarray]:
    """Replicate arrays by (name, metric). Chunks of replicates are outermost: their weights are made once for all."""
    labels, positions = test["label"].to_numpy(dtype=int), test["token"].to_numpy(dtype=int)

    def chunk(weights: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
        return {
            (name, metric): figure
            for name, values in scores.values.items()
            for metric, figure in _figures(
                labels, values, positions, weights, probability=scores.kinds[name] != "feature"
            ).items()
        }

    return drawn.apply(chunk)


def _single_features(
    train: pd.DataFrame, test: pd.DataFrame, names: Sequence[str]
) -> tuple[dict[str, np.ndarray], dict[str, int], dict[str, str], tuple[str, ...]]:
    """Features as scores: oriented, and gaps filled with the median, by the training fold alone.

    Returns:
        Test scores by name (by falling training AUROC), signs, the best feature by metric of ``AREAS``, and features
        without any value.
    """
    labels, positions = train["label"].to_numpy(dtype=int), train["token"].to_numpy(dtype=int)
    learn, held_out = feature_matrix(train, names), feature_matrix(test, names)
    skipped = tuple(name for name, column in zip(names, learn.T, strict=True) if np.isnan(column).all())
    scores, signs, strength = {}, {}, {}
    for name, seen, new in zip(names, learn.T, held_out.T, strict=True):
        if name in skipped:
            continue
        middle = np.nanmedian(seen)
        seen, new = np.nan_to_num(seen, nan=middle), np.nan_to_num(new, nan=middle)
        areas = np.array(
            [
                metrics.auroc(labels, seen),
                metrics.auroc_controlled(labels, seen, positions, width=CONTROL_WIDTH),
                metrics.auroc_controlled(labels, seen, positions, width=1),
            ]
        )
        signs[name] = 1 if areas[0] >= 0.5 else -1
        scores[name] = signs[name] * new
        strength[name] = np.nan_to_num(areas if signs[name] > 0 else 1 - areas)
    order = sorted(scores, key=lambda name: -strength[name][0])
    best = {metric: max(order, key=lambda name: strength[name][at]) for at, metric in enumerate(AREAS) if order}
    return {name: scores[name] for name in order}, signs, best, skipped


def leaderboard(
    table: pd.DataFrame,
    detectors: Mapping[str, Detector],
    folds: Mapping[str, np.ndarray],
    replicates: int = REPLICATES,
    seed: int = 0,
    repeats: str = "first",
) -> Leaderboard:
    """Measures fitted detectors beside the baselines and every single feature on the ``test`` fold.

    Args:
        table: token table, all folds.
        detectors: fitted on the ``train`` (and ``calibration``) fold, by name.
        folds: (rows,) masks ``train``, ``calibration`` and ``test``; baselines are fitted here, on the same folds.
        replicates: of the bootstrap over images.
        seed: of the bootstrap.
        repeats: measure ``first`` mentions of every object in an answer, or ``all``.

    Raises:
        DataError: the test fold lacks hallucinated or grounded mentions.
        ArtefactError: a detector does not fit the table.
    """
    require(table, ("group", "token"))
    train, test = (mention_rows(table[folds[fold]], repeats=repeats) for fold in ("train", "test"))
    if test["label"].nunique() < 2:
        raise DataError(
            f"the test fold has {len(test)} judged mentions of {test['label'].nunique()} kinds; hallucinated and "
            "grounded ones are needed: run the task on more samples"
        )
    values, kinds = {}, {}
    for name, detector in detectors.items():
        values[name], kinds[name] = detector.predict(test), "detector"
    others: dict[str, Predictor] = baselines(repeats)
    for name, baseline in others.items():
        baseline.fit(table[folds["train"]], table[folds["calibration"]])
        values[name], kinds[name] = baseline.predict(test), "baseline"
    names = [name for name in FeatureSchema.of(table).names if name not in values]
    features, signs, best, skipped = _single_features(train, test, names)
    scores = _Scores(kinds | dict.fromkeys(features, "feature"), signs, values | features)

    drawn = group_weights(test["group"], replicates, seed)
    figures = _measure(scores, test, drawn)
    rows = tuple(
        Row(
            name,
            scores.kinds[name],
            signs.get(name, 1),
            {metric: drawn.interval(figures[name, metric]) for metric in METRICS if (name, metric) in figures},
        )
        for name in scores.values
    )
    opponents = [(metric, [*filter(None, [best.get(metric)]), "position only", "text prior"]) for metric in AREAS]
    differences = tuple(
        Difference(name, other, metric, drawn.interval(figures[name, metric] - figures[other, metric]))
        for name in detectors
        for metric, against in opponents
        for other in against
    )
    return Leaderboard(rows, differences, best, skipped)


def _sizes(rows: pd.DataFrame) -> dict[str, int]:
    """How much a fold holds."""
    return {
        "images": int(rows["group"].nunique()),
        "mentions": len(rows),
        "hallucinated": int((rows["label"] == 1).sum()),
    }


def train_detector(
    table: pd.DataFrame,
    detector: Detector,
    fractions: Sequence[float] = (0.5, 0.2, 0.3),
    seed: int = 0,
    replicates: int = REPLICATES,
) -> tuple[Detector, dict[str, Any]]:
    """The whole step from a token table to a measured detector.

    Args:
        table: token table of one model and one task.
        detector: settings of the detector; it is fitted here.
        fractions: shares of the images for fitting, for calibration and threshold, and for the test.
        seed: of the split and the bootstrap.
        replicates: of the bootstrap over images.

    Returns:
        The detector, with ``split`` and ``figures`` in its notes, and JSON-able results: ``split`` (sizes of the
        folds), ``leaderboard`` (``Leaderboard.to_dict``), ``reliability`` (points of the diagram on the test fold) and
        ``threshold`` (with precision and recall on the test fold).

    Raises:
        ConfigError: fractions do not add up to 1, or a feature name fits nothing.
        DataError: a fold is too small to learn from or to measure on.
    """
    require(table, ("group", "token", "object", "number"))
    folds = split_groups(
        table["group"].to_numpy(dtype=str), dict(zip(("train", "calibration", "test"), fractions, strict=True)), seed
    )
    repeats = detector.settings["repeats"]
    parts = {name: mention_rows(table[mask], repeats=repeats) for name, mask in folds.items()}
    detector.fit(parts["train"], parts["calibration"])
    board = leaderboard(table, {"detector": detector}, folds, replicates, seed, repeats)
    split = {
        "unit": "image",
        "fractions": dict(zip(folds, map(float, fractions), strict=True)),
        "seed": seed,
        "folds": {name: _sizes(rows) for name, rows in parts.items()},
    }
    figures = board.row("detector").to_dict()["metrics"]
    detector.notes |= {"split": split, "figures": figures}
    labels, probabilities = parts["test"]["label"].to_numpy(dtype=int), detector.predict(parts["test"])
    return detector, {
        "split": split,
        "leaderboard": board.to_dict(),
        "reliability": metrics.reliability(labels, probabilities),
        "threshold": _at_threshold(labels, probabilities, detector.threshold),
    }


def _at_threshold(labels: np.ndarray, probabilities: np.ndarray, threshold: float) -> dict[str, float | None]:
    """What warnings at the threshold are worth on the test fold; None where nothing was flagged."""
    flagged = probabilities >= threshold
    found = int((flagged & (labels == 1)).sum())
    return {
        "value": threshold,
        "precision": found / int(flagged.sum()) if flagged.any() else None,
        "recall": found / int((labels == 1).sum()),
        "flagged": float(flagged.mean()),
    }
