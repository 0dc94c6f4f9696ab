"""Compare finished runs that answered the same samples, paired over the same resampled images."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stethoscope.core.errors import ConfigError, DataError
from stethoscope.core.files import read_json, read_yaml
from stethoscope.core.types import ImageRef, Sample
from stethoscope.metrics.bootstrap import Resamples, count_replicates, group_weights, p_value
from stethoscope.report.metrics_tables import RANKING, TITLES, primary, read_interval, shown_rows
from stethoscope.report.run_source import CONFIG_REMEDY, RunReader
from stethoscope.report.tables import Cell, PairedDifference, Table
from stethoscope.storage.records import FAILED, Record
from stethoscope.storage.run_fingerprint import differences

if TYPE_CHECKING:
    from stethoscope.tasks.base import Tally, Task

ASKED = ("group", "subset", "image", "question", "reference")  # what makes a sample the same
SUMMARY = ("auroc", "auroc_controlled", "auprc_hallucinated", "ece")
TRANSFERRED = ("auroc", "auroc_controlled", "ece")
LONG = 30  # characters of a name that a head of a column can bear
PAIRED = "Paired over the same resampled images; p is two-sided and not corrected for the number of comparisons."
TaskOf = Callable[[RunReader, str], "Task"]
"""Makes the task of a run again, by its name."""


def run_names(sources: Sequence[RunReader]) -> list[str]:
    """Name every run: the last part of its path, or all of it where that is not enough.

    Long names, as a sweep makes them, give way to the overrides on the command line that are not in all of them.
    """
    short = [source.name for source in sources]
    if len(set(short)) < len(short):
        return [str(source.folder) for source in sources]
    if max(map(len, short)) <= LONG:
        return short
    overrides = [_overrides(source) for source in sources]
    own = [
        " ".join(override for override in mine if not all(override in others for others in overrides))
        for mine in overrides
    ]
    return own if all(own) and len(set(own)) == len(own) else short


def _overrides(source: RunReader) -> list[str]:
    """Read the arguments on the command line that began the run, without its name."""
    overrides = read_yaml(source.folder / "overrides.yaml", CONFIG_REMEDY, kind=list, default=[])
    return [str(override) for override in overrides if not str(override).startswith("name=")]


def common_tasks(first: RunReader, other: RunReader) -> list[str]:
    """List the tasks that both runs answered.

    Raises:
        ConfigError: there is none.
    """
    other_tasks = {result.task for result in other.results}
    common = [result.task for result in first.results if result.task in other_tasks]
    if not common:
        first_tasks = ", ".join(result.task for result in first.results)
        raise ConfigError(
            f"{first.folder} ({first_tasks}) and {other.folder} ({', '.join(sorted(other_tasks))}) have no task in "
            "common"
        )
    return common


def require_same(first: RunReader, other: RunReader, swept: bool = False) -> None:
    """Check that the common tasks of two runs are the same and asked the same.

    Args:
        first, other: the runs.
        swept: they are jobs of a sweep, whose settings and questions differ because they were meant to: it is enough
            that the tasks are of one kind and that images and truth are the same.

    Raises:
        ConfigError: they are not; the message names what differs.
    """
    reasons = []
    asked = [key for key in ASKED if not (swept and key == "question")]
    for task in common_tasks(first, other):
        tasks = (source.store.fingerprints()[task]["task"] for source in (first, other))
        for key, old, new in differences(*tasks):
            # a moved folder: the samples tell whether they are the same
            if not (_is_path(old) and _is_path(new)) and not (swept and key.startswith("settings")):
                reasons.append(f"{task} {key} is {reprlib.repr(old)} and {reprlib.repr(new)}")
        reasons += [f"{task} {line}" for line in _sample_differences(first, other, task, asked)]
    if reasons:
        shown = "; ".join(reasons[:4]) + (f"; and {len(reasons) - 4} more" if len(reasons) > 4 else "")
        raise ConfigError(f"{first.folder} and {other.folder} did not answer the same: {shown}")


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and ("/" in value or "\\" in value)


def _sample_differences(first: RunReader, other: RunReader, task: str, asked: Sequence[str]) -> Iterator[str]:
    runs = first, other
    old, new = ({record.sample_id: record for record in source.store.records(task)} for source in runs)
    for source, records, others in ((first, old, new), (other, new, old)):
        alone = [name for name in records if name not in others]
        if alone:
            yield f"has {len(alone)} samples only in {source.folder}, such as {alone[0]!r}"
    for key in asked:
        unequal = [name for name in old if name in new and getattr(old[name], key) != getattr(new[name], key)]
        if unequal:
            yield f"has another {key} in {len(unequal)} samples, such as {unequal[0]!r}"


def task_table(first: RunReader, other: RunReader, task: Task, names: tuple[str, str]) -> Table:
    """Compare every metric of a task in two runs.

    Only samples that failed in neither run count.

    Args:
        first, other: runs that ``require_same`` lets pass.
        task: of both.
        names: of the runs.

    Raises:
        DataError: no sample went well in both.
    """
    records = [{record.sample_id: record for record in source.store.records(task.name)} for source in (first, other)]
    both = [name for name in records[0] if all(run[name].status != FAILED for run in records)]
    if not both:
        raise DataError(f"{task.name} has no sample that failed neither in {first.folder} nor in {other.folder}")
    tallies = [task.tally([_scored(run[name]) for name in both]) for run in records]
    drawn = group_weights([tally.group for run in tallies for tally in run])
    parts = drawn.select(np.arange(len(tallies[0]))), drawn.select(np.arange(len(tallies[0]), len(drawn.index)))
    asked = {record.subset for record in records[0].values()} if task.macro else set()
    figures = [_replicates(task, run, part, asked) for run, part in zip(tallies, parts, strict=True)]
    cells: list[tuple[Cell, ...]] = []
    bold = set()
    for metric, subset in figures[0]:
        if (metric, subset) not in figures[1]:
            continue
        part = parts[0].select(np.array([subset in (tally.subset, "mean") for tally in tallies[0]]))
        old, new = (figure[metric, subset] for figure in figures)
        if metric == task.primary:
            bold.add(len(cells))
        cells.append((metric, subset, part.interval(old), part.interval(new), _difference(new - old, part)))
    left = len(records[0]) - len(both)
    note = PAIRED + (f" {left} samples that failed in one of the runs are left out." if left else "")
    columns = ("metric", "subset", *names, f"{names[1]} − {names[0]}")
    return Table(f"{task.name}: {names[1]} against {names[0]}", columns, tuple(cells), note, frozenset(bold))


def _scored(record: Record) -> tuple[Sample, Mapping[str, float]]:
    """Make what ``Task.tally`` takes from what the run stored."""
    image = ImageRef(record.image, Path(record.image))
    sample = Sample(record.sample_id, image, record.question, record.group, record.subset, record.reference)
    return sample, record.score.counts if record.score else {}


def _replicates(
    task: Task, tallies: Sequence[Tally], drawn: Resamples, asked: Collection[str] = ()
) -> dict[tuple[str, str], np.ndarray]:
    counts = pd.DataFrame([dict(tally.counts) for tally in tallies]).fillna(0.0)
    return count_replicates(task.metrics(), counts, [tally.subset for tally in tallies], drawn, task.macro, asked)


def _difference(replicates: np.ndarray, drawn: Resamples) -> PairedDifference:
    return PairedDifference(drawn.interval(replicates), p_value(replicates))


def _test_images(source: RunReader, images: set[str]) -> set[str]:
    """Keep the images that the run's detector has not learned from, also those in which nothing was named."""
    rows = source.warnings
    if not (rows["fold"] != "").any():
        return images
    return images - set(rows.loc[rows["fold"] != "test", "group"])


