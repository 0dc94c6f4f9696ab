"""Read a run, finished or in progress: metrics, answers, mentions, importance of features."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from stethoscope.core.errors import ArtefactError, unknown
from stethoscope.core.files import check_shape, read_yaml
from stethoscope.core.json_rows import check_content
from stethoscope.core.text import counted, listed
from stethoscope.core.token_table import mention_rows
from stethoscope.detection.detector_results import DetectorResults
from stethoscope.evaluation.given_answers import NOT_OWN
from stethoscope.evaluation.results import TaskResults
from stethoscope.features.columns import feature_of, keep_columns
from stethoscope.metrics.bootstrap import Interval, group_weights
from stethoscope.metrics.ranking import Order, Ranking
from stethoscope.storage.run_dir import DETECTOR, REMEDIES, RunStore, read_warnings
from stethoscope.storage.saved_heatmaps import HeatmapFile, SavedMedia

if TYPE_CHECKING:
    import pandas as pd

    from stethoscope.storage.records import Record

Value = TypeVar("Value")

_KEYS = ["sample_id", "start"]
_MENTION = ["sample_id", "mention_index"]
SHUFFLES, REPLICATES = 3, 200
PRIOR = "place and name"

FINGERPRINT_SHAPE: dict[str, Any] = {"adapter": dict, "task": dict}
"""A section of ``fingerprint.json``."""

SHOWN_TASK_SHAPE: dict[str, Any] = {"class": str, "version": str, "settings": dict}
"""The part of ``task`` in it that a report shows."""


@contextmanager
def readable(folder: Path | str) -> Iterator[None]:
    """Raise errors that are caused by wrong values in a run's files as one line about the run.

    The files are JSON with some hundred fields, and a wrong value shows only where it is used. The message names the
    line of our code as well, in case the error is ours.

    Args:
        folder: the run directory, or the names of several, for the message.

    Raises:
        ArtefactError: a value was not of the expected type.
    """
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        frame = next((frame for frame in reversed(frames) if "stethoscope" in frame.filename), frames[-1])
        reason = " ".join(str(error).split())[:160]
        raise ArtefactError(
            f"a file of the run in {folder} is damaged, it holds a value of another kind than expected "
            f"({type(error).__name__}: {reason}; {Path(frame.filename).name}, line {frame.lineno}); "
            "the command that made the file makes it again"
        ) from error


@dataclass(frozen=True)
class RunReader:
    """A finished run, or what there is of one in progress.

    Attributes:
        folder: its directory.
        store: of the directory.
        results: metrics of its finished tasks.
        detector: results of the detector that was trained on this run; None without one.
        unfinished: status by task of those that have no figures yet, ``DETECTOR`` while one is being fitted; empty for
            a finished run.
    """

    folder: Path
    store: RunStore
    results: tuple[TaskResults, ...]
    detector: DetectorResults | None
    unfinished: Mapping[str, str] = field(default_factory=dict)
    _cache: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def read(cls, folder: Path, in_progress: bool = False) -> RunReader:
        """Read the metrics of a run directory.

        Args:
            folder: the run directory.
            in_progress: whether it may be unfinished.

        Raises:
            ArtefactError: it is no run directory, one of its tasks is not finished, or a file is damaged.
        """
        if not (folder / "samples.jsonl").is_file():
            raise ArtefactError(_describe_missing_run(folder))
        with readable(folder):
            return cls._read(folder, in_progress)

    @classmethod
    def _read(cls, folder: Path, in_progress: bool) -> RunReader:
        store = RunStore(folder)
        statuses, figures, fingerprints = store.status(), store.metrics(), store.fingerprints()
        unfinished = {task: status for task, status in statuses.items() if status != "finished"}
        unfinished |= {task: "without figures" for task in fingerprints if task not in {**figures, **unfinished}}
        if set(unfinished) == {DETECTOR} and not in_progress:
            raise ArtefactError(
                f"the run in {folder} has parts of two detectors: fitting one was cut short. The command that did "
                f"(`stethoscope train run={folder}`, or `benchmark`) makes it whole"
            )
        if (unfinished and not in_progress) or not statuses:
            reason = ", ".join(f"{task}: {status}" for task, status in unfinished.items()) or "it has no status.json"
            raise ArtefactError(
                f"the run in {folder} is not finished ({reason}); the command that was cut short goes on with it"
            )
        for task, section in fingerprints.items():
            check_shape(folder / "fingerprint.json", section, FINGERPRINT_SHAPE, REMEDIES["fingerprint.json"], task)
        sections = (*fingerprints, *([DETECTOR] if figures.get(DETECTOR) else ()))
        known = {name: figures[name] for name in sections if name not in unfinished}
        check_content("metrics", known, folder / "metrics.json", REMEDIES["metrics.json"])
        tasks = tuple(TaskResults.from_dict(task, known[task]) for task in fingerprints if task in known)
        detector = DetectorResults.from_dict(known[DETECTOR]) if DETECTOR in known else None
        return cls(folder, store, tasks, detector, unfinished)

    @property
    def name(self) -> str:
        """Return the last part of the folder's path."""
        return self.folder.resolve().name

    @cached_property
    def config(self) -> dict[str, Any]:
        """Read the configuration that the run was made with, as plain data; empty where it has none."""
        return read_yaml(self.folder / "config.yaml", REMEDIES["config.yaml"], default={})

    @property
    def model(self) -> str:
        """Name the model that answered."""
        settings = self.config.get("model")
        if isinstance(settings, dict) and settings.get("name"):
            return str(settings["name"])
        fingerprint: Mapping[str, Any] = next(iter(self.store.fingerprints().values()), {})
        adapter = fingerprint.get("adapter", {})
        return str(adapter.get("model_id") or adapter.get("model_class") or "unknown model")

    @property
    def task(self) -> str:
        """Name the task whose mentions were scored; empty without warnings."""
        return "" if self.warnings.empty else str(self.warnings["task"].iloc[0])

    @cached_property
    def warnings(self) -> pd.DataFrame:
        """Read ``warnings.jsonl``, a row per object mention; empty if no detector was applied to the run.

        While tasks are unfinished their rows, and all rows of a detector that is being fitted, are of earlier answers
        or of an earlier detector, and are left out.

        Raises:
            ArtefactError: a line of it is damaged, or there is none, though the run has a detector.
        """
        import pandas as pd  # which only reports need, and `evaluate` prints a table of this module

        rows = [] if DETECTOR in self.unfinished else read_warnings(self.folder)
        rows = [row for row in rows if row["task"] not in self.unfinished]
        if self.detector and not rows and not self.unfinished:
            raise ArtefactError(
                f"{self.folder / 'warnings.jsonl'} has no lines or is missing, but metrics.json has a detector; "
                f"`stethoscope train run={self.folder}` makes both again"
            )
        return pd.DataFrame(rows)

    @cached_property
    def table(self) -> pd.DataFrame:
        """Read the token table of the warnings' task."""
        return self.store.tokens(self.task)

    @cached_property
    def rows(self) -> pd.DataFrame:
        """Join every mention of ``warnings`` with its row of the token table.

        Raises:
            ArtefactError: a warning has no row in the token table.
        """
        table = mention_rows(self.table, "first", "all", judged=False)
        verdicts = self.warnings[[*_KEYS, "end", "probability", "evidence", "prior", "warned", "fold"]]
        joined = table.drop(columns="end").merge(verdicts, on=_KEYS, how="inner", validate="one_to_one")
        if len(joined) != len(verdicts):
            raise ArtefactError(
                f"{len(verdicts) - len(joined)} of {len(verdicts)} lines of {self.folder / 'warnings.jsonl'} are about "
                "mentions that tokens.parquet does not have; `stethoscope train` makes both fit again"
            )
        return joined

    @cached_property
    def held_out(self) -> pd.DataFrame:
        """Select the labelled rows that the detector was not fitted on.

        These are the mentions of the test images, or of all images if the detector was fitted on another run: first
        mentions or all mentions, as the detector's metrics count them.
        """
        rows = self.rows[self.rows["label"] >= 0]
        if (rows["fold"] != "").any():
            rows = rows[rows["fold"] == "test"]
        if self.detector is None or self.detector.first_mentions_only:
            rows = rows[rows["repeat_index"] == 0]
        return rows.reset_index(drop=True)

    def cached(self, key: Hashable, compute: Callable[[], Value]) -> Value:
        """Return what was computed for ``key`` before, else compute and keep it until ``release``.

        Args:
            key: names the value with everything that it depends on besides the run.
            compute: returns the value, which nobody may change.
        """
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    def records(self, task: str) -> dict[str, Record]:
        """Read the records of a task by sample id, in the order of the file, and keep them until ``release``."""
        return self.cached(("records", task), lambda: {record.sample_id: record for record in self.store.records(task)})

    def release(self) -> None:
        """Drop the values of ``cached`` and the token table to free memory; they are read again where needed."""
        self._cache.clear()
        for name in ("table", "rows", "held_out"):
            self.__dict__.pop(name, None)

    def record(self, sample_id: str) -> Record | None:
        """Read the record of one sample of the warnings' task."""
        return self.store.find(self.task, sample_id)

    @cached_property
    def _heatmap_file(self) -> HeatmapFile:
        return HeatmapFile(self.folder)

    def saved_media(self, record: Record) -> SavedMedia | None:
        """Read the image and heat maps that the run saved of a sample; None if it saved nothing.

        Raises:
            ArtefactError: the sample's line of ``maps.jsonl`` is damaged.
        """
        return self._heatmap_file.find(record)

    def no_detector(self) -> str:
        """Explain in one line why the run has no detector; empty if it has one."""
        if self.detector or not self.warnings.empty:
            return ""
        if any(section.get("adapter", {}).get("has_model") is False for section in self.store.fingerprints().values()):
            return f"{self.folder} has no detector: no model has read its answers (model=none)"
        if not (self.folder / "tokens.parquet").is_file():
            return f"{self.folder} has no detector: `stethoscope extract run={self.folder}` and then `train` make one"
        return f"{self.folder} has no detector: `stethoscope train run={self.folder}` makes one"

    def progress(self) -> str:
        """Say in one line how far an unfinished run is; empty for a finished one."""
        planned = self.store.planned()
        parts = [
            f"{task}: {self.store.count(task)}{f' of {planned[task]}' if task in planned else ''} answered, {status}"
            for task, status in self.unfinished.items()
            if task != DETECTOR
        ]
        parts += ["its detector is being fitted"] if DETECTOR in self.unfinished else []
        return "; ".join(parts)

    def off_policy(self) -> str:
        """Name the tasks whose answers the run's model did not write; empty if there are none."""
        tasks = [result.task for result in self.results if result.answers.get("check", {}).get("own") is False]
        return f"{', '.join(tasks)}: {NOT_OWN}, or they were sampled." if tasks else ""


