"""Compare the jobs of a sweep: settings, metrics with intervals, differences from the first job."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, cast

from stethoscope.core.errors import ArtefactError, StethoscopeError
from stethoscope.core.files import atomic_write, jsonable, write_json
from stethoscope.core.json_rows import check_content
from stethoscope.core.text import escape_markdown
from stethoscope.detection.detector_results import DetectorResults
from stethoscope.evaluation.results import TaskResults
from stethoscope.metrics.bootstrap import Interval
from stethoscope.report.compare import TaskLoader, detector_table, first_task, is_seed, paired_table, require_same
from stethoscope.report.metrics_tables import TITLES, metric_title, primary, print_table
from stethoscope.report.run_report import table_page
from stethoscope.report.run_source import RunReader, readable
from stethoscope.report.tables import Cell, PairedDifference, Table, markdown
from stethoscope.storage.run_dir import DETECTOR, REMEDIES, RunStore
from stethoscope.storage.sweep_jobs import FINISHED, Job

if TYPE_CHECKING:
    from rich.console import Console

TESTED = ("auroc", "auroc_controlled")
SHOWN = {"AUROC", "position-controlled", "ECE"}  # the detector's metrics in the table; the files have all of them


@dataclass
class JobResult:
    """Metrics of one job.

    Attributes:
        job: the job.
        figures: metrics by name: those of tasks (``chair chair_i``) and those of the detector (``AUROC``).
        differences: by name, this job less the first job of the same seeds, paired over images.
        remark: why the job could not be compared with the first; empty if it could, or has nothing to compare.
        shared: its answers are those of the first job, as in a sweep that trains detectors on one run.
    """

    job: Job
    figures: dict[str, Interval] = field(default_factory=dict)
    differences: dict[str, PairedDifference] = field(default_factory=dict)
    remark: str = ""
    shared: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-able dictionary."""
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
        results: in the order of the jobs; the others are compared with the first of their seeds that has metrics.
    """

    results: tuple[JobResult, ...]

    @property
    def keys(self) -> list[str]:
        """List the settings that differ between jobs; all settings if there is one job."""
        keys = list(dict.fromkeys(key for result in self.results for key in result.job.settings))
        values = {key: {result.job.settings.get(key) for result in self.results} for key in keys}
        return [key for key in keys if len(values[key]) > 1 or len(self.results) == 1]

    @property
    def table(self) -> Table:
        """List every job with its metrics and its final status."""
        names = self._shown_figures()
        compared = {name for result in self.results for name in result.differences}
        columns, rows = ["job", *self.keys], []
        for name in names:
            columns += [_title(name), *(["− first"] if name in compared else [])]
        for result in self.results:
            cells: list[Cell] = [result.job.index, *(result.job.settings.get(key) for key in self.keys)]
            for name in names:
                cells += [result.figures.get(name), *([result.differences.get(name)] if name in compared else [])]
            rows.append((*cells, result.job.status))
        note = "95 % intervals over images."
        first = "the first job of the same seed" if any(map(is_seed, self.keys)) else "the first job"
        note += (
            f" − first: less {first}, paired over the same resampled images; p is two-sided and not corrected."
            if compared
            else ""
        )
        return Table("sweep", (*columns, "status"), tuple(rows), note)

    @property
    def seed_table(self) -> Table | None:
        """List mean and standard deviation over seeds; None where no setting has two seeds."""
        others = [key for key in self.keys if not is_seed(key)]
        groups: dict[tuple[str | None, ...], list[JobResult]] = {}
        for result in self.results:
            if result.figures:
                groups.setdefault(tuple(result.job.settings.get(key) for key in others), []).append(result)
        if len(others) == len(self.keys) or max(map(len, groups.values()), default=0) < 2:
            return None
        names = self._shown_figures()
        rows = []
        for settings, results in groups.items():
            cells = [_mean_and_deviation([item.figures[name].value for item in results if name in item.figures])
                     for name in names]  # fmt: skip
            rows.append((*settings, len(results), *cells))
        columns = (*others, "seeds", *map(_title, names))
        return Table("over seeds", columns, tuple(rows), "Mean ± standard deviation over the seeds.")

    def _shown_figures(self) -> list[str]:
        """List the figures of all jobs that tables show, in the order in which they come."""
        return list(dict.fromkeys(name for result in self.results for name in result.figures if self._is_shown(name)))

    def _is_shown(self, name: str) -> bool:
        """Tell whether the table shows a metric: those in ``SHOWN``, and those of tasks with other answers."""
        if name in TITLES.values():
            return name in SHOWN
        measured = [result for result in self.results if result.figures]
        return len(measured) == 1 or not all(result.shared for result in measured[1:])

    def problems(self) -> Iterator[str]:
        """Explain in a line each which jobs failed, and which could not be compared."""
        for result in self.results:
            job = result.job
            if job.status != FINISHED:
                yield f"job {job.index} ({job.title}) {job.status}: {job.error or 'it left no message; see its log'}"
            if result.remark:
                yield f"job {job.index} ({job.title}) is not compared with the first: {result.remark}"

    def print(self, console: Console) -> None:
        """Print the tables, and the jobs that failed or could not be compared."""
        for table in self._tables:
            print_table(table, console)
        for line in self.problems():
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    @property
    def _tables(self) -> list[Table]:
        """Make the table of jobs and, where there are several seeds, that over seeds."""
        over_seeds = self.seed_table
        return [self.table] if over_seeds is None else [self.table, over_seeds]

    def _difference_tables(self) -> list[Table]:
        """Make a table of every metric's differences to the first job, for the page, which draws them."""
        names = dict.fromkeys(name for result in self.results for name in result.differences if self._is_shown(name))
        return [
            Table(
                f"{_title(name)}: less the first job",
                ("job", "difference"),
                tuple((r.job.title, r.differences[name]) for r in self.results if name in r.differences),
            )
            for name in names
        ]

    def write(self, folder: Path, name: str) -> None:
        """Write ``sweep.md``, ``sweep.html``, ``sweep.csv`` and ``sweep.json``, each atomically.

        Args:
            folder: of the sweep.
            name: of the sweep, for the heading.
        """
        problems = "".join(f"- {escape_markdown(line)}\n" for line in self.problems())
        jobs = [result.job for result in self.results]
        runs = "".join(f"- job {job.index}: `{job.folder}`\n" for job in jobs if job.folder)
        parts = [f"# {escape_markdown(name)}", *map(markdown, self._tables)]
        parts += [f"## Jobs to look at\n\n{problems}"] if problems else []
        parts += [f"## Runs\n\n{runs}"]
        atomic_write(folder / "sweep.md", "\n".join(part.rstrip() + "\n" for part in parts))
        atomic_write(folder / "sweep.html", table_page(name, [*self._tables, *self._difference_tables()]))
        write_json(folder / "sweep.json", jsonable([result.to_dict() for result in self.results]))
        columns, rows = self.long_table()
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])
        atomic_write(folder / "sweep.csv", file.getvalue())

    def long_table(self) -> tuple[list[str], list[list[Any]]]:
        """Make columns and rows with one row for every job and metric; a job without metrics has one row."""
        metric_columns = ["metric", "value", "low", "high", "above_first", "above_first_low", "above_first_high", "p"]
        columns, rows = ["job", *self.keys, "status", "error", "run", *metric_columns], []
        for result in self.results:
            job = result.job
            job_cells = [job.index, *(job.settings.get(key) for key in self.keys), job.status, job.error, job.folder]
            if not result.figures:
                rows.append([*job_cells, *(None,) * len(metric_columns)])
            for name, figure in result.figures.items():
                cells: list[Any] = [name, figure.value, figure.low, figure.high]
                difference = result.differences.get(name)
                if difference is None:
                    cells += [None] * 4
                else:
                    interval = difference.interval
                    cells += [interval.value, interval.low, interval.high, difference.p]
                rows.append([*job_cells, *(None if cell != cell else cell for cell in cells)])  # NaN: not known
        return columns, rows


