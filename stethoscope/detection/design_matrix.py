"""Turn a token table into what a detector reads: its mentions (rows), its features, and the design matrix of them.

``Selection`` follows the detector's settings; ``Inputs`` are the columns of the matrix, and the classifier for them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator

from stethoscope.core.errors import ConfigError, unknown
from stethoscope.core.token_table import (
    SUBTOKENS,
    FeatureSchema,
    Repeats,
    feature_matrix,
    feature_names,
    mention_rows,
    object_index,
    require,
    select_features,
)
from stethoscope.detection.calibrated_model import CALIBRATIONS
from stethoscope.detection.estimator_classes import check_estimator
from stethoscope.detection.estimators import make_estimator
from stethoscope.detection.evidence_prior import EXTERNAL, Factored, external_columns
from stethoscope.detection.hidden_probe import COLUMNS as HIDDEN_COLUMNS
from stethoscope.detection.hidden_probe import TEACHER, Probed
from stethoscope.detection.image_probe import COLUMN as IMAGE_COLUMN
from stethoscope.detection.recalibration import reply_boundary
from stethoscope.detection.visual_consistency import COLUMNS, FEATURE, VisualConsistency
from stethoscope.features.columns import feature_of, group_of

RARE = 5
"""Mentions that an object needs in training to get a category of its own."""


@dataclass(frozen=True)
class Inputs:
    """Columns of the design matrix: plain, objects or external, hidden states and teacher, visual evidence and object.

    Attributes:
        features: names of all feature columns of the table that are read.
        objects: canonical names with a category of their own.
        named: add an indicator column for each object. Excludes ``factored``.
        factored: add the external columns, for evidence and prior.
        probed: give hidden states to a probe; otherwise they are plain features.
        taught: probe and evidence learn from the model's verification instead of from labels.
        imaged: add the score of ``image_probe``.
        visual: may read image tokens.
    """

    features: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()
    named: bool = False
    factored: bool = False
    probed: bool = True
    taught: bool = False
    imaged: bool = False
    visual: bool = True

    @cached_property
    def hidden(self) -> tuple[str, ...]:
        """Columns that only the probe of hidden states reads."""
        return tuple(name for name in self.features if self.probed and is_hidden(name))

    @cached_property
    def evidence_columns(self) -> tuple[str, ...]:
        """Columns that only the visual-consistency classifier reads."""
        return tuple(name for name in self.features if feature_of(name) == FEATURE)

    @property
    def reads_tokens(self) -> bool:
        """Whether image tokens are read where the table has them: beside hidden states or image evidence."""
        return self.visual and (bool(self.evidence_columns) or any(map(is_hidden, self.features)))

    @property
    def without_evidence(self) -> tuple[str, ...]:
        """The features that are left without visual consistency."""
        return tuple(name for name in self.features if name not in set(self.evidence_columns))

    @cached_property
    def plain(self) -> tuple[str, ...]:
        """All other feature columns."""
        others = {*self.evidence_columns, *self.hidden}
        return tuple(name for name in self.features if name not in others)

    @property
    def explained_columns(self) -> tuple[str, ...]:
        """Names of the first columns that the final classifier reads, for explanations."""
        probes = HIDDEN_COLUMNS if self.hidden else ()
        image = (IMAGE_COLUMN,) if self.imaged else ()
        return (*probes, *(COLUMNS if self.evidence_columns else ()), *self.plain, *image)

    @property
    def needs_objects(self) -> bool:
        """Whether the matrix depends on the named object."""
        return self.named or self.factored or self.imaged or bool(self.evidence_columns)

    @property
    def width(self) -> int:
        """Number of columns of ``matrix``."""
        names = len(EXTERNAL) if self.factored else len(self.objects) if self.named else 0
        parts = sum(len(columns) + 1 for columns in (self.hidden, self.evidence_columns) if columns)
        return len(self.plain) + self.imaged + names + parts

    def matrix(self, table: pd.DataFrame, image_scores: np.ndarray | None = None) -> np.ndarray:
        """Build the design matrix, (rows, columns) float64, NaN where a value is missing.

        Args:
            table: token table.
            image_scores: (rows,) of ``image_probe``, with ``imaged``; None for zeros.

        Raises:
            DataError: a column is missing, or a value is infinite.
        """
        if self.needs_objects:
            require(table, ("object",))
        named = object_index(table, self.objects) if self.needs_objects else None
        places = external_columns(table, self.objects)[:, :-1] if self.factored else None
        teacher = table[TEACHER].to_numpy(dtype=float) if self.hidden and TEACHER in table else None
        return self.arrange(feature_matrix(table, self.features), named, image_scores, places, teacher)

    def arrange(
        self,
        values: np.ndarray,
        named: np.ndarray | None = None,
        image_scores: np.ndarray | None = None,
        places: np.ndarray | None = None,
        teacher: np.ndarray | None = None,
    ) -> np.ndarray:
        """Arrange values as ``matrix`` does, which need not come from a table.

        Args:
            values: (rows, features) in the order of ``features``.
            named: (rows,) index in ``objects`` of the named object, -1 for any other, with ``needs_objects``.
            image_scores: as for ``matrix``.
            places: (rows, 3) columns of ``EXTERNAL`` but for the object, with ``factored``.
            teacher: (rows,) replies of the model, which training alone reads; None for none.
        """
        if not (self.hidden or self.needs_objects):
            return values
        plain, hidden, evidence = self._order
        objects = np.full(len(values), -1) if named is None else named
        parts = [values[:, plain]]
        if self.imaged:
            parts.append((np.zeros(len(values)) if image_scores is None else image_scores)[:, None])
        if self.factored:
            parts += [np.zeros((len(values), len(EXTERNAL) - 1)) if places is None else places, objects[:, None]]
        elif self.named:
            parts.append(objects[:, None] == np.arange(len(self.objects)))
        if self.hidden:
            parts += [values[:, hidden], (np.full(len(values), np.nan) if teacher is None else teacher)[:, None]]
        if self.evidence_columns:
            parts += [values[:, evidence], objects[:, None]]
        return np.hstack(parts)

    @cached_property
    def _order(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return where plain, hidden and evidence columns stand among ``features``."""
        index = {name: position for position, name in enumerate(self.features)}
        plain, hidden, evidence = (
            np.array([index[name] for name in names], dtype=int)
            for names in (self.plain, self.hidden, self.evidence_columns)
        )
        return plain, hidden, evidence

    @cached_property
    def index_of(self) -> dict[str, int]:
        """Index of every object in ``objects``."""
        return {name: index for index, name in enumerate(self.objects)}

    def classifier(
        self,
        kind: str | Mapping[str, Any],
        C: float | None,
        seed: int,
        unlabelled: np.ndarray | None = None,
        draft: bool = False,
    ) -> BaseEstimator:
        """Create an unfitted classifier of ``matrix``.

        Args:
            kind: see ``make_estimator``.
            C: inverse regularisation strength of nested fits; None chooses it by inner folds.
            seed: seed of everything random.
            unlabelled: (rows, columns) of ``matrix`` of mentions without labels, for the probe; None for none.
            draft: with fewer inner folds and shorter training of what has any, a tenth of the time.
        """
        count, evidence = len(self.objects), self.evidence_columns
        model = Factored(kind, count, C, seed) if self.factored else make_estimator(kind, seed)
        if self.hidden:
            more = None if unlabelled is None else self._before_evidence(unlabelled)
            model = Probed(model, len(self.hidden), C, seed, self.taught, more, draft)
        if not evidence:
            return model
        taught = self.taught and bool(self.hidden)
        more = unlabelled if taught else None  # the evidence of others learns from labels alone
        return VisualConsistency(model, len(evidence) + 1, count, C, taught, more, draft)

    def _before_evidence(self, matrix: np.ndarray) -> np.ndarray:
        """Return the own columns of rows of ``matrix`` as the classifier inside ``VisualConsistency`` gets them."""
        size = len(self.evidence_columns)
        return np.hstack([np.zeros((len(matrix), len(COLUMNS))), matrix[:, : -size - 1]]) if size else matrix


