"""Hold the results of one model on one task: metrics with intervals, and the counts beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stethoscope.evaluation.given_answers import describe
from stethoscope.metrics.bootstrap import Interval, MetricRow

COUNTS = ("samples", "ok", "unparsed", "failed", "truncated")
_INTERVAL = ("value", "low", "high", "items", "groups")


@dataclass(frozen=True)
class TaskResults:
    """Figures of one model on one task.

    Attributes:
        task: name of the task.
        primary: name of the main metric.
        metrics: every metric on every subset (``mean`` for the mean over subsets) with its interval over images.
        counts: ``samples`` and, of these, ``ok``, ``unparsed`` and ``failed``; ``truncated`` counts the answers among
            them that were cut off at the longest length allowed.
        subset_counts: ``samples``, ``ok``, ``unparsed`` and ``failed`` of every subset of the samples.
        notes: sentences on how the figures came about, see ``Task.notes``.
        answers: of answers that the model did not write itself, where they come from, how many are missing, how they
            were read, and the off-policy check; see ``given_answers.summarise``. Empty otherwise.
        seconds: time spent by stage, over all sessions of a resumed run. Not part of ``to_dict``: the same run gives
            the same ``metrics.json``.
    """

    task: str
    primary: str
    metrics: tuple[MetricRow, ...]
    counts: Mapping[str, int]
    subset_counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    answers: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict, compare=False)

    def __repr__(self) -> str:
        measured = any(row.metric == self.primary for row in self.metrics)
        figure = f"{self.primary} {self.interval()}" if measured else f"no {self.primary}"
        return f"TaskResults({self.task!r}, {figure}, {self.counts.get('samples', 0)} samples)"

    def __str__(self) -> str:
        """Write every figure with its interval on a line of its own, then the counts.

        ``stethoscope.report.metrics_tables.task_table`` makes a table of them.
        """
        figures = [f"{row.metric} ({row.subset}): {row.interval}" for row in self.metrics]
        return "\n".join([self.task, *figures, *self.notes, self.summary(), *describe(self.answers)])

    @property
    def subsets(self) -> tuple[str, ...]:
        """Subsets in the order of the task, then ``mean`` if there is one."""
        return tuple(dict.fromkeys(row.subset for row in self.metrics))

    def value(self, metric: str | None = None, subset: str | None = None) -> float:
        """Return one figure; by default the primary metric, its mean over subsets or else its only subset.

        Raises:
            KeyError: there is no such figure.
        """
        return self.interval(metric, subset).value

    def interval(self, metric: str | None = None, subset: str | None = None) -> Interval:
        """Return one figure with its interval; arguments as in ``value``."""
        metric = metric or self.primary
        intervals = {row.subset: row.interval for row in self.metrics if row.metric == metric}
        if subset is None:
            subset = "mean" if "mean" in intervals else next(iter(intervals), None)
        if subset not in intervals:
            raise KeyError(f"{self.task} has no {metric} on subset {subset}")
        return intervals[subset]

    def flat(self) -> dict[str, float]:
        """Return all figures under one flat name each, for loggers.

        They are ``task/subset/metric``, ``task/count/...``, ``task/answers/...`` and, to sort runs by, the main one as
        ``task/metric``.
        """
        figures = {f"{self.task}/{row.subset}/{row.metric}": row.interval.value for row in self.metrics}
        if any(row.metric == self.primary for row in self.metrics):
            figures[f"{self.task}/{self.primary}"] = self.value()
        figures |= {f"{self.task}/count/{name}": float(count) for name, count in self.counts.items()}
        numbers = {**self.answers, **self.answers.get("check", {})}
        figures |= {
            f"{self.task}/answers/{name}": float(value)
            for name, value in numbers.items()
            if isinstance(value, (int, float)) and name != "token_ids"
        }
        return figures

    def rows(self) -> tuple[list[str], list[list[Any]]]:
        """Return column names and rows of the long table, a row for every metric and subset."""
        columns = ["metric", "subset", *_INTERVAL]
        return columns, [[figures[name] for name in columns] for figures in (row.to_dict() for row in self.metrics)]

    def to_dict(self) -> dict[str, Any]:
        """Return the section of ``metrics.json``."""
        return {
            "primary": self.primary,
            "counts": dict(self.counts),
            "subset_counts": {subset: dict(counts) for subset, counts in self.subset_counts.items()},
            "notes": list(self.notes),
            "metrics": [row.to_dict() for row in self.metrics],
            **({"answers": dict(self.answers)} if self.answers else {}),
        }

    @classmethod
    def from_dict(cls, task: str, section: Mapping[str, Any]) -> TaskResults:
        """Read a section of ``metrics.json``."""
        rows = tuple(
            MetricRow(row["metric"], row["subset"], Interval.from_dict({k: row[k] for k in _INTERVAL}))
            for row in section["metrics"]
        )
        return cls(
            task,
            section["primary"],
            rows,
            section["counts"],
            section.get("subset_counts", {}),
            tuple(section.get("notes", ())),
            section.get("answers", {}),
        )

    def summary(self) -> str:
        """Format the counts as one line, with those of every subset that lost samples."""
        counts = [f"{self.counts[name]} {name}" for name in COUNTS[1:]]
        missing = [
            f"{subset} {' and '.join(f'{lost[name]} {name}' for name in ('unparsed', 'failed') if lost[name])} "
            f"of {lost['samples']}"
            for subset, lost in self.subset_counts.items()
            if len(self.subset_counts) > 1 and lost["unparsed"] + lost["failed"]
        ]
        return f"{self.counts['samples']} samples: {', '.join(counts[:3])}; {counts[3]}" + (
            f"; by subset: {', '.join(missing)}" if missing else ""
        )
