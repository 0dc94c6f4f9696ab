"""Detectors, ours and published, baselines and single features, on the same held-out mentions and resampled images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from stethoscope.core.errors import ConfigError, DataError
from stethoscope.core.token_table import FeatureSchema, feature_matrix, mention_rows, require
from stethoscope.detection.baselines import baselines
from stethoscope.detection.detector import Detector
from stethoscope.detection.detector_results import Difference, Leaderboard, Row
from stethoscope.detection.published import SELF_VERIFICATION, available_methods, cost_of, score_published
from stethoscope.detection.score_metrics import AREAS, METRICS, LabelledMentions, control_bins, evaluate_scores
from stethoscope.features import FEATURES
from stethoscope.features.columns import feature_of
from stethoscope.features.registry import FORWARD
from stethoscope.metrics import classification
from stethoscope.metrics.bootstrap import REPLICATES, Resamples, group_weights

SHUFFLES = 20  # detectors fitted to shuffled labels; one alone is off 0.5 by chance, as any direction among features is
MOST_FEATURES = 100  # single features with a row of their own
SHUFFLED = "shuffled labels"
KINDS = ("detector", "published", "baseline", "feature")  # of rows, in their order


def _single_features(
    train: pd.DataFrame, test: pd.DataFrame, names: Sequence[str]
) -> tuple[dict[str, np.ndarray], dict[str, int], dict[str, str], tuple[str, ...]]:
    """Features as scores: oriented, and gaps filled with the median, by the training fold alone.

    Returns:
        Test scores by name (by falling training AUROC), signs, the best feature by metric of ``AREAS``, and features
        without any value.
    """
    mentions = LabelledMentions.of(train)
    learn, held_out = feature_matrix(train, names), feature_matrix(test, names)
    skipped = tuple(name for name, column in zip(names, learn.T, strict=True) if np.isnan(column).all())
    scores, signs, areas_by_name = {}, {}, {}
    for name, seen, new in zip(names, learn.T, held_out.T, strict=True):
        if name in skipped:
            continue
        middle = np.nanmedian(seen)
        seen, new = np.nan_to_num(seen, nan=middle), np.nan_to_num(new, nan=middle)
        found = {"auroc": classification.auroc(mentions.labels, seen), **mentions.areas(seen)}
        signs[name] = 1 if found["auroc"] >= 0.5 else -1
        scores[name] = signs[name] * new
        areas = np.array([found[metric] for metric in AREAS])
        areas_by_name[name] = np.nan_to_num(areas if signs[name] > 0 else 1 - areas)
    order = sorted(scores, key=lambda name: -areas_by_name[name][0])
    best = {metric: max(order, key=lambda name: areas_by_name[name][at]) for at, metric in enumerate(AREAS) if order}
    shown = [name for at, name in enumerate(order) if at < MOST_FEATURES or name in best.values()]
    return {name: scores[name] for name in shown}, signs, best, skipped


def shuffled(table: pd.DataFrame, detector: Detector, folds: Mapping[str, np.ndarray], seed: int) -> Iterator[Detector]:
    """Detectors with the settings of one that is fitted, fitted to labels shuffled among the mentions of each fold.

    Both folds are shuffled: a calibration on true labels would turn a meaningless direction to the better side.
    """
    settings = {**detector.settings, "C": detector.C, "threshold": "f1"}
    parts = [detector.rows(table[folds[fold]]) for fold in ("train", "calibration")]
    for number in range(SHUFFLES):
        random = np.random.default_rng([seed, number])
        yield Detector(**settings).fit(*(part.assign(label=random.permutation(part["label"])) for part in parts))


def _mean_of(figures: dict[tuple[str, str], np.ndarray], names: Sequence[str], seed: int) -> None:
    """Puts one row in the place of several: their mean, with their own spread in its replicates."""
    if not names:
        return
    count = len(next(iter(figures.values())))
    drawn = np.random.default_rng(seed).integers(len(names), size=(len(names), count))
    drawn[:, 0] = np.arange(len(names))
    for metric in [metric for name, metric in figures if name == names[0]]:
        stacked = np.stack([figures.pop((name, metric)) for name in names])
        figures[SHUFFLED, metric] = np.take_along_axis(stacked, drawn, axis=0).mean(axis=0)


def leaderboard(
    table: pd.DataFrame,
    detectors: Mapping[str, Detector],
    folds: Mapping[str, np.ndarray],
    replicates: int = REPLICATES,
    seed: int = 0,
    repeats: str = "first",
    published: bool = False,
) -> Leaderboard:
    """Measures fitted detectors beside published ones, baselines and every single feature on the ``test`` fold.

    Args:
        table: token table, all folds.
        detectors: fitted on the ``train`` (and ``calibration``) fold, by name; all take the same rows of a table. The
            row ``shuffled labels`` has the settings of the first.
        folds: (rows,) masks ``train``, ``calibration`` and ``test``; baselines are fitted here, on the same folds.
        replicates: of the bootstrap over images.
        seed: of the bootstrap and the shuffles.
        repeats: measure ``first`` mentions of every object in an answer, or ``all``; without detectors only, which
            say it themselves.
        published: also measure the published detectors that the table has the features of.

    Raises:
        ConfigError: the detectors take different rows.
        DataError: the test fold lacks hallucinated or grounded mentions.
        ArtefactError: a detector does not fit the table.
    """
    require(table, ("group", "token", "object"))
    ways = _common_rows(detectors, repeats)
    parts = {fold: mention_rows(table[mask], **ways) for fold, mask in folds.items()}
    test = parts["test"]
    if test["label"].nunique() < 2:
        raise DataError(
            f"the test fold has {len(test)} judged mentions of {test['label'].nunique()} kinds; hallucinated and "
            "grounded ones are needed: run the task on more samples"
        )
    entries, best, skipped = _entries(table, detectors, parts, ways, seed, published)
    mixed = {
        f"{SHUFFLED} {number}": other.predict(test)
        for one in list(detectors.values())[:1]
        for number, other in enumerate(shuffled(table, one, folds, seed))
    }
    drawn = group_weights(test["group"], replicates, seed)
    probabilities, scores = (
        {one.name: one.values for one in entries if one.probability is kind} for kind in (True, False)
    )
    figures = evaluate_scores(test, probabilities | mixed, drawn, scores)
    _mean_of(figures, list(mixed), seed)
    made = tuple(
        Row(
            one.name,
            one.kind,
            one.sign,
            {metric: drawn.interval(figures[one.name, metric]) for metric in METRICS if (one.name, metric) in figures},
            one.cost,
            one.note,
        )
        for one in sorted(
            [*entries, *[_Entry(SHUFFLED, "baseline")] * bool(mixed)], key=lambda one: KINDS.index(one.kind)
        )
    )
    labels = test["label"].to_numpy(dtype=int)
    controls = {metric: classification.comparable(labels, bins) for metric, bins in control_bins(test).items()}
    rivals = _best_published(made)
    asked = [row.name for row in made if row.name == SELF_VERIFICATION]
    others = {metric: [*filter(None, [best.get(metric), rivals.get(metric)]), *asked] for metric in AREAS}
    return Leaderboard(made, _differences(figures, list(detectors), others, drawn), best, controls, skipped, rivals)


@dataclass(frozen=True)
class _Entry:
    """Something that is measured: a row of the leaderboard to be, with its (rows,) values on the test fold."""

    name: str
    kind: str
    values: np.ndarray | None = None
    probability: bool = True
    sign: int = 1
    cost: str = ""
    note: str = ""


def _entries(
    table: pd.DataFrame,
    detectors: Mapping[str, Detector],
    parts: Mapping[str, pd.DataFrame],
    ways: Mapping[str, str],
    seed: int,
    published: bool,
) -> tuple[list[_Entry], dict[str, str], tuple[str, ...]]:
    """All that is measured, the best feature by metric of ``AREAS``, and features without any value."""
    train, test = parts["train"], parts["test"]
    entries = [
        _Entry(name, "detector", detector.predict(test), cost=cost_of(detector.features))
        for name, detector in detectors.items()
    ]
    for method in available_methods(train) if published else ():
        said = score_published(method, parts, ways, seed)
        entries.append(
            _Entry(method.name, "published", said.values, said.probability, said.sign, method.cost, said.note)
        )
    for name, baseline in baselines("all", "all").items():  # all of the rows that are given
        entries.append(_Entry(name, "baseline", baseline.fit(train, parts["calibration"]).predict(test)))
    taken = {one.name for one in entries}
    single = [name for name in FeatureSchema.of(table).names if name not in taken and not _is_vector(name)]
    scores, signs, best, skipped = _single_features(train, test, single)
    entries += [_Entry(name, "feature", values, False, signs[name], cost_of([name])) for name, values in scores.items()]
    return entries, best, skipped


def _is_vector(column: str) -> bool:
    """Whether a column is one dimension of a state, which means nothing by itself."""
    feature = FEATURES.get(feature_of(column))
    return feature is not None and feature.vector


def _best_published(rows: Sequence[Row]) -> dict[str, str]:
    """By metric of ``AREAS`` the published detector of the same forward pass with the highest figure."""
    there = [row for row in rows if row.kind == "published" and row.cost == FORWARD]
    values = {metric: [np.nan_to_num(row.metrics[metric].value) for row in there] for metric in AREAS}
    return {metric: there[int(np.argmax(found))].name for metric, found in values.items() if found}


def _common_rows(detectors: Mapping[str, Detector], repeats: str) -> dict[str, str]:
    """How all detectors make mentions of a token table: arguments of ``mention_rows``."""
    ways = {(one.settings["subtokens"], one.settings["repeats"]) for one in detectors.values()}
    if len(ways) > 1:
        raise ConfigError(f"detectors with different subtokens and repeats {sorted(ways)} have no mentions in common")
    subtokens, repeats = ways.pop() if ways else ("first", repeats)
    return {"subtokens": subtokens, "repeats": repeats}


def _differences(
    figures: Mapping[tuple[str, str], np.ndarray],
    detectors: Sequence[str],
    others: Mapping[str, Sequence[str]],
    drawn: Resamples,
) -> tuple[Difference, ...]:
    """Every detector against some others by metric, the baselines that count, and the detectors after it."""
    return tuple(
        Difference.of(name, other, metric, figures[name, metric] - figures[other, metric], drawn)
        for at, name in enumerate(detectors)
        for metric in AREAS
        for other in [*others[metric], "position only", "text prior", *detectors[at + 1 :]]
    )
