"""Write and check what a detector's ``manifest.json`` says besides its arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from stethoscope.core.token_table import FeatureSchema
from stethoscope.detection.artifact import GENERATED_KEYS
from stethoscope.detection.evidence_prior import EXTERNAL
from stethoscope.detection.warning_threshold import WarningThreshold

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
