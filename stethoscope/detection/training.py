"""From a token table to measured detectors: split by image, fit, compare, and ask what each feature group is worth."""

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
from stethoscope.detection.leaderboard import leaderboard
from stethoscope.detection.lookup import mention_warnings, write_warnings
from stethoscope.detection.published import refits
from stethoscope.detection.score_metrics import evaluate_scores
from stethoscope.detection.transfer import Target, transfer
from stethoscope.features import FEATURES
from stethoscope.features.columns import feature_of
from stethoscope.metrics import classification
from stethoscope.metrics.bootstrap import REPLICATES, group_weights, split_groups

if TYPE_CHECKING:
    from stethoscope.storage.run_dir import RunStore

SECTION = "detector"
"""Section of ``metrics.json``, and of ``status.json`` while detector, figures and warnings do not fit."""
ABLATED = ("auroc", "auroc_controlled")
Progress = Callable[[str], None]


class Trained(NamedTuple):
    """What training gives.

    Attributes:
        detector: fitted, with ``split`` and ``figures`` in its notes.
        results: for ``metrics.json``.
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
    beside: Mapping[str, Detector] | None = None,
    ablation: bool = False,
    progress: Progress | None = None,
    published: bool = False,
    sets: Sequence[str] = (),
) -> Trained:
    """The whole step from a token table to a measured detector.

    Args:
        table: token table of one model and one task.
        detector: settings of the detector; it is fitted here.
        fractions: shares of the images for fitting, for calibration and threshold, and for the test.
        seed: of the split and the bootstrap.
        replicates: of the bootstrap over images.
        beside: other detectors by name, to be fitted on the same folds and compared with it.
        ablation: refit the detector without each feature group, to see what the group is worth.
        progress: is told what is being fitted.
        published: measure the published detectors too that the table has the features of.
        sets: names of feature sets; the detector is fitted on each of them too, to be compared with itself.

    Returns:
        The detector, the results, and the folds.

    Raises:
        ConfigError: fractions do not add up to 1, a feature name fits nothing, or detectors take different rows.
        DataError: a fold is too small to learn from, to measure on, or to promise a threshold.
    """
    require(table, ("group", "token", "object", "mention_index"))
    tell = progress or (lambda line: None)
    folds = split_groups(
        table["group"].to_numpy(dtype=str), dict(zip(("train", "calibration", "test"), fractions, strict=True)), seed
    )
    others = {**(beside or {}), **refits(detector, sets, feature_names(table))}
    detectors = {"detector": detector, **others}
    if len(detectors) <= len(others):
        raise ConfigError("a detector beside the main one cannot have its name, 'detector'")
    for name, one in detectors.items():
        tell(f"fitting {name}")
        one.fit(table[folds["train"]], table[folds["calibration"]])
    tell("measuring")
    board = leaderboard(table, detectors, folds, replicates, seed, published=published)
    parts = {name: detector.rows(table[mask]) for name, mask in folds.items()}
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
        threshold=at_threshold(parts["test"], detector, replicates, seed),
        ablations=ablate(table, detector, folds, replicates, seed, tell) if ablation else None,
    )
    detector.notes |= {"split": split, "figures": board.row("detector").to_dict()["metrics"]}
    return Trained(detector, results, folds)


def _sizes(rows: pd.DataFrame) -> dict[str, int]:
    """How much a fold holds."""
    return {
        "images": int(rows["group"].nunique()),
        "mentions": len(rows),
        "hallucinated": int((rows["label"] == 1).sum()),
    }


def at_threshold(test: pd.DataFrame, detector: Detector, replicates: int = REPLICATES, seed: int = 0) -> dict[str, Any]:
    """What warnings at a detector's threshold are worth on judged mentions.

    Returns:
        JSON-able: ``value``, ``chosen`` and ``certificate`` as in the detector's manifest, and intervals over images of
        ``precision`` and ``recall`` of the warnings, of ``false_alarms`` (share of grounded mentions with a warning),
        ``missed`` (share of hallucinated ones without) and ``flagged`` (share of all mentions with a warning). Where
        all sub-tokens are rows, a mention is its first.
    """
    test = test[test["is_first_subtoken"]].reset_index(drop=True)
    wrong = test["label"].to_numpy() == 1
    flagged = detector.predict(test) >= detector.threshold
    drawn = group_weights(test["group"], replicates, seed)

    def shares(weights: np.ndarray) -> dict[str, np.ndarray]:
        def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
            total = weights @ whole
            return np.divide(weights @ (part & whole), total, out=np.full(len(total), np.nan), where=total > 0)

        return {
            "precision": share(wrong, flagged),
            "recall": share(flagged, wrong),
            "false_alarms": share(flagged, ~wrong),
            "missed": share(~flagged, wrong),
            "flagged": share(flagged, np.ones(len(test), dtype=bool)),
        }

    found = {name: drawn.interval(values).to_dict() for name, values in drawn.apply(shares).items()}
    return {**detector.manifest["threshold"], **found}


def feature_groups(columns: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Columns of a token table by the group of their feature; those of no known feature are the group ``other``.

    >>> feature_groups(["nll", "attn_image_l00", "mine"])
    {'uncertainty': ('nll',), 'attention': ('attn_image_l00',), 'other': ('mine',)}
    """
    groups: dict[str, tuple[str, ...]] = {}
    for column in columns:
        name = feature_of(column)
        group = FEATURES[name].group if name in FEATURES else "other"
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
    """Compare the detector with itself refitted without each feature group, to measure what the group adds.

    Args:
        table: token table, all folds.
        detector: fitted on the ``train`` and ``calibration`` folds.
        folds: (rows,) masks by name; differences are those on ``test``.
        replicates, seed: of the bootstrap over images.
        progress: is told what is being fitted.

    Returns:
        One for every group and metric of ``ABLATED``; none if there is only one group.
    """
    groups = feature_groups(detector.features)
    test = detector.rows(table[folds["test"]])
    if test["label"].nunique() < 2:
        raise DataError("the test fold lacks hallucinated or grounded mentions: run the task on more samples")
    scores = {"detector": detector.predict(test)}
    for group, columns in groups.items():
        if len(groups) > 1:
            progress(f"fitting without {group} ({len(columns)} columns)")
            kept = [name for name in detector.features if name not in columns]
            settings = {**detector.settings, "features": kept, "exclude": [], "threshold": "f1"}
            refitted = Detector(**settings).fit(table[folds["train"]], table[folds["calibration"]])
            scores[f"without {group}"] = refitted.predict(test)
    drawn = group_weights(test["group"], replicates, seed)
    figures = evaluate_scores(test, scores, drawn)
    return tuple(
        Ablation(group, len(columns), Difference.of("detector", f"without {group}", metric, gain, drawn))
        for group, columns in (groups.items() if len(groups) > 1 else ())
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
) -> DetectorResults:
    """Train on one task's mentions; write ``detector/``, ``warnings.jsonl`` and the figures into the run directory.

    Args:
        store: the run.
        task: whose mentions.
        detector: settings of the detector.
        shares: of the images for train, calibration and test.
        seed: of split and bootstrap.
        table: the token rows to learn from and to measure on; None for all of the task's.
        targets: other runs to judge the detector on.
        source_run: name of the run beside them.
        more: ``beside``, ``ablation`` and ``progress`` of ``stethoscope.detection.training.train_detector``.

    Raises:
        ArtefactError: the run has no token rows of that task.
    """

    table = store.tokens(task) if table is None else table
    if table.empty:
        raise no_rows(store, task)
    detector, results, folds = train_detector(table, detector, shares, seed, **more)
    if targets:
        source_target = Target(source_run, table, store.model(task))
        results = replace(results, transfer=transfer(detector, source_target, targets, shares, seed))
    fingerprint = store.fingerprints().get(task, {})
    store.set_status(SECTION, "running")  # a kill from here on leaves parts of two detectors
    detector.save(
        store.run_dir / "detector",
        {"model": fingerprint.get("adapter"), "task": fingerprint.get("task", task), "label": label(detector)},
    )
    store.write_metrics(SECTION, results.to_dict())
    write_warnings(mention_warnings(table, detector, folds), store.run_dir / "warnings.jsonl")
    store.set_status(SECTION, None)
    return results


def label(detector: Detector) -> str:
    """Describe what a detector has learned to predict, for its manifest."""
    chosen = {"first": "first sub-token of", "all": "every sub-token of"}
    rows = chosen.get(detector.settings["subtokens"], f"{detector.settings['subtokens']} over the sub-tokens of")
    which = "the first mention of an object" if detector.settings["repeats"] == "first" else "every object mention"
    return f"{rows} {which} in an answer: 1 if the object is not in the image (the task's ground truth), else 0"


def no_rows(store: RunStore, task: str | None = None) -> ArtefactError:
    """Make the error of a run without token rows; it says which command computes them."""
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
