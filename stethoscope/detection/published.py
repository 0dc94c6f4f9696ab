"""Run published detectors on a token table: every ``conf/features/paper/<name>`` whose columns the table has.

A detector that is one score is evaluated by that score. Layers and other settings are the paper's (by share of depth);
a layer that the paper chooses on validation data is the best of the training fold; the direction is the paper's or, if
the paper gives none, that of the training fold. A detector that learns from several columns (or one per
layer or head) learns as its set declares (``learner``, see ``stethoscope.detection.learners``), on the same folds as
ours.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from stethoscope.core.errors import ConfigError
from stethoscope.core.token_table import MentionSelection, feature_matrix, feature_names
from stethoscope.detection.detector import Detector
from stethoscope.detection.learners import MeasuredDetector, describe_learner, make_learner
from stethoscope.features import FEATURES, FeatureSet, named_set, set_names
from stethoscope.features.columns import feature_of
from stethoscope.features.registry import COST_CLASSES, FORWARD
from stethoscope.metrics import classification

PREFIX = "paper/"
SELF_VERIFICATION = "paper/self_verification"
EQUIVALENT = {"pas_q": "attn_previous_l00"}
"""Columns that equal another one, which a table may have instead: PAS is the mass on the earlier answer in layer 0."""


@dataclass(frozen=True)
class Method:
    """A published detector that a table has the columns of.

    Attributes:
        name: of its feature set, such as ``paper/svar``.
        cost: most expensive cost class of its features.
        columns: names of all columns that it reads.
        score: columns that can each be its score, one for each layer if the paper chooses a layer; none if it learns
            from all ``columns``.
        higher_means: meaning of a higher score: ``hallucinated``, ``grounded`` or ``depends``.
        learner: how it learns from the columns, if it has no score; None is a logistic regression.
    """

    name: str
    cost: str
    columns: tuple[str, ...]
    score: tuple[str, ...] = ()
    higher_means: str = "depends"
    learner: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class PublishedScores:
    """Scores of a published method on the test fold.

    Attributes:
        values: (rows,) scores; higher means hallucinated.
        probability: whether the scores are calibrated probabilities.
        sign: -1 if low values of the column speak for hallucination, else 1.
        note: description of how the scores were computed.
    """

    values: np.ndarray
    probability: bool
    sign: int
    note: str


def columns_of(features: FeatureSet, columns: Sequence[str]) -> tuple[str, ...]:
    """Return the columns that belong to a feature of the set."""
    names = set(features.names)
    return tuple(column for column in columns if feature_of(column) in names)


def cost_of(columns: Sequence[str]) -> str:
    """Return the most expensive cost class of the features of some columns; empty if none is known."""
    costs = [FEATURES[name].cost for name in map(feature_of, columns) if name in FEATURES]
    return max(costs, key=COST_CLASSES.index, default="")


def available_methods(table: pd.DataFrame) -> list[Method]:
    """List the published detectors all of whose features have values in a token table.

    Args:
        table: mentions of the training fold.
    """
    names = list(feature_names(table))
    columns = [str(name) for name, known in table[names].notna().any().items() if known]
    columns += [name for name, same in EQUIVALENT.items() if name not in columns and same in columns]
    methods = []
    for name, features in _published_sets():
        own = columns_of(features, columns)
        if {feature_of(column) for column in own} != set(features.names):
            continue
        score = tuple(column for column in own if feature_of(column) == features.score)
        own, score = (
            tuple(column if column in table else EQUIVALENT[column] for column in part) for part in (own, score)
        )
        higher_means = FEATURES[features.score].higher_means if features.score else "depends"
        methods.append(Method(name, features.cost, own, score, higher_means, features.learner))
    return methods


def left_out(methods: Sequence[Method]) -> tuple[str, ...]:
    """Name the published detectors of the same forward pass that are not among some, for lack of their features.

    >>> "paper/haloprobe" in left_out([])
    True
    """
    measured = {method.name for method in methods}
    return tuple(name for name, features in _published_sets() if features.cost == FORWARD and name not in measured)


def _published_sets() -> Iterator[tuple[str, FeatureSet]]:
    """Yield name and features of every published detector."""
    return ((name, named_set(name)) for name in set_names() if name.startswith(PREFIX))


def refits(detector: Detector, names: Sequence[str], columns: Sequence[str]) -> dict[str, Detector]:
    """Create detectors with the settings of another for the columns of some feature sets, to compare the sets.

    Args:
        detector: detector whose settings are used.
        names: names of feature sets, such as ``one_pass``, which become the names of the detectors. If the table has
            only part of a set, the name says so.
        columns: feature columns of the token table.

    Raises:
        ConfigError: a set is not known, or the table has no column of it.
    """
    computed = {feature_of(column) for column in columns}
    check_sets(names, computed)
    detectors: dict[str, Detector] = {}
    for name in names:
        features = named_set(name)
        available, total = len(computed & set(features.names)), len(features.names)
        label = name if available == total else f"{name} ({available} of {total} features)"
        own = list(columns_of(features, columns))
        detectors[label] = MeasuredDetector(**{**detector.settings, "features": own, "exclude": []})
    return detectors


def check_sets(names: Sequence[str], computed: Collection[str]) -> None:
    """Check that every feature set has a feature among the computed ones.

    Args:
        names: names of feature sets.
        computed: names of the computed features.

    Raises:
        ConfigError: a set is not known, or none of its features is among them.
    """
    for name in names:
        if not set(named_set(name).names) & set(computed):
            raise ConfigError(f"sets={name}: none of its features is computed; choose features={name} or more")


def score_published(
    method: Method, folds: Mapping[str, pd.DataFrame], selection: MentionSelection, seed: int = 0
) -> PublishedScores:
    """Score the mentions of the ``test`` fold by a published method.

    Args:
        method: one of ``available_methods``.
        folds: mentions of ``train``, ``calibration`` and ``test``, a row each.
        selection: mention selection of the detectors that it is compared with.
        seed: seed of the fit.
    """
    if method.score:
        return _score_column(method, folds["train"], folds["test"])
    learner = make_learner(method.columns, method.learner, selection, seed)
    fitted = learner.fit(folds["train"], folds["calibration"])
    return PublishedScores(
        fitted.predict(folds["test"]), True, 1, describe_learner(method.learner, len(method.columns))
    )


def _score_column(method: Method, train: pd.DataFrame, test: pd.DataFrame) -> PublishedScores:
    """Orient the score column; gaps are filled with the median of the training fold."""
    labels = train["label"].to_numpy(dtype=int)
    train_matrix = feature_matrix(train, method.score)
    medians = np.nanmedian(train_matrix, axis=0)
    filled = np.where(np.isnan(train_matrix), medians, train_matrix)
    areas = np.array([classification.auroc(labels, values) for values in filled.T])
    published_sign = {"hallucinated": 1, "grounded": -1}.get(method.higher_means)
    signs = np.full(len(areas), published_sign) if published_sign else np.where(areas >= 0.5, 1, -1)
    best = int(np.argmax(np.where(signs > 0, areas, 1 - areas)))
    sign, column = int(signs[best]), method.score[best]
    values = feature_matrix(test, [column])[:, 0]
    authority = "paper" if published_sign else "training fold"
    direction = f"{'high' if sign > 0 else 'low'} for hallucinated by the {authority}"
    layer = f" (layer by the training fold, of {len(method.score)})" if len(method.score) > 1 else ""
    scores = sign * np.where(np.isnan(values), medians[best], values)
    return PublishedScores(scores, False, sign, f"{column}{layer}, {direction}")
