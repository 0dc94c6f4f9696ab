"""List the jobs of a sweep in one table: settings, figures with intervals, and differences from the first job."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.core.errors import StethoscopeError
from stethoscope.core.files import atomic_write, write_json
from stethoscope.evaluation.results import TaskResults
from stethoscope.metrics.bootstrap import Interval
from stethoscope.report.compare import TaskOf, detector_table, require_same, task_table
from stethoscope.report.console import print_table
from stethoscope.report.metrics_tables import TITLES, DetectorResults, primary
from stethoscope.report.run_source import RunReader
from stethoscope.report.tables import Cell, PairedDifference, Table, markdown
from stethoscope.storage.run_dir import RunStore
from stethoscope.storage.run_fingerprint import jsonable
from stethoscope.storage.sweep_jobs import FINISHED, Job

if TYPE_CHECKING:
    from rich.console import Console

    from stethoscope.tasks.base import Task

TESTED = ("auroc", "auroc_controlled")
SHOWN = {"AUROC", "position-controlled", "ECE"}  # of a detector's figures, in the table; the files have all


@dataclass
class JobResult:
    """Figures of one job.

    Attributes:
        job: itself.
        figures: by name: those of tasks (``chair chair_i``) and those of the detector (``AUROC``).
        differences: by name, the job less the first job, paired over images.
        remark: why there are no differences, if the reason is worth telling.
        shared: its answers are those of the first job, as where detectors are trained on one run.
    """

    job: Job
    figures: dict[str, Interval] = field(default_factory=dict)
    differences: dict[str, PairedDifference] = field(default_factory=dict)
    remark: str = ""
    shared: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Write it for JSON."""
        return {
            "job": self.job.index,
            "settings": self.job.settings,
            "status": self.job.status,
            "error": self.job.error,
            "run": self.job.folder,
            "seconds": self.job.seconds,
            "figures": {name: figure.to_dict() for name, figure in self.figures.items()},
            "above_first": {
                name: {**difference.interval.to_dict(), "p": difference.p}
                for name, difference in self.differences.items()
            },
        }


@dataclass(frozen=True)
class Comparison:
    """All jobs of a sweep, compared.

    Attributes:
        results: in the order of the jobs; the first that has figures is what the others are compared with.
    """

    results: tuple[JobResult, ...]

    @property
    def keys(self) -> list[str]:
        """List the settings that differ between jobs; all of them where there is one job."""
        known = list(dict.fromkeys(key for result in self.results for key in result.job.settings))
        values = {key: {result.job.settings.get(key) for result in self.results} for key in known}
        return [key for key in known if len(values[key]) > 1 or len(self.results) == 1]

    @property
    def table(self) -> Table:
        """List every job with its figures and, at the end, how it ended."""
        names = [name for name in _names(self.results, "figures") if self._is_shown(name)]
        tested = _names(self.results, "differences")
        columns, rows = ["job", *self.keys], []
        for name in names:
            columns += [name, *(["− first"] if name in tested else [])]
        for result in self.results:
            cells: list[Cell] = [result.job.index, *(result.job.settings.get(key) for key in self.keys)]
            for name in names:
                cells += [result.figures.get(name), *([result.differences.get(name)] if name in tested else [])]
            rows.append((*cells, result.job.status))
        note = "95 % intervals over images."
        note += " − first: paired over the same resampled images; p is two-sided and not corrected." if tested else ""
        return Table("sweep", (*columns, "status"), tuple(rows), note)

    def _is_shown(self, name: str) -> bool:
        """Leave out most of a detector's figures, and figures of a task whose answers all jobs share."""
        if name in TITLES.values():
            return name in SHOWN
        complete = [result for result in self.results if result.figures]
        return len(complete) == 1 or not all(result.shared for result in complete[1:])

    def problems(self) -> Iterator[str]:
        """Explain in a line every job that failed, and every one that could not be compared."""
        for result in self.results:
            job = result.job
            if job.status != FINISHED:
                yield f"job {job.index} ({job.title}) {job.status}: {job.error or 'it left no message; see its log'}"
            if result.remark:
                yield f"job {job.index} ({job.title}) is not compared with the first: {result.remark}"

    def print(self, console: Console) -> None:
        """Print the table for people, and the jobs that failed."""
        print_table(self.table, console)
        for line in self.problems():
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def write(self, folder: Path, name: str) -> None:
        """Write ``sweep.md``, ``sweep.csv`` and ``sweep.json``; each appears whole or not at all."""
        problems = "".join(f"- {line}\n" for line in self.problems())
        jobs = [result.job for result in self.results]
        runs = "".join(f"- job {job.index}: `{job.folder}`\n" for job in jobs if job.folder)
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
        """Write columns and rows of a table with a row for every job and figure; a job without figures has one row."""
        own = ["metric", "value", "low", "high", "above_first", "above_first_low", "above_first_high", "p"]
        columns, rows = ["job", *self.keys, "status", "error", "run", *own], []
        for result in self.results:
            job = result.job
            job_cells = [job.index, *(job.settings.get(key) for key in self.keys), job.status, job.error, job.folder]
            for name, figure in result.figures.items() or [(None, None)]:
                own_cells = (figure.value, figure.low, figure.high) if figure else (None,) * 3
                above = _difference_cells(result.differences.get(name))
                rows.append([*job_cells, name, *own_cells, *above])
        return columns, rows