def _title(figure: str) -> str:
    """Write the name of a figure as the field does: ``chair chair_i`` becomes ``CHAIR_i``."""
    task, _, metric = figure.rpartition(" ")
    return metric_title(metric, task) if figure not in TITLES.values() else figure


def _mean_and_deviation(values: Sequence[float]) -> str:
    """Format the mean and the sample standard deviation; the mean alone of one value.

    >>> _mean_and_deviation([0.25, 0.75])
    '0.500 ± 0.354'
    """
    if not values:
        return ""
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def compare_jobs(jobs: Sequence[Job], load_task: TaskLoader) -> Comparison:
    """Read the metrics of all jobs, and compare each with the first of the same seeds that has any.

    Jobs that differ in nothing but a seed are not compared one by one: their spread is the noise of the others.

    Args:
        jobs: of one sweep.
        load_task: builds a run's task, for its metrics.
    """
    results: list[JobResult] = []
    first: RunReader | None = None
    first_of_seeds: dict[tuple[tuple[str, str], ...], RunReader] = {}
    for job in jobs:
        source, remark = None, ""
        try:
            source = _read_run(job)
        except ArtefactError as error:  # one damaged run must not hide the others
            remark = str(error)
        result = JobResult(job, _figures(source) if source else {}, remark=remark)
        results.append(result)
        if source is None or not result.figures:
            continue
        first = first or source
        result.shared = source is not first and _same_answers(first, source)
        seeds = tuple((key, value) for key, value in job.settings.items() if is_seed(key))
        reference = first_of_seeds.setdefault(seeds, source)
        if reference is not source:
            shared = _same_answers(reference, source)
            result.differences, result.remark = _differences(reference, source, shared, load_task)
    return Comparison(tuple(results))


