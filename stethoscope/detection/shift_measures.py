"""Measure what has changed between the data that a detector was calibrated on and others.

``Readings`` are what is compared, ``RunShift`` the result. Between them: distances of single pictures to a training
fold and their ranks, tests of whole runs, and estimates, from probabilities alone, of a changed share of hallucinations
and of the errors of a threshold.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit
from scipy.stats import mannwhitneyu

from stethoscope.core.picture_profile import read_profiles
from stethoscope.detection.artifact import Arrays

MAX_COMPONENTS = 64
SHRINKAGE = 0.05  # of the correlation matrix towards the identity
MAX_DEVIATION = 10.0  # standard deviations at which a column is cut off, so that none decides alone
LARGEST_INTERCEPT = 6.0
MAX_ORDER = 6
"""Mentions of an answer whose mean probabilities are known one by one; later ones share the last."""
RUN_LEVEL = 0.05
"""False-alarm rate of a whole run."""
TOLERANCE = 0.05
"""By how much probabilities may be off on average, and which share of pictures may be far out, in a kept promise."""
CHANGED = {
    "picture": "the pictures",
    "answer": "the answers",
    "scores": "the share of hallucinations",
    "alarms": "the share of errors that is guaranteed",
}
"""What has changed, by the view that shows it."""
RIDGE = 1e-3  # of the map from standardised columns to log-odds


@dataclass(frozen=True)
class Readings:
    """What a detector reads of mentions.

    Attributes:
        mentions: rows of a token table: ``task``, ``sample_id``, ``group`` and perhaps ``picture``.
        columns: (rows, columns) of its final classifier, NaN where a value is missing.
        log_odds: (rows,) calibrated log-odds of hallucination.
        contents: (rows, objects) probability that the mention's picture shows each object, NaN where not known; None
            where it is not asked for, or the detector does not read image tokens.
    """

    mentions: pd.DataFrame
    columns: np.ndarray
    log_odds: np.ndarray
    contents: np.ndarray | None = None

    def select(self, rows: np.ndarray) -> Readings:
        """Select rows by a mask."""
        contents = None if self.contents is None else self.contents[rows]
        return Readings(self.mentions[rows], self.columns[rows], self.log_odds[rows], contents)

    def first_answers(self) -> Readings:
        """Select the mentions of the first answer to every image, so that pictures are independent."""
        owners = pd.Series(self.owners, index=self.mentions.index)
        return self.select((owners == owners.groupby(self.mentions["group"]).transform("min")).to_numpy())

    @cached_property
    def owners(self) -> np.ndarray:
        """Index of every row's answer, (rows,) int, in order of first appearance."""
        return self.mentions.groupby(["task", "sample_id"], sort=False).ngroup().to_numpy()

    @cached_property
    def order(self) -> np.ndarray:
        """Number of mentions of the same answer before each, (rows,) int, at most ``MAX_ORDER`` - 1."""
        counts = self.mentions.groupby(["task", "sample_id"], sort=False).cumcount().to_numpy()
        return np.minimum(counts, MAX_ORDER - 1)

    @cached_property
    def first_rows(self) -> np.ndarray:
        """Index of the first row of every answer, (answers,) int."""
        return np.unique(self.owners, return_index=True)[1]

    @cached_property
    def profiles(self) -> np.ndarray:
        """Profile of every answer's picture, (answers, ``LENGTH``); NaN where it is not known."""
        texts = self.mentions["picture"] if "picture" in self.mentions else pd.Series("", index=self.mentions.index)
        return read_profiles(list(texts.to_numpy()[self.first_rows]))


