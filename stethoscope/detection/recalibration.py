"""Calibrate a detector again for data unlike those that it was calibrated on, from few labels or none.

With labels the calibrated log-odds x become a x + b (Platt 1999), with a penalty towards a = 1, b = 0: the fewer the
labels, the more of the old calibration is kept. Without labels only the share of hallucinated mentions is estimated, by
the expectation-maximisation of Saerens, Latinne and Decaestecker (Neural Computation 14, 2002), and b is its log-odds
less those of before. That is right where hallucinated mentions look as before and only their number has changed; where
features themselves have shifted (noise) it is not, and labels are needed.

Where there never was a label, scores alone are left: they are taken for a mixture of two distributions, of grounded and
hallucinated mentions, as speaker verification is calibrated without labels (Brummer and Garcia-Romero, Odyssey 2014).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit
from scipy.stats import t as student
from sklearn.linear_model import LogisticRegression

from stethoscope.detection.array_classifiers import PlattScaling
from stethoscope.detection.calibrated_model import CalibratedModel
from stethoscope.detection.estimators import log_loss_of
from stethoscope.detection.warning_threshold import WarningThreshold, best_threshold

SLOPE_SPREAD, INTERCEPT_SPREAD = 0.5, 1.5
"""Standard deviations of the normal priors of a (around 1) and b (around 0)."""
LOWEST_SHARE = 1e-4
FREEDOM = 4
"""Degrees of freedom of the mixture's distributions: scores have longer tails than a normal distribution."""
ENOUGH_SCORES, SHARES = 100, (0.02, 0.5)
"""Mentions that a mixture needs, and between which shares its upper part can be the hallucinated mentions."""


class Recalibration(NamedTuple):
    """A classifier that is calibrated again.

    Attributes:
        line: slope and intercept from the log-odds of before to the new ones.
        base_rate: share of hallucinated mentions of the new data, in (0, 1).
        model: the classifier with its new calibration.
        threshold: where it warns.
    """

    line: tuple[float, float]
    base_rate: float
    model: CalibratedModel
    threshold: WarningThreshold


def recalibrate(
    model: CalibratedModel,
    scores: np.ndarray,
    labels: np.ndarray | None,
    base_rate: float,
    threshold: float,
    images: int,
) -> Recalibration:
    """Calibrate a classifier again: by ``shrunk_line`` with labels, else by ``share_of_hallucinated``.

    Args:
        model: the classifier, calibrated by a line.
        scores: (mentions,) of the new data, before calibration.
        labels: (mentions,) 1 hallucinated, 0 grounded; None without labels.
        base_rate: share of hallucinated mentions where the model was calibrated, in (0, 1).
        threshold: where it has warned, in [0, 1].
        images: number of pictures of the new data.

    Raises:
        ConfigError: the calibration is isotonic, which is no line.
    """
    slope, intercept = model.line
    if labels is None:
        share = share_of_hallucinated(model.calibrate(scores), base_rate)
        line, data = (1.0, intercept_of_share(share, base_rate)), f"{images} pictures without labels"
    else:
        share = float(labels.mean())
        line, data = shrunk_line(slope * scores + intercept, labels), f"{images} labelled pictures"
    calibrator = PlattScaling(line[0] * slope, line[0] * intercept + line[1])
    new = replace(model, calibrator=calibrator, held_out_scores=None)
    if labels is not None and 0 < share < 1:
        warned = WarningThreshold(best_threshold(labels, new.calibrate(scores)), f"highest F1 on {data}")
    else:
        if 0 < threshold < 1:  # 0 warns of everything and 1 of nothing, whatever the calibration
            threshold = float(expit(line[0] * logit(threshold) + line[1]))
        warned = WarningThreshold(threshold, f"as before, recalibrated on {data}")
    return Recalibration(line, float(np.clip(share, LOWEST_SHARE, 1 - LOWEST_SHARE)), new, warned)


