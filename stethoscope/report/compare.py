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
from stethoscope.detection.detector_results import read_interval
from stethoscope.detection.score_metrics import evaluate_scores
from stethoscope.metrics.bootstrap import Interval, Resamples, count_replicates, group_weights
from stethoscope.report.metrics_tables import RANKING, TITLES, metric_title, primary, shown_rows, task_title
from stethoscope.report.run_source import RunReader
from stethoscope.report.tables import Cell, PairedDifference, Table
from stethoscope.storage.records import FAILED, Record
from stethoscope.storage.run_dir import REMEDIES
from stethoscope.storage.run_fingerprint import differences

if TYPE_CHECKING:
    from stethoscope.tasks.base import Tally, Task

COMPARED_FIELDS = ("group", "subset", "image", "question", "reference")  # of records, which must agree by sample
SUMMARY = ("auroc", "auroc_controlled", "auprc_hallucinated", "ece")
TRANSFERRED = ("auroc", "auroc_controlled", "ece")
LONGEST_NAME = 30  # characters of a run's name in a column header
PAIRED = "Paired over the same resampled images; p is two-sided and not corrected for the number of comparisons."
TaskLoader = Callable[[RunReader, str], "Task"]
"""Builds a task of a run again from the run's saved configuration, given the task's name."""


def run_names(sources: Sequence[RunReader]) -> list[str]:
    """Name every run by the last part of its path, or by its whole path if two last parts are equal.

    Long names, as those of a sweep, are replaced by the command-line overrides that the runs do not share.
    """
    short = [source.name for source in sources]
    if len(set(short)) < len(short):
        return [str(source.folder) for source in sources]
    if max(map(len, short)) <= LONGEST_NAME:
        return short
    overrides = [_read_overrides(source) for source in sources]
    distinct = [
        " ".join(override for override in run_overrides if not all(override in others for others in overrides))
        for run_overrides in overrides
    ]
    return distinct if all(distinct) and len(set(distinct)) == len(distinct) else short


def is_seed(key: str) -> bool:
    """Return whether a setting is a seed, such as ``detector.seed``."""
    return key.rpartition(".")[2] == "seed"


def _read_overrides(source: RunReader) -> list[str]:
    """Read the command-line overrides that the run was started with, except its name."""
    file = source.folder / "overrides.yaml"
    overrides = read_yaml(file, REMEDIES[file.name], kind=list, default=[])
    return [str(override) for override in overrides if not str(override).startswith("name=")]


