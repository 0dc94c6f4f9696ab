"""Choose the probability at or above which a detector warns: by the highest F1, or by a guarantee."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from stethoscope.detection.calibrated_model import CalibratedModel, Examples
from stethoscope.detection.risk_control import Certificate, RiskGuarantee, calibrate_threshold


class WarningThreshold(NamedTuple):
    """A threshold and how it was chosen.

    Attributes:
        value: probability at or above which to warn, in [0, 1].
        chosen: how it was chosen, for people.
        certificate: the guarantee and the images it rests on; None without a guarantee.
    """

    value: float = 0.5
    chosen: str = ""
    certificate: Certificate | None = None

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON-able values."""
        return {**self._asdict(), "certificate": None if self.certificate is None else self.certificate.to_dict()}

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> WarningThreshold:
        """Read what ``to_dict`` returned.

        Raises:
            KeyError, TypeError, ValueError: a value is missing or of another kind.
        """
        value, certificate = float(values["value"]), values["certificate"]
        if not 0 <= value <= 1:
            raise ValueError(f"threshold {value!r} should lie from 0 to 1")
        return cls(value, str(values["chosen"]), None if certificate is None else Certificate.parse(certificate))


def best_threshold(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Choose the probability at or above which to warn, by the highest F1 of the hallucinated class.

    It lies halfway to the next lower probability, so that rounding cannot decide about a mention.

    Args:
        labels: (mentions,) of 0 and 1, or probabilities in their place, for the F1 that these expect.
        probabilities: (mentions,) of the detector.

    >>> round(best_threshold(np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.35, 0.8])), 3)
    0.225
    """
    values, index = np.unique(probabilities, return_inverse=True)
    flagged, wrong = np.bincount(index)[::-1].cumsum(), np.bincount(index, labels)[::-1].cumsum()
    best = int(np.argmax(2 * wrong / (flagged + labels.sum())))
    return float(values[::-1][best : best + 2].mean())


def choose_threshold(
    model: CalibratedModel,
    train: Examples,
    warned: np.ndarray,
    calibration: Examples | None = None,
    guarantee: RiskGuarantee | None = None,
    estimated: bool = False,
    note: str = "",
) -> WarningThreshold:
    """Choose the threshold of a fitted classifier on the images that it was not fitted on, where there are any.

    Args:
        model: fitted on ``train``.
        train: mentions that were learned from.
        warned: (rows of ``train``,) bool, whether a row gives a warning: the first sub-token of a mention.
        calibration: mentions of other images, one row each; None for out-of-fold scores of ``train``.
        guarantee: to meet by the lowest threshold; None for the highest F1.
        estimated: take the F1 that the probabilities expect, since there are no labels.
        note: to add to ``chosen``.

    Raises:
        DataError: no threshold meets the guarantee, or there is no ``calibration`` to prove it on.
    """
    own = train.select(warned)
    if guarantee is not None:
        certificate = calibrate_threshold(model, own, calibration, guarantee)
        value = float(model.calibrate(np.array([certificate.threshold]))[0])
        return WarningThreshold(value, f"{certificate}{note}", certificate)
    if calibration is not None:
        examples, probabilities, fold = calibration, model.predict(calibration.matrix), "calibration fold"
    elif model.held_out_scores is None:  # without calibration
        examples, probabilities, fold = own, model.predict(own.matrix), "training fold"
    else:
        examples, fold = own, "training fold, out of fold"
        probabilities = model.calibrate(model.held_out_scores[warned])
    labels = probabilities if estimated else examples.labels
    value = best_threshold(labels, probabilities) if len(labels) else WarningThreshold().value
    return WarningThreshold(value, f"highest {'expected ' if estimated else ''}F1 on the {fold}{note}")
