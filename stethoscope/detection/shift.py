"""Monitor whether pictures and answers are like those that a detector was calibrated on.

A promise ("5 % false alarms", "30 % means 30 %") holds for pictures like those of the calibration fold. The monitor has
three views of an answer, none of which needs a label or a pass of the model:

- ``answer``: the plain columns that the detector reads, of every mention (mean over the answer's mentions);
- ``picture``: the profile of the picture's pixels (``core.images.picture_profile``), where the table has it;
- ``scores``, of whole runs only: the classifier's score of a mention less the mean score of mentions with as many
  others before them. If it moves, the share of hallucinations has changed, and with it what a percentage means.

In the first two the distance is a regularised Mahalanobis distance to the training fold (Lee et al. 2018, arXiv
1807.03888, without classes; Hotelling's T2 plus the residual of further components in process control). It is high for
answers unlike those of training, and stays low where only the mixture changes: a shorter answer has other means, but
mentions like those of a longer one. The probabilities of a detector rest on the second.

A picture's p-value is the rank of its distance among pictures of the calibration fold, from which nothing of the
distance was learned: under exchangeability the chance of a p-value of at most ``level`` is at most ``level`` (split
conformal prediction, Vovk et al. 2005; Bates et al. 2023, arXiv 2104.08279). A run is tested as a whole, pictures as
units: distances of its answers against those of held-out ones (Mann and Whitney 1947, one-sided), every column of its
pictures' profiles against theirs (two-sided, Bonferroni over columns), and scores against theirs (two-sided), with
Bonferroni over the views. So weak shifts of all pictures are seen too, such as noise, of which no single picture is out
of the range.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import mannwhitneyu

from stethoscope.core.errors import DataError
from stethoscope.core.images import LENGTH, read_profiles
from stethoscope.core.token_table import feature_matrix
from stethoscope.detection.artifact import Arrays

PICTURE_LEVEL, RUN_LEVEL = 0.01, 0.05
"""False-alarm rates: of a single picture (if the calibration fold has 99 or more), and of a whole run."""
FEWEST = 20
"""Pictures that the training and the calibration fold need, each, for a monitor."""
MAX_COMPONENTS = 64
SHRINKAGE = 0.05  # of the correlation matrix towards the identity
MAX_DEVIATION = 10.0  # standard deviations at which a column is cut off, so that none decides alone
VIEWS = ("answer", "picture")
CHANGED = {"picture": "the pictures", "answer": "the answers", "scores": "the share of hallucinations"}
"""What has changed, by the view that shows it."""
MAX_ORDER = 6
"""Mentions of an answer whose mean scores are known one by one; later ones share the last."""


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
        profiles: (n, columns) rows of held-out pictures, of the view ``picture``; else (0, columns).
    """

    mean: np.ndarray
    inverse_scale: np.ndarray
    components: np.ndarray
    weights: np.ndarray
    rest: float
    per_unit: float
    reference: np.ndarray
    profiles: np.ndarray

    @classmethod
    def fit(cls, rows: np.ndarray, owners: np.ndarray) -> View:
        """Learn a distance, still without reference.

        Args:
            rows: (rows, columns), NaN where a value is missing.
            owners: (rows,) answer of every row.
        """
        known = ~np.isnan(rows)
        count = np.maximum(known.sum(0), 1)
        mean = np.where(known, rows, 0).sum(0) / count
        scale = np.sqrt((np.where(known, rows - mean, 0) ** 2).sum(0) / count)
        varies = scale > 1e-9 * (1 + np.abs(mean))
        inverse_scale = np.where(varies, 1 / np.where(varies, scale, 1), 0)
        none = np.zeros((0, len(mean)))
        view = cls(mean, inverse_scale, none, np.zeros(0), 1.0, 1.0, np.zeros(0), none)
        standard = view._standardised(rows)
        correlation = (1 - SHRINKAGE) * standard.T @ standard / len(rows) + SHRINKAGE * np.eye(len(mean))
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
            arrays.numbers("profiles", None, columns),
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name."""
        return {**vars(self), "rest": np.array(self.rest), "per_unit": np.array(self.per_unit)}


@dataclass(frozen=True)
class RunShift:
    """The comparison of a run with the pictures that a detector was calibrated on.

    Attributes:
        pictures: number of compared pictures.
        unlike: number of pictures that are flagged one by one.
        level: chance that a picture like those of the calibration fold is flagged.
        p: p-value of the whole run.
        view: the view that gives it, ``answer``, ``picture`` or ``scores``.
    """

    pictures: int
    unlike: int
    level: float
    p: float
    view: str

    @property
    def shifted(self) -> bool:
        """Whether the run is unlike the calibration fold, at a false-alarm rate of ``RUN_LEVEL``."""
        return self.p <= RUN_LEVEL

    @property
    def sentence(self) -> str:
        """One sentence for terminal, page and report."""
        seen = (
            f"{self.unlike} of {self.pictures} pictures are unlike those that the detector was calibrated on, "
            f"{self.level:.1%} expected; p {_shown_p(self.p)}"
        )
        if not self.shifted:
            return f"no shift seen ({seen})"
        return (
            f"shift in {CHANGED[self.view]} ({seen}): no probability is calibrated here and no guarantee of the "
            "threshold holds; `stethoscope train run=... recalibrate=...` mends that with a few labelled pictures"
        )

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-able dictionary."""
        return {**vars(self), "shifted": self.shifted, "sentence": self.sentence}