def _describe_missing_run(folder: Path) -> str:
    """Explain why a path is no run, and name the runs near it."""
    inside = _run_names(folder)
    if inside:
        return f"{folder} is no run directory but holds {len(inside)}: {listed(inside)}"
    reason = "is no run directory, it has no samples.jsonl" if folder.is_dir() else "is no directory"
    return f"{folder} {reason}; {unknown('run', folder.name, _run_names(folder.parent))}"


def _run_names(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("*/samples.jsonl")) if folder.is_dir() else []


@dataclass(frozen=True)
class Importance:
    """Permutation importance of one feature of a detector.

    Attributes:
        feature: its name; ``PRIOR`` for the mention's position and object name.
        columns: number of its columns in the token table, such as one for every layer.
        loss: AUROC with the feature, less AUROC with its values shuffled among the mentions.
    """

    feature: str
    columns: int
    loss: Interval


def by_feature(columns: Sequence[str]) -> dict[str, list[str]]:
    """Group columns by their feature; a column of no registered feature is a group of its own.

    >>> by_feature(["nll", "lens_rank_l00", "lens_rank_l01", "mine"])
    {'nll': ['nll'], 'lens_rank': ['lens_rank_l00', 'lens_rank_l01'], 'mine': ['mine']}
    """
    groups: dict[str, list[str]] = {}
    for column in columns:
        groups.setdefault(feature_of(column), []).append(column)
    return groups


