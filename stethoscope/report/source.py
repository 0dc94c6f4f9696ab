"""A finished run as reports read it: figures, answers, and the mentions that its detector judged."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.core.errors import ArtefactError, unknown
from stethoscope.core.files import check_shape, read_jsonl, read_yaml
from stethoscope.evaluation.results import TaskResults
from stethoscope.report.shapes import DETECTOR as DETECTOR_SHAPE
from stethoscope.report.shapes import FINGERPRINT, TASK, WARNING
from stethoscope.storage.run_dir import DETECTOR, REMEDIES, RunStore
from stethoscope.storage.saved_heatmaps import HeatmapFile, SavedMedia

if TYPE_CHECKING:
    import pandas as pd

    from stethoscope.storage.records import Record

CONFIG_REMEDY = "delete it; the command that made the run writes it again"
_WARNINGS_REMEDY = "delete it; `stethoscope train` makes it again"
_KEYS = ["sample_id", "start"]


@contextmanager
def readable(folder: Path | str) -> Iterator[None]:
    """Turn what wrong values in a run's files make of any step into one line about the run.

    The files are JSON with some hundred fields, some of them numbers that are only formatted; a changed one shows where
    it is used. The line names that place in our code too, in case that the fault is ours.

    Args:
        folder: the run directory, or the names of several, for the message.

    Raises:
        ArtefactError: a value was of another kind than the code expected.
    """
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = next((frame for frame in reversed(frames) if "stethoscope" in frame.filename), frames[-1])
        why = " ".join(str(error).split())[:160]
        raise ArtefactError(
            f"a file of the run in {folder} is damaged, it holds a value of another kind than expected "
            f"({type(error).__name__}: {why}; {Path(ours.filename).name}, line {ours.lineno}); "
            "the command that made the file makes it again"
        ) from error


@dataclass(frozen=True)
class Source:
    """A finished run.

    Attributes:
        folder: its directory.
        store: reads it.
        results: figures of its tasks.
        detector: the section of ``metrics.json`` of a detector trained on this run; empty without one.
    """

    folder: Path
    store: RunStore
    results: tuple[TaskResults, ...]
    detector: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Source:
        """Reads the figures of a run directory.

        Raises:
            ArtefactError: it is no run directory, a task of it is not finished, or a file is damaged.
        """
        if not (folder / "samples.jsonl").is_file():
            raise ArtefactError(_no_run(folder))
        with readable(folder):
            return cls._read(folder)

    @classmethod
    def _read(cls, folder: Path) -> Source:
        store = RunStore(folder)
        statuses, figures, fingerprints = store.status(), store.metrics(), store.fingerprints()
        late = {task: status for task, status in statuses.items() if status != "finished"}
        late |= {task: "without figures" for task in fingerprints if task not in figures and task not in late}
        if set(late) == {DETECTOR}:
            raise ArtefactError(
                f"the run in {folder} has parts of two detectors: fitting one was cut short. The command that did "
                f"(`stethoscope train run={folder}`, or `benchmark`) makes it whole"
            )
        if late or not statuses:
            how = ", ".join(f"{task}: {status}" for task, status in late.items()) or "it has no status.json"
            raise ArtefactError(
                f"the run in {folder} is not finished ({how}); the command that began it goes on with it"
            )
        for task, section in fingerprints.items():
            check_shape(folder / "fingerprint.json", section, FINGERPRINT, REMEDIES["fingerprint.json"], task)
            check_shape(folder / "metrics.json", figures[task], TASK, REMEDIES["metrics.json"], task)
        if figures.get("detector"):
            check_shape(
                folder / "metrics.json", figures["detector"], DETECTOR_SHAPE, REMEDIES["metrics.json"], "detector"
            )
        tasks = tuple(TaskResults.from_dict(task, figures[task]) for task in fingerprints)
        return cls(folder, store, tasks, figures.get("detector", {}))

    @property
    def name(self) -> str:
        """Last part of the folder's path."""
        return self.folder.resolve().name

    @property
    def model(self) -> str:
        """What model answered."""
        chosen = read_yaml(self.folder / "config.yaml", CONFIG_REMEDY, default={}).get("model")
        if isinstance(chosen, dict) and chosen.get("name"):
            return str(chosen["name"])
        adapter = next(iter(self.store.fingerprints().values()), {}).get("adapter", {})
        return str(adapter.get("model_id") or adapter.get("model_class") or "unknown model")

    @property
    def task(self) -> str:
        """Whose mentions the warnings are about; empty without warnings."""
        return "" if self.warnings.empty else str(self.warnings["task"].iloc[0])

    @cached_property
    def warnings(self) -> pd.DataFrame:
        """``warnings.jsonl``, a row per object mention; empty where no detector was applied to the run.

        Raises:
            ArtefactError: a line of it is damaged.
        """
        import pandas as pd

        return pd.DataFrame(read_warnings(self.folder))

    @cached_property
    def table(self) -> pd.DataFrame:
        """The token table of the warnings' task."""
        return self.store.tokens(self.task)

    @cached_property
    def rows(self) -> pd.DataFrame:
        """The token table's row of every mention of ``warnings``, with what the detector said of it.

        Raises:
            ArtefactError: warnings and token table are not of one run.
        """
        from stethoscope.core.token_table import mention_rows

        table = mention_rows(self.table, "first", "all", judged=False)
        said = self.warnings[[*_KEYS, "end", "probability", "evidence", "prior", "warned", "fold"]]
        joined = table.drop(columns="end").merge(said, on=_KEYS, how="inner", validate="one_to_one")
        if len(joined) != len(said):
            raise ArtefactError(
                f"{len(said) - len(joined)} of {len(said)} lines of {self.folder / 'warnings.jsonl'} are about "
                "mentions that tokens.parquet does not have; `stethoscope train` makes both fit again"
            )
        return joined

    @cached_property
    def held_out(self) -> pd.DataFrame:
        """The judged rows that the detector has not learned from, as its figures count them (first mentions, or all).

        Those of the test images; all where the detector was fitted elsewhere.
        """
        rows = self.rows[self.rows["label"] >= 0]
        if (rows["fold"] != "").any():
            rows = rows[rows["fold"] == "test"]
        if self.detector.get("split", {}).get("mentions", {}).get("repeats", "first") == "first":
            rows = rows[rows["repeat"] == 0]
        return rows.reset_index(drop=True)

    def record(self, sample_id: str) -> Record | None:
        """The record of one sample of the warnings' task."""
        return self.store.find(self.task, sample_id)

    @cached_property
    def _maps(self) -> HeatmapFile:
        return HeatmapFile(self.folder)

    def view(self, record: Record) -> SavedMedia | None:
        """Picture and heat maps that the run has kept of a record's sample; None where it has kept nothing.

        Raises:
            ArtefactError: its line of ``maps.jsonl`` is damaged.
        """
        return self._maps.find(record)

    def no_detector(self) -> str:
        """One line that says why there is nothing about a detector; empty if there is."""
        if self.detector or not self.warnings.empty:
            return ""
        if not (self.folder / "tokens.parquet").is_file():
            return f"{self.folder} has no detector: `stethoscope extract run={self.folder}` and then `train` make one"
        return f"{self.folder} has no detector: `stethoscope train run={self.folder}` makes one"


def read_warnings(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of ``warnings.jsonl`` of a run; none where no detector was applied to it.

    Raises:
        ArtefactError: the file is damaged.
    """
    path = folder / "warnings.jsonl"
    rows = read_jsonl(path, _WARNINGS_REMEDY, default=[])
    for number, row in enumerate(rows, 1):
        check_shape(f"{path}:{number}", row, WARNING, _WARNINGS_REMEDY)
    return rows


def _no_run(folder: Path) -> str:
    """Why a path is no run, and which runs are near it."""
    inside = _runs(folder) if folder.is_dir() else []
    if inside:
        shown = ", ".join(inside[:6]) + (f" and {len(inside) - 6} more" if len(inside) > 6 else "")
        return f"{folder} is no run directory but holds {len(inside)}: {shown}"
    what = "has no samples.jsonl" if folder.is_dir() else "is no directory"
    return f"{folder} is no run directory, it {what}; {unknown('run', folder.name, _runs(folder.parent))}"


def _runs(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("*/samples.jsonl")) if folder.is_dir() else []
