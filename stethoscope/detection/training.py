"""Train and measure detectors on a token table: split by image, fit, compare, and ablate feature groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from stethoscope.core.errors import ArtefactError, ConfigError, DataError
from stethoscope.core.token_table import feature_names, require
from stethoscope.detection.detector import Detector
from stethoscope.detection.detector_results import Ablation, DetectorResults, Difference
from stethoscope.detection.estimators import SharedFits
from stethoscope.detection.leaderboard import build_leaderboard
from stethoscope.detection.learners import MeasuredDetector
from stethoscope.detection.lookup import mention_warnings, write_warnings
from stethoscope.detection.published import refits
from stethoscope.detection.score_metrics import evaluate_scores
from stethoscope.detection.transfer import Target, transfer
from stethoscope.features.columns import group_of
from stethoscope.metrics import classification
from stethoscope.metrics.bootstrap import REPLICATES, group_weights, split_folds
from stethoscope.metrics.ranking import divide

if TYPE_CHECKING:
    from stethoscope.storage.run_dir import RunStore

SECTION = "detector"
"""Section of ``metrics.json``, and of ``status.json`` while detector, figures and warnings do not fit."""
ABLATED = ("auroc", "auroc_controlled")
Progress = Callable[[str], None]


class TrainingResult(NamedTuple):
    """The result of training.

    Attributes:
        detector: fitted detector, with ``split`` and ``figures`` in its notes.
        results: results for ``metrics.json``.
        folds: (rows,) masks ``train``, ``calibration`` and ``test`` of the table.
    """

    detector: Detector
    results: DetectorResults
    folds: dict[str, np.ndarray]


def train_detector(
    table: pd.DataFrame,
    detector: Detector,
    fractions: Sequence[float] = (0.5, 0.2, 0.3),
    seed: int = 0,
    replicates: int = REPLICATES,
    compare_with: Mapping[str, Detector] | None = None,
    ablation: bool = False,
    progress: Progress | None = None,
    published: bool = False,
    sets: Sequence[str] = (),
) -> TrainingResult:
    """Split a token table by image, fit a detector and measure it on the test fold.

    Args:
        table: token table of one model and one task.
        detector: unfitted detector; it is fitted here.
        fractions: shares of the images for training, for calibration and threshold, and for the test.
        seed: seed of the split and the bootstrap.
        replicates: number of bootstrap replicates over images.
        compare_with: other detectors by name, fitted on the same folds and compared with ``detector``.
        ablation: refit the detector without each feature group, to measure the group's gain.
        progress: called with a line of text before each step.
        published: also measure the published detectors that the table has the features of.
        sets: names of feature sets; a copy of the detector is fitted on each of them for comparison.

    Returns:
        The detector, the results, and the folds.

    Raises:
        ConfigError: fractions are not three that add up to 1, a feature name fits nothing, or detectors select
            different rows.
        DataError: a fold is too small to learn from, to measure on, or to guarantee a threshold.
    """
    require(table, ("group", "token", "object", "mention_index", "label", "repeat_index"))
    report = progress or (lambda line: None)
    folds = split_folds(table["group"], fractions, seed)
    named = (table["label"].to_numpy() >= 0) | (table["repeat_index"].to_numpy() >= 0)
    table, parts_of = table[named], {name: mask[named] for name, mask in folds.items()}  # nothing reads other tokens
    others = {**(compare_with or {}), **refits(detector, sets, feature_names(table))}
    detectors = {"detector": detector, **others}
    if len(detectors) <= len(others):
        raise ConfigError("a detector to compare with cannot have the name of the main one, 'detector'")
    train, calibration = table[parts_of["train"]], table[parts_of["calibration"]]
    shared = SharedFits() if others else None
    for name, candidate in detectors.items():
        report(f"fitting {name}")
        candidate.sharing(shared).fit(train, calibration)
        candidate.sharing(None)
    report("measuring")
    board = build_leaderboard(table, detectors, parts_of, replicates, seed, published=published)
    parts = {name: detector.select_mentions(table[mask]) for name, mask in parts_of.items()}
    split = {
        "unit": "image",
        "fractions": dict(zip(folds, map(float, fractions), strict=True)),
        "seed": seed,
        "mentions": {key: detector.settings[key] for key in ("repeats", "subtokens")},
        "folds": {name: _sizes(rows) for name, rows in parts.items()},
    }
    results = DetectorResults(
        split=split,
        leaderboard=board,
        reliability=classification.reliability(
            parts["test"]["label"].to_numpy(dtype=int), detector.predict(parts["test"])
        ),
        threshold=evaluate_threshold(parts["test"], detector, replicates, seed),
        ablations=ablate(table, detector, parts_of, replicates, seed, report) if ablation else None,
    )
    detector.notes |= {"split": split, "figures": board.row("detector").to_dict()["metrics"]}
    return TrainingResult(detector, results, folds)


def _sizes(rows: pd.DataFrame) -> dict[str, int]:
    """Count the images, mentions and hallucinated mentions of a fold."""
    return {
        "images": int(rows["group"].nunique()),
        "mentions": len(rows),
        "hallucinated": int((rows["label"] == 1).sum()),
    }


def evaluate_threshold(
    test: pd.DataFrame, detector: Detector, replicates: int = REPLICATES, seed: int = 0
) -> dict[str, Any]:
    """Measure the warnings at a detector's threshold on labelled mentions.

    Args:
        test: mentions of the test fold.
        detector: fitted detector.
        replicates: number of bootstrap replicates over images.
        seed: seed of the bootstrap.

    Returns:
        JSON-able: ``value``, ``chosen`` and ``certificate`` as in the detector's manifest, and intervals over images of
        ``precision`` and ``recall`` of the warnings, of ``false_alarms`` (share of grounded mentions with a warning),
        ``missed`` (share of hallucinated ones without) and ``flagged`` (share of all mentions with a warning). With
        ``subtokens="all"`` only the first sub-token of a mention counts.
    """
    test = test[test["is_first_subtoken"]].reset_index(drop=True)
    wrong = test["label"].to_numpy() == 1
    flagged = detector.predict(test) >= detector.threshold
    resamples = group_weights(test["group"].to_numpy(dtype=str), replicates, seed)

    def shares(weights: np.ndarray) -> dict[str, np.ndarray]:
        def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
            return divide(weights @ (part & whole), weights @ whole)

        return {
            "precision": share(wrong, flagged),
            "recall": share(flagged, wrong),
            "false_alarms": share(flagged, ~wrong),
            "missed": share(~flagged, wrong),
            "flagged": share(flagged, np.ones(len(test), dtype=bool)),
        }

    intervals = {name: resamples.interval(values).to_dict() for name, values in resamples.apply(shares).items()}
    return {**detector.manifest["threshold"], **intervals}


def feature_groups(columns: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Group the columns of a token table by their feature's group; unknown features are ``other``.

    >>> feature_groups(["nll", "attn_image_l00", "mine"])
    {'uncertainty': ('nll',), 'attention': ('attn_image_l00',), 'other': ('mine',)}
    """
    groups: dict[str, tuple[str, ...]] = {}
    for column in columns:
        group = group_of(column) or "other"
        groups[group] = (*groups.get(group, ()), column)
    return groups


