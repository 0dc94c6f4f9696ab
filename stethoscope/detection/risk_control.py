"""Calibrate thresholds with a bound on the share of false alarms or missed hallucinations over future images.

The promise. Image i has G_i mentions that can be in error (a false alarm needs a grounded mention, a miss a
hallucinated one), of which F_i are. An image counts with at most ``limit`` = c of them, that is with the weight
w_i = min(1, c / G_i) for each, and the promise is

    E[w F] / E[w G] <= alpha    with probability 1 - delta over the draw of the calibration images,

which are independent draws of one kind; the mentions of one image may depend on each other in any way. If no image has
more than c mentions, all weights are 1 and that is the share E[F] / E[G]. Otherwise the share over all mentions is at
most alpha + (1 - alpha) b, where b = 1 - E[w G] / E[G] is the share of the mentions that do not count: E[F] <= E[w F] +
E[(1 - w) G]. A certificate states c and the share that counted.

The test of one threshold. X_i = w_i (F_i - alpha G_i) lies in [-alpha c, (1 - alpha) c], and the promise is broken if
and only if E[X] > 0. It is tested by betting (Waudby-Smith & Ramdas 2024, "Estimating means of bounded random variables
by betting", arXiv 2010.09686): the wealth W_i = prod_{j <= i} (1 - s_j X_j) with bets 0 <= s_j < 1 / ((1 - alpha) c)
that depend on images before j only is never negative, and if E[X] >= 0 its mean given the past never grows. So it ever
reaches 1 / delta with probability delta at most (Ville's inequality), whatever the bets; they only decide how often a
good threshold is accepted. Betting stops when 1 / delta is reached.

The bets. With m images left, the second moment v of X and the wealth W, the bet that is best for a normal variable is
sqrt(2 log(1 / (delta W)) / (m v)): it aims at the wealth that is still lacking, again after every image (Voracek &
Orabona 2025, "STaR-Bets", arXiv 2505.22422). v is estimated from the images before, and a bet is never smaller than
what would just suffice if no error followed. The order of the images is drawn with a fixed seed.

The limit. One image with c errors takes all wealth at the largest bet, so that bets, and with them what n images can
prove, shrink with c: n log(1 + alpha mean(min(G, c)) / ((1 - alpha) c)) is the log-wealth without any error. c is the
largest number at which that is 1.5 times the log(1 / delta) required, but at least 90 % of the mentions count, by the
sizes of the *training* images, which the calibration images do not depend on. With enough images nothing is cut.
``per_image`` sets c by hand.

The search. F grows with every mention that a bolder threshold flags, and the risk with it. Thresholds are tested from
the one without an error to bolder ones, at every value at which F changes, until one is refused; the last one accepted
is taken. This needs no correction (fixed-sequence testing; Angelopoulos et al. 2021, "Learn then Test", arXiv
2110.01052): of the thresholds that break the promise let t be the most cautious, or one as near to that as one likes.
Its F is among those tested, so that a threshold as bold as t is taken only if t itself was accepted.

``scripts/check/promises.py`` measures it against the bet that was fixed beforehand with c = max G, as it was before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stethoscope.core.errors import ConfigError, DataError, unknown

if TYPE_CHECKING:
    from stethoscope.detection.calibrated_model import CalibratedModel, Examples

RISKS = {
    "max_false_alarms": "share of grounded mentions that get a warning",
    "max_missed": "share of hallucinated mentions that get none",
}
MAX_BET = 0.99  # as a share of the bet at which a single image could take all wealth
VARIANCE_INFLATION = 1.5  # expected, because mentions of one image depend on each other
PRIOR_IMAGES = 10  # that the expected second moment counts for beside the measured ones
AHEAD = 1.05  # of the smallest bet that can still reach the required wealth
COMFORT = 1.5  # log-wealth without any error, as a multiple of the required one, for which a limit is lowered
LEAST_COUNTED = 0.9  # share of the mentions that count, below which no limit is lowered by itself
ORDER_SEED = 0
CHUNK = 256  # thresholds that are tested together


@dataclass(frozen=True)
class RiskGuarantee:
    """The bound that the user asks for.

    Attributes:
        risk: one of ``RISKS``.
        most: the largest allowed share alpha, in (0, 1).
        confidence: probability 1 - delta with which the bound holds, in (0, 1).
        per_image: most mentions that an image counts with; None chooses it from the training images. A number that
            no image exceeds counts all mentions.
    """

    risk: str
    most: float
    confidence: float = 0.95
    per_image: int | None = None

    @classmethod
    def parse(cls, settings: Mapping[str, Any]) -> RiskGuarantee:
        """Parse a configuration such as ``{"max_false_alarms": 0.05}``.

        ``confidence`` and ``per_image`` are optional.

        Raises:
            ConfigError: not exactly one known risk is named, or a number is out of range.

        >>> RiskGuarantee.parse({"max_missed": 0.1})
        RiskGuarantee(risk='max_missed', most=0.1, confidence=0.95, per_image=None)
        """
        known = (*RISKS, "confidence", "per_image")
        for key in settings:
            if key not in known:
                raise ConfigError(unknown("guarantee of detector.threshold", str(key), list(known)))
        risks = [key for key in settings if key in RISKS]
        if len(risks) != 1:
            raise ConfigError(f"detector.threshold={dict(settings)} should name one of {', '.join(RISKS)}")
        values = {"most": settings[risks[0]], "confidence": settings.get("confidence", 0.95)}
        for key, value in values.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
                name = risks[0] if key == "most" else key
                raise ConfigError(f"detector.threshold.{name}={value!r} should be a number between 0 and 1")
        limit = settings.get("per_image")
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise ConfigError(f"detector.threshold.per_image={limit!r} should be a whole number of at least 1")
        return cls(risks[0], **values, per_image=limit)

    @property
    def required(self) -> float:
        """Log-wealth log(1 / delta) at which a threshold is accepted, in nats."""
        return math.log(1 / (1 - self.confidence))

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
        most_per_image: most mentions that an image counts with.
        counted: share of such mentions, of the calibration images and of those that the limit was chosen from, that
            count, in (0, 1]; 1 if no image has more.
    """

    threshold: float
    risk: str
    most: float
    confidence: float
    observed: float
    images: int
    mentions: int
    most_per_image: int
    counted: float = 1.0

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

    def __str__(self) -> str:
        text = str(RiskGuarantee(self.risk, self.most, self.confidence))
        mentions = "mention" if self.most_per_image == 1 else "mentions"
        limit = f", an image counting with at most {self.most_per_image} {mentions} (so {self.counted:.1%} count)"
        return text if self.counted == 1 else text + limit


