"""Runs against each other: refused unless they answered the same, else paired over the same resampled images."""

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
from stethoscope.report.figures import AT_WORK, RANKING, interval, primary, shown_rows
from stethoscope.report.source import CONFIG_REMEDY, Source
from stethoscope.report.tables import Cell, Gap, Table
from stethoscope.storage.records import FAILED, Record
from stethoscope.storage.run_fingerprint import differences

if TYPE_CHECKING:
    from stethoscope.tasks.base import Tally, Task

ASKED = ("group", "subset", "image", "question", "reference")  # what makes a sample the same
SUMMARY = ("auroc", "auroc_controlled", "auprc_hallucinated", "ece")
TRANSFERRED = ("auroc", "auroc_controlled", "ece")
LONG = 30  # characters of a name that a head of a column can bear
PAIRED = "Paired over the same resampled images; p is two-sided and not corrected for the number of comparisons."
TaskOf = Callable[[Source, str], "Task"]
"""Makes the task of a run again, by its name."""


def names(sources: Sequence[Source]) -> list[str]:
    """What to call every run: the last part of its path, or all of it where that is not enough.

    Long names, as a sweep makes them, give way to the words on the command line that are not in all of them.
    """
    short = [source.name for source in sources]
    if len(set(short)) < len(short):
        return [str(source.folder) for source in sources]
    if max(map(len, short)) <= LONG:
        return short
    words = [_overrides(source) for source in sources]
    own = [" ".join(word for word in some if not all(word in others for others in words)) for some in words]
    return own if all(own) and len(set(own)) == len(own) else short


def _overrides(source: Source) -> list[str]:
    """The words on the command line that began the run, without its name."""
    words = read_yaml(source.folder / "overrides.yaml", CONFIG_REMEDY, kind=list, default=[])
    return [str(word) for word in words if not str(word).startswith("name=")]


def common_tasks(first: Source, other: Source) -> list[str]:
    """Tasks that both runs answered.

    Raises:
        ConfigError: there is none.
    """
    theirs = {result.task for result in other.results}
    found = [result.task for result in first.results if result.task in theirs]
    if not found:
        mine = ", ".join(result.task for result in first.results)
        raise ConfigError(
            f"{first.folder} ({mine}) and {other.folder} ({', '.join(sorted(theirs))}) have no task in common"
        )
    return found


def require_same(first: Source, other: Source, swept: bool = False) -> None:
    """Checks that the common tasks of two runs are the same and asked the same.

    Args:
        first, other: the runs.
        swept: they are jobs of a sweep, whose settings and questions differ because they were meant to: it is enough
            that the tasks are of one kind and that pictures and truth are the same.

    Raises:
        ConfigError: they are not; the message names what differs.
    """
    found = []
    asked = [key for key in ASKED if not (swept and key == "question")]
    for task in common_tasks(first, other):
        mine, theirs = (source.store.fingerprints()[task]["task"] for source in (first, other))
        for key, old, new in differences(mine, theirs):
            # a moved folder: the samples tell whether they are the same
            if not (_path(old) and _path(new)) and not (swept and key.startswith("settings")):
                found.append(f"{task} {key} is {reprlib.repr(old)} and {reprlib.repr(new)}")
        found += [f"{task} {line}" for line in _sample_differences(first, other, task, asked)]
    if found:
        shown = "; ".join(found[:4]) + (f"; and {len(found) - 4} more" if len(found) > 4 else "")
        raise ConfigError(f"{first.folder} and {other.folder} did not answer the same: {shown}")


def _path(value: Any) -> bool:
    return isinstance(value, str) and ("/" in value or "\\" in value)


def _sample_differences(first: Source, other: Source, task: str, asked: Sequence[str]) -> Iterator[str]:
    mine, theirs = ({record.sample_id: record for record in one.store.records(task)} for one in (first, other))
    for one, there, here in ((first, mine, theirs), (other, theirs, mine)):
        alone = [name for name in there if name not in here]
        if alone:
            yield f"has {len(alone)} samples only in {one.folder}, such as {alone[0]!r}"
    for key in asked:
        unequal = [name for name in mine if name in theirs and getattr(mine[name], key) != getattr(theirs[name], key)]
        if unequal:
            yield f"has another {key} in {len(unequal)} samples, such as {unequal[0]!r}"


