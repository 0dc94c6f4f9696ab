"""The settings of a detector: which values they may have, and which may not be together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stethoscope.core.errors import ConfigError, unknown
from stethoscope.core.token_table import SUBTOKENS
from stethoscope.detection.estimators import CALIBRATIONS, ESTIMATORS

CHOICES = {
    "estimator": ESTIMATORS,
    "calibration": CALIBRATIONS,
    "repeats": ("first", "all"),
    "subtokens": SUBTOKENS,
}


def checked(**settings: Any) -> dict[str, Any]:
    """The settings of ``Detector`` as plain dictionaries and lists, in their order.

    Raises:
        ConfigError: one of them has a value that it cannot have, or two exclude each other.
    """
    for key, known in CHOICES.items():
        if settings[key] not in known:
            raise ConfigError(unknown(f"detector.{key}", str(settings[key]), known))
    strength, threshold = settings["strength"], settings["threshold"]
    if strength is not None and not strength > 0:
        raise ConfigError(f"detector.strength={strength} should be above 0, or null to choose it")
    if isinstance(settings["features"], str) or isinstance(settings["exclude"], str):
        raise ConfigError("detector.features and detector.exclude should be lists, for example [entropy,nll]")
    for key in ("objects", "factored", "sight"):
        if not isinstance(settings[key], bool):
            raise ConfigError(f"detector.{key}={settings[key]!r} should be true or false")
    if settings["objects"] and settings["factored"]:
        raise ConfigError("detector.objects with factored=true: leave it out, the prior knows the objects")
    if not isinstance(threshold, Mapping) and threshold != "f1":
        raise ConfigError(f"detector.threshold={threshold!r} should be f1 or a promise: {{max_false_alarms: 0.05}}")
    if isinstance(threshold, Mapping) and settings["calibration"] == "isotonic":
        raise ConfigError(
            "detector.calibration=isotonic gives equal probabilities to unequal scores, for which no threshold can "
            "promise anything; use platt or none"
        )
    return settings | {
        "features": None if settings["features"] is None else list(settings["features"]),
        "exclude": list(settings["exclude"]),
        "threshold": dict(threshold) if isinstance(threshold, Mapping) else threshold,
    }
