"""Read finished runs for the second tab: samples with what was caught and missed, and the figures."""

from __future__ import annotations

import json
import logging
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.app import payload
from stethoscope.app.answer import Question
from stethoscope.app.model_pool import ModelPool
from stethoscope.core.errors import ArtefactError, StethoscopeError, unknown
from stethoscope.core.types import Generation, ImageRef
from stethoscope.evaluation.saved_task import saved_task
from stethoscope.report.run_report import collect_report
from stethoscope.report.run_source import RunReader, readable

if TYPE_CHECKING:
    from stethoscope.core.types import Sample
    from stethoscope.storage.records import Record

logger = logging.getLogger(__name__)

MOST = 3000  # samples of a task in the list
WORDS = 320  # characters of an answer in the list
NO_RUN = "There is no finished run yet: `stethoscope benchmark` makes one, then start the app again."


class Runs:
    """The finished runs of a folder.

    Args:
        folder: of run directories. ``run``: the one to show first, anywhere; None for the newest of the folder.
        kept: folder for pictures that are opened; the only one of this machine that the server hands out.
        plugins: packages from which tasks may be made.

    Raises:
        ArtefactError: ``run`` is no finished run.
    """

    def __init__(self, folder: Path, run: Path | None, kept: Path, plugins: Sequence[str] = ()) -> None:
        files = sorted(folder.glob("*/metrics.json"), key=lambda path: -path.stat().st_mtime)
        self._folders = {path.parent.name: path.parent for path in files if _finished(path.parent)}
        if run is not None:
            RunReader.read(run)
            self._folders = {run.resolve().name: run, **self._folders}
        self._kept, self._plugins = kept, plugins
        self._report = lru_cache(4)(_report)
        self._samples = lru_cache(4)(self._read_samples)

    @property
    def names(self) -> list[str]:
        """What there is to choose from; that of ``run`` first, then the newest."""
        return list(self._folders)

    @property
    def first(self) -> str | None:
        """The run to begin with."""
        return next(iter(self._folders), None)

    def source(self, name: str | None) -> RunReader:
        """A run by its name.

        Raises:
            ArtefactError: there is none of that name, or it is damaged.
        """
        if name not in self._folders:  # a name, never a path: users of the page choose among these
            raise ArtefactError(unknown("run", str(name), self._folders))
        return RunReader.read(self._folders[name])

    def listing(self, name: str | None) -> str:
        """All samples of a run, as JSON for the list; what is wrong with the run is shown in it."""
        if not self._folders:
            return payload.encode("list", rows=[], note=NO_RUN, run="")
        try:
            source = self.source(name)
            with readable(source.folder):
                rows = [row for task in _tasks(source) for row in _rows(source, task)]
        except Exception as error:  # one bad run never stops the app
            return payload.encode("list", rows=[], note=_note(error), run=str(name))
        return payload.encode("list", rows=rows, note=source.no_detector(), run=str(name))

    def figures(self, name: str | None) -> str:
        """Leader board, ROC, calibration and the rest of the run's report, as JSON for the frame that shows it."""
        if not self._folders:
            return payload.encode("figures", note=NO_RUN)
        try:
            folder = self.source(name).folder
            page = self._report(folder, (folder / "metrics.json").stat().st_mtime_ns)
        except Exception as error:
            return payload.encode("figures", note=_note(error))
        return payload.encode("figures", page=page, title=f"figures of {name}")

    def question(self, name: str, task: str, sample_id: str, pool: ModelPool, model: str) -> Question:
        """A sample with its stored answer, to be looked at; its picture is a new file of the app's own folder.

        Args:
            model: chosen on the page; taken where the run's own is none of the pool.

        Raises:
            ArtefactError: there is no such sample, it has no answer, or its picture is gone.
        """
        from stethoscope.detection.detector import Detector

        source = self.source(name)
        with readable(source.folder):
            record = source.store.find(task, sample_id)
        if record is None or record.answer is None or not record.answer.token_ids:
            raise ArtefactError(f"{name} has no answer to {task} sample {sample_id}")
        notes = [f"Stored answer of the run {name}, sample {sample_id} of {task}."]
        picture = self._picture(name, source, record, notes)
        if source.model in pool.names:
            model = source.model
        else:
            notes.append(f"The run was made with {source.model}, which is not loaded; this is how {model} reads it.")
        detector = None
        if (source.folder / "detector").is_dir():
            detector = Detector.load(source.folder / "detector")
            notes.append("Judged by the run's own detector.")
        file = Path(tempfile.mkdtemp(dir=self._kept)) / "sample.png"
        picture.save(file)
        return Question(model, file, record.question, Generation(), record.answer, detector, tuple(notes))

    def _picture(self, name: str, source: RunReader, record: Record, notes: list[str]) -> Any:
        """The picture that was asked about, or the run's small copy of it."""
        why = "its task no longer has the sample"
        try:
            sample = self._samples(name, record.task).get(record.sample_id)
            if sample is not None and not record.changes(sample):
                return sample.image.load()
        except (StethoscopeError, ImportError) as error:
            why = str(error)
        media = source.saved_media(record)
        if media is None or media.picture is None:
            raise ArtefactError(f"the picture of sample {record.sample_id} is not to be had: {why}")
        notes.append(f"The picture is the run's small copy: {why}.")
        return media.picture

    def _read_samples(self, name: str, task: str) -> dict[str, Sample]:
        made = saved_task(self.source(name).store, task, self._plugins, offline=True)
        made.setup()
        return {sample.id: sample for sample in made.samples()}


