"""What a run of one model on one task comes to: metrics with intervals, and the counts that belong beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stethoscope.core.text import console
from stethoscope.metrics.bootstrap import Interval, MetricRow

if TYPE_CHECKING:
    from rich.console import Console

COUNTS = ("samples", "ok", "unparsed", "failed", "truncated")


@dataclass(frozen=True)
class TaskResults:
    """Figures of one model on one task.

    Attributes:
        task: name of the task.
        primary: the metric that stands for it.
        metrics: every metric on every subset (``mean`` for the mean over subsets) with its interval over images.
        counts: ``samples`` and, of these, ``ok``, ``unparsed`` and ``failed``; ``truncated`` counts the answers among
            them that were cut off at the longest length allowed.
        subset_counts: ``samples``, ``ok``, ``unparsed`` and ``failed`` of every subset of the samples.
        seconds: time spent by stage, over all sittings of a resumed run. Not part of ``to_dict``: the same run gives
            the same ``metrics.json``.
    """

    task: str
    primary: str
    metrics: tuple[MetricRow, ...]
    counts: Mapping[str, int]
    subset_counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict, compare=False)

    @property
    def subsets(self) -> tuple[str, ...]:
        """Subsets in the order of the task, then ``mean`` if there is one."""
        return tuple(dict.fromkeys(row.subset for row in self.metrics))

    def value(self, metric: str | None = None, subset: str | None = None) -> float:
        """One figure; by default the primary metric, its mean over subsets or else its only subset.

        Raises:
            KeyError: there is no such figure.
        """
        return self.interval(metric, subset).value

    def interval(self, metric: str | None = None, subset: str | None = None) -> Interval:
        """One figure with its interval; arguments as in ``value``."""
        metric = metric or self.primary
        found = {row.subset: row.interval for row in self.metrics if row.metric == metric}
        if subset is None:
            subset = "mean" if "mean" in found else next(iter(found), None)
        if subset not in found:
            raise KeyError(f"{self.task} has no {metric} on subset {subset}")
        return found[subset]

    def flat(self) -> dict[str, float]:
        """All figures under one flat name each, ``task/subset/metric`` and ``task/count/...``, for loggers."""
        figures = {f"{self.task}/{row.subset}/{row.metric}": row.interval.value for row in self.metrics}
        return {**figures, **{f"{self.task}/count/{name}": float(count) for name, count in self.counts.items()}}

    def rows(self) -> tuple[list[str], list[list[Any]]]:
        """Column names and rows of the long table: a row for every metric and subset."""
        columns = ["metric", "subset", "value", "low", "high", "items", "groups"]
        return columns, [[row.to_dict()[name] for name in columns] for row in self.metrics]

    def to_dict(self) -> dict[str, Any]:
        """The section of ``metrics.json``."""
        return {
            "primary": self.primary,
            "counts": dict(self.counts),
            "subset_counts": {subset: dict(counts) for subset, counts in self.subset_counts.items()},
            "metrics": [row.to_dict() for row in self.metrics],
        }

    @classmethod
    def from_dict(cls, task: str, section: Mapping[str, Any]) -> TaskResults:
        """From a section of ``metrics.json``."""
        rows = tuple(
            MetricRow(row["metric"], row["subset"], Interval.from_dict({k: row[k] for k in _INTERVAL}))
            for row in section["metrics"]
        )
        return cls(task, section["primary"], rows, section["counts"], section.get("subset_counts", {}))

    def summary(self) -> str:
        """The counts as one line, to be printed beside every metric; and of every subset that lost some."""
        counts = [f"{self.counts[name]} {name}" for name in COUNTS[1:]]
        missing = [
            f"{subset} {' and '.join(f'{some[name]} {name}' for name in ('unparsed', 'failed') if some[name])} "
            f"of {some['samples']}"
            for subset, some in self.subset_counts.items()
            if len(self.subset_counts) > 1 and some["unparsed"] + some["failed"]
        ]
        return f"{self.counts['samples']} samples: {', '.join(counts[:3])}; {counts[3]}" + (
            f"; by subset: {', '.join(missing)}" if missing else ""
        )

    def table(self, markdown: bool = False) -> str:
        """Metrics down, subsets across, each figure with its 95 % interval; aligned text or Markdown."""
        header, body = self._cells()
        rows = [header, *body]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        if markdown:
            lines = [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *body]]
        return "\n".join([*lines, "", self.summary()] if markdown else [*lines, self.summary()])

    def print(self, output: Console | None = None) -> None:
        """Prints the table for people."""
        from rich.markup import escape
        from rich.table import Table

        header, body = self._cells()
        table = Table(*map(escape, header))
        for row in body:
            table.add_row(*map(escape, row), style="bold" if row[0] == self.primary else None)
        output = output or console()
        output.print(table)
        output.print(self.summary(), highlight=False, soft_wrap=True)

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        subsets = self.subsets
        found = {(row.metric, row.subset): str(row.interval) for row in self.metrics}
        names: Sequence[str] = list(dict.fromkeys(row.metric for row in self.metrics))
        return [self.task, *subsets], [[name, *(found.get((name, subset), "") for subset in subsets)] for name in names]


_INTERVAL = ("value", "low", "high", "items", "groups")
