"""Collect what one mitigation wrote: counts, replies, costs, and how its detector fares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stethoscope.metrics import classification
from stethoscope.metrics.bootstrap import Interval, count_metrics, group_weights
from stethoscope.storage.records import FAILED, Record

if TYPE_CHECKING:
    from stethoscope.detection.detector import Detector
    from stethoscope.detection.shift_measures import RunShift
    from stethoscope.tasks.base import Totals

REPLY_METRICS = {"accuracy": "accuracy", "f1": "F1", "yes_rate": "share of yes", "tpr": "TPR", "tnr": "TNR"}
"""Metrics of a task of yes/no questions that are shown, and their names in tables."""


@dataclass(frozen=True)
class DetectorFigures:
    """How a detector fares on the answers of one method.

    Attributes:
        auroc: area under the ROC curve, hallucinated mentions being the positive class.
        ece: expected calibration error, ten bins of equal width.
        shift: whether the answers are like those that it was calibrated on; None where it has no monitor.
    """

    auroc: Interval
    ece: Interval
    shift: RunShift | None

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON object."""
        shift = None if self.shift is None else self.shift.to_dict()
        return {"auroc": self.auroc.to_dict(), "ece": self.ece.to_dict(), "shift": shift}


@dataclass(frozen=True)
class MethodAnswers:
    """What one method wrote.

    Attributes:
        name: of the method, for tables.
        captions: a row for every sample by its id: ``group`` (its image) and the counts of its score.
        trivial: whether it is a control that no one would call a method.
        passes: forward passes for every answer token; None if they were not counted.
        seconds: for one description; None if it was not measured.
        peak_memory: largest memory of the process while it wrote, in bytes; None if it is not known.
        replies: metrics of yes/no questions, see ``REPLY_METRICS``; empty if none were asked.
        detector: how the detector fares on its answers; None if it was not asked.
        promised: largest share of hallucinated mentions that the method has promised; None without a promise.
    """

    name: str
    captions: pd.DataFrame
    trivial: bool = False
    passes: float | None = None
    seconds: float | None = None
    peak_memory: int | None = None
    replies: Mapping[str, Interval] = field(default_factory=dict)
    detector: DetectorFigures | None = None
    promised: float | None = None


def score_counts(records: Iterable[Record], excluded: Iterable[str] = ()) -> pd.DataFrame:
    """Collect the counts of the answers that did not fail, by sample id.

    Args:
        records: of one task.
        excluded: images to leave out.
    """
    left_out = set(excluded)
    rows = {
        record.sample_id: {"group": record.group, **record.score.counts}
        for record in records
        if record.status != FAILED and record.score is not None and record.group not in left_out
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def reply_figures(
    records: Iterable[Record], metrics: Mapping[str, Callable[[Totals], np.ndarray]]
) -> dict[str, Interval]:
    """Compute the metrics of ``REPLY_METRICS`` over all yes/no questions of a task together.

    Args:
        records: of the task; those that failed are left out.
        metrics: of the task; of those that are shown it may lack some.
    """
    counts = score_counts(records).fillna(0.0)
    if not len(counts):
        return {}
    shown = {name: metrics[name] for name in REPLY_METRICS if name in metrics}
    rows = count_metrics(shown, counts.drop(columns="group"), counts["group"].to_numpy(), [""] * len(counts))
    return {row.metric: row.interval for row in rows}


def detector_figures(table: pd.DataFrame, detector: Detector, excluded: Iterable[str] = ()) -> DetectorFigures | None:
    """Measure a detector on the judged mentions of a method's answers; None where there is none.

    Args:
        table: token table of the answers, with the features that the detector reads.
        detector: fitted on other images.
        excluded: images to leave out.

    Raises:
        ArtefactError: the table has other features.
    """
    table = table[~table["group"].isin(set(excluded))] if len(table) else table
    mentions = detector.select_mentions(table) if len(table) else table
    if not len(mentions):
        return None
    labels, probabilities = mentions["label"].to_numpy(dtype=int), detector.predict(mentions)
    resamples = group_weights(mentions["group"].to_numpy())

    def figures(weights: np.ndarray) -> dict[str, np.ndarray]:
        return {
            "auroc": np.asarray(classification.auroc(labels, probabilities, weights)),
            "ece": np.asarray(classification.ece(labels, probabilities, weights)),
        }

    values = resamples.apply(figures)
    auroc, ece = (resamples.interval(values[name]) for name in ("auroc", "ece"))
    return DetectorFigures(auroc, ece, detector.shift(table))
