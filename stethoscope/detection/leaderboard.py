"""Compare detectors, published methods, baselines and features on the same mentions and resampled images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from stethoscope.core.errors import ConfigError, DataError
from stethoscope.core.token_table import FeatureSchema, MentionSelection, Repeats, feature_matrix, mention_rows, require
from stethoscope.detection.baselines import baselines
from stethoscope.detection.calibrated_model import CalibratedModel, Examples
from stethoscope.detection.detector import Detector
from stethoscope.detection.detector_results import Difference, Leaderboard, LeaderboardRow
from stethoscope.detection.hidden_probe import TEACHER
from stethoscope.detection.published import SELF_VERIFICATION, available_methods, cost_of, left_out, score_published
from stethoscope.detection.score_metrics import AREAS, METRICS, LabelledMentions, control_bins, evaluate_scores
from stethoscope.features import FEATURES
from stethoscope.features.columns import feature_of
from stethoscope.features.registry import FORWARD
from stethoscope.metrics import classification
from stethoscope.metrics.bootstrap import REPLICATES, Resamples, group_weights

SHUFFLES = 8  # detectors fitted to shuffled labels; the AUROC of a single one differs from 0.5 by chance
MAX_FEATURES = 100  # single features with a row of their own
SHUFFLED = "shuffled labels"
KINDS = ("detector", "published", "baseline", "feature")  # of rows, in their order


def _single_features(
    train: pd.DataFrame, test: pd.DataFrame, names: Sequence[str]
) -> tuple[dict[str, np.ndarray], dict[str, int], dict[str, str]]:
    """Orient features as scores and fill gaps with the median, both by the training fold alone.

    Returns:
        Test scores by name (by falling training AUROC), signs, and the best feature by metric of ``AREAS``.
    """
    mentions = LabelledMentions.of(train)
    train_matrix, test_matrix = feature_matrix(train, names), feature_matrix(test, names)
    scores, signs, areas_by_name = {}, {}, {}
    for name, train_values, test_values in zip(names, train_matrix.T, test_matrix.T, strict=True):
        median = np.nanmedian(train_values)
        train_values = np.nan_to_num(train_values, nan=median)
        by_metric = {"auroc": classification.auroc(mentions.labels, train_values), **mentions.areas(train_values)}
        signs[name] = 1 if by_metric["auroc"] >= 0.5 else -1
        scores[name] = signs[name] * np.nan_to_num(test_values, nan=median)
        areas = np.array([by_metric[metric] for metric in AREAS])
        areas_by_name[name] = np.nan_to_num(areas if signs[name] > 0 else 1 - areas)
    order = sorted(scores, key=lambda name: -areas_by_name[name][0])
    best = {metric: max(order, key=lambda name: areas_by_name[name][i]) for i, metric in enumerate(AREAS) if order}
    selected = [name for i, name in enumerate(order) if i < MAX_FEATURES or name in best.values()]
    return {name: scores[name] for name in selected}, signs, best


def _uninformative(train: pd.DataFrame, names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the features without any value, and those with one value and no gap."""
    columns = dict(zip(names, feature_matrix(train, names).T, strict=True))
    empty = tuple(name for name, values in columns.items() if np.isnan(values).all())
    return empty, tuple(name for name, values in columns.items() if (values == values[:1]).all())


def shuffled_predictions(
    table: pd.DataFrame, detector: Detector, folds: Mapping[str, np.ndarray], seed: int, draft: bool = True
) -> Iterator[np.ndarray]:
    """Yield predictions on the ``test`` fold of a fitted detector's classifier, refitted to shuffled labels.

    The labels are shuffled within the training and the calibration fold: a calibration on true labels would orient a
    meaningless direction to the better side. Rows and columns are those of the detector.

    Args:
        table: token table, all folds.
        detector: fitted detector.
        folds: (rows,) masks ``train``, ``calibration`` and ``test``.
        seed: seed of the shuffles.
        draft: fit drafts (``Inputs.classifier``), which are right by chance as often as the classifier itself.
    """
    parts = [detector.select_mentions(table[folds[fold]]) for fold in ("train", "calibration", "test")]
    if TEACHER not in detector.features:  # a probe would learn the truth from the model's verification
        parts = [part.drop(columns=TEACHER, errors="ignore") for part in parts]
    train, calibration, test = (Examples.of(detector.inputs.matrix(part), part) for part in parts)
    kind, method, own_seed = (detector.settings[key] for key in ("estimator", "calibration", "seed"))
    for index in range(SHUFFLES):
        random = np.random.default_rng([seed, index])
        shuffled = [replace(part, labels=random.permutation(part.labels)) for part in (train, calibration)]
        estimator = detector.inputs.classifier(kind, detector.C, own_seed, draft=draft)
        yield CalibratedModel.fit(estimator, *shuffled, method, detector.C).predict(test.matrix)