def task_table(first: Source, other: Source, task: Task, heads: tuple[str, str]) -> Table:
    """Every metric of a task in two runs, and what the second is above the first.

    Only samples that failed in neither run count.

    Args:
        first, other: runs that ``require_same`` lets pass.
        task: of both.
        heads: what the runs are called.

    Raises:
        DataError: no sample went well in both.
    """
    records = [{record.sample_id: record for record in one.store.records(task.name)} for one in (first, other)]
    both = [name for name in records[0] if all(found[name].status != FAILED for found in records)]
    if not both:
        raise DataError(f"{task.name} has no sample that failed neither in {first.folder} nor in {other.folder}")
    rows = [task.tally([_judged(found[name]) for name in both]) for found in records]
    drawn = group_weights([row.group for some in rows for row in some])
    parts = drawn.select(np.arange(len(rows[0]))), drawn.select(np.arange(len(rows[0]), len(drawn.index)))
    asked = {record.subset for record in records[0].values()} if task.macro else set()
    figures = [_replicates(task, some, part, asked) for some, part in zip(rows, parts, strict=True)]
    cells: list[tuple[Cell, ...]] = []
    bold = set()
    for metric, subset in figures[0]:
        if (metric, subset) not in figures[1]:
            continue
        inside = [subset in (row.subset, "mean") for row in rows[0]]
        part = parts[0].select(np.array(inside))
        own, theirs = (found[metric, subset] for found in figures)
        if metric == task.primary:
            bold.add(len(cells))
        cells.append((metric, subset, part.interval(own), part.interval(theirs), _tested(theirs - own, part)))
    left = len(records[0]) - len(both)
    note = PAIRED + (f" {left} samples that failed in one of the runs are left out." if left else "")
    columns = ("metric", "subset", *heads, f"{heads[1]} − {heads[0]}")
    return Table(f"{task.name}: {heads[1]} against {heads[0]}", columns, tuple(cells), note, frozenset(bold))


def _judged(record: Record) -> tuple[Sample, Mapping[str, float]]:
    """What ``Task.tally`` takes, from what the run stored."""
    image = ImageRef(record.image, Path(record.image))
    sample = Sample(record.sample_id, image, record.question, record.group, record.subset, record.reference)
    return sample, record.score.counts if record.score else {}


def _replicates(
    task: Task, rows: Sequence[Tally], drawn: Resamples, asked: Collection[str] = ()
) -> dict[tuple[str, str], np.ndarray]:
    counts = pd.DataFrame([dict(row.counts) for row in rows]).fillna(0.0)
    return count_replicates(task.metrics(), counts, [row.subset for row in rows], drawn, task.macro, asked)


def _tested(difference: np.ndarray, drawn: Resamples) -> Gap:
    return Gap(drawn.interval(difference), p_value(difference))


def _test_images(source: Source, images: set[str]) -> set[str]:
    """Of some images those that the run's detector has not learned from: also those in which nothing was named."""
    rows = source.warnings
    if not (rows["fold"] != "").any():
        return images
    return images - set(rows.loc[rows["fold"] != "test", "group"])


def detector_table(first: Source, other: Source, heads: tuple[str, str]) -> Table:
    """The detectors of two runs on the images that neither has learned from, and what the second is above the first.

    Each is judged on the mentions of its own run's answers; where the answers are the same, so are the mentions.

    Raises:
        DataError: they have no test image in common, or one kind of mention is missing there.
    """
    from stethoscope.detection.judging import measure

    images = set(first.warnings["group"]) | set(other.warnings["group"])
    common = _test_images(first, images) & _test_images(other, images)
    firsts = any((one.held_out["repeat"] == 0).all() for one in (first, other))
    rows = [one.held_out[one.held_out["group"].isin(common)] for one in (first, other)]
    rows = [some[some["repeat"] == 0] if firsts else some for some in rows]
    if any(some["label"].nunique() < 2 for some in rows):
        raise DataError(
            f"{first.folder} and {other.folder} have {len(common)} test images in common, without hallucinated and "
            "grounded mentions in both; train their detectors with the same seed and split"
        )
    drawn = group_weights(pd.concat(some["group"] for some in rows))
    parts = drawn.select(np.arange(len(rows[0]))), drawn.select(np.arange(len(rows[0]), len(drawn.index)))
    figures = [
        measure(some, {"detector": some["probability"].to_numpy()}, part)
        for some, part in zip(rows, parts, strict=True)
    ]
    cells = []
    for metric, title in {**RANKING, **AT_WORK}.items():
        if all(("detector", metric) in found for found in figures):
            own, theirs = (found["detector", metric] for found in figures)
            cells.append((title, parts[0].interval(own), parts[1].interval(theirs), _tested(theirs - own, parts[0])))
    which = "first mentions" if firsts else "mentions"
    sizes = f"{len(rows[0])} and {len(rows[1])} {which} in {drawn.groups} images"
    note = f"{sizes} that neither detector has learned from. {PAIRED}"
    title = f"detectors: {heads[1]} against {heads[0]}"
    return Table(title, ("", *heads, f"{heads[1]} − {heads[0]}"), tuple(cells), note, frozenset({0}))