@dataclass(frozen=True)
class View:
    """A distance to the rows of a training fold.

    Attributes:
        mean, inverse_scale: (columns,) of the standardisation; 0 for constant columns, which tell nothing.
        components: (k, columns) orthonormal directions of most variance, k at most ``MAX_COMPONENTS``.
        weights: (k,) inverse variances along them.
        rest: inverse mean variance of all other directions.
        per_unit: inverse of the 99 % quantile of the training fold's own distances, by which they are multiplied.
        reference: (n,) distances of held-out pictures, sorted.
    """

    mean: np.ndarray
    inverse_scale: np.ndarray
    components: np.ndarray
    weights: np.ndarray
    rest: float
    per_unit: float
    reference: np.ndarray

    @classmethod
    def fit(cls, rows: np.ndarray, owners: np.ndarray, floor: float = 0.0) -> View:
        """Learn a distance, still without reference.

        Args:
            rows: (rows, columns), NaN where a value is missing.
            owners: (rows,) answer of every row.
            floor: standard deviation that is added to that of every column, so that what varies less counts less.
        """
        known = ~np.isnan(rows)
        count = np.maximum(known.sum(0), 1)
        mean = np.where(known, rows, 0).sum(0) / count
        scale = np.sqrt((np.where(known, rows - mean, 0) ** 2).sum(0) / count)
        varies = scale > 1e-9 * (1 + np.abs(mean))
        scale = np.hypot(scale, floor)
        inverse_scale = np.where(varies, 1 / np.where(varies, scale, 1), 0)
        none = np.zeros((0, len(mean)))
        view = cls(mean, inverse_scale, none, np.zeros(0), 1.0, 1.0, np.zeros(0))
        standard = view._standardised(rows)
        covariance = standard.T @ standard / len(rows) + np.diag((floor * inverse_scale) ** 2)
        correlation = (1 - SHRINKAGE) * covariance + SHRINKAGE * np.eye(len(mean))
        variances, directions = np.linalg.eigh(correlation)
        kept = slice(None, -MAX_COMPONENTS - 1, -1)
        others = variances[: max(len(variances) - MAX_COMPONENTS, 0)]
        rest = 1 / float(others.mean()) if len(others) else 0.0
        view = replace(view, components=directions.T[kept].copy(), weights=1 / variances[kept], rest=rest)
        distances = view.distances(rows, owners)
        return replace(view, per_unit=1 / max(float(np.nanquantile(distances, 0.99)), 1e-9))

    def _standardised(self, rows: np.ndarray) -> np.ndarray:
        """Standardise (rows, columns); a missing value counts as the mean."""
        standard = np.nan_to_num((rows - self.mean) * self.inverse_scale)
        return np.clip(standard, -MAX_DEVIATION, MAX_DEVIATION)

    def distances(self, rows: np.ndarray, owners: np.ndarray) -> np.ndarray:
        """Compute the mean distance of every answer's rows, (answers,) in units of training; NaN where all are missing.

        Args:
            rows: (rows, columns).
            owners: (rows,) index of the answer of every row, from 0 without gaps.
        """
        standard = self._standardised(rows)
        along = (standard @ self.components.T) ** 2
        squares = along @ self.weights + self.rest * np.maximum((standard**2).sum(1) - along.sum(1), 0)
        squares[np.isnan(rows).all(1)] = np.nan
        known = ~np.isnan(squares)
        answers = int(owners.max()) + 1 if len(owners) else 0
        totals = np.bincount(owners[known], squares[known], answers)
        counts = np.bincount(owners[known], minlength=answers)
        return np.where(counts > 0, totals / np.maximum(counts, 1), np.nan) * self.per_unit

    @classmethod
    def restore(cls, arrays: Arrays, columns: int) -> View:
        """Restore and check what ``arrays`` returned."""
        weights = arrays.numbers("weights", None)
        return cls(
            arrays.numbers("mean", columns),
            arrays.numbers("inverse_scale", columns),
            arrays.numbers("components", len(weights), columns),
            weights,
            float(arrays.numbers("rest")),
            float(arrays.numbers("per_unit")),
            np.sort(arrays.numbers("reference", None)),
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name."""
        return {**vars(self), "rest": np.array(self.rest), "per_unit": np.array(self.per_unit)}


def rank_p_values(reference: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Compute (1 + number of reference values at least as large) / (n + 1), (values,) in (0, 1].

    Args:
        reference: (n,) sorted values of held-out pictures.
        values: (values,) of other pictures.

    >>> rank_p_values(np.array([1.0, 2.0, 3.0]), np.array([0.5, 3.0, 4.0])).tolist()
    [1.0, 0.5, 0.25]
    """
    larger = len(reference) - np.searchsorted(reference, values, side="left")
    return (1 + larger) / (len(reference) + 1)


def linear_map(columns: np.ndarray, log_odds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit the linear map from columns to log-odds; exact for a linear classifier, the nearest for others.

    Args:
        columns: (rows, columns), NaN where a value is missing, which counts as the mean.
        log_odds: (rows,).

    Returns:
        Means and weights, (columns,) each; weight 0 for constant columns.
    """
    known = ~np.isnan(columns)
    center = np.where(known, columns, 0).sum(0) / np.maximum(known.sum(0), 1)
    centered = np.where(known, columns - center, 0)
    scale = centered.std(0)
    varies = scale > 1e-9 * (1 + np.abs(center))
    standard = centered[:, varies] / scale[varies]
    gram = standard.T @ standard / max(len(columns), 1) + RIDGE * np.eye(standard.shape[1])
    weights = np.zeros(columns.shape[1])
    weights[varies] = np.linalg.solve(gram, standard.T @ (log_odds - log_odds.mean()) / len(columns)) / scale[varies]
    return center, weights


def share_intercept(probabilities: np.ndarray, rates: np.ndarray) -> float:
    """Estimate by how much the log-odds of hallucination have moved at the same place of an answer.

    Maximises the likelihood of label shift: sum of log((1 - p)(1 - r') / (1 - r) + p r' / r), with the log-odds of r'
    those of r plus the result; the equation of Saerens et al. 2002 with one shift for all places.

    Args:
        probabilities: (mentions,) p, in [0, 1].
        rates: (mentions,) r, mean probability of held-out mentions at the same place, in (0, 1).

    >>> rates = np.full(4, 0.5)
    >>> round(share_intercept(np.array([0.9, 0.9, 0.1, 0.1]), rates), 3)
    0.0
    """

    def loss(intercept: float) -> float:
        new = expit(logit(rates) + intercept)
        return -float(np.log((1 - probabilities) * (1 - new) / (1 - rates) + probabilities * new / rates).sum())

    bounds = (-LARGEST_INTERCEPT, LARGEST_INTERCEPT)
    return float(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-4}).x)


def estimated_risk(probabilities: np.ndarray, threshold: float, risk: str) -> float:
    """Estimate a guaranteed share of errors, in [0, 1], by the probabilities themselves.

    Args:
        probabilities: (mentions,) of hallucination.
        threshold: at or above which a mention gets a warning.
        risk: ``max_false_alarms``, of grounded mentions that get a warning, or ``max_missed``, of hallucinated ones
            that get none.

    >>> estimated_risk(np.array([0.0, 0.5, 1.0]), 0.5, "max_false_alarms").__round__(3)
    0.333
    """
    warned = probabilities >= threshold
    at_risk, wrong = (1 - probabilities, warned) if risk == "max_false_alarms" else (probabilities, ~warned)
    return float(at_risk[wrong].sum() / max(at_risk.sum(), 1e-12))


def smallest_p(rows: np.ndarray, held_out: np.ndarray) -> float | None:
    """Return the smallest p-value of rank tests by column (Mann and Whitney 1947), times the number of columns."""
    if not len(rows) or not len(held_out) or rows.shape[1] != held_out.shape[1]:
        return None
    p_values = mannwhitneyu(rows.astype(float), held_out.astype(float), axis=0).pvalue
    return None if np.isnan(p_values).all() else float(min(1.0, len(p_values) * np.nanmin(p_values)))


# --- results ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunShift:
    """The comparison of a run with the pictures that a detector was calibrated on.

    Attributes:
        pictures: number of compared pictures.
        unlike: number of pictures that are flagged one by one.
        level: chance that a picture like those of the calibration fold is flagged.
        p: p-value of the whole run: that what the promise rests on is as before.
        view: what has changed most: one of ``CHANGED``.
        shifted: whether the promise does not hold, at a false-alarm rate of ``RUN_LEVEL``.
        error: by how much probabilities may be off on average, in [0, 1].
        risk: share of guaranteed errors by the detector's own probabilities; None without a guarantee.
        guaranteed: the largest share that is guaranteed; None without.
        changes: p-values by view.
    """

    pictures: int
    unlike: int
    level: float
    p: float
    view: str
    shifted: bool
    error: float = 0.0
    risk: float | None = None
    guaranteed: float | None = None
    changes: dict[str, float] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """One sentence for terminal, page and report."""
        seen = (
            f"{self.unlike} of {self.pictures} pictures are unlike those that the detector was calibrated on, "
            f"{self.level:.1%} expected; p {shown_p(self.p)}"
        )
        if self.shifted:
            if self.view == "scores" and self.error > TOLERANCE:
                seen += f"; probabilities may be off by {self.error:.0%}"
            elif self.view == "alarms" and self.risk is not None and self.guaranteed is not None:
                seen += f"; by its own probabilities {self.risk:.1%} errors, {self.guaranteed:.1%} guaranteed"
            return (
                f"shift in {CHANGED[self.view]} ({seen}): no probability is calibrated here and no guarantee of the "
                "threshold holds; `stethoscope train run=... recalibrate=...` mends that with a few labelled pictures"
            )
        changed = [CHANGED[view] for view, p in self.changes.items() if len(self.changes) * p <= RUN_LEVEL]
        if changed:
            return f"no shift in what the probabilities rest on, though {_listed(changed)} changed ({seen})"
        return f"no shift seen ({seen})"

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-able dictionary."""
        return {**vars(self), "sentence": self.sentence}


def _listed(names: list[str]) -> str:
    return f"{' and '.join(names)} {'has' if names == [CHANGED['scores']] else 'have'}"


def shown_p(p: float) -> str:
    """Write a p-value after its sign.

    >>> shown_p(0.0123), shown_p(0.0001)
    ('= 0.012', '< 0.001')
    """
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"
