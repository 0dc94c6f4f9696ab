"""Hold the results of training a detector: leaderboard, threshold, ablation and transfer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from stethoscope.detection.score_metrics import METRICS
from stethoscope.metrics.bootstrap import Interval, Resamples


@dataclass(frozen=True)
class LeaderboardRow:
    """One line of the leaderboard.

    Attributes:
        name: of the detector, the baseline or the feature.
        kind: ``detector``, ``published``, ``baseline`` or ``feature``.
        sign: 1, or -1 for a feature of which low values mean hallucinated (on the training fold).
        metrics: intervals by name, of ``METRICS``.
        cost: most expensive cost class of the features that it reads; empty for baselines.
        note: of a published detector, how its score was computed.
    """

    name: str
    kind: str
    sign: int
    metrics: Mapping[str, Interval]
    cost: str = ""
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-able dictionary."""
        metrics = {name: interval.to_dict() for name, interval in self.metrics.items()}
        labels = {"name": self.name, "kind": self.kind, "sign": self.sign, "cost": self.cost, "note": self.note}
        return {**labels, "metrics": metrics}

    @classmethod
    def from_dict(cls, section: Mapping[str, Any]) -> LeaderboardRow:
        """Rebuild a row from the result of ``to_dict``."""
        metrics = {name: read_interval(interval) for name, interval in section["metrics"].items()}
        optional = {key: section[key] for key in ("sign", "cost", "note") if key in section}
        return cls(**{"name": section["name"], "kind": section["kind"], "sign": 1, "metrics": metrics, **optional})


@dataclass(frozen=True)
class Difference:
    """By how much a detector is ahead of another row, paired on the same mentions and resampled images.

    Attributes:
        detector, other: names of rows.
        metric: of ``AREAS``.
        interval: of the difference; above 0 the detector is better.
        p: two-sided bootstrap p-value, not corrected for the number of differences.
    """

    detector: str
    other: str
    metric: str
    interval: Interval
    p: float

    @classmethod
    def of(cls, detector: str, other: str, metric: str, replicates: np.ndarray, resamples: Resamples) -> Difference:
        """Compute the interval and the p-value from the (replicates,) differences."""
        return cls(detector, other, metric, resamples.interval(replicates), resamples.p_value(replicates))

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-able dictionary."""
        names = {"detector": self.detector, "other": self.other, "metric": self.metric}
        return {**names, **self.interval.to_dict(), "p": None if np.isnan(self.p) else self.p}

    @classmethod
    def from_dict(cls, section: Mapping[str, Any]) -> Difference:
        """Rebuild a difference from the result of ``to_dict``; other keys are ignored."""
        p = float("nan") if section["p"] is None else section["p"]
        return cls(section["detector"], section["other"], section["metric"], read_interval(section), p)


@dataclass(frozen=True)
class Leaderboard:
    """Detectors, baselines and single features, measured on the test fold.

    Attributes:
        rows: detectors, published ones, baselines, then features by falling AUROC on the training fold.
        differences: every detector against the best single feature, the best published detector of one pass,
            self-verification, position only, the text prior and the detectors after it.
        best_features: for every metric of ``AREAS`` the feature that was best on the training fold.
        best_published: for every metric of ``AREAS`` the published detector of the same forward pass that is best on
            the test fold itself: the hardest to beat, chosen with hindsight.
        controls: the data of the controlled AUROCs by metric: ``pairs`` that are compared, ``items`` (mentions) in
            one of them, and their ``share``.
        skipped: features without any value in the training fold.
        constant: features with one value in the whole training fold, of which nothing can be learned.
        left_out: published detectors of the same forward pass that were not measured, for lack of their features.
    """

    rows: tuple[LeaderboardRow, ...]
    differences: tuple[Difference, ...]
    best_features: Mapping[str, str]
    controls: Mapping[str, Mapping[str, float]]
    skipped: tuple[str, ...] = ()
    constant: tuple[str, ...] = ()
    best_published: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def row(self, name: str) -> LeaderboardRow:
        """Return the row of that name."""
        return next(row for row in self.rows if row.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-able dictionary."""
        return {
            "rows": [row.to_dict() for row in self.rows],
            "differences": [difference.to_dict() for difference in self.differences],
            "best_features": dict(self.best_features),
            "best_published": dict(self.best_published),
            "controls": {metric: dict(control) for metric, control in self.controls.items()},
            "skipped_features": list(self.skipped),
            "constant_features": list(self.constant),
            "left_out": list(self.left_out),
            "columns": METRICS,
        }

    @classmethod
    def from_dict(cls, section: Mapping[str, Any]) -> Leaderboard:
        """Rebuild a leaderboard from the result of ``to_dict``."""
        return cls(
            rows=tuple(map(LeaderboardRow.from_dict, section["rows"])),
            differences=tuple(map(Difference.from_dict, section["differences"])),
            best_features=section["best_features"],
            controls=section["controls"],
            skipped=tuple(section.get("skipped_features", ())),
            constant=tuple(section.get("constant_features", ())),
            best_published=section.get("best_published", {}),
            left_out=tuple(section.get("left_out", ())),
        )