def _average_shuffled(figures: dict[tuple[str, str], np.ndarray], names: Sequence[str], seed: int) -> None:
    """Replace the figures of several rows by their mean, whose replicates include the spread of the rows."""
    if not names:
        return
    count = len(next(iter(figures.values())))
    rows = np.random.default_rng(seed).integers(len(names), size=(len(names), count))
    rows[:, 0] = np.arange(len(names))
    for metric in [metric for name, metric in figures if name == names[0]]:
        stacked = np.stack([figures.pop((name, metric)) for name in names])
        figures[SHUFFLED, metric] = np.take_along_axis(stacked, rows, axis=0).mean(axis=0)


def build_leaderboard(
    table: pd.DataFrame,
    detectors: Mapping[str, Detector],
    folds: Mapping[str, np.ndarray],
    replicates: int = REPLICATES,
    seed: int = 0,
    repeats: Repeats = "first",
    published: bool = False,
) -> Leaderboard:
    """Measure fitted detectors, published ones, baselines and every single feature on the ``test`` fold.

    Args:
        table: token table, all folds.
        detectors: fitted on the ``train`` (and ``calibration``) fold, by name; all select the same rows of a table.
            The row ``shuffled labels`` has the settings of the first.
        folds: (rows,) masks ``train``, ``calibration`` and ``test``; baselines are fitted here, on the same folds.
        replicates: number of bootstrap replicates over images.
        seed: seed of the bootstrap and the shuffles.
        repeats: measure ``first`` mentions of every object in an answer, or ``all``; ignored if there are
            detectors, whose setting counts.
        published: also measure the published detectors that the table has the features of.

    Raises:
        ConfigError: the detectors select different rows.
        DataError: the test fold lacks hallucinated or grounded mentions.
        ArtefactError: a detector does not fit the table.
    """
    require(table, ("group", "token", "object"))
    selection = _common_selection(detectors, repeats)
    parts = {fold: mention_rows(table[mask], **selection) for fold, mask in folds.items()}
    test = parts["test"]
    if test["label"].nunique() < 2:
        raise DataError(
            f"the test fold has {len(test)} judged mentions of {test['label'].nunique()} kinds; hallucinated and "
            "grounded ones are needed: run the task on more samples"
        )
    methods = available_methods(parts["train"]) if published else []
    single = _single_columns(table)
    skipped, constant = _uninformative(parts["train"], single)
    entries, best = _entries([name for name in single if name not in skipped], detectors, parts)
    for method in methods:
        result = score_published(method, parts, selection, seed)
        entries.append(
            _Entry(method.name, "published", result.values, result.probability, result.sign, method.cost, result.note)
        )
    shuffled = {
        f"{SHUFFLED} {index}": probabilities
        for detector in list(detectors.values())[:1]
        for index, probabilities in enumerate(shuffled_predictions(table, detector, folds, seed))
    }
    resamples = group_weights(test["group"].to_numpy(dtype=str), replicates, seed)
    probabilities, scores = (
        {entry.name: entry.values for entry in entries if entry.probability is kind} for kind in (True, False)
    )
    figures = evaluate_scores(test, probabilities | shuffled, resamples, scores)
    _average_shuffled(figures, list(shuffled), seed)
    if shuffled:
        entries.append(_Entry(SHUFFLED, "baseline", np.zeros(0)))
    rows = tuple(
        LeaderboardRow(
            entry.name,
            entry.kind,
            entry.sign,
            {
                metric: resamples.interval(figures[entry.name, metric])
                for metric in METRICS
                if (entry.name, metric) in figures
            },
            entry.cost,
            entry.note,
        )
        for entry in sorted(entries, key=lambda entry: KINDS.index(entry.kind))
    )
    labels = test["label"].to_numpy(dtype=int)
    controls = {metric: classification.comparable(labels, bins) for metric, bins in control_bins(test).items()}
    best_published = _best_published(rows)
    verification = [row.name for row in rows if row.name == SELF_VERIFICATION]
    others = {
        metric: [*filter(None, [best.get(metric), best_published.get(metric)]), *verification] for metric in AREAS
    }
    differences = _differences(figures, list(detectors), others, resamples)
    return Leaderboard(
        rows,
        differences,
        best,
        controls,
        skipped,
        constant,
        best_published=best_published,
        left_out=left_out(methods) if published else (),
    )


