"""Calibrate thresholds with a bound on the share of false alarms or missed hallucinations over future images.

Risk control after Bates et al. 2021 ("Distribution-Free, Risk-Controlling Prediction Sets", arXiv 2101.02703, theorem
1) and Angelopoulos et al. 2021 ("Learn then Test", arXiv 2110.01052), with images as the unit, since the mentions of
one image depend on each other. With F_i the errors among the G_i mentions of image i that can be in error (a false
alarm needs a grounded mention, a miss a hallucinated one), the risk E[F] / E[G] is at most alpha if and only if
E[F - alpha G] <= 0, a mean of bounded, independent variables. It is tested by betting (Waudby-Smith & Ramdas 2024,
"Estimating means of bounded random variables by betting"): with a bet s fixed beforehand the wealth

    prod_i (1 - s (F_i - alpha G_i))

has mean at most 1 if the risk is above alpha, so it reaches 1 / delta with probability delta at most (Markov). F grows
with every mention that a bolder threshold flags, hence the wealth falls, and the boldest threshold that is accepted
together with all more cautious ones needs no correction for having been searched for.

The bet is the optimum of a normal approximation at risk alpha, from alpha and the mean G of the *training*
images. On simulated clustered mentions (alpha 0.05, 400 images of 3 mentions, 100 repetitions) the mean risk was then
0.031, as with the predictable bets of Waudby-Smith & Ramdas, which depend on the order of the images; with a mixture
of 50 bets it was 0.025, with Hoeffding-Bentkus 0.001 or no threshold at all. A plain normal approximation gave 0.040
and exceeded alpha in 5 of the repetitions, with 200 images in 11.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stethoscope.core.errors import ConfigError, DataError, unknown

if TYPE_CHECKING:
    from stethoscope.detection.estimators import CalibratedModel, Examples

RISKS = {
    "max_false_alarms": "share of grounded mentions that get a warning",
    "max_missed": "share of hallucinated mentions that get none",
}
MAX_BET = 0.95  # as a share of the bet at which a single image could take all wealth
VARIANCE_INFLATION = 1.5  # expected, because mentions of one image depend on each other


@dataclass(frozen=True)
class RiskGuarantee:
    """The bound that the user asks for.

    Attributes:
        risk: one of ``RISKS``.
        most: the largest allowed share alpha, in (0, 1).
        confidence: probability 1 - delta with which the bound holds, in (0, 1).
    """

    risk: str
    most: float
    confidence: float = 0.95

    @classmethod
    def parse(cls, settings: Mapping[str, Any]) -> RiskGuarantee:
        """Parse a configuration such as ``{"max_false_alarms": 0.05}``, with an optional ``confidence``.

        Raises:
            ConfigError: not exactly one known risk is named, or a number is out of range.

        >>> RiskGuarantee.parse({"max_missed": 0.1})
        RiskGuarantee(risk='max_missed', most=0.1, confidence=0.95)
        """
        for key in settings:
            if key not in (*RISKS, "confidence"):
                raise ConfigError(unknown("guarantee of detector.threshold", str(key), [*RISKS, "confidence"]))
        risks = [key for key in settings if key in RISKS]
        if len(risks) != 1:
            raise ConfigError(f"detector.threshold={dict(settings)} should name one of {', '.join(RISKS)}")
        values = {"most": settings[risks[0]], "confidence": settings.get("confidence", 0.95)}
        for key, value in values.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
                name = risks[0] if key == "most" else key
                raise ConfigError(f"detector.threshold.{name}={value!r} should be a number between 0 and 1")
        return cls(risks[0], **values)

    def __str__(self) -> str:
        kinds = {"max_false_alarms": "grounded mentions get a warning", "max_missed": "hallucinated mentions get none"}
        return f"at most {self.most:.3g} of the {kinds[self.risk]}, at confidence {self.confidence:.3g}"


@dataclass(frozen=True)
class Certificate:
    """A threshold and the calibration data that it rests on.

    Attributes:
        threshold: score at or above which to warn.
        risk, most, confidence: fields of the guarantee.
        observed: share of errors on the calibration images, in [0, 1].
        images: number of calibration images.
        mentions: number of their mentions that can be in error.
        most_per_image: largest weight of an image, in such mentions.
    """

    threshold: float
    risk: str
    most: float
    confidence: float
    observed: float
    images: int
    mentions: int
    most_per_image: int

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Certificate:
        """Read what ``to_dict`` returned.

        Raises:
            TypeError, ValueError: a value is missing, unknown or not a finite number.
        """
        certificate = cls(**values)
        numbers = [value for name, value in values.items() if name != "risk"]
        if certificate.risk not in RISKS or not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
            raise ValueError(f"{dict(values)} is no certificate")
        return certificate

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON-able values."""
        return asdict(self)