def ablate(
    table: pd.DataFrame,
    detector: Detector,
    folds: Mapping[str, np.ndarray],
    replicates: int = REPLICATES,
    seed: int = 0,
    progress: Progress = lambda line: None,
) -> tuple[Ablation, ...]:
    """Measure the gain of every feature group: compare the detector with itself refitted without the group.

    Args:
        table: token table, all folds.
        detector: detector fitted on the ``train`` and ``calibration`` folds.
        folds: (rows,) masks by name; the differences are those on ``test``.
        replicates: number of bootstrap replicates over images.
        seed: seed of the bootstrap.
        progress: called with a line of text before each fit.

    Returns:
        One ``Ablation`` for every group and metric of ``ABLATED``; above 0 the group helps. Empty if there is only one
        group.

    Raises:
        DataError: the test fold lacks hallucinated or grounded mentions.
    """
    groups = feature_groups(detector.features)
    if len(groups) < 2:
        return ()
    test = detector.select_mentions(table[folds["test"]])
    if test["label"].nunique() < 2:
        raise DataError("the test fold lacks hallucinated or grounded mentions: run the task on more samples")
    scores = {"detector": detector.predict(test)}
    train, calibration, shared = table[folds["train"]], table[folds["calibration"]], SharedFits()
    for group, columns in groups.items():
        progress(f"fitting without {group} ({len(columns)} columns)")
        remaining = [name for name in detector.features if name not in set(columns)]
        settings = {**detector.settings, "features": remaining, "exclude": [], "threshold": "f1"}
        refitted = MeasuredDetector(**settings).sharing(shared).fit(train, calibration)
        scores[f"without {group}"] = refitted.predict(test)
    resamples = group_weights(test["group"].to_numpy(dtype=str), replicates, seed)
    figures = evaluate_scores(test, scores, resamples)
    return tuple(
        Ablation(group, len(columns), Difference.of("detector", f"without {group}", metric, gain, resamples))
        for group, columns in groups.items()
        for metric in ABLATED
        for gain in [figures["detector", metric] - figures[f"without {group}", metric]]
    )