def transfer_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A detector at home and on other runs, beside one that is trained there; from ``results["transfer"]``."""
    shown = {metric: {**RANKING, **AT_WORK}[metric] for metric in TRANSFERRED}
    cells: list[tuple[Cell, ...]] = []
    for row in rows:
        for which in ("at home", "transferred", "trained there"):
            if which in row:
                cells.append((row["target"], which, *(interval(row[which][metric]) for metric in shown)))
        if "difference" in row:
            gaps = [Gap(interval(row["difference"][metric]), row["difference"][metric]["p"]) for metric in shown]
            cells.append((row["target"], "transferred − trained there", *gaps))
    sizes = ", ".join(f"{row['target']} {row['mentions']} in {row['images']}" for row in rows)
    note = f"On test images only; mentions and images: {sizes}. {PAIRED}"
    return Table("transfer", ("judged on", "detector", *shown.values()), tuple(cells), note, frozenset({0}))


def board_table(sources: Sequence[Source], heads: Sequence[str]) -> Table | None:
    """The leader boards of several runs under each other: detectors, baselines, the best single feature."""
    found, bold = [], set()
    columns = {metric: {**RANKING, **AT_WORK}[metric] for metric in (*list(RANKING)[:4], "auprc_hallucinated", "ece")}
    for head, source in zip(heads, sources, strict=True):
        if not source.detector:
            continue
        board = source.detector["leaderboard"]
        best = board["best_features"].get("auroc")
        for row in shown_rows(board):
            if row["kind"] == "feature" and row["name"] != best:
                continue
            if row["kind"] == "detector":
                bold.add(len(found))
            found.append((head, row["name"], *(interval(row["metrics"].get(metric)) for metric in columns)))
    if not found:
        return None
    note = "Each on the test images of its own run."
    return Table("leader boards", ("run", "", *columns.values()), tuple(found), note, frozenset(bold))


def summary_table(sources: Sequence[Source], heads: Sequence[str]) -> Table:
    """One row for every run: the primary metric of its tasks, and its detector."""
    leading = {result.task: result.primary for source in sources for result in source.results}
    detectors = [source for source in sources if source.detector]
    titles = {**RANKING, **AT_WORK}
    rows = []
    for head, source in zip(heads, sources, strict=True):
        mine = {result.task: result for result in source.results}
        cells: list[Cell] = [primary(mine[task]) if task in mine else None for task in leading]
        if detectors:
            board = source.detector["leaderboard"]["rows"][0]["metrics"] if source.detector else {}
            cells += [interval(board.get(metric)) for metric in SUMMARY]
        rows.append((head, source.model, *cells))
    columns = ["run", "model", *(f"{task} {metric}" for task, metric in leading.items())]
    columns += [f"detector: {titles[metric]}" for metric in SUMMARY] if detectors else []
    return Table("runs", tuple(columns), tuple(rows), "95 % intervals from resampled images.")


def setting_table(sources: Sequence[Source], heads: Sequence[str]) -> Table | None:
    """In what the runs differ: model, generation, features, detector; None where in nothing."""
    known = [_settings(source) for source in sources]
    changed = {
        key: None for one in known[1:] for key, _, _ in differences(known[0], one)
    }  # a dict keeps the order in which they come
    if not changed:
        return None
    rows = tuple((key, *(_short(_at(one, key)) for one in known)) for key in changed if key != "features")
    if "features" in changed:
        rows += (("features", *(_features(known[0]["features"], one["features"]) for one in known)),)
    return Table("settings that differ", ("", *heads), rows)


def _settings(source: Source) -> dict[str, Any]:

    found = next(iter(source.store.fingerprints().values()), {})
    settings = {key: found[key] for key in ("adapter", "generation") if key in found}
    features = [one["features"] for one in source.store.fingerprints().values() if "features" in one]
    manifest = source.folder / "detector" / "manifest.json"
    settings["features"] = features[0].get("names", []) if features else []
    if manifest.is_file():
        settings["detector"] = read_json(manifest, "`stethoscope train` makes the detector again").get("settings", {})
    return settings


def _features(first: Sequence[str], other: Sequence[str]) -> str:
    """How many features, and which the first run has not or has besides.

    >>> _features(["nll", "pmi"], ["nll", "svar"])
    '2: without pmi; with svar'
    """
    lacking, more = ([name for name in one if name not in two] for one, two in ((first, other), (other, first)))
    parts = [f"{word} {', '.join(found)}" for word, found in (("without", lacking), ("with", more)) if found]
    return f"{len(other)}" + (f": {'; '.join(parts)}" if parts else "")


def _at(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, Mapping) else None
    return settings


def _short(value: Any, most: int = 120) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= most else text[: most - 2] + " …"


def compare(sources: Sequence[Source], task_of: TaskOf) -> tuple[list[Table], list[str]]:
    """All tables of a comparison: every run against the first.

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
    first, heads = sources[0], names(sources)
    for other in sources[1:]:
        require_same(first, other)
    found: list[Table | None] = [summary_table(sources, heads), setting_table(sources, heads)]
    remarks = [source.no_detector() for source in sources if source.no_detector()]
    for head, other in zip(heads[1:], sources[1:], strict=True):
        pair = heads[0], head
        found += [task_table(first, other, task_of(first, task), pair) for task in common_tasks(first, other)]
        if not (first.no_detector() or other.no_detector()):
            if first.task != other.task:
                remarks.append(f"the detectors judge mentions of {first.task} and of {other.task}")
                continue
            try:
                found.append(detector_table(first, other, pair))
            except DataError as error:
                remarks.append(str(error))
    found.append(board_table(sources, heads))
    return [table for table in found if table is not None], remarks