class Ablation(NamedTuple):
    """By how much the detector is ahead of itself refitted without a feature group.

    Attributes:
        group: of features.
        columns: number of its columns.
        difference: ``other`` is ``without <group>``; above 0 the group helps.
    """

    group: str
    columns: int
    difference: Difference


@dataclass(frozen=True)
class DetectorResults:
    """The detector's section of ``metrics.json``.

    Attributes:
        split: sizes of the folds, and which mentions count.
        leaderboard: of the detector and everything it is compared with.
        reliability: points of the reliability diagram on the test fold.
        threshold: how the threshold was chosen, and intervals of its precision, recall and error rates.
        ablations: one for every feature group and metric; None if they were not computed.
        transfer: rows of ``stethoscope.detection.transfer.transfer``; None if they were not computed.
    """

    split: Mapping[str, Any]
    leaderboard: Leaderboard
    reliability: Sequence[Mapping[str, Any]]
    threshold: Mapping[str, Any]
    ablations: tuple[Ablation, ...] | None = None
    transfer: Sequence[Mapping[str, Any]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-able dictionary."""
        section: dict[str, Any] = {
            "split": self.split,
            "leaderboard": self.leaderboard.to_dict(),
            "reliability": self.reliability,
            "threshold": self.threshold,
        }
        if self.ablations is not None:
            section["ablation"] = [
                {**ablation.difference.to_dict(), "columns": ablation.columns} for ablation in self.ablations
            ]
        if self.transfer is not None:
            section["transfer"] = self.transfer
        return section

    @classmethod
    def from_dict(cls, section: Mapping[str, Any]) -> DetectorResults:
        """Rebuild results from the section of ``metrics.json``."""
        ablations = None
        if "ablation" in section:
            differences = [(Difference.from_dict(row), int(row["columns"])) for row in section["ablation"]]
            ablations = tuple(
                Ablation(difference.other.removeprefix("without "), columns, difference)
                for difference, columns in differences
            )
        return cls(
            split=section["split"],
            leaderboard=Leaderboard.from_dict(section["leaderboard"]),
            reliability=section["reliability"],
            threshold=section["threshold"],
            ablations=ablations,
            transfer=section.get("transfer"),
        )

    @property
    def detector(self) -> LeaderboardRow:
        """Return the leaderboard's first row: that of the run's own detector."""
        return self.leaderboard.rows[0]

    @property
    def first_mentions_only(self) -> bool:
        """Tell whether only the first mention of an object in an answer counts."""
        return self.split["mentions"]["repeats"] == "first"


def read_interval(section: Mapping[str, Any]) -> Interval:
    """Read the interval of a section of JSON, which may have other keys too."""
    return Interval.from_dict({key: section[key] for key in ("value", "low", "high", "items", "groups")})