def detector_table(first: RunReader, other: RunReader, names: tuple[str, str]) -> Table:
    """Compare the detectors of two runs on the images that neither has learned from.

    Each is measured on the mentions of its own run's answers; where the answers are the same, so are the mentions.

    Raises:
        DataError: they have no test image in common, or one kind of mention is missing there.
    """
    # here, because scikit-learn takes a second to import and runs without a detector need none of it
    from stethoscope.detection.score_metrics import evaluate_scores

    images = set(first.warnings["group"]) | set(other.warnings["group"])
    common = _test_images(first, images) & _test_images(other, images)
    first_only = any((source.held_out["repeat_index"] == 0).all() for source in (first, other))
    rows = [source.held_out[source.held_out["group"].isin(common)] for source in (first, other)]
    rows = [part[part["repeat_index"] == 0] if first_only else part for part in rows]
    if any(part["label"].nunique() < 2 for part in rows):
        raise DataError(
            f"{first.folder} and {other.folder} have {len(common)} test images in common, without hallucinated and "
            "grounded mentions in both; train their detectors with the same seed and split"
        )
    drawn = group_weights(pd.concat(part["group"] for part in rows))
    parts = drawn.select(np.arange(len(rows[0]))), drawn.select(np.arange(len(rows[0]), len(drawn.index)))
    figures = [
        evaluate_scores(mentions, {"detector": mentions["probability"].to_numpy()}, part)
        for mentions, part in zip(rows, parts, strict=True)
    ]
    cells = []
    for metric, title in TITLES.items():
        if all(("detector", metric) in figure for figure in figures):
            old, new = (figure["detector", metric] for figure in figures)
            cells.append((title, parts[0].interval(old), parts[1].interval(new), _difference(new - old, parts[0])))
    which = "first mentions" if first_only else "mentions"
    sizes = f"{len(rows[0])} and {len(rows[1])} {which} in {drawn.groups} images"
    note = f"{sizes} that neither detector has learned from. {PAIRED}"
    title = f"detectors: {names[1]} against {names[0]}"
    return Table(title, ("", *names, f"{names[1]} − {names[0]}"), tuple(cells), note, frozenset({0}))