def common_tasks(first: RunReader, other: RunReader) -> list[str]:
    """List the tasks that both runs answered.

    Raises:
        ConfigError: they have no task in common.
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


def require_same(first: RunReader, other: RunReader, swept: bool = False, common: bool = False) -> None:
    """Check that two runs answered the same samples in their common tasks.

    Args:
        first: a run.
        other: the run that is compared with it.
        swept: the runs are jobs of a sweep, whose settings and questions may differ on purpose: only the kind of
            task, the images and the reference answers must be the same.
        common: samples that only one of the runs has do not matter, nor settings that choose them.

    Raises:
        ConfigError: the samples differ; the message names how.
    """
    reasons = []
    fields = [key for key in COMPARED_FIELDS if not (swept and key == "question")]
    for task in common_tasks(first, other):
        tasks = (_fingerprints(source)[task]["task"] for source in (first, other))
        for key, old, new in differences(*tasks):
            # two paths may be one folder that was moved; the samples are compared below
            if not (_is_path(old) and _is_path(new)) and not ((swept or common) and key.startswith("settings")):
                reasons.append(f"{task} {key} is {reprlib.repr(old)} and {reprlib.repr(new)}")
        if not common:
            reasons += [f"{task} {line}" for line in _unmatched(first, other, task)]
        reasons += [f"{task} {line}" for line in _sample_differences(first, other, task, fields)]
    if reasons:
        shown = "; ".join(reasons[:4]) + (f"; and {len(reasons) - 4} more" if len(reasons) > 4 else "")
        hint = "" if common or swept else "; common=true compares the samples that both have, if they are the same"
        raise ConfigError(f"{first.folder} and {other.folder} did not answer the same: {shown}{hint}")


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and ("/" in value or "\\" in value)


def _fingerprints(source: RunReader) -> dict[str, Any]:
    return source.cached("fingerprints", source.store.fingerprints)


def first_task(first: RunReader, name: str, load_task: TaskLoader) -> Task:
    """Build a task of the run that others are compared with, once for all of them."""
    return first.cached(("task", name), lambda: load_task(first, name))


def _unmatched(first: RunReader, other: RunReader, task: str) -> Iterator[str]:
    old, new = (source.records(task) for source in (first, other))
    for source, own, others in ((first, old, new), (other, new, old)):
        unmatched = [name for name in own if name not in others]
        if unmatched:
            yield f"has {len(unmatched)} samples only in {source.folder}, such as {unmatched[0]!r}"


def _sample_differences(first: RunReader, other: RunReader, task: str, fields: Sequence[str]) -> Iterator[str]:
    old, new = (source.records(task) for source in (first, other))
    for key in fields:
        unequal = [name for name in old if name in new and getattr(old[name], key) != getattr(new[name], key)]
        if unequal:
            yield f"has another {key} in {len(unequal)} samples, such as {unequal[0]!r}"


def paired_table(first: RunReader, other: RunReader, task: Task, names: tuple[str, str]) -> Table:
    """Compare every metric of a task in two runs, on the samples that failed in neither.

    Args:
        first: a run.
        other: the run that is compared with it; ``require_same`` must accept the two.
        task: of both runs.
        names: of the two runs, for the columns.

    Raises:
        DataError: they have no sample in common, or each of those failed in one of the runs.
    """
    records = [source.records(task.name) for source in (first, other)]
    common = [name for name in records[0] if name in records[1]]
    both = [name for name in common if all(run[name].status != FAILED for run in records)]
    if not both:
        raise DataError(f"{task.name} has no sample that failed neither in {first.folder} nor in {other.folder}")
    subsets = frozenset(records[0][name].subset for name in common) if task.macro else frozenset()
    old_tallies = first.cached(
        ("tallies", task, tuple(both)), lambda: task.tally([_scored(records[0][name]) for name in both])
    )
    new_tallies = task.tally([_scored(records[1][name]) for name in both])
    resamples = group_weights([tally.group for tally in (*old_tallies, *new_tallies)])
    parts = _split(resamples, len(old_tallies))
    old_figures = first.cached(
        ("replicates", task, tuple(both), subsets, tuple(resamples.names)),
        lambda: _first_figures(task, old_tallies, parts[0], subsets),
    )
    new_figures = _replicates(task, new_tallies, parts[1], subsets)
    cells: list[tuple[Cell, ...]] = []
    bold = set()
    for (metric, subset), (old, interval, part) in old_figures.items():
        if (metric, subset) not in new_figures:
            continue
        new = new_figures[metric, subset]
        if metric == task.primary:
            bold.add(len(cells))
        cells.append((metric_title(metric), subset, interval, part.interval(new), _difference(new - old, part)))
    failed, alone = len(common) - len(both), len({*records[0], *records[1]}) - len(common)
    note = PAIRED + (f" {failed} samples that failed in one of the runs are left out." if failed else "")
    note += f" {alone} samples that only one of the runs has are left out, {len(common)} are common." if alone else ""
    columns = ("metric", "subset", *names, f"{names[1]} − {names[0]}")
    return Table(
        f"{task_title(task.name)}: {names[1]} against {names[0]}",
        columns,
        tuple(cells),
        note,
        frozenset(bold),
    )


def _scored(record: Record) -> tuple[Sample, Mapping[str, float]]:
    """Rebuild from a stored record the pair of sample and counts that ``Task.tally`` takes."""
    image = ImageRef(record.image, Path(record.image))
    sample = Sample(record.sample_id, image, record.question, record.group, record.subset, record.reference)
    return sample, record.score.counts if record.score else {}


def _replicates(
    task: Task, tallies: Sequence[Tally], resamples: Resamples, subsets: Collection[str] = ()
) -> dict[tuple[str, str], np.ndarray]:
    counts = pd.DataFrame([dict(tally.counts) for tally in tallies]).fillna(0.0)
    tally_subsets = [tally.subset for tally in tallies]
    return count_replicates(task.metrics(), counts, tally_subsets, resamples, task.macro, subsets)


def _first_figures(
    task: Task, tallies: Sequence[Tally], resamples: Resamples, subsets: Collection[str]
) -> dict[tuple[str, str], tuple[np.ndarray, Interval, Resamples]]:
    """Compute replicates, intervals and resampled images of the first run's metrics, by (metric, subset)."""
    figures = {}
    for (metric, subset), replicates in _replicates(task, tallies, resamples, subsets).items():
        part = resamples.select(np.array([subset in (tally.subset, "mean") for tally in tallies]))
        figures[metric, subset] = replicates, part.interval(replicates), part
    return figures


