"""Monitor whether the promises of a detector hold for data unlike those of calibration.

A promise ("30 % means 30 %", "5 % false alarms") is about mentions like those of the calibration fold. The monitor
needs no label and no pass of the model. It does not ask whether anything has changed (something always has), but
whether what the promise rests on has. Of a run, with pictures as units, it asks three things:

1. **Has the share of hallucinations changed?** The mean probability of mentions with as many others before them,
   against that of held-out ones (Welch 1947). If it has, there are two explanations. *The answers* have changed:
   another prompt or way of decoding names other objects of the same pictures. Then the evidence is what it was, and a
   probability that follows it stays right (covariate shift, Shimodaira 2000). *The pictures* have changed, and with
   them how often a name is wrong given the same evidence (label shift at the same place of an answer, Saerens et al.
   2002): then all log-odds are off by a constant, and its most likely value says by how much probabilities may be off,
   ``error``. The second is believed only if the pictures show other objects, or their pixels are others, neither of
   which depends on the answer. Without image tokens it is not known which objects they show, and it is always believed.
2. **Is a guarantee broken by the detector's own probabilities?** They say how many grounded mentions get a warning:
   ``risk`` (confidence-based estimates: Guillory et al. 2021, arXiv 2107.03315; Garg et al. 2022, arXiv 2201.04234).
3. **Are many pictures far out?** Of them nothing is known.

The monitor speaks if ``error`` is above ``TOLERANCE`` or ``risk`` above what is guaranteed, and the share has changed
at all; or if more pictures than ``TOLERANCE`` are far out and that is no chance. The two tests share the false-alarm
rate ``RUN_LEVEL``. It assumes that one of the two explanations holds: harm that leaves all mean probabilities as they
were is not seen. Where no scores of held-out pictures are known, it speaks of any change.

A single picture is far out by a regularised Mahalanobis distance to the training fold (Lee et al. 2018, arXiv
1807.03888, without classes) in one of two views: ``picture``, the profile of its pixels
(``core.picture_profile``), and ``answer``, the parts of its mentions' log-odds: hidden states, image tokens,
attention and so on, each as much as it moves the score. Its p-value is the rank among pictures of the calibration fold,
from which nothing of the distance was learned: under exchangeability the chance of a p-value of at most ``level`` is at
most ``level`` (split conformal prediction, Vovk et al. 2005; Bates et al. 2023, arXiv 2104.08279).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit
from scipy.stats import betabinom, mannwhitneyu, ttest_ind_from_stats

from stethoscope.core.errors import DataError
from stethoscope.core.picture_profile import PROFILE_LENGTH
from stethoscope.detection.artifact import Arrays
from stethoscope.detection.risk_control import Certificate
from stethoscope.detection.shift_measures import (
    CHANGED,
    MAX_ORDER,
    RUN_LEVEL,
    TOLERANCE,
    Readings,
    RunShift,
    View,
    estimated_risk,
    linear_map,
    rank_p_values,
    share_intercept,
    shown_p,
    smallest_p,
)
from stethoscope.features.columns import group_of

PICTURE_LEVEL = 0.01
"""False-alarm rate of a single picture, if the calibration fold has 99 or more."""
FLOOR = 4 * TOLERANCE
"""Log-odds that move no probability by more than ``TOLERANCE``."""
FEWEST = 20
"""Pictures that the training and the calibration fold need, each, for a monitor."""
VIEWS = ("answer", "picture")


@dataclass(frozen=True)
class ShiftMonitor:
    """The monitor of a detector.

    Attributes:
        columns: names of the columns of the final classifier.
        center: (columns,) their means in training.
        weights: (columns,) how much each moves the log-odds: of a linear map from the columns to them.
        views: views by name.
        reference: (n,) largest distance over the views, of held-out pictures, sorted.
        order_rates: (``MAX_ORDER``,) mean probability of the first, second, ... mention of held-out pictures.
        residuals: (n,) sums over the mentions of held-out answers of probability less that; (0,) where not known.
        profiles: (n, ``PROFILE_LENGTH``) float32 profiles of held-out pictures.
        contents: (n, objects) float32 probabilities that they show the objects; (0, 0) where not known.
    """

    columns: tuple[str, ...]
    center: np.ndarray
    weights: np.ndarray
    views: dict[str, View]
    reference: np.ndarray
    order_rates: np.ndarray = field(default_factory=lambda: np.full(MAX_ORDER, 0.5))
    residuals: np.ndarray = field(default_factory=lambda: np.zeros(0))
    profiles: np.ndarray = field(default_factory=lambda: np.zeros((0, PROFILE_LENGTH), np.float32))
    contents: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))

    # --- fitting ------------------------------------------------------------------------------------------------------

    @classmethod
    def fit(cls, columns: Iterable[str], train: Readings, calibration: Readings | None = None) -> ShiftMonitor | None:
        """Fit on the mentions of a detector's folds; None where they have too few pictures.

        Args:
            columns: names of the columns of the final classifier.
            train: to learn the distance from.
            calibration: of other images, the reference of p-values; without it every second image of ``train`` is
                kept for that, and scores are no view: of training images they are no measure.
        """
        if not {"task", "sample_id", "group"} <= set(train.mentions.columns):
            return None
        held_out = calibration
        if held_out is None:
            images = train.mentions["group"].unique()
            kept = train.mentions["group"].isin(set(images[1::2])).to_numpy()
            train, held_out = train.select(~kept), train.select(kept)
        if train.mentions["group"].nunique() < FEWEST:
            return None
        names = tuple(columns)
        monitor = cls(names, *linear_map(train.columns, train.log_odds), {}, np.zeros(0))
        views = {
            name: View.fit(rows, owners, FLOOR if name == "answer" else 0.0)
            for name, (rows, owners) in monitor._views_of(train).items()
            if not np.isnan(rows).all() and rows.shape[1]
        }
        return replace(monitor, views=views).with_reference(held_out, calibration is not None) if views else None

    def with_reference(self, readings: Readings, scored: bool = True) -> ShiftMonitor | None:
        """Return the monitor with other pictures as reference: the first answer to each that names something.

        None where they are fewer than ``FEWEST``: of n pictures the rank of another is below 1 / n by chance alone.

        Args:
            readings: of the pictures.
            scored: whether their scores may be compared with.
        """
        if readings.mentions["group"].nunique() < FEWEST:
            return None
        readings = readings.first_answers()
        distances, profiles = self._distances(readings), readings.profiles
        views = {name: replace(view, reference=np.sort(_known(distances[name]))) for name, view in self.views.items()}
        contents = (
            np.zeros((0, 0), np.float32)
            if readings.contents is None
            else _complete(readings.contents[readings.first_rows])
        )
        monitor = replace(
            self,
            views=views,
            reference=np.sort(_largest(distances)),
            residuals=np.zeros(0),
            profiles=_complete(profiles),
            contents=contents,
        )
        if not scored:
            return monitor
        rates, order = expit(readings.log_odds), readings.order
        by_order = [rates[order == index] for index in range(MAX_ORDER)]
        means = np.array([part.mean() if len(part) else rates.mean() for part in by_order])
        monitor = replace(monitor, order_rates=np.clip(means, 1e-6, 1 - 1e-6))
        return replace(monitor, residuals=monitor._residuals(readings))

    # --- single pictures ----------------------------------------------------------------------------------------------

    @property
    def level(self) -> float:
        """Chance that a picture like those of the calibration fold is flagged: 0.01, or 1 / (n + 1) for n < 99."""
        return max(PICTURE_LEVEL, 1 / (len(self.reference) + 1))

    def pictures(self, readings: Readings) -> pd.DataFrame:
        """Compare single answers with the calibration fold.

        Returns:
            A row per answer with a mention: ``task``, ``sample_id``, ``group``, ``view`` (of the largest distance),
            ``p`` in (0, 1], and ``unlike``, whether p is at most ``level``.
        """
        rows = readings.mentions[["task", "sample_id", "group"]].iloc[readings.first_rows].reset_index(drop=True)
        distances = self._distances(readings)
        names = np.array(list(distances))
        stacked = np.nan_to_num(np.stack(list(distances.values())), nan=-np.inf)
        rows["view"] = names[stacked.argmax(0)]
        rows["p"] = rank_p_values(self.reference, _largest(distances))
        rows["unlike"] = rows["p"] <= self.level + 1e-12
        return rows

    def sentence(self, readings: Readings) -> str:
        """Say in one sentence that an answer is unlike the calibration fold; empty if it is like it, or names nothing.

        Args:
            readings: of the mentions of one answer.
        """
        if not len(readings.mentions):
            return ""
        row = self.pictures(readings).iloc[0]
        if not row["unlike"]:
            return ""
        return (
            f"This {row['view']} is unlike the {len(self.reference)} that the detector was calibrated on "
            f"(p {shown_p(row['p'])}): no percentage here is calibrated."
        )

    # --- whole runs ---------------------------------------------------------------------------------------------------

    def run(
        self, readings: Readings, threshold: float = 0.5, certificate: Certificate | None = None
    ) -> RunShift | None:
        """Compare a whole run with the calibration fold; None where it has no mention.

        Args:
            readings: of its mentions; of several answers to an image the first counts.
            threshold: probability at or above which the detector warns.
            certificate: of the threshold; None without a guarantee.
        """
        if not len(readings.mentions):
            return None
        readings = readings.first_answers()
        single, changes = self.pictures(readings), self._changes(readings)
        counts, level = (len(single), int(single["unlike"].sum())), self.level
        risk, guaranteed = None, None if certificate is None else certificate.most
        if certificate is not None:
            risk = estimated_risk(expit(readings.log_odds), threshold, certificate.risk)
        if not len(self.residuals):
            if not changes:
                return None
            view = min(changes, key=lambda name: changes[name])
            p = min(1.0, len(changes) * changes[view])
            return RunShift(*counts, level, p, view, p <= RUN_LEVEL, 0.0, risk, guaranteed, changes)
        far = self._chance_far_out(single, "picture", TOLERANCE)
        share, error = changes["scores"], self._error(readings, changes)
        broken = risk is not None and guaranteed is not None and risk > guaranteed
        by_share = 2 * share <= RUN_LEVEL and (error > TOLERANCE or broken)
        by_count = 2 * far <= RUN_LEVEL
        view = "scores" if error > TOLERANCE else "alarms" if broken else min(changes, key=lambda name: changes[name])
        if by_count and (not by_share or far < share):
            view = "picture"
        p = min(1.0, 2 * min(share, far))
        return RunShift(*counts, level, p, view, by_share or by_count, error, risk, guaranteed, changes)

    def check_share_alone(self, readings: Readings) -> None:
        """Refuse a run in which the share of hallucinations is not what has changed most.

        Raises:
            DataError: no shift is seen, or more of one in answers or pictures than in scores, after which a score need
                not mean what it meant, or the share has changed with the answers alone, which its probabilities
                follow. Nothing is refused if the scores of held-out pictures are not known.
        """
        shift = self.run(readings) if len(self.residuals) else None
        if shift is None:
            return
        loudest = min(shift.changes, key=lambda name: shift.changes[name])
        largest = min(1.0, len(shift.changes) * shift.changes[loudest])
        single = self.pictures(readings.first_answers())
        for view, share in (("picture", TOLERANCE), ("answer", 0.5)):  # a share alone moves few answers out of range
            if (far := self._chance_far_out(single, view, share)) <= RUN_LEVEL:
                loudest, largest = view, far
        if shift.shifted and loudest == "scores" and shift.error > TOLERANCE:
            return
        seen = f"above all {CHANGED[loudest]} have changed" if largest <= RUN_LEVEL else "no shift is seen"
        if loudest == "scores" and largest <= RUN_LEVEL:
            seen = "the share of hallucinations has changed too little, or with the answers alone"
        raise DataError(
            f"{seen} (p {shown_p(largest)}), and recalibration without labels mends nothing but a changed share of "
            "hallucinations in other pictures; give some labelled pictures (labels=50), or keep the detector"
        )

    def _changes(self, readings: Readings) -> dict[str, float]:
        """Test all answers together against the held-out ones, by view."""
        distances, changes = self._distances(readings), {}
        if "answer" in self.views:
            known, held_out = _known(distances["answer"]), self.views["answer"].reference
            if len(known) and len(held_out):
                changes["answer"] = float(mannwhitneyu(known, held_out, alternative="greater").pvalue)
        tests = [smallest_p(_complete(readings.profiles), self.profiles)]
        if self.contents.size and readings.contents is not None:
            contents = _complete(readings.contents[readings.first_rows])
            tests += [smallest_p(contents, self.contents)]
            totals = (rows.sum(1, keepdims=True, dtype=float) for rows in (contents, self.contents))
            tests += [smallest_p(*totals)]
        known_tests = [p for p in tests if p is not None]
        if known_tests:
            changes["picture"] = min(1.0, len(known_tests) * min(known_tests))
        if len(self.residuals):
            residuals = self._residuals(readings)
            comparable = len(residuals) > 1 and (np.ptp(residuals) > 1e-9 or np.ptp(self.residuals) > 1e-9)
            moments = ((part.mean(), part.std(ddof=1), len(part)) for part in (residuals, self.residuals))
            changes["scores"] = 1.0
            if comparable:
                test = ttest_ind_from_stats(*chain.from_iterable(moments), equal_var=False)
                changes["scores"] = float(test.pvalue)
        return changes

    def _error(self, readings: Readings, changes: dict[str, float]) -> float:
        """Estimate by how much probabilities are off if the share at the same place has changed with the pictures."""
        seen = self.contents.size and readings.contents is not None
        if seen and changes.get("picture", 0.0) > RUN_LEVEL:
            return 0.0
        intercept = share_intercept(expit(readings.log_odds), self.order_rates[readings.order])
        return float(np.abs(expit(readings.log_odds + intercept) - expit(readings.log_odds)).mean())

    def _chance_far_out(self, single: pd.DataFrame, view: str, share: float) -> float:
        """Compute the chance that so many pictures are flagged by a view without a shift; 1 if no more than a share.

        How many of m further values exceed the k-th largest of n is beta-binomial, with parameters k and n + 1 - k.
        """
        count = int((single["unlike"] & (single["view"] == view)).sum())
        if count <= share * len(single):
            return 1.0
        n = len(self.reference)
        rank = max(1, int(self.level * (n + 1) + 1e-9))
        return float(betabinom.sf(count - 1, len(single), rank, n + 1 - rank))

    def _residuals(self, readings: Readings) -> np.ndarray:
        """Sum over every answer's mentions the probability less the mean one at the same place, (answers,)."""
        return np.bincount(readings.owners, expit(readings.log_odds) - self.order_rates[readings.order])

    def _views_of(self, readings: Readings) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return the rows of every view and the answer of each row."""
        profiles = readings.profiles
        return {"answer": (self._parts(readings), readings.owners), "picture": (profiles, np.arange(len(profiles)))}

    def _parts(self, readings: Readings) -> np.ndarray:
        """Split the log-odds by groups of columns, (rows, groups + 1); the last is what no column explains."""
        missing = np.isnan(readings.columns)
        terms = np.where(missing, 0.0, (readings.columns - self.center) * self.weights)
        names = np.array([group_of(name) or name.partition("_")[0] for name in self.columns], dtype=str)
        parts = [terms[:, names == name].sum(1) for name in dict.fromkeys(names.tolist())]
        rows = np.column_stack([*parts, readings.log_odds - terms.sum(1)])
        rows[missing.all(1)] = np.nan
        return rows

    def _distances(self, readings: Readings) -> dict[str, np.ndarray]:
        """Compute the distance of every answer by view, in order of first appearance."""
        rows = self._views_of(readings)
        return {name: view.distances(*rows[name]) for name, view in self.views.items()}

    # --- files --------------------------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name."""
        own = {f"{name}.{key}": array for name, view in self.views.items() for key, array in view.arrays().items()}
        named = ("center", "weights", "reference", "order_rates", "residuals")
        single = {name: getattr(self, name).astype(np.float32) for name in ("profiles", "contents")}
        return {**own, **{name: getattr(self, name) for name in named}, **single}

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-able part, of which ``restore`` reads the arrays' names and sizes."""
        return {"columns": list(self.columns), "views": list(self.views), "level": self.level}

    @classmethod
    def restore(cls, manifest: dict[str, Any], arrays: Arrays, known: Iterable[str]) -> ShiftMonitor:
        """Restore and check what ``to_dict`` and ``arrays`` returned.

        Args:
            manifest: result of ``to_dict``.
            arrays: arrays of a file by name.
            known: columns of the detector's final classifier.

        Raises:
            ArtefactError: an array is missing, has another shape or type, or holds invalid numbers.
            ValueError: the manifest names other columns or views.
        """
        columns, names = tuple(manifest["columns"]), list(manifest["views"])
        if columns != tuple(known) or not names or not set(names) <= set(VIEWS):
            raise ValueError("the monitor should have views answer and picture, of columns that the detector reads")
        center, weights = (arrays.numbers(name, len(columns)) for name in ("center", "weights"))
        monitor = cls(columns, center, weights, {}, np.sort(arrays.numbers("reference", None)))
        nothing = Readings(
            pd.DataFrame(columns=["task", "sample_id", "group"]), np.zeros((0, len(columns))), np.zeros(0)
        )
        sizes = {"answer": monitor._parts(nothing).shape[1], "picture": PROFILE_LENGTH}
        rates, residuals = arrays.numbers("order_rates", MAX_ORDER), arrays.numbers("residuals", None)
        arrays.require(((rates > 0) & (rates < 1)).all(), "order_rates", "should lie between 0 and 1")
        return replace(
            monitor,
            views={name: View.restore(arrays.under(name), sizes[name]) for name in VIEWS if name in names},
            order_rates=rates,
            residuals=residuals,
            profiles=arrays.weights("profiles", None, PROFILE_LENGTH),
            contents=arrays.weights("contents", None, None),
        )


def _complete(rows: np.ndarray) -> np.ndarray:
    """Return the rows without a missing value, in single precision, as they are stored: equal values stay equal."""
    return rows[~np.isnan(rows).any(1)].astype(np.float32)


def _known(values: np.ndarray) -> np.ndarray:
    """Return the values that are not missing."""
    return values[~np.isnan(values)]


def _largest(distances: dict[str, np.ndarray]) -> np.ndarray:
    """Return the largest distance over the views, (answers,); a missing view does not count."""
    return np.nan_to_num(np.stack(list(distances.values())), nan=-1.0).max(0)