def _read_run(job: Job) -> RunReader | None:
    """Read the run of a job, also one that failed after some of its tasks; None if there is no run."""
    folder, name = Path(job.folder), "metrics.json"
    if not job.folder or not (folder / name).is_file():
        return None
    with readable(folder):
        store = RunStore(folder)
        tasks, metrics = list(store.fingerprints()), store.metrics()
        figures = {section: metrics[section] for section in (*tasks, DETECTOR) if metrics.get(section)}
        check_content("metrics", figures, folder / name, REMEDIES[name])
        results = tuple(TaskResults.from_dict(task, figures[task]) for task in tasks if task in figures)
        detector = DetectorResults.from_dict(figures[DETECTOR]) if DETECTOR in figures else None
    return RunReader(folder, store, results, detector)


def _figures(source: RunReader) -> dict[str, Interval]:
    figures = {f"{result.task} {result.primary}": primary(result) for result in source.results}
    rows = source.detector.leaderboard.rows if source.detector else ()
    metrics = next((row.metrics for row in rows if row.kind == "detector"), {})
    figures |= {title: metrics.get(name) for name, title in TITLES.items()}
    return {name: figure for name, figure in figures.items() if figure is not None}


def _differences(
    first: RunReader, other: RunReader, shared: bool, load_task: TaskLoader
) -> tuple[dict[str, PairedDifference], str]:
    """Compare a run with the first; return the differences, and why some are missing (empty if none is)."""
    differences: dict[str, PairedDifference] = {}
    try:
        if not shared:
            require_same(first, other, swept=True)
            for result in other.results:
                if any(result.task == first_result.task for first_result in first.results):
                    name = f"{result.task} {result.primary}"
                    task = first_task(first, result.task, load_task)
                    table = paired_table(first, other, task, ("first", "other"))
                    rows = [row for row in table.rows if row[0] == metric_title(task.primary)]
                    over_subsets = [row for row in rows if row[1] == "mean"]
                    for row in (over_subsets or rows)[:1]:  # none where one of the runs could not measure it
                        differences[name] = cast(PairedDifference, row[-1])
        if first.detector and other.detector and first.task == other.task:
            titles = {TITLES[metric] for metric in TESTED}
            table = detector_table(first, other, ("first", "other"))
            differences |= {str(row[0]): cast(PairedDifference, row[-1]) for row in table.rows if row[0] in titles}
    except StethoscopeError as error:
        return differences, str(error)
    return differences, ""


def _same_answers(first: RunReader, other: RunReader) -> bool:
    """Tell whether two runs have the same answers, as in a sweep that trains detectors on one run."""
    first_fingerprints, other_fingerprints = (
        {task: {**fingerprint, "features": None} for task, fingerprint in source.store.fingerprints().items()}
        for source in (first, other)
    )
    return first_fingerprints == other_fingerprints