def is_hidden(column: str) -> bool:
    """Whether a column is a dimension of a hidden state.

    >>> is_hidden("hidden_last_q_d0003"), is_hidden("nll")
    (True, False)
    """
    return group_of(column) == "hidden"


def frequent_objects(rows: pd.DataFrame) -> tuple[str, ...]:
    """Return the sorted objects with at least ``RARE`` mentions."""
    require(rows, ("object", "is_first_subtoken"))
    first = rows["is_first_subtoken"].astype(bool)  # a mention may have several rows
    counts = rows.loc[first, "object"].value_counts()
    return tuple(sorted(str(name) for name, count in counts.items() if count >= RARE and name))


# --- what a detector's settings select --------------------------------------------------------------------------------

LABELS = ("all", "few", "none")
CHOICES = {
    "calibration": CALIBRATIONS,
    "repeats": ("first", "all"),
    "subtokens": SUBTOKENS,
    "labels": LABELS,
}


def check_settings(**settings: Any) -> dict[str, Any]:
    """Check the settings of ``Detector`` and return them as plain dictionaries and lists, in order.

    Raises:
        ConfigError: a setting has an invalid value, or two settings exclude each other.
    """
    for key, known in CHOICES.items():
        if settings[key] not in known:
            raise ConfigError(unknown(f"detector.{key}", str(settings[key]), known))
    estimator = check_estimator(settings["estimator"], settings["factored"])
    C, seed, threshold = settings["C"], settings["seed"], settings["threshold"]
    if C is not None and (isinstance(C, bool) or not isinstance(C, (int, float)) or not 0 < C < math.inf):
        raise ConfigError(f"detector.C={C!r} should be a number above 0, or null to choose it")
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
        raise ConfigError(f"detector.seed={seed!r} should be a whole number from 0 to {2**32 - 1}")
    for key in ("features", "exclude"):
        names = () if key == "features" and settings[key] is None else settings[key]
        if isinstance(names, str) or not isinstance(names, Collection) or not all(isinstance(n, str) for n in names):
            raise ConfigError(f"detector.{key}={names!r} should be a list of names, for example [entropy,nll]")
    for key in ("objects", "factored", "visual_consistency", "hidden_probe"):
        if not isinstance(settings[key], bool):
            raise ConfigError(f"detector.{key}={settings[key]!r} should be true or false")
    if settings["objects"] and settings["factored"]:
        raise ConfigError("detector.objects with factored=true: leave it out, the prior knows the objects")
    if not isinstance(threshold, Mapping) and threshold != "f1":
        raise ConfigError(f"detector.threshold={threshold!r} should be f1 or a guarantee: {{max_false_alarms: 0.05}}")
    if isinstance(threshold, Mapping) and settings["calibration"] == "isotonic":
        raise ConfigError(
            "detector.calibration=isotonic gives equal probabilities to unequal scores, for which no threshold has a "
            "guarantee; use platt or none"
        )
    if settings["labels"] != "all" and not settings["hidden_probe"]:
        raise ConfigError(f"detector.labels={settings['labels']} learns through detector.hidden_probe=true")
    if settings["labels"] == "none" and isinstance(threshold, Mapping):
        raise ConfigError("detector.labels=none: a guarantee needs labels; use detector.labels=few, or threshold=f1")
    return settings | {
        "estimator": estimator,
        "features": None if settings["features"] is None else list(settings["features"]),
        "exclude": list(settings["exclude"]),
        "seed": int(seed),
        "threshold": dict(threshold) if isinstance(threshold, Mapping) else threshold,
    }


