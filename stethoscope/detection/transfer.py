"""A detector of one run judged on others: does it still rank mentions, are its probabilities right?"""

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
from stethoscope.metrics.bootstrap import REPLICATES, group_weights, p_value, split_groups

MEASURED = ("auroc", "auroc_controlled", "auprc_hallucinated", "ece", "brier", "base_rate")
HERE, THERE, HOME = "transferred", "trained there", "at home"


@dataclass(frozen=True)
class Target:
    """What a detector is judged on.

    Attributes:
        name: what to call it.
        table: token table, all folds, with the features of the detector and perhaps more.
        model: fingerprint of the model that wrote the answers; empty where that is not known.
    """

    name: str
    table: pd.DataFrame
    model: Mapping[str, Any] = field(default_factory=dict)


def of_subset(table: pd.DataFrame, subset: str | None, where: str) -> pd.DataFrame:
    """The rows of one subset of a task; all of them for None.

    Raises:
        ConfigError: there is no such subset.
    """
    if subset is None:
        return table
    known = sorted(table["subset"].unique())
    if subset not in known:
        raise ConfigError(f"{where}: {unknown('subset', str(subset), known)}")
    return table[table["subset"] == subset].reset_index(drop=True)


def transfer(
    detector: Detector,
    home: Target,
    targets: Sequence[Target],
    fractions: Sequence[float],
    seed: int = 0,
    replicates: int = REPLICATES,
) -> list[dict[str, Any]]:
    """Judges a fitted detector on the test images of other runs, beside one of the same settings that is fitted there.

    All runs are split by image with the same seed, and an image's fold depends on its id alone: no image that the
    detector has learned from is among the test images of another run (where both name their images alike).

    Args:
        detector: fitted on the training and calibration images of ``home``.
        home: the run that it was fitted on.
        targets: the others.
        fractions: shares of the images for train, calibration and test.
        seed: of split and bootstrap.
        replicates: of the bootstrap over images.

    Returns:
        JSON-able, ``home`` first: ``target``, ``mentions``, ``images``, ``hallucinated`` (share), and by detector
        (``transferred`` and ``trained there``, or ``at home``) intervals by metric of ``MEASURED``; ``difference`` is
        the first less the second, paired over images, with ``p``.

    Raises:
        ConfigError: a target has not the detector's features, or they are states of another model.
        DataError: a target has too few mentions to learn from or to measure on.
    """
    for target in targets:
        check_same_model(detector.features, home.model, target.model, target.name)
    found = [_judge(home, {HOME: detector}, fractions, seed, replicates)]
    for target in targets:
        table = matching_columns(target.table, detector.schema.names, target.name)
        folds = _folds(table, fractions, seed)
        own = Detector(**{**detector.settings, "threshold": "f1"})
        try:
            own.fit(table[folds["train"]], table[folds["calibration"]])
        except StethoscopeError as error:
            raise type(error)(f"{target.name}: {error}") from None
        found.append(_judge(Target(target.name, table), {HERE: detector, THERE: own}, fractions, seed, replicates))
    return found


def _folds(table: pd.DataFrame, fractions: Sequence[float], seed: int) -> dict[str, np.ndarray]:
    names = dict(zip(("train", "calibration", "test"), fractions, strict=True))
    return split_groups(table["group"].to_numpy(dtype=str), names, seed)


def _judge(
    target: Target, detectors: Mapping[str, Detector], fractions: Sequence[float], seed: int, replicates: int
) -> dict[str, Any]:
    """All figures on the test images of one run."""
    first = next(iter(detectors.values()))
    test = first.rows(target.table[_folds(target.table, fractions, seed)["test"]])
    if test["label"].nunique() < 2:
        raise DataError(
            f"{target.name} has {len(test)} judged mentions in its test images, not hallucinated and grounded ones: "
            "run the task on more samples"
        )
    drawn = group_weights(test["group"], replicates, seed)
    figures = evaluate_scores(test, {name: one.predict(test) for name, one in detectors.items()}, drawn)
    row: dict[str, Any] = {
        "target": target.name,
        "mentions": len(test),
        "images": drawn.groups,
        "hallucinated": float((test["label"] == 1).mean()),
    }
    for name in detectors:
        row[name] = {metric: drawn.interval(figures[name, metric]).to_dict() for metric in MEASURED}
    if len(detectors) > 1:
        gaps = {metric: figures[HERE, metric] - figures[THERE, metric] for metric in MEASURED[:-1]}
        row["difference"] = {
            metric: {**drawn.interval(gap).to_dict(), "p": None if np.isnan(p_value(gap)) else p_value(gap)}
            for metric, gap in gaps.items()
        }
    return row