@dataclass(frozen=True)
class _Entry:
    """A future row of the leaderboard with its (rows,) values on the test fold; empty for shuffled labels."""

    name: str
    kind: str
    values: np.ndarray
    probability: bool = True
    sign: int = 1
    cost: str = ""
    note: str = ""


def _single_columns(table: pd.DataFrame) -> list[str]:
    """Return the features that mean something by themselves, as one dimension of a vector does not."""
    vectors = {name for name, feature in FEATURES.items() if feature.vector}
    return [name for name in FeatureSchema.of(table).names if feature_of(name) not in vectors]


def _entries(
    columns: Sequence[str],
    detectors: Mapping[str, Detector],
    parts: Mapping[str, pd.DataFrame],
) -> tuple[list[_Entry], dict[str, str]]:
    """Return the entries of detectors, baselines and single features, and the best feature by metric of ``AREAS``."""
    train, test = parts["train"], parts["test"]
    entries = [
        _Entry(name, "detector", detector.predict(test), cost=cost_of(detector.features))
        for name, detector in detectors.items()
    ]
    for name, baseline in baselines("all", "all").items():  # the mentions are selected already
        entries.append(_Entry(name, "baseline", baseline.fit(train, parts["calibration"]).predict(test)))
    taken = {entry.name for entry in entries}
    scores, signs, best = _single_features(train, test, [name for name in columns if name not in taken])
    entries += [_Entry(name, "feature", values, False, signs[name], cost_of([name])) for name, values in scores.items()]
    return entries, best


def _best_published(rows: Sequence[LeaderboardRow]) -> dict[str, str]:
    """Return by metric of ``AREAS`` the best published detector that needs one forward pass only."""
    candidates = [row for row in rows if row.kind == "published" and row.cost == FORWARD]
    values = {metric: [np.nan_to_num(row.metrics[metric].value) for row in candidates] for metric in AREAS}
    return {metric: candidates[int(np.argmax(areas))].name for metric, areas in values.items() if areas}


def _common_selection(detectors: Mapping[str, Detector], repeats: Repeats) -> MentionSelection:
    """Return the mention selection that all detectors share, or the default without detectors."""
    settings = {(detector.settings["subtokens"], detector.settings["repeats"]) for detector in detectors.values()}
    if len(settings) > 1:
        raise ConfigError(
            f"detectors with different subtokens and repeats {sorted(settings)} have no mentions in common"
        )
    if not settings:
        return MentionSelection(subtokens="first", repeats=repeats)
    subtokens, repeats = settings.pop()
    return MentionSelection(subtokens=subtokens, repeats=repeats)


def _differences(
    figures: Mapping[tuple[str, str], np.ndarray],
    detectors: Sequence[str],
    others: Mapping[str, Sequence[str]],
    resamples: Resamples,
) -> tuple[Difference, ...]:
    """Compare every detector with the given others by metric, two baselines, and the detectors after it."""
    return tuple(
        Difference.of(name, other, metric, figures[name, metric] - figures[other, metric], resamples)
        for i, name in enumerate(detectors)
        for metric in AREAS
        for other in [*others[metric], "position only", "text prior", *detectors[i + 1 :]]
    )