def shrunk_line(log_odds: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Fit slope a and intercept b of new log-odds a x + b, shrunk towards 1 and 0.

    Minimises the log loss plus (a - 1)^2 / (2 SLOPE_SPREAD^2) + b^2 / (2 INTERCEPT_SPREAD^2).

    Args:
        log_odds: (mentions,) calibrated log-odds x of the detector.
        labels: (mentions,) 1 hallucinated, 0 grounded.

    >>> shrunk_line(np.zeros(0), np.zeros(0))
    (1.0, 0.0)
    """

    def loss(line: np.ndarray) -> tuple[float, np.ndarray]:
        a, b = line
        scores = a * log_odds + b
        penalty = (a - 1) ** 2 / (2 * SLOPE_SPREAD**2) + b**2 / (2 * INTERCEPT_SPREAD**2)
        errors = expit(scores) - labels
        slope = errors @ log_odds + (a - 1) / SLOPE_SPREAD**2
        return float(log_loss_of(labels, scores).sum() + penalty), np.array(
            [slope, errors.sum() + b / INTERCEPT_SPREAD**2]
        )

    bounds = [(0.0, None), (None, None)]  # a falling line would turn the ranking round
    a, b = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=bounds).x
    return float(a), float(b)


def share_of_hallucinated(probabilities: np.ndarray, base_rate: float, steps: int = 1000) -> float:
    """Estimate the share of hallucinated mentions of unlabelled data (Saerens et al. 2002, equation 4).

    Args:
        probabilities: (mentions,) of a detector calibrated where the share was ``base_rate``, in [0, 1].
        base_rate: share of hallucinated mentions there, in (0, 1).
        steps: at most so many steps of expectation-maximisation.

    Returns:
        The share, in [0, 1]; ``base_rate`` without any mention.
    """
    share = base_rate
    if not len(probabilities):
        return share
    for _ in range(steps):
        wrong, right = probabilities * share / base_rate, (1 - probabilities) * (1 - share) / (1 - base_rate)
        new = float((wrong / (wrong + right)).mean())
        if abs(new - share) < 1e-9:
            break
        share = new
    return share


def intercept_of_share(share: float, base_rate: float) -> float:
    """Compute the shift of the log-odds that a new share of hallucinated mentions makes.

    >>> intercept_of_share(0.5, 0.5)
    0.0
    """
    share = min(max(share, LOWEST_SHARE), 1 - LOWEST_SHARE)
    return float(logit(share) - logit(base_rate))


def reply_boundary(odds: np.ndarray, labels: np.ndarray) -> float:
    """Return the log-odds of a yes below which the model's replies count as a no.

    A model that is asked whether an object it named is there rather says yes: it denies far fewer names than are wrong.
    As many replies lie below the boundary as mentions are wrong, if some have labels. Without any it is the mean less a
    standard deviation, and 0 at least: two groups of replies, the smaller with a tenth to a third of them, are told
    apart by it, and a model that says no by itself is believed.

    Args:
        odds: (rows,) log-odds of a yes, NaN where the model was not asked.
        labels: (rows,) of 0 and 1, others where not known.

    >>> reply_boundary(np.array([1.0, 2.0, 6.0, 6.0, 7.0, 8.0]), np.full(6, -1)).__round__(2)
    2.42
    """
    asked = np.isfinite(odds)
    odds, labels = odds[asked], labels[asked]
    known = np.isin(labels, (0, 1))
    if len(np.unique(labels[known])) == 2:
        return float(np.quantile(odds[known], labels[known].mean()))
    return max(0.0, float(odds.mean() - odds.std())) if len(odds) else 0.0


def mixture_line(scores: np.ndarray, steps: int = 500) -> tuple[float, float] | None:
    """Fit slope and intercept from scores to log-odds of hallucination without a label.

    The scores are a mixture of two t distributions with ``FREEDOM`` degrees of freedom, fitted by
    expectation-maximisation (Peel and McLachlan, Statistics and Computing 10, 2000); the line is fitted to the
    probabilities of the upper part. It is right as far as that is what hallucinated mentions are: the fewer ones, with
    scores of a distribution of their own.

    Args:
        scores: (mentions,) of a detector, before calibration.
        steps: at most so many steps of expectation-maximisation.

    Returns:
        Slope and intercept; None where there are too few scores, or no two such parts in them.
    """
    if len(scores) < ENOUGH_SCORES or not np.std(scores) > 0:
        return None
    centres, spreads, share = np.quantile(scores, [0.25, 0.95]), np.full(2, np.std(scores) / 2), 0.2
    high = np.zeros(len(scores))
    for _ in range(steps):
        before = share
        low, up = (student.logpdf(scores, FREEDOM, *part) for part in zip(centres, spreads, strict=True))
        high = expit(logit(share) + up - low)
        share = float(high.mean())
        if not SHARES[0] < share < SHARES[1]:
            return None
        for part, weights in enumerate((1 - high, high)):
            near = weights * (FREEDOM + 1) / (FREEDOM + ((scores - centres[part]) / spreads[part]) ** 2)
            centres[part] = near @ scores / near.sum()
            spreads[part] = np.sqrt(near @ (scores - centres[part]) ** 2 / weights.sum())
        if not spreads.min() > 0:
            return None
        if abs(share - before) < 1e-7:
            break
    rows, parts = np.concatenate([scores, scores])[:, None], np.repeat([0, 1], len(scores))
    line = LogisticRegression(C=1e6).fit(rows, parts, sample_weight=np.concatenate([1 - high, high]))
    slope, intercept = float(line.coef_[0, 0]), float(line.intercept_[0])
    return (slope, intercept) if slope > 0 else None
