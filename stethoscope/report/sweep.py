"""The jobs of a sweep in one table: what each was, its figures with intervals, and what it is above the first."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.core.digests import jsonable
from stethoscope.core.errors import StethoscopeError
from stethoscope.core.files import atomic_write, write_json
from stethoscope.evaluation.results import TaskResults
from stethoscope.metrics.bootstrap import Interval
from stethoscope.report.figures import AT_WORK, RANKING, interval, primary
from stethoscope.report.source import Source
from stethoscope.report.tables import Cell, Gap, Table, markdown, plain
from stethoscope.report.versus import TaskOf, detector_table, require_same, task_table
from stethoscope.storage.run_dir import RunStore
from stethoscope.storage.sweep_jobs import FINISHED, Job

if TYPE_CHECKING:
    from rich.console import Console

    from stethoscope.tasks.base import Task

TITLES = {**RANKING, **AT_WORK}
TESTED = ("auroc", "auroc_controlled")
SHOWN = {"AUROC", "position-controlled", "ECE"}  # of a detector's figures, in the table; the files have all


@dataclass
class Result:
    """What a job came to.

    Attributes:
        job: itself.
        figures: by name: those of tasks (``chair chair_i``) and those of the detector (``AUROC``).
        gaps: by name, what it is above the first job, paired over images.
        remark: why there are no gaps, if the reason is worth telling.
        shared: its answers are those of the first job, as where detectors are trained on one run.
    """

    job: Job
    figures: dict[str, Interval] = field(default_factory=dict)
    gaps: dict[str, Gap] = field(default_factory=dict)
    remark: str = ""
    shared: bool = False

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "job": self.job.index,
            "settings": self.job.settings,
            "status": self.job.status,
            "error": self.job.error,
            "run": self.job.folder,
            "seconds": self.job.seconds,
            "figures": {name: found.to_dict() for name, found in self.figures.items()},
            "above_first": {name: {**gap.interval.to_dict(), "p": gap.p} for name, gap in self.gaps.items()},
        }


@dataclass(frozen=True)
class Comparison:
    """All jobs of a sweep.

    Attributes:
        results: in the order of the jobs; the first that has figures is what the others are compared with.
    """

    results: tuple[Result, ...]

    @property
    def keys(self) -> list[str]:
        """The settings that differ between jobs; all of them where there is one job."""
        known = list(dict.fromkeys(key for result in self.results for key in result.job.settings))
        values = {key: {result.job.settings.get(key) for result in self.results} for key in known}
        return [key for key in known if len(values[key]) > 1 or len(self.results) == 1]

    @property
    def table(self) -> Table:
        """A row for every job, with its figures and, at the end, how it ended."""
        names = [name for name in _names(self.results, "figures") if self._is_shown(name)]
        tested = _names(self.results, "gaps")
        columns, rows = ["job", *self.keys], []
        for name in names:
            columns += [name, *(["− first"] if name in tested else [])]
        for result in self.results:
            cells: list[Cell] = [result.job.index, *(result.job.settings.get(key) for key in self.keys)]
            for name in names:
                cells += [result.figures.get(name), *([result.gaps.get(name)] if name in tested else [])]
            rows.append((*cells, result.job.status))
        note = "95 % intervals over images."
        note += " − first: paired over the same resampled images; p is two-sided and not corrected." if tested else ""
        return Table("sweep", (*columns, "status"), tuple(rows), note)

    def _is_shown(self, name: str) -> bool:
        """Not all of a detector's figures, and no figure of a task whose answers all jobs share."""
        if name in TITLES.values():
            return name in SHOWN
        found = [result for result in self.results if result.figures]
        return len(found) == 1 or not all(result.shared for result in found[1:])

    def problems(self) -> Iterator[str]:
        """A line for every job that failed, and for every one that could not be compared."""
        for result in self.results:
            job = result.job
            if job.status != FINISHED:
                yield f"job {job.index} ({job.title}) {job.status}: {job.error or 'it left no word; see its log'}"
            if result.remark:
                yield f"job {job.index} ({job.title}) is not compared with the first: {result.remark}"

    def print(self, console: Console) -> None:
        """Prints the table for people, and the jobs that failed."""
        from rich.table import Table as Grid

        found = self.table
        grid = Grid(*found.columns, title="sweep", title_justify="left", caption=found.note, caption_justify="left")
        for row in found.rows:
            grid.add_row(*(re.sub(r"(?<!\d)0\.", ".", plain(cell)) for cell in row))
        console.print(grid, markup=False)
        for line in self.problems():
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def write(self, folder: Path, name: str) -> None:
        """Writes ``sweep.md``, ``sweep.csv`` and ``sweep.json``; each appears whole or not at all."""
        problems = "".join(f"- {line}\n" for line in self.problems())
        runs = "".join(f"- job {one.job.index}: `{one.job.folder}`\n" for one in self.results if one.job.folder)
        parts = [f"# {name}", markdown(self.table)]
        parts += [f"## Jobs to look at\n\n{problems}"] if problems else []
        parts += [f"## Runs\n\n{runs}"]
        atomic_write(folder / "sweep.md", "\n".join(part.rstrip() + "\n" for part in parts))
        write_json(folder / "sweep.json", jsonable([result.to_dict() for result in self.results]))
        columns, rows = self.long()
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])
        atomic_write(folder / "sweep.csv", file.getvalue())

    def long(self) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows of a table with a row for every job and figure; a job without figures has one row."""
        own = ["metric", "value", "low", "high", "above_first", "above_first_low", "above_first_high", "p"]
        columns, rows = ["job", *self.keys, "status", "error", "run", *own], []
        for result in self.results:
            job = result.job
            head = [job.index, *(job.settings.get(key) for key in self.keys), job.status, job.error, job.folder]
            for name, found in result.figures.items() or [(None, None)]:
                gap = result.gaps.get(name)
                above = (gap.interval.value, gap.interval.low, gap.interval.high, gap.p) if gap else (None,) * 4
                rows.append([*head, name, *((found.value, found.low, found.high) if found else (None,) * 3), *above])
        return columns, rows


def _names(results: Sequence[Result], what: str) -> list[str]:
    return list(dict.fromkeys(name for result in results for name in getattr(result, what)))


def comparison(jobs: Sequence[Job], task_of: TaskOf) -> Comparison:
    """Reads the figures of all jobs from their run directories and compares each with the first that has any.

    Args:
        jobs: of one sweep.
        task_of: makes the task of a run again, for its metrics.
    """
    results, first = [], None
    for job in jobs:
        source = _source(job)
        result = Result(job, _figures(source) if source else {})
        results.append(result)
        if source is None or not result.figures:
            continue
        if first is None:
            first = source
        else:
            result.shared = _same_answers(first, source)
            result.gaps, result.remark = _gaps(first, source, result.shared, task_of)
    return Comparison(tuple(results))


def _source(job: Job) -> Source | None:
    """The run of a job; None where there is none. A run that failed has the figures of what it had finished."""
    folder = Path(job.folder)
    if not job.folder or not (folder / "metrics.json").is_file():
        return None
    store = RunStore(folder)
    figures = store.metrics()
    tasks = tuple(TaskResults.from_dict(task, figures[task]) for task in store.fingerprints() if task in figures)
    return Source(folder, store, tasks, figures.get("detector", {}))


def _figures(source: Source) -> dict[str, Interval]:
    found = {f"{result.task} {result.primary}": primary(result) for result in source.results}
    rows = source.detector["leaderboard"]["rows"] if source.detector else []
    metrics: Mapping[str, Any] = next((row["metrics"] for row in rows if row["kind"] == "detector"), {})
    found |= {title: interval(metrics.get(name)) for name, title in TITLES.items()}
    return {name: figure for name, figure in found.items() if figure is not None}


def _gaps(first: Source, other: Source, shared: bool, task_of: TaskOf) -> tuple[dict[str, Gap], str]:
    """What a run is above the first, where they were asked the same; else why there is nothing."""
    gaps: dict[str, Gap] = {}
    try:
        if not shared:
            require_same(first, other, swept=True)
            for result in other.results:
                if result.task in {one.task for one in first.results}:
                    gaps[f"{result.task} {result.primary}"] = _task_gap(first, other, task_of(first, result.task))
        if first.detector and other.detector and first.task == other.task:
            titles = {TITLES[metric] for metric in TESTED}
            rows = detector_table(first, other, ("first", "other")).rows
            gaps |= {str(row[0]): row[-1] for row in rows if row[0] in titles}
    except StethoscopeError as error:
        return gaps, str(error)
    return gaps, ""


def _task_gap(first: Source, other: Source, task: Task) -> Cell:
    """The difference of a task's primary metric, in the mean over its subsets or else its only one."""
    rows = [row for row in task_table(first, other, task, ("first", "other")).rows if row[0] == task.primary]
    return next((row for row in rows if row[1] == "mean"), rows[0])[-1]


def _same_answers(first: Source, other: Source) -> bool:
    """Whether two runs share their answers, as those do that train detectors on one run: their tasks cannot differ."""
    mine, theirs = (
        {task: {**found, "features": None} for task, found in one.store.fingerprints().items()}
        for one in (first, other)
    )
    return mine == theirs