def fit(
    store: RunStore,
    task: str,
    detector: Detector,
    shares: tuple[float, float, float],
    seed: int,
    table: pd.DataFrame | None = None,
    targets: Sequence[Target] = (),
    source_run: str = "",
    **more: Any,
) -> DetectorResults | None:
    """Train on one task's mentions; write ``detector/``, ``warnings.jsonl`` and the figures into the run directory.

    Args:
        store: the run.
        task: name of the task whose mentions are used.
        detector: unfitted detector.
        shares: shares of the images for train, calibration and test.
        seed: seed of split and bootstrap.
        table: token rows to train and measure on; None for all of the task's.
        targets: other runs to evaluate the detector on.
        source_run: name of this run in the comparison with ``targets``.
        more: further arguments of ``train_detector``, such as ``compare_with``, ``ablation`` and ``progress``.

    Returns:
        The results of ``train_detector``, with ``transfer`` if there are targets; None where no mention has a label, so
        that there is nothing to measure by (``detector.labels=none``).

    Raises:
        ArtefactError: the run has no token rows of that task.
    """
    table = store.tokens(task) if table is None else table
    if table.empty:
        raise missing_rows_error(store, task)
    if detector.settings["labels"] == "none" and not (table["label"] >= 0).any():
        folds = split_folds(table["group"], shares, seed)
        detector.fit(table[~folds["calibration"]], table[folds["calibration"]])
        _save(store, task, detector, table, folds)
        return None
    detector, results, folds = train_detector(table, detector, shares, seed, **more)
    if targets:
        source_target = Target(source_run, table, store.model(task))
        results = replace(results, transfer=transfer(detector, source_target, targets, shares, seed))
    _save(store, task, detector, table, folds, results)
    return results


def _save(
    store: RunStore,
    task: str,
    detector: Detector,
    table: pd.DataFrame,
    folds: Mapping[str, np.ndarray],
    results: DetectorResults | None = None,
) -> None:
    """Write a fitted detector, its figures, where there are any, and its warnings into the run directory."""
    fingerprint = store.fingerprints().get(task, {})
    store.set_status(SECTION, "running")  # a kill from here on leaves parts of two detectors
    asked = fingerprint.get("task", task)
    labels = asked.get("settings", {}).get("labels") if isinstance(asked, Mapping) else None
    detector.save(
        store.run_dir / "detector",
        {"model": fingerprint.get("adapter"), "task": asked, "label": describe_label(detector, labels)},
    )
    if results is not None:
        store.write_metrics(SECTION, results.to_dict())
    write_warnings(mention_warnings(table, detector, folds), store.run_dir / "warnings.jsonl")
    store.set_status(SECTION, None)


def describe_label(detector: Detector, labels: str | None = None) -> str:
    """Describe what a detector has learned to predict, for its manifest.

    Args:
        detector: that is trained.
        labels: which ones of several that the task has, its setting ``labels``.
    """
    if detector.settings["labels"] == "none":
        return "no label: 1 if the model itself, asked about the object it named, rather says no, else 0"
    chosen = {"first": "first sub-token of", "all": "every sub-token of"}
    rows = chosen.get(detector.settings["subtokens"], f"{detector.settings['subtokens']} over the sub-tokens of")
    which = "the first mention of an object" if detector.settings["repeats"] == "first" else "every object mention"
    truth = "the task's ground truth" if labels is None else f"the task's ground truth, labels={labels}"
    return f"{rows} {which} in an answer: 1 if the object is not in the image ({truth}), else 0"


def missing_rows_error(store: RunStore, task: str | None = None) -> ArtefactError:
    """Build the error for a run without token rows; it names the command that computes them."""
    others = sorted(store.traced_tasks())
    if task is not None and others:
        return ArtefactError(f"{store.run_dir} has no token features of task {task!r}, only of {', '.join(others)}")
    if not any(record.mentions for record in store.records()):
        return ArtefactError(
            f"no answer in {store.run_dir} names an object that is judged: there is nothing to learn from"
        )
    return ArtefactError(
        f"{store.run_dir} has no token features; `stethoscope extract run={store.run_dir}` computes them"
    )