def _split(resamples: Resamples, size: int) -> tuple[Resamples, Resamples]:
    """Split the resamples of two runs' rows, laid end to end, after the ``size`` rows of the first."""
    return resamples.select(np.arange(size)), resamples.select(np.arange(size, len(resamples.index)))


def _difference(replicates: np.ndarray, resamples: Resamples) -> PairedDifference:
    return PairedDifference(resamples.interval(replicates), resamples.p_value(replicates))


def _test_images(source: RunReader, images: set[str]) -> set[str]:
    """Select the images that the run's detector was not fitted on, including those without any mention."""
    rows = source.warnings
    if not (rows["fold"] != "").any():
        return images
    return images - set(rows.loc[rows["fold"] != "test", "group"])


def detector_table(first: RunReader, other: RunReader, names: tuple[str, str]) -> Table:
    """Compare the detectors of two runs on the images that neither was fitted on.

    Each is measured on the mentions of its own run's answers; equal answers have equal mentions.

    Raises:
        DataError: they have no test image in common, or one kind of mention is missing there.
    """
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
    resamples = group_weights(pd.concat(part["group"] for part in rows))
    parts = _split(resamples, len(rows[0]))

    def evaluate(index: int) -> dict[str, tuple[np.ndarray, Interval]]:
        scores = {"detector": rows[index]["probability"].to_numpy()}
        figures = evaluate_scores(rows[index], scores, parts[index])
        return {metric: (replicates, parts[index].interval(replicates)) for (_, metric), replicates in figures.items()}

    old_figures = first.cached(("detector", frozenset(common), first_only, tuple(resamples.names)), lambda: evaluate(0))
    new_figures = evaluate(1)
    cells = []
    for metric, title in TITLES.items():
        if metric in old_figures and metric in new_figures:
            (old, old_interval), (new, new_interval) = old_figures[metric], new_figures[metric]
            cells.append((title, old_interval, new_interval, _difference(new - old, parts[0])))
    counted = "first mentions" if first_only else "mentions"
    sizes = f"{len(rows[0])} and {len(rows[1])} {counted} in {resamples.groups} images"
    note = f"{sizes} that neither detector has learned from. {PAIRED}"
    title = f"detectors: {names[1]} against {names[0]}"
    return Table(title, ("", *names, f"{names[1]} − {names[0]}"), tuple(cells), note, frozenset({0}))


def transfer_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Compare a detector on other runs with one that is trained there, from rows of ``transfer``."""
    shown = {metric: TITLES[metric] for metric in TRANSFERRED}
    cells: list[tuple[Cell, ...]] = []
    for row in rows:
        for origin in ("at home", "transferred", "trained there"):
            if origin in row:
                cells.append((row["target"], origin, *(read_interval(row[origin][metric]) for metric in shown)))
        if "difference" in row:
            sections = [row["difference"][metric] for metric in shown]
            paired = [PairedDifference(read_interval(section), section["p"]) for section in sections]
            cells.append((row["target"], "transferred − trained there", *paired))
    sizes = ", ".join(f"{row['target']} {row['mentions']} in {row['images']}" for row in rows)
    shifts = "".join(f" {row['target']}: {row['shift']}." for row in rows if row.get("shift"))
    note = f"On test images only; mentions and images: {sizes}. {PAIRED}{shifts}"
    return Table("transfer", ("judged on", "detector", *shown.values()), tuple(cells), note, frozenset({0}))


def leaderboard_table(sources: Sequence[RunReader], names: Sequence[str]) -> Table | None:
    """List detectors, baselines and the best single feature of several runs' leaderboards."""
    rows: list[tuple[Cell, ...]] = []
    bold = set()
    columns = {metric: TITLES[metric] for metric in (*list(RANKING)[:5], "auprc_hallucinated", "ece")}
    for name, source in zip(names, sources, strict=True):
        if not source.detector:
            continue
        leaderboard = source.detector.leaderboard
        for row in shown_rows(leaderboard):
            if row.kind == "feature" and row.name != leaderboard.best_features.get("auroc"):
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
    primary_metrics = {result.task: result.primary for source in sources for result in source.results}
    any_detector = any(source.detector for source in sources)
    rows = []
    for name, source in zip(names, sources, strict=True):
        results = {result.task: result for result in source.results}
        cells: list[Cell] = [primary(results[task]) if task in results else None for task in primary_metrics]
        if any_detector:
            metrics = source.detector.detector.metrics if source.detector else {}
            cells += [metrics.get(metric) for metric in SUMMARY]
        rows.append((name, source.model, *cells))
    columns = ["run", "model", *(metric_title(metric, task) for task, metric in primary_metrics.items())]
    columns += [f"detector: {TITLES[metric]}" for metric in SUMMARY] if any_detector else []
    return Table("runs", tuple(columns), tuple(rows), "95 % intervals from resampled images.")