def transfer_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Compare a detector on other runs with one that is trained there; from the section ``transfer``."""
    shown = {metric: TITLES[metric] for metric in TRANSFERRED}
    cells: list[tuple[Cell, ...]] = []
    for row in rows:
        for which in ("at home", "transferred", "trained there"):
            if which in row:
                cells.append((row["target"], which, *(read_interval(row[which][metric]) for metric in shown)))
        if "difference" in row:
            sections = [row["difference"][metric] for metric in shown]
            tested = [PairedDifference(read_interval(section), section["p"]) for section in sections]
            cells.append((row["target"], "transferred − trained there", *tested))
    sizes = ", ".join(f"{row['target']} {row['mentions']} in {row['images']}" for row in rows)
    note = f"On test images only; mentions and images: {sizes}. {PAIRED}"
    return Table("transfer", ("judged on", "detector", *shown.values()), tuple(cells), note, frozenset({0}))


def leaderboard_table(sources: Sequence[RunReader], names: Sequence[str]) -> Table | None:
    """List the leaderboards of several runs under each other: detectors, baselines, the best single feature."""
    rows, bold = [], set()
    columns = {metric: TITLES[metric] for metric in (*list(RANKING)[:4], "auprc_hallucinated", "ece")}
    for name, source in zip(names, sources, strict=True):
        if not source.detector:
            continue
        board = source.detector.leaderboard
        for row in shown_rows(board):
            if row.kind == "feature" and row.name != board.best_features.get("auroc"):
                continue
            if row.kind == "detector":
                bold.add(len(rows))
            rows.append((name, row.name, *(row.metrics.get(metric) for metric in columns)))
    if not rows:
        return None
    note = "Each on the test images of its own run."
    return Table("leader boards", ("run", "", *columns.values()), tuple(rows), note, frozenset(bold))


def summary_table(sources: Sequence[RunReader], names: Sequence[str]) -> Table:
    """List every run in one row: the primary metric of its tasks, and its detector."""
    leading = {result.task: result.primary for source in sources for result in source.results}
    any_detector = any(source.detector for source in sources)
    rows = []
    for name, source in zip(names, sources, strict=True):
        results = {result.task: result for result in source.results}
        cells: list[Cell] = [primary(results[task]) if task in results else None for task in leading]
        if any_detector:
            metrics = source.detector.detector.metrics if source.detector else {}
            cells += [metrics.get(metric) for metric in SUMMARY]
        rows.append((name, source.model, *cells))
    columns = ["run", "model", *(f"{task} {metric}" for task, metric in leading.items())]
    columns += [f"detector: {TITLES[metric]}" for metric in SUMMARY] if any_detector else []
    return Table("runs", tuple(columns), tuple(rows), "95 % intervals from resampled images.")


def setting_table(sources: Sequence[RunReader], names: Sequence[str]) -> Table | None:
    """List in what the runs differ: model, generation, features, detector; None where in nothing."""
    settings = [_settings(source) for source in sources]
    changed = {
        key: None for other in settings[1:] for key, _, _ in differences(settings[0], other)
    }  # a dict keeps the order in which they come
    if not changed:
        return None
    rows = tuple((key, *(_short(_lookup(run, key)) for run in settings)) for key in changed if key != "features")
    if "features" in changed:
        rows += (("features", *(_features(settings[0]["features"], run["features"]) for run in settings)),)
    return Table("settings that differ", ("", *names), rows)


def _settings(source: RunReader) -> dict[str, Any]:
    sections = list(source.store.fingerprints().values())
    first = sections[0] if sections else {}
    settings = {key: first[key] for key in ("adapter", "generation") if key in first}
    features = [section["features"] for section in sections if "features" in section]
    manifest = source.folder / "detector" / "manifest.json"
    settings["features"] = features[0].get("names", []) if features else []
    if manifest.is_file():
        settings["detector"] = read_json(manifest, "`stethoscope train` makes the detector again").get("settings", {})
    return settings


def _features(first: Sequence[str], other: Sequence[str]) -> str:
    """Count the features, and name those that the first run has not or has besides.

    >>> _features(["nll", "pmi"], ["nll", "svar"])
    '2: without pmi; with svar'
    """
    without, more = [name for name in first if name not in other], [name for name in other if name not in first]
    parts = [f"{word} {', '.join(names)}" for word, names in (("without", without), ("with", more)) if names]
    return f"{len(other)}" + (f": {'; '.join(parts)}" if parts else "")


def _lookup(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, Mapping) else None
    return settings


def _short(value: Any, most: int = 120) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= most else text[: most - 2] + " …"


def compare(sources: Sequence[RunReader], task_of: TaskOf) -> tuple[list[Table], list[str]]:
    """Compare every run with the first.

    Args:
        sources: two runs or more.
        task_of: makes the task of a run again, for its metrics.

    Returns:
        Tables, and remarks about what could not be compared.

    Raises:
        ConfigError: fewer than two runs, no common task, or they did not answer the same.
    """
    if len(sources) < 2:
        raise ConfigError("stethoscope compare takes two runs or more")
    first, names = sources[0], run_names(sources)
    for other in sources[1:]:
        require_same(first, other)
    tables: list[Table | None] = [summary_table(sources, names), setting_table(sources, names)]
    remarks = [source.no_detector() for source in sources if source.no_detector()]
    for name, other in zip(names[1:], sources[1:], strict=True):
        pair = names[0], name
        tables += [task_table(first, other, task_of(first, task), pair) for task in common_tasks(first, other)]
        if not (first.no_detector() or other.no_detector()):
            if first.task != other.task:
                remarks.append(f"the detectors judge mentions of {first.task} and of {other.task}")
                continue
            try:
                tables.append(detector_table(first, other, pair))
            except DataError as error:
                remarks.append(str(error))
    tables.append(leaderboard_table(sources, names))
    return [table for table in tables if table is not None], remarks
