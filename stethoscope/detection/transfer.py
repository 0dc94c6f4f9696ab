"""Evaluate the detector of one run on other runs: ranking and calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from stethoscope.core.errors import ConfigError, DataError, StethoscopeError, unknown
from stethoscope.detection.detector import Detector
from stethoscope.detection.score_metrics import evaluate_scores
from stethoscope.features.columns import check_same_model, matching_columns
from stethoscope.metrics.bootstrap import REPLICATES, group_weights, split_folds

MEASURED = ("auroc", "auroc_controlled", "auprc_hallucinated", "ece", "brier", "base_rate")
TRANSFERRED, RETRAINED, IN_SOURCE = "transferred", "trained there", "at home"


@dataclass(frozen=True)
class Target:
    """A run that a detector is evaluated on.

    Attributes:
        name: name in the results.
        table: token table, all folds, with the features of the detector and perhaps more.
        model: fingerprint of the model that wrote the answers; empty if unknown.
    """

    name: str
    table: pd.DataFrame
    model: Mapping[str, Any] = field(default_factory=dict)


def of_subset(table: pd.DataFrame, subset: str | None, run: str) -> pd.DataFrame:
    """Select the rows of one subset of a task; all of them for None.

    Args:
        table: token table of the task.
        subset: name of the subset.
        run: name of the run, for messages.

    Raises:
        ConfigError: there is no such subset.
    """
    if subset is None:
        return table
    known = sorted(table["subset"].unique())
    if subset not in known:
        raise ConfigError(f"{run}: {unknown('subset', str(subset), known)}")
    return table[table["subset"] == subset].reset_index(drop=True)


def transfer(
    detector: Detector,
    source: Target,
    targets: Sequence[Target],
    fractions: Sequence[float],
    seed: int = 0,
    replicates: int = REPLICATES,
) -> list[dict[str, Any]]:
    """Evaluate a fitted detector on the test images of other runs, and refit one with the same settings there.

    All runs are split by image with the same seed, and an image's fold depends on its id alone: no training image of
    the detector is among the test images of another run (if both name their images alike).

    Args:
        detector: detector fitted on the training and calibration images of ``source``.
        source: the run that it was fitted on.
        targets: the other runs.
        fractions: shares of the images for train, calibration and test.
        seed: seed of split and bootstrap.
        replicates: number of bootstrap replicates over images.

    Returns:
        JSON-able, ``source`` first: ``target``, ``mentions``, ``images``, ``hallucinated`` (share), and by detector
        (``transferred`` and ``trained there``, or ``at home``) intervals by metric of ``MEASURED``; ``difference`` is
        the first less the second, paired over images, with ``p``; ``shift`` is the monitor's sentence.

    Raises:
        ConfigError: a target lacks the detector's features, or they are states of another model.
        DataError: a target has too few mentions to learn from or to measure on.
    """
    for target in targets:
        check_same_model(detector.features, source.model, target.model, target.name)
    rows = [_evaluate(source, {IN_SOURCE: detector}, fractions, seed, replicates)]
    for target in targets:
        table = matching_columns(target.table, detector.schema.names, target.name)
        folds = split_folds(table["group"], fractions, seed)
        own = Detector(**{**detector.settings, "threshold": "f1"})
        try:
            own.fit(table[folds["train"]], table[folds["calibration"]])
        except StethoscopeError as error:
            raise type(error)(f"{target.name}: {error}") from None
        compared = {TRANSFERRED: detector, RETRAINED: own}
        rows.append(_evaluate(Target(target.name, table), compared, fractions, seed, replicates))
    return rows


def _evaluate(
    target: Target, detectors: Mapping[str, Detector], fractions: Sequence[float], seed: int, replicates: int
) -> dict[str, Any]:
    """Compute all figures on the test images of one run."""
    first = next(iter(detectors.values()))
    table = target.table[split_folds(target.table["group"], fractions, seed)["test"]]
    test = first.select_mentions(table)
    if test["label"].nunique() < 2:
        raise DataError(
            f"{target.name} has {len(test)} judged mentions in its test images, not hallucinated and grounded ones: "
            "run the task on more samples"
        )
    resamples = group_weights(test["group"].to_numpy(dtype=str), replicates, seed)
    probabilities = {name: detector.predict(test) for name, detector in detectors.items()}
    figures = evaluate_scores(test, probabilities, resamples)
    row: dict[str, Any] = {
        "target": target.name,
        "mentions": len(test),
        "images": resamples.groups,
        "hallucinated": float((test["label"] == 1).mean()),
    }
    for name in detectors:
        row[name] = {metric: resamples.interval(figures[name, metric]).to_dict() for metric in MEASURED}
    if len(detectors) > 1:
        shift = first.shift(table)
        row["shift"] = "" if shift is None else shift.sentence
        gains = {metric: figures[TRANSFERRED, metric] - figures[RETRAINED, metric] for metric in MEASURED[:-1]}
        row["difference"] = {
            metric: {**resamples.interval(gain).to_dict(), "p": None if np.isnan(p := resamples.p_value(gain)) else p}
            for metric, gain in gains.items()
        }
    return row