def per_image(groups: Sequence[str] | np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Count the marked items of every image, (images,) int, in the order of the sorted ids; 0 is included.

    >>> per_image(["a", "b", "a", "c"], np.array([True, False, True, True])).tolist()
    [2, 0, 1]
    """
    names, index = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    return np.bincount(index.ravel(), weights=counted, minlength=len(names)).astype(int)


def choose_limit(reference: np.ndarray, images: int, guarantee: RiskGuarantee) -> int:
    """Choose how many mentions an image counts with at most: as many as the number of images allows.

    Args:
        reference: (images,) mentions per image that can be in error, of other images.
        images: number of calibration images.
        guarantee: guarantee to meet.

    >>> sizes = np.array([1, 2, 3, 3, 4])
    >>> [choose_limit(sizes, images, RiskGuarantee("max_false_alarms", 0.05)) for images in (50, 100, 200)]
    [3, 3, 4]
    """
    limits = _limits(reference, guarantee.per_image)
    growth = [_growth(reference, guarantee.most, limit) for limit in limits]
    enough = COMFORT * guarantee.required
    return next(
        (limit for limit, each in zip(limits, growth, strict=True) if images * each >= enough),
        limits[int(np.argmax(growth))],
    )


def _limits(sizes: np.ndarray, per_image: int | None) -> list[int]:
    """List the limits to choose from, the largest first; with each, enough of the mentions count."""
    largest = int(max(np.max(sizes, initial=1), 1))
    if per_image is not None:
        return [min(per_image, largest)]
    limits = sorted({largest, *(int(size) for size in sizes if size >= 1)}, reverse=True)
    return [limit for limit in limits if np.minimum(sizes, limit).sum() >= LEAST_COUNTED * np.sum(sizes)]


def _growth(sizes: np.ndarray, most: float, limit: int) -> float:
    """Compute the log-wealth that an image without an error adds at the largest bet, in nats."""
    return float(np.log1p(_largest_bet(most, limit) * most * np.minimum(sizes, limit)).mean()) if len(sizes) else 0.0


def _largest_bet(most: float, limit: int) -> float:
    """Compute the largest bet: an image with ``limit`` errors leaves 1 % of the wealth."""
    return MAX_BET / ((1 - most) * limit)


def log_wealth(
    errors: np.ndarray, n_at_risk: np.ndarray, guarantee: RiskGuarantee, limit: int, mean: float
) -> np.ndarray:
    """Bet on one image after the other that the risk is at most ``guarantee.most``.

    Args:
        errors: (images, thresholds) errors F, in the order of betting.
        n_at_risk: (images, 1) or (images, thresholds) mentions G that can be in error, G >= F.
        guarantee: guarantee to meet.
        limit: most mentions that an image counts with.
        mean: mean number of mentions that count, per image, over other images.

    Returns:
        (thresholds,) log-wealth in nats; higher is more evidence for the guarantee, and at ``guarantee.required``
        betting stops.
    """
    most, images = guarantee.most, len(errors)
    losses = np.minimum(1, limit / np.maximum(n_at_risk, 1)) * (errors - most * n_at_risk)
    gain = most * max(mean, 1e-9)  # of an image without an error
    squares = np.full(losses.shape[1], PRIOR_IMAGES * VARIANCE_INFLATION * gain * (1 - most))
    wealth = np.zeros(losses.shape[1])
    for i, loss in enumerate(losses):
        lacking = np.maximum(guarantee.required - wealth, 0)
        bet = np.sqrt(2 * lacking * (PRIOR_IMAGES + i) / ((images - i) * squares))
        smallest = AHEAD * np.expm1(np.minimum(lacking / (images - i), 50)) / gain
        bet = np.minimum(np.maximum(bet, smallest), _largest_bet(most, limit))
        wealth += np.log1p(-bet * loss)
        squares += loss**2
    return wealth


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
    threshold. An image counts with at most ``most_per_image`` mentions that can be in error (``choose_limit``); what
    that says about all mentions is in the docstring of the module.

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
    scores, labels, reference = np.asarray(scores, dtype=np.float64), np.asarray(labels), np.asarray(reference)
    side = 1 if guarantee.risk == "max_false_alarms" else -1  # a miss is a false alarm with labels and scores reversed
    at_risk = labels == (0 if side > 0 else 1)
    index = np.unique(np.asarray(groups, dtype=str), return_inverse=True)[1].ravel()
    n_at_risk = np.bincount(index, weights=at_risk)
    limit = choose_limit(reference, len(n_at_risk), guarantee)
    mean = float(np.minimum(reference, limit).mean()) if len(reference) else 1.0
    bolder, step = np.unique(-side * scores[at_risk], return_inverse=True)  # errors in the order of bolder thresholds
    count = _accepted(step.ravel(), index[at_risk], n_at_risk, guarantee, limit, mean)
    if count < 0:
        raise DataError(_too_few(guarantee, n_at_risk, _limits(reference, guarantee.per_image)[0]))
    oriented, first_error = side * scores, -bolder[count]
    above = oriented[oriented > first_error]  # halfway to the first error not allowed, so that rounding cannot decide
    threshold = float((first_error + above.min()) / 2) if above.size else math.inf
    flagged = oriented >= threshold
    if not (flagged & ~at_risk).any():
        raise DataError(
            f"{guarantee}: only a useless threshold meets that on {len(n_at_risk)} calibration images, because the "
            "most extreme scores are errors; allow more, or use detector.threshold=f1"
        )
    sizes = np.r_[n_at_risk, reference]
    return Certificate(
        threshold=threshold if side > 0 else float(np.nextafter(-threshold, np.inf)),  # warn at or above it
        risk=guarantee.risk,
        most=guarantee.most,
        confidence=guarantee.confidence,
        observed=float((flagged & at_risk).sum() / max(at_risk.sum(), 1)),
        images=len(n_at_risk),
        mentions=int(at_risk.sum()),
        most_per_image=limit,
        counted=float(np.minimum(sizes, limit).sum() / sizes.sum()),
    )


def _accepted(
    step: np.ndarray, index: np.ndarray, n_at_risk: np.ndarray, guarantee: RiskGuarantee, limit: int, mean: float
) -> int:
    """Count how many distinct scores may be errors, testing one more each time; -1 if not even none is accepted.

    Args:
        step: (mentions,) for every mention that can be in error, the rank of its score among the distinct ones, in the
            order of bolder thresholds.
        index: (mentions,) image of each.
        n_at_risk: (images,) mentions of every image.
        guarantee: guarantee to meet.
        limit: most mentions that an image counts with.
        mean: mean number of mentions that count, per image, over other images.
    """
    images, total = len(n_at_risk), int(step.max(initial=-1)) + 1
    order = np.random.default_rng(ORDER_SEED).permutation(images)
    for start in range(0, total + 1, CHUNK):
        width = min(CHUNK, total + 1 - start)
        errors = np.zeros((images, width))
        np.add.at(errors[:, 0], index[step < start], 1)
        inside = (step >= start) & (step < start + width - 1)
        np.add.at(errors, (index[inside], step[inside] - start + 1), 1)
        errors = np.cumsum(errors, axis=1)[order]
        refused = log_wealth(errors, n_at_risk[order, None], guarantee, limit, mean) < guarantee.required
        if refused.any():
            return start + int(np.argmax(refused)) - 1
    return total


def images_needed(n_at_risk: np.ndarray, guarantee: RiskGuarantee, limit: int) -> int | None:
    """Compute how many such images a guarantee needs if no error occurs; None if no mention can be in error.

    Args:
        n_at_risk: (images,) mentions per image that can be in error.
        guarantee: guarantee to meet.
        limit: most mentions that an image counts with; without ``guarantee.per_image`` a smaller limit is used where
            it needs fewer images.

    >>> images_needed(np.array([3, 2, 4]), RiskGuarantee("max_false_alarms", 0.05), 4)
    79
    """
    if not np.sum(n_at_risk):
        return None
    limits = _limits(np.minimum(n_at_risk, limit), None) if guarantee.per_image is None else [limit]
    growth = max(_growth(n_at_risk, guarantee.most, each) for each in limits)
    return math.ceil(guarantee.required / growth)


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