def _finished(folder: Path) -> bool:
    try:
        RunReader.read(folder)
    except StethoscopeError:  # half a run, or another kind of folder: nothing to look through yet
        return False
    except Exception as error:  # a damaged one, in a way that no reader knows; the other runs are shown all the same
        logger.error("%s is left out, it cannot be read: %s", folder, type(error).__name__, exc_info=error)
        return False
    return True


def _note(error: Exception) -> str:
    """What is wrong with a run, for the page."""
    return json.loads(payload.failure(error))["text"]


def _report(folder: Path, changed: int) -> str:
    """The page of ``stethoscope report``, made again when the figures have changed."""
    with readable(folder):
        return collect_report(RunReader.read(folder), examples=0).html()


def _tasks(source: RunReader) -> list[str]:
    """Tasks of the run, that of the warnings first."""
    return sorted((result.task for result in source.results), key=lambda task: task != source.task)


def _rows(source: RunReader, task: str) -> list[dict[str, Any]]:
    """Rows of the list: samples with the mentions that warnings are about."""
    said: dict[str, list[Any]] = defaultdict(list)
    folds: dict[str, str] = {}
    warnings = source.warnings
    for row in [] if warnings.empty else warnings[warnings["task"] == task].to_dict("records"):
        said[row["sample_id"]].append([row["object"], kind(row["label"], row["warned"]), round(row["probability"], 4)])
        folds[row["sample_id"]] = row["fold"]
    rows = []
    for record in source.store.records(task):
        if len(rows) == MOST:
            break
        text = record.error if record.answer is None else record.answer.text
        rows.append(
            {
                "task": task,
                "sample": record.sample_id,
                "question": record.question,
                "answer": text if len(text) <= WORDS else text[:WORDS] + " …",
                "status": record.status,
                "fold": folds.get(record.sample_id, ""),
                "mentions": said.get(record.sample_id, []),
            }
        )
    return rows


def kind(label: int, warned: bool) -> str:
    """What became of a mention.

    >>> kind(1, True), kind(1, False), kind(0, True), kind(0, False), kind(-1, True)
    ('caught', 'missed', 'false alarm', 'right', 'not judged')
    """
    if label < 0:
        return "not judged"
    return ("caught" if warned else "missed") if label else ("false alarm" if warned else "right")


def write_examples(folder: Path, seed: int, count: int = 6) -> list[Path]:
    """Files of rendered scenes of the embedded world.

    Args:
        folder: where to write them. ``seed``: which scenes. ``count``: how many.
    """
    from stethoscope import testbed

    files = []
    for scene in testbed.scenes(int(seed) + count)[-count:]:
        file = folder / f"{scene.id}.png"
        ImageRef(scene.id, scene.image).load().save(file)
        files.append(file)
    return files