def _difference_cells(difference: PairedDifference | None) -> tuple[float | None, ...]:
    if difference is None:
        return (None,) * 4
    return difference.interval.value, difference.interval.low, difference.interval.high, difference.p


def _names(results: Sequence[JobResult], what: str) -> list[str]:
    return list(dict.fromkeys(name for result in results for name in getattr(result, what)))


def comparison(jobs: Sequence[Job], task_of: TaskOf) -> Comparison:
    """Read the figures of all jobs from their run directories and compares each with the first that has any.

    Args:
        jobs: of one sweep.
        task_of: makes the task of a run again, for its metrics.
    """
    results, first = [], None
    for job in jobs:
        source = _source(job)
        result = JobResult(job, _figures(source) if source else {})
        results.append(result)
        if source is None or not result.figures:
            continue
        if first is None:
            first = source
        else:
            result.shared = _same_answers(first, source)
            result.differences, result.remark = _differences(first, source, result.shared, task_of)
    return Comparison(tuple(results))


def _source(job: Job) -> RunReader | None:
    """Read the run of a job; None where there is none. A run that failed has the figures of what it had finished."""
    folder = Path(job.folder)
    if not job.folder or not (folder / "metrics.json").is_file():
        return None
    store = RunStore(folder)
    figures = store.metrics()
    tasks = tuple(TaskResults.from_dict(task, figures[task]) for task in store.fingerprints() if task in figures)
    detector = DetectorResults.from_dict(figures["detector"]) if figures.get("detector") else None
    return RunReader(folder, store, tasks, detector)


def _figures(source: RunReader) -> dict[str, Interval]:
    figures = {f"{result.task} {result.primary}": primary(result) for result in source.results}
    rows = source.detector.leaderboard.rows if source.detector else ()
    metrics = next((row.metrics for row in rows if row.kind == "detector"), {})
    figures |= {title: metrics.get(name) for name, title in TITLES.items()}
    return {name: figure for name, figure in figures.items() if figure is not None}


def _differences(
    first: RunReader, other: RunReader, shared: bool, task_of: TaskOf
) -> tuple[dict[str, PairedDifference], str]:
    """Compare a run with the first, where they were asked the same; else say why there is nothing."""
    differences: dict[str, PairedDifference] = {}
    try:
        if not shared:
            require_same(first, other, swept=True)
            for result in other.results:
                if any(result.task == first_result.task for first_result in first.results):
                    name = f"{result.task} {result.primary}"
                    differences[name] = _task_difference(first, other, task_of(first, result.task))
        if first.detector and other.detector and first.task == other.task:
            titles = {TITLES[metric] for metric in TESTED}
            rows = detector_table(first, other, ("first", "other")).rows
            differences |= {str(row[0]): row[-1] for row in rows if row[0] in titles}
    except StethoscopeError as error:
        return differences, str(error)
    return differences, ""


def _task_difference(first: RunReader, other: RunReader, task: Task) -> Cell:
    """Compare a task's primary metric, in the mean over its subsets or else its only one."""
    rows = [row for row in task_table(first, other, task, ("first", "other")).rows if row[0] == task.primary]
    return next((row for row in rows if row[1] == "mean"), rows[0])[-1]


def _same_answers(first: RunReader, other: RunReader) -> bool:
    """Tell whether two runs share their answers, as those do that train detectors on one run."""
    first_prints, other_prints = (
        {task: {**fingerprint, "features": None} for task, fingerprint in source.store.fingerprints().items()}
        for source in (first, other)
    )
    return first_prints == other_prints