def importances(source: RunReader, seed: int = 0) -> list[Importance]:
    """Measure every feature's permutation importance on the held-out mentions, greatest loss first.

    The columns of a feature are shuffled together (Breiman 2001, section 10, for groups). Correlated features share
    their importance, and each alone may lose little.

    Args:
        source: a run. The list is empty if it has no detector, or no hallucinated or no grounded mentions.
        seed: of shuffles and bootstrap.

    Raises:
        ArtefactError: the detector is damaged or does not fit the token table.
    """
    if not (source.folder / "detector" / "manifest.json").is_file() or source.held_out["label"].nunique() < 2:
        return []
    import pandas as pd

    from stethoscope.detection.detector import Detector
    from stethoscope.detection.evidence_prior import EXTERNAL

    detector = Detector.load(source.folder / "detector")
    missing = set(detector.schema.names) - set(source.table.columns)
    if missing:
        warnings.warn(
            f"the token table of {source.folder} lacks {counted(len(missing), 'column')} that its detector reads, "
            f"so that feature importance is left out; `stethoscope train run={source.folder}` makes both fit again",
            stacklevel=2,
        )
        return []
    mentions = pd.MultiIndex.from_frame(source.held_out[_MENTION])
    table = source.table[pd.MultiIndex.from_frame(source.table[_MENTION]).isin(mentions)]
    rows = detector.select_mentions(keep_columns(table, detector.schema.names))
    labels, resamples = rows["label"].to_numpy() == 1, group_weights(rows["group"].to_numpy(), REPLICATES, seed)
    generator = np.random.default_rng(seed)

    def area(scores: np.ndarray) -> np.ndarray:
        order = Order.of(labels, scores)
        return resamples.apply(lambda weights: {"area": Ranking(order, weights.T).auroc()})["area"]

    full_area = area(detector.predict(rows))
    parts = by_feature(detector.features)
    if detector.settings["factored"] or detector.settings["objects"]:
        parts[PRIOR] = list(EXTERNAL) if detector.settings["factored"] else ["object"]
    results = []
    for feature, columns in parts.items():
        areas = []
        for _ in range(SHUFFLES):
            order = generator.permutation(len(rows))
            shuffled = rows.assign(**{name: rows[name].to_numpy()[order] for name in columns})
            areas.append(area(detector.predict(shuffled)))
        results.append(Importance(feature, len(columns), resamples.interval(full_area - np.mean(areas, axis=0))))
    return sorted(results, key=lambda importance: -importance.loss.value)