def _shown_p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def describe_picture_shift(view: str, p: float, count: int) -> str:
    """Say in one sentence that a picture or its answer is unlike those of the calibration fold.

    Args:
        view: the view that shows it, ``answer`` or ``picture``.
        p: p-value of the picture.
        count: number of held-out pictures that it was compared with.

    >>> describe_picture_shift("picture", 0.005, 200)
    'This picture is unlike the 200 that the detector was calibrated on (p = 0.005): no percentage here is calibrated.'
    """
    return (
        f"This {view} is unlike the {count} that the detector was calibrated on (p {_shown_p(p)}): "
        "no percentage here is calibrated."
    )


@dataclass(frozen=True)
class ShiftMonitor:
    """The monitor of a detector.

    Attributes:
        columns: names of the plain columns of the view ``answer``.
        views: views by name.
        reference: (n,) largest distance over the views, of held-out pictures, sorted.
        order_scores: (``MAX_ORDER``,) mean scores of the first, second, ... mention of held-out pictures.
        scores: (n,) mean scores of held-out pictures, less those; (0,) where they are not known.
    """

    columns: tuple[str, ...]
    views: dict[str, View]
    reference: np.ndarray
    order_scores: np.ndarray = field(default_factory=lambda: np.zeros(MAX_ORDER))
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @classmethod
    def fit(
        cls,
        columns: Iterable[str],
        train: pd.DataFrame,
        calibration: pd.DataFrame | None = None,
        scores: np.ndarray | None = None,
    ) -> ShiftMonitor | None:
        """Fit on the mentions of a detector's folds; None where they have too few pictures.

        Args:
            columns: names of plain columns that the detector reads.
            train: mentions to learn the distance from.
            calibration: mentions of other images, the reference of p-values; without it every second image of
                ``train`` is kept for that.
            scores: (mentions,) the classifier's scores of ``calibration``; without them ``scores`` is no view.
        """
        if not {"task", "sample_id", "group"} <= set(train.columns):
            return None
        if calibration is None:
            scores = None  # of a training image they are no measure
            images = train["group"].unique()
            held_out = train["group"].isin(set(images[1::2]))
            train, calibration = train[~held_out], train[held_out]
        if train["group"].nunique() < FEWEST:
            return None
        monitor = cls(tuple(columns), {}, np.zeros(0))
        views = {
            name: View.fit(rows, owners)
            for name, (rows, owners) in monitor._views_of(train, _owners(train)).items()
            if not np.isnan(rows).all() and rows.shape[1]
        }
        return replace(monitor, views=views).with_reference(calibration, scores) if views else None

    def with_reference(self, mentions: pd.DataFrame, scores: np.ndarray | None = None) -> ShiftMonitor | None:
        """Return the monitor with other pictures as reference: the first answer to each that names something.

        None where they are fewer than ``FEWEST``: of n pictures the rank of another is below 1 / n by chance alone.
        """
        if mentions["group"].nunique() < FEWEST:
            return None
        first = _first_answers(mentions)
        mentions, scores = mentions[first], None if scores is None else scores[first]
        rows, distances, views = self._views_of(mentions, _owners(mentions)), self._distances(mentions), {}
        for name, view in self.views.items():
            profiles = rows[name][0] if name == "picture" else np.zeros((0, len(view.mean)))
            profiles = profiles[~np.isnan(profiles).any(1)]
            views[name] = replace(view, reference=np.sort(_known(distances[name])), profiles=profiles)
        monitor = replace(self, views=views, reference=np.sort(_largest(distances)), scores=np.zeros(0))
        if scores is None:
            return monitor
        order = _order(mentions)
        known = [scores[order == index] for index in range(MAX_ORDER)]
        means = np.array([part.mean() if len(part) else scores.mean() for part in known])
        monitor = replace(monitor, order_scores=means)
        return replace(monitor, scores=np.sort(monitor._mean_scores(mentions, scores)))

    def _mean_scores(self, mentions: pd.DataFrame, scores: np.ndarray) -> np.ndarray:
        """Compute the mean score of every answer, less the mean scores of mentions of the same order."""
        owners, residuals = _owners(mentions), scores - self.order_scores[_order(mentions)]
        return np.bincount(owners, residuals) / np.bincount(owners)

    def _views_of(self, mentions: pd.DataFrame, owners: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return the rows of every view and the answer of each row."""
        first = np.unique(owners, return_index=True)[1]
        texts = mentions["picture"].to_numpy()[first] if "picture" in mentions else np.full(len(first), "")
        pictures = read_profiles(list(texts)), np.arange(len(first))
        return {"answer": (feature_matrix(mentions, self.columns), owners), "picture": pictures}

    def _distances(self, mentions: pd.DataFrame) -> dict[str, np.ndarray]:
        """Compute the distance of every answer by view, in order of first appearance."""
        views = self._views_of(mentions, _owners(mentions))
        return {name: view.distances(*views[name]) for name, view in self.views.items()}

    @property
    def level(self) -> float:
        """Chance that a picture like those of the calibration fold is flagged: 0.01, or 1 / (n + 1) for n < 99."""
        return max(PICTURE_LEVEL, 1 / (len(self.reference) + 1))

    def pictures(self, mentions: pd.DataFrame) -> pd.DataFrame:
        """Compare single answers with the calibration fold.

        Args:
            mentions: mentions of a token table.

        Returns:
            A row per answer with a mention: ``task``, ``sample_id``, ``group``, ``view`` (of the largest distance),
            ``p`` in (0, 1], and ``unlike``, whether p is at most ``level``.
        """
        keys = ["task", "sample_id"]
        rows = mentions.drop_duplicates(keys)[[*keys, "group"]].reset_index(drop=True)
        distances = self._distances(mentions)
        names = np.array(list(distances))
        stacked = np.nan_to_num(np.stack(list(distances.values())), nan=-np.inf)
        rows["view"] = names[stacked.argmax(0)]
        rows["p"] = rank_p_values(self.reference, _largest(distances))
        rows["unlike"] = rows["p"] <= self.level + 1e-12
        return rows

    def sentence(self, mentions: pd.DataFrame) -> str:
        """Say in one sentence that an answer is unlike the calibration fold; empty if it is like it, or names nothing.

        Args:
            mentions: mentions of one answer.
        """
        if not len(mentions):
            return ""
        row = self.pictures(mentions).iloc[0]
        return describe_picture_shift(row["view"], float(row["p"]), len(self.reference)) if row["unlike"] else ""

    def run(self, mentions: pd.DataFrame, scores: np.ndarray | None = None) -> RunShift | None:
        """Compare a whole run with the calibration fold; None where it has no mention.

        Args:
            mentions: mentions of a token table; of several answers to an image the first counts.
            scores: (mentions,) the classifier's scores.
        """
        if not len(mentions):
            return None
        first = _first_answers(mentions)
        mentions, scores = mentions[first], None if scores is None else scores[first]
        single, p_values = self.pictures(mentions), self._run_p_values(mentions, scores)
        if not p_values:
            return None
        view = min(p_values, key=lambda name: p_values[name])
        p = min(1.0, len(p_values) * p_values[view])
        return RunShift(len(single), int(single["unlike"].sum()), self.level, p, view)

    def check_share_alone(self, mentions: pd.DataFrame, scores: np.ndarray) -> None:
        """Refuse a run in which the share of hallucinations is not what has changed most.

        Args:
            mentions: mentions of a token table.
            scores: (mentions,) the classifier's scores.

        Raises:
            DataError: no shift is seen, or more of one in answers or pictures than in scores, after which a score need
                not mean what it meant. Nothing is refused if the scores of held-out pictures are not known.
        """
        shift = self.run(mentions, scores) if len(self.scores) else None
        if shift is None or (shift.shifted and shift.view == "scores"):
            return
        seen = f"above all {CHANGED[shift.view]} have changed" if shift.shifted else "no shift is seen"
        raise DataError(
            f"{seen} (p {_shown_p(shift.p)}), and recalibration without labels mends nothing but a changed share of "
            "hallucinations; give some labelled pictures (labels=50), or keep the detector"
        )

    def _run_p_values(self, mentions: pd.DataFrame, scores: np.ndarray | None) -> dict[str, float]:
        """Test all answers together against the held-out ones, by view."""
        rows, distances, p_values = self._views_of(mentions, _owners(mentions)), self._distances(mentions), {}
        if "answer" in self.views:
            known, held_out = _known(distances["answer"]), self.views["answer"].reference
            if len(known) and len(held_out):
                p_values["answer"] = float(mannwhitneyu(known, held_out, alternative="greater").pvalue)
        if "picture" in self.views:
            profiles, held_out = rows["picture"][0], self.views["picture"].profiles
            profiles = profiles[~np.isnan(profiles).any(1)]
            if len(profiles) and len(held_out):
                tests = mannwhitneyu(profiles, held_out, axis=0).pvalue
                p_values["picture"] = float(min(1.0, len(tests) * np.nanmin(tests)))
        if scores is not None and len(self.scores):
            p_values["scores"] = float(mannwhitneyu(self._mean_scores(mentions, scores), self.scores).pvalue)
        return p_values

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name."""
        own = {f"{name}.{key}": array for name, view in self.views.items() for key, array in view.arrays().items()}
        return {**own, "reference": self.reference, "order_scores": self.order_scores, "scores": self.scores}

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-able part, of which ``restore`` reads the arrays' names and sizes."""
        return {"columns": list(self.columns), "views": list(self.views), "level": self.level}

    @classmethod
    def restore(cls, manifest: dict[str, Any], arrays: Arrays, known: Iterable[str]) -> ShiftMonitor:
        """Restore and check what ``to_dict`` and ``arrays`` returned.

        Args:
            manifest: result of ``to_dict``.
            arrays: arrays of a file by name.
            known: the detector's columns.

        Raises:
            ArtefactError: an array is missing, has another shape or type, or holds invalid numbers.
            ValueError: the manifest names other columns or views.
        """
        columns, names = tuple(manifest["columns"]), list(manifest["views"])
        if not set(columns) <= set(known) or not names or not set(names) <= set(VIEWS):
            raise ValueError("the monitor should have views answer and picture, of columns that the detector reads")
        sizes = {"answer": len(columns), "picture": LENGTH}
        views = {name: View.restore(arrays.under(name), sizes[name]) for name in VIEWS if name in names}
        reference, scores = (np.sort(arrays.numbers(name, None)) for name in ("reference", "scores"))
        return cls(columns, views, reference, arrays.numbers("order_scores", MAX_ORDER), scores)


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


def _owners(mentions: pd.DataFrame) -> np.ndarray:
    """Return the index of every row's answer, (rows,) int, in order of first appearance."""
    return mentions.groupby(["task", "sample_id"], sort=False).ngroup().to_numpy()


def _order(mentions: pd.DataFrame) -> np.ndarray:
    """Count the mentions of the same answer before each, (rows,) int, at most ``MAX_ORDER`` - 1."""
    return np.minimum(mentions.groupby(["task", "sample_id"], sort=False).cumcount().to_numpy(), MAX_ORDER - 1)


def _first_answers(mentions: pd.DataFrame) -> np.ndarray:
    """Mark the mentions of the first answer to every image, (rows,) bool, so that pictures are independent."""
    owners = pd.Series(_owners(mentions), index=mentions.index)
    return (owners == owners.groupby(mentions["group"]).transform("min")).to_numpy()


def _known(values: np.ndarray) -> np.ndarray:
    """Return the values that are not missing."""
    return values[~np.isnan(values)]


def _largest(distances: dict[str, np.ndarray]) -> np.ndarray:
    """Return the largest distance over the views, (answers,); a missing view does not count."""
    return np.nan_to_num(np.stack(list(distances.values())), nan=-1.0).max(0)
