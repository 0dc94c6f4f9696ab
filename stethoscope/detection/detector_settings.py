"""Check the settings of a detector, select the mentions that they ask for, and keep them in its ``manifest.json``."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from stethoscope.core.errors import ConfigError, unknown
from stethoscope.core.token_table import SUBTOKENS, FeatureSchema, Repeats, mention_rows
from stethoscope.detection.artifact import GENERATED_KEYS
from stethoscope.detection.calibrated_model import CALIBRATIONS
from stethoscope.detection.design_matrix import is_hidden
from stethoscope.detection.estimator_classes import check_estimator
from stethoscope.detection.evidence_prior import EXTERNAL
from stethoscope.detection.hidden_probe import TEACHER
from stethoscope.detection.recalibration import reply_boundary
from stethoscope.detection.warning_threshold import WarningThreshold

CHOICES = {
    "calibration": CALIBRATIONS,
    "repeats": ("first", "all"),
    "subtokens": SUBTOKENS,
    "labels": ("all", "few", "none"),
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
    """The rows of token tables that a detector's settings choose.

    Args:
        settings: of the detector, as ``check_settings`` returns them.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

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


def _verified(table: pd.DataFrame) -> bool:
    """Whether a table has the model's replies and states that they can teach."""
    return TEACHER in table and any(map(is_hidden, table.columns))


def _shifted(table: pd.DataFrame, boundary: float) -> pd.DataFrame:
    """Return a table with other replies and the same other columns, which are not copied."""
    shifted = table.copy(deep=False)
    if TEACHER in shifted:
        shifted[TEACHER] = shifted[TEACHER] - boundary
    return shifted


# --- the manifest ----------------------------------------------------------------------------------------------------

NOTES = ("model", "task", "label", "split", "figures")  # always in the manifest, null where not known


@dataclass(frozen=True)
class DetectorManifest:
    """The JSON-able part of a detector.

    Attributes:
        settings: of ``Detector``, checked.
        features: names of the columns that it reads.
        objects: names with a category of their own.
        schema: all features of the table that it was fitted on.
        base_rate: share of hallucinated mentions in the fold that it was calibrated on, in (0, 1).
        threshold: where it warns.
        monitor: ``ShiftMonitor.to_dict``; None without a monitor.
        notes: facts of the user, ``NOTES`` and others.
    """

    settings: Mapping[str, Any]
    features: tuple[str, ...]
    objects: tuple[str, ...]
    schema: FeatureSchema
    base_rate: float
    threshold: WarningThreshold
    monitor: Mapping[str, Any] | None
    notes: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of ``manifest.json``, to which ``artifact.write`` adds versions and digests."""
        return {
            **dict.fromkeys(NOTES),
            **self.notes,
            "kind": "stethoscope.Detector",
            "features": list(self.features),
            "feature_schema_hash": self.schema.hash,
            "table_features": list(self.schema.names),
            "objects": list(self.objects),
            "settings": self.settings,
            "external": list(EXTERNAL) if self.settings["factored"] else [],
            "base_rate": self.base_rate,
            "threshold": self.threshold.to_dict(),
            "monitor": self.monitor,
        }

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> DetectorManifest:
        """Read what ``to_dict`` returned; the settings are not checked yet.

        Raises:
            KeyError, TypeError, ValueError: a value is missing or of another kind.
        """
        features, schema = _read_names(values, "features"), FeatureSchema(_read_names(values, "table_features"))
        if not set(features) <= set(schema.names):
            raise ValueError("features should be among table_features")
        base_rate = float(values["base_rate"])
        if not 0 < base_rate < 1:
            raise ValueError("base_rate should lie between 0 and 1")
        threshold = WarningThreshold.parse(values["threshold"])
        objects, settings = _read_names(values, "objects"), values["settings"]
        manifest = cls(settings, features, objects, schema, base_rate, threshold, values.get("monitor"), {})
        own = {*manifest.to_dict(), *GENERATED_KEYS} - set(NOTES)
        notes = {key: value for key, value in values.items() if key not in own and value is not None}
        check_notes(notes)
        return replace(manifest, notes=notes)


def check_notes(notes: Mapping[str, Any]) -> None:
    """Check the notes that the package itself reads.

    Raises:
        ValueError: ``model`` is no fingerprint.
    """
    if not isinstance(notes.get("model") or {}, Mapping):
        raise ValueError(f"model={notes['model']!r} should be a fingerprint or null")


def _read_names(values: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """Read a list of different names."""
    names = values[key]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError(f"{key} should be a list of different names")
    return tuple(names)
