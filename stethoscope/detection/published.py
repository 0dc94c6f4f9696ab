"""Published detectors on a token table: every ``conf/features/paper/<name>`` that the table has the columns of.

A detector that is one score is judged by that score: layers and other settings are the paper's (by share of depth),
where the paper chooses a layer on validation data it is the best one of the training fold, and the direction is the
paper's or, where that says nothing, that of the training fold. A detector that learns from several columns (or one per
layer or head) is a logistic regression on them, fitted and calibrated on the same folds as ours.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from stethoscope.core.errors import ConfigError
from stethoscope.core.token_table import feature_matrix, feature_names
from stethoscope.detection.detector import Detector
from stethoscope.features import FEATURES, FeatureSet, named_set, set_names
from stethoscope.features.columns import feature_of
from stethoscope.features.registry import COST_CLASSES
from stethoscope.metrics import classification

PREFIX = "paper/"
SELF_VERIFICATION = "paper/self_verification"


@dataclass(frozen=True)
class Method:
    """A published detector that a table can be judged with.

    Attributes:
        name: of its feature set, such as ``paper/svar``.
        cost: most expensive cost class of its features.
        columns: all that it reads.
        score: columns that can be its score by themselves, one for each layer where the paper chooses a layer; none
            where it learns from all ``columns``.
        higher_means: what a higher score speaks for: ``hallucinated``, ``grounded`` or ``depends``.
    """

    name: str
    cost: str
    columns: tuple[str, ...]
    score: tuple[str, ...] = ()
    higher_means: str = "depends"


@dataclass(frozen=True)
class PublishedScores:
    """What a method says of the test fold.

    Attributes:
        values: (rows,) high for hallucinated.
        probability: they are calibrated probabilities.
        sign: -1 if low values of the column speak for hallucination.
        note: how the values were made, in words.
    """

    values: np.ndarray
    probability: bool
    sign: int
    note: str


def columns_of(features: FeatureSet, columns: Sequence[str]) -> tuple[str, ...]:
    """Those of some columns that hold one of the features."""
    return tuple(column for column in columns if feature_of(column) in features.names)


def cost_of(columns: Sequence[str]) -> str:
    """Return the most expensive cost class of the features of some columns; empty if none is known."""
    costs = [FEATURES[name].cost for name in map(feature_of, columns) if name in FEATURES]
    return max(costs, key=COST_CLASSES.index, default="")


def available_methods(table: pd.DataFrame) -> list[Method]:
    """The published detectors of which a token table has all features, with a value somewhere.

    Args:
        table: what they would learn from, the mentions of the training fold.
    """
    columns = [name for name in feature_names(table) if table[name].notna().any()]
    found = []
    for name in set_names():
        features = named_set(name) if name.startswith(PREFIX) else None
        own = columns_of(features, columns) if features else ()
        if features is None or {feature_of(column) for column in own} != set(features.names):
            continue
        score = tuple(column for column in own if feature_of(column) == features.score)
        higher_means = FEATURES[features.score].higher_means if features.score else "depends"
        found.append(Method(name, features.cost, own, score, higher_means))
    return found


def refits(detector: Detector, names: Sequence[str], columns: Sequence[str]) -> dict[str, Detector]:
    """Detectors with the settings of another, for the columns of some feature sets: what is each set worth?

    Args:
        detector: that the others are compared with.
        names: of feature sets, such as ``one_pass``; the detectors are called so. Where the table has a part of a set
            alone, the name says so.
        columns: of the token table.

    Raises:
        ConfigError: a set is not known, or the table has no column of it.
    """
    computed = {feature_of(column) for column in columns}
    check_sets(names, computed)
    found = {}
    for name in names:
        features = named_set(name)
        have, all_of_it = len(computed & set(features.names)), len(features.names)
        label = name if have == all_of_it else f"{name} ({have} of {all_of_it} features)"
        own = list(columns_of(features, columns))
        found[label] = Detector(**{**detector.settings, "features": own, "exclude": []})
    return found


def check_sets(names: Sequence[str], computed: Collection[str]) -> None:
    """Checks that features hold something of every feature set.

    Args:
        names: of feature sets.
        computed: names of features.

    Raises:
        ConfigError: a set is not known, or none of its features is among them.
    """
    for name in names:
        if not set(named_set(name).names) & set(computed):
            raise ConfigError(f"sets={name}: none of its features is computed; choose features={name} or more")


def score_published(
    method: Method, folds: Mapping[str, pd.DataFrame], settings: Mapping[str, str], seed: int = 0
) -> PublishedScores:
    """What a method says of the mentions of the ``test`` fold.

    Args:
        method: of ``available_methods``.
        folds: mentions of ``train``, ``calibration`` and ``test``, a row each.
        settings: ``repeats`` and ``subtokens`` of the detectors that it is compared with.
        seed: of the fit.
    """
    if method.score:
        return _score(method, folds["train"], folds["test"])
    fitted = Detector(features=method.columns, seed=seed, **settings).fit(folds["train"], folds["calibration"])
    note = f"logistic regression on {len(method.columns)} columns"
    return PublishedScores(fitted.predict(folds["test"]), True, 1, note)


def _score(method: Method, train: pd.DataFrame, test: pd.DataFrame) -> PublishedScores:
    """The score column as it stands; gaps are filled with the median of the training fold."""
    labels = train["label"].to_numpy(dtype=int)
    seen = feature_matrix(train, method.score)
    middle = np.nanmedian(seen, axis=0)
    areas = np.array([classification.auroc(labels, values) for values in np.where(np.isnan(seen), middle, seen).T])
    given = {"hallucinated": 1, "grounded": -1}.get(method.higher_means)
    signs = np.full(len(areas), given) if given else np.where(areas >= 0.5, 1, -1)
    best = int(np.argmax(np.where(signs > 0, areas, 1 - areas)))
    sign, column = int(signs[best]), method.score[best]
    values = feature_matrix(test, [column])[:, 0]
    direction = f"{'high' if sign > 0 else 'low'} for hallucinated by the {'paper' if given else 'training fold'}"
    layer = f" (layer by the training fold, of {len(method.score)})" if len(method.score) > 1 else ""
    return PublishedScores(
        sign * np.where(np.isnan(values), middle[best], values), False, sign, f"{column}{layer}, {direction}"
    )