def setting_table(sources: Sequence[RunReader], names: Sequence[str]) -> Table | None:
    """List the settings of model, generation, features and detector that differ; None if none does."""
    settings = [_settings(source) for source in sources]
    changed = {
        key: None for other in settings[1:] for key, _, _ in differences(settings[0], other)
    }  # a dictionary, not a set, to keep the order of the settings
    if not changed:
        return None
    rows = tuple((key, *(_shorten(_lookup(run, key)) for run in settings)) for key in changed if key != "features")
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
    """Count the features, and name those that the first run has in addition or lacks.

    >>> _features(["nll", "pmi"], ["nll", "svar"])
    '2: without pmi; with svar'
    """
    removed, added = [name for name in first if name not in other], [name for name in other if name not in first]
    parts = [f"{change} {', '.join(names)}" for change, names in (("without", removed), ("with", added)) if names]
    return f"{len(other)}" + (f": {'; '.join(parts)}" if parts else "")


def _lookup(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, Mapping) else None
    return settings


def _shorten(value: Any, length: int = 120) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= length else text[: length - 2] + " …"


def compare(sources: Sequence[RunReader], load_task: TaskLoader, common: bool = False) -> tuple[list[Table], list[str]]:
    """Compare every run with the first; of a sweep over seeds and more, with the first of the same seeds.

    Args:
        sources: two runs or more.
        load_task: builds a run's task, for its metrics.
        common: compare the samples that both runs have, where one has more.

    Returns:
        Tables, and remarks about what could not be compared.

    Raises:
        ConfigError: there are fewer than two runs, or two have no task in common or answered different samples.
    """
    if len(sources) < 2:
        raise ConfigError("stethoscope compare takes two runs or more")
    first, names = sources[0], run_names(sources)
    tables: list[Table | None] = [summary_table(sources, names), setting_table(sources, names)]
    remarks = [source.no_detector() for source in sources if source.no_detector()]
    references = _references(sources)
    for name, other, index in zip(names[1:], sources[1:], references[1:], strict=True):
        reference, pair = sources[index], (names[index], name)
        if other is reference and other is not first:
            remarks.append(f"{name} has another seed than {names[0]}; it is compared with runs of its own seed alone")
            continue
        require_same(reference, other, common=common)
        for task in common_tasks(reference, other):
            tables.append(paired_table(reference, other, first_task(reference, task, load_task), pair))
        if not (reference.no_detector() or other.no_detector()):
            if reference.task != other.task:
                remarks.append(f"the detectors judge mentions of {reference.task} and of {other.task}")
            else:
                try:
                    tables.append(detector_table(reference, other, pair))
                except DataError as error:
                    remarks.append(str(error))
        if other is not first:
            other.release()  # the first ones are read once for all, every other one once
    tables.append(leaderboard_table(sources, names))
    return [table for table in tables if table is not None], remarks


def _references(sources: Sequence[RunReader]) -> list[int]:
    """Return for every run the index of the run that it is compared with.

    It is the first, or the first of the same seeds.

    Seeds count where each is that of several runs, as in a sweep over seeds and something else: a difference of one
    seed's run to another's is noise and effect in one.
    """
    seeds = [tuple(sorted(word for word in _read_overrides(run) if is_seed(word.partition("=")[0]))) for run in sources]
    if len(set(seeds)) < 2 or min(map(seeds.count, seeds)) < 2:
        return [0] * len(sources)
    return [seeds.index(own) for own in seeds]