class Selection:
    """The rows and columns of token tables that a detector's settings choose.

    Args:
        settings: of the detector, as ``check_settings`` returns them.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    # --- rows ---------------------------------------------------------------------------------------------------------

    def mentions(self, table: pd.DataFrame, judged: bool = True) -> pd.DataFrame:
        """Select the mentions to train and to measure on; see ``Detector.select_mentions``."""
        repeats: Repeats = self.settings["repeats"] if judged else "all"
        return mention_rows(table, self.settings["subtokens"], repeats, judged)

    def monitored(self, table: pd.DataFrame) -> pd.DataFrame:
        """Select the mentions that the monitor reads: judged or not, a row each, first ones if only they count."""
        rows = self.mentions(table, judged=False)
        kept = rows["is_first_subtoken"].to_numpy(dtype=bool)
        if self.settings["repeats"] == "first":
            kept = kept & (rows["repeat_index"].to_numpy() == 0)
        return rows[kept].reset_index(drop=True)

    def centre_replies(
        self, train: pd.DataFrame, calibration: pd.DataFrame | None
    ) -> tuple[pd.DataFrame, pd.DataFrame | None]:
        """Shift the model's replies in both folds, so that 0 is their boundary in the first; not if all have labels."""
        if self.settings["labels"] == "all":
            return train, calibration
        rows = self._asked(mention_rows(train, self.settings["subtokens"], self.settings["repeats"], judged=False))
        labels = rows["label"].to_numpy() if self.settings["labels"] == "few" else np.full(len(rows), -1)
        boundary = reply_boundary(rows[TEACHER].to_numpy(dtype=float), labels)
        return _shifted(train, boundary), None if calibration is None else _shifted(calibration, boundary)

    def labelled(self, table: pd.DataFrame) -> pd.DataFrame:
        """Select the mentions to learn from, with the labels that ``labels`` asks for."""
        if self.settings["labels"] != "none":
            return self.mentions(table)
        rows = self._asked(mention_rows(table, self.settings["subtokens"], self.settings["repeats"], judged=False))
        return rows.assign(label=(rows[TEACHER] < 0).astype(int))

    def unlabelled(self, table: pd.DataFrame) -> pd.DataFrame | None:
        """Select the mentions without a label that the probe learns from; None for none.

        Raises:
            ConfigError: ``labels`` is ``few``, and the table has no verification.
        """
        labels = self.settings["labels"]
        if labels == "none" or (labels == "all" and not (self.settings["hidden_probe"] and _verified(table))):
            return None
        rows = self._asked(mention_rows(table, self.settings["subtokens"], "all", judged=False))
        rows = rows[rows["label"] < 0].reset_index(drop=True)
        return rows if labels == "few" or len(rows) else None

    def _asked(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Select the rows of mentions that the model was asked about."""
        if not _verified(rows):
            raise ConfigError(
                f"detector.labels={self.settings['labels']} needs hidden states and the model's verification of every "
                "mention; compute features=default_verified"
            )
        return rows[rows[TEACHER].notna()].reset_index(drop=True)

    def deciding_rows(self, mentions: pd.DataFrame) -> np.ndarray:
        """Return for every mention the index of the row whose probability it gets; see ``Detector.deciding_rows``."""
        own = np.arange(len(mentions))
        if self.settings["repeats"] == "all" or not len(mentions):
            return own
        mentions = mentions.reset_index(drop=True)
        first = mentions.groupby(["task", "sample_id", "object"])["mention_index"].transform("idxmin").to_numpy()
        return np.where(mentions["repeat_index"].to_numpy() > 0, first, own)

    # --- columns ------------------------------------------------------------------------------------------------------

    def features(self, names: Sequence[str]) -> tuple[str, ...]:
        """Select the columns to read: with ``labels`` other than all, those that the model's verification can teach.

        Args:
            names: feature columns of a token table.

        Raises:
            ConfigError: a name or pattern of the settings fits no column.
        """
        selected = select_features(names, self.settings["features"], self.settings["exclude"])
        if self.settings["labels"] == "all":
            return selected
        evidence = self.settings["visual_consistency"]
        return tuple(name for name in selected if is_hidden(name) or (evidence and feature_of(name) == FEATURE))

    def schema(self, table: pd.DataFrame, read: Sequence[str]) -> FeatureSchema:
        """Build the schema of a table, without verification columns where training alone reads them.

        Args:
            table: token table.
            read: columns that the detector reads.
        """
        names = feature_names(table)
        if not any(map(is_hidden, read)):
            return FeatureSchema(names)
        return FeatureSchema(tuple(name for name in names if name in read or group_of(name) != "verification"))

    def inputs(self, names: Sequence[str], objects: Sequence[str]) -> Inputs:
        """Select the columns of the design matrix.

        Args:
            names: feature columns, as ``features`` selects them.
            objects: names of the objects that get columns of their own.

        Raises:
            ConfigError: no column is left.
        """
        keys = ("objects", "factored", "hidden_probe", "visual_consistency")
        named, factored, probed, visual = (self.settings[key] for key in keys)
        taught = self.settings["labels"] != "all"
        inputs = Inputs(tuple(names), tuple(objects), named, factored, probed, taught, visual=visual)
        if visual:
            return inputs
        if not inputs.without_evidence:
            raise ConfigError("detector.visual_consistency=false leaves no feature: attended_embedding is the only one")
        return replace(inputs, features=inputs.without_evidence)


def _verified(table: pd.DataFrame) -> bool:
    """Whether a table has the model's replies and states that they can teach."""
    return TEACHER in table and any(map(is_hidden, table.columns))


def _shifted(table: pd.DataFrame, boundary: float) -> pd.DataFrame:
    """Return a table with other replies and the same other columns, which are not copied."""
    shifted = table.copy(deep=False)
    if TEACHER in shifted:
        shifted[TEACHER] = shifted[TEACHER] - boundary
    return shifted