def per_image(groups: Sequence[str] | np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Count the marked items of every image, (images,) int, in the order of the sorted ids; 0 is included.

    >>> per_image(["a", "b", "a", "c"], np.array([True, False, True, True])).tolist()
    [2, 0, 1]
    """
    names, index = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    return np.bincount(index.ravel(), weights=counted, minlength=len(names)).astype(int)


def bet_size(images: int, most: float, confidence: float, mean: float, limit: int) -> float:
    """Choose the bet from quantities that do not depend on the calibration labels.

    Args:
        images: number n of calibration images.
        most: alpha.
        confidence: 1 - delta.
        mean: mean number of mentions per image that can be in error, over other images.
        limit: largest number of them that an image counts with.

    Returns:
        sqrt(2 log(1 / delta) / (n variance)), capped so that a single image cannot take all wealth.
    """
    variance = VARIANCE_INFLATION * most * (1 - most) * max(mean, 1e-9)
    best = math.sqrt(2 * math.log(1 / (1 - confidence)) / (max(images, 1) * variance))
    return min(best, MAX_BET / ((1 - most) * limit))


def log_wealth(errors: np.ndarray, n_at_risk: np.ndarray, most: float, bet: float) -> float:
    """Compute the log-wealth, in nats; higher is more evidence for a risk of at most ``most``.

    Args:
        errors: (images,) errors F.
        n_at_risk: (images,) mentions G that can be in error, G >= F.
        most: alpha.
        bet: bet s, less than 1 / ((1 - alpha) max G).
    """
    return float(np.log1p(-bet * (errors - most * n_at_risk)).sum())


def certify(
    scores: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str] | np.ndarray,
    guarantee: RiskGuarantee,
    reference: np.ndarray,
) -> Certificate:
    """Find the boldest threshold that meets the guarantee: the one with the most warnings or fewest misses.

    With probability ``guarantee.confidence`` over the draw of the calibration images, the share of errors over all
    images of the same kind is at most ``guarantee.most``, however good the detector is; a poor one only gets a poor
    threshold. An image counts with at most ``max(reference)`` mentions that can be in error, so that the tested
    variable is bounded.

    Args:
        scores: (n,) scores of the calibration mentions, by a model not fitted on their images; higher means
            hallucinated.
        labels: (n,) 1 hallucinated, 0 grounded.
        groups: (n,) image ids.
        guarantee: guarantee to meet.
        reference: (images,) mentions per image that can be in error, of other images: those of the training fold.

    Raises:
        DataError: there are too few images for any threshold, or only a useless one meets the guarantee.
    """
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    side = 1 if guarantee.risk == "max_false_alarms" else -1  # a miss is a false alarm with labels and scores reversed
    at_risk = labels == (0 if side > 0 else 1)
    limit, mean = int(max(np.max(reference, initial=1), 1)), float(np.mean(reference)) if len(reference) else 1.0
    index = np.unique(np.asarray(groups, dtype=str), return_inverse=True)[1].ravel()
    n_at_risk = np.bincount(index, weights=at_risk)
    share = np.minimum(1, limit / np.maximum(n_at_risk, 1))  # weight of a mention, by image
    bet = bet_size(len(n_at_risk), guarantee.most, guarantee.confidence, mean, limit)
    required = math.log(1 / (1 - guarantee.confidence))
    errors_sorted = np.sort(side * scores[at_risk])[::-1]  # errors in the order in which bolder thresholds make them

    def accepted(count: int) -> bool:
        """Tell whether the guarantee holds with the first ``count`` errors; each lowers the wealth."""
        flagged = at_risk & (side * scores >= (errors_sorted[count - 1] if count else np.inf))
        errors = np.bincount(index, weights=flagged, minlength=len(n_at_risk))
        return log_wealth(errors * share, n_at_risk * share, guarantee.most, bet) >= required

    if not accepted(0):
        raise DataError(_too_few(guarantee, n_at_risk * share, limit))
    low, high = 0, len(errors_sorted) - 1  # making every error is never accepted: the wealth is then below 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if accepted(middle) else (low, middle - 1)
    threshold = _between(side * scores, errors_sorted, low)
    flagged = side * scores >= threshold
    if not (flagged & ~at_risk).any():
        raise DataError(
            f"{guarantee}: only a useless threshold meets that on {len(n_at_risk)} calibration images, because the "
            "most extreme scores are errors; allow more, or use detector.threshold=f1"
        )
    return Certificate(
        threshold=threshold if side > 0 else float(np.nextafter(-threshold, np.inf)),  # warn at or above it
        risk=guarantee.risk,
        most=guarantee.most,
        confidence=guarantee.confidence,
        observed=float((flagged & at_risk).sum() / max(at_risk.sum(), 1)),
        images=len(n_at_risk),
        mentions=int(at_risk.sum()),
        most_per_image=limit,
    )


def _between(oriented: np.ndarray, errors_sorted: np.ndarray, count: int) -> float:
    """Return the middle between the first error not allowed and the next higher score, safe from rounding."""
    below = errors_sorted[count]
    above = oriented[oriented > below]
    return float((below + above.min()) / 2) if above.size else math.inf


def images_needed(n_at_risk: np.ndarray, guarantee: RiskGuarantee, limit: int) -> int | None:
    """Estimate how many such images a guarantee needs if no error occurs; None if no mention can be in error.

    >>> images_needed(np.array([3, 2, 4]), RiskGuarantee("max_false_alarms", 0.05), 4)
    82
    """
    if not np.sum(n_at_risk):
        return None
    bet = MAX_BET / ((1 - guarantee.most) * limit)  # with so few images the bet is at its maximum
    gain = log_wealth(np.zeros(len(n_at_risk)), n_at_risk, guarantee.most, bet) / len(n_at_risk)
    return math.ceil(math.log(1 / (1 - guarantee.confidence)) / gain)


def _too_few(guarantee: RiskGuarantee, n_at_risk: np.ndarray, limit: int) -> str:
    """Write the message for too few calibration images."""
    needed = images_needed(n_at_risk, guarantee, limit)
    kind = "grounded" if guarantee.risk == "max_false_alarms" else "hallucinated"
    about = "" if needed is None else f"; at least about {needed} are needed, and three times as many for a good one"
    return (
        f"no threshold can guarantee {guarantee}: the {len(n_at_risk)} calibration images have {n_at_risk.sum():.0f} "
        f"{kind} mentions{about}. Give more images to calibration, allow more, or use detector.threshold=f1"
    )


def calibrate_threshold(
    model: CalibratedModel, train: Examples, held_out: Examples | None, guarantee: RiskGuarantee
) -> Certificate:
    """Find the boldest threshold of a fitted classifier that meets a guarantee.

    Args:
        model: classifier fitted on ``train``.
        train: training examples, for the expected number of mentions per image.
        held_out: examples of images that the classifier was not fitted on.
        guarantee: guarantee to meet.

    Raises:
        DataError: there are no such images, or the classifier ranks them no better than chance.
    """
    if held_out is None or not len(held_out.labels):
        raise DataError(f"{guarantee}: that needs a calibration fold of images that the classifier was not fitted on")
    if model.line[0] <= 0:
        raise DataError(f"{guarantee}: the detector ranks the calibration images no better than chance")
    # scores before calibration depend on the training images alone; the calibration is monotone and changes no warning
    scores = model.scores(held_out.matrix)
    kind = 0 if guarantee.risk == "max_false_alarms" else 1
    reference = per_image(train.groups, train.labels == kind)
    return certify(scores, held_out.labels, held_out.groups, guarantee, reference)
