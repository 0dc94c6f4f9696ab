"""Read finished runs for the second tab: samples with their scored mentions, and the report."""

from __future__ import annotations

import json
import logging
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.app import payload
from stethoscope.app.answer import Question
from stethoscope.app.model_pool import ModelPool
from stethoscope.core.errors import ArtefactError, StethoscopeError, unknown
from stethoscope.core.html import data_uri
from stethoscope.core.types import Generation, ImageRef
from stethoscope.diagnosis.edited_answer import edit_payload
from stethoscope.diagnosis.verdict import mention_outcome
from stethoscope.report.run_report import collect_report
from stethoscope.report.run_source import RunReader, readable
from stethoscope.storage.run_dir import saved_task

if TYPE_CHECKING:
    from PIL.Image import Image

    from stethoscope.core.types import Sample
    from stethoscope.storage.records import Record

logger = logging.getLogger(__name__)

MOST_SAMPLES = 3000  # of a task in the list
THUMBNAIL = 96  # pixels along the longer side
ANSWER_LENGTH = 320  # characters of an answer in the list
NO_RUN = "There is no finished run yet: `stethoscope benchmark` makes one, then start the app again."


class Runs:
    """The finished runs of a folder.

    Args:
        folder: of run directories.
        run: the run directory to show first, inside or outside ``folder``; None for the newest of the folder.
        picture_folder: for opened pictures; the only folder of this machine whose files the server sends.
        plugins: packages from which tasks may be built.

    Raises:
        ArtefactError: ``run`` is no finished run.
    """

    def __init__(self, folder: Path, run: Path | None, picture_folder: Path, plugins: Sequence[str] = ()) -> None:
        files = sorted(folder.glob("*/metrics.json"), key=lambda path: -path.stat().st_mtime)
        self._folders = {path.parent.name: path.parent for path in files if _finished(path.parent)}
        if run is not None:
            RunReader.read(run)
            self._folders = {run.resolve().name: run, **self._folders}
        self._picture_folder, self._plugins = picture_folder, plugins
        self._report = lru_cache(4)(self._report_page)
        self._samples = lru_cache(4)(self._read_samples)

    @property
    def names(self) -> list[str]:
        """List the names of the runs: that of ``run`` first, then the newest."""
        return list(self._folders)

    @property
    def first(self) -> str | None:
        """Return the name of the run to show first; None if there is no run."""
        return next(iter(self._folders), None)

    def source(self, name: str | None) -> RunReader:
        """Read a run by its name.

        Raises:
            ArtefactError: there is no run of that name, or it is damaged.
        """
        if name not in self._folders:  # a name, never a path: users of the page may open only these runs
            raise ArtefactError(unknown("run", str(name), self._folders))
        return RunReader.read(self._folders[name])

    def listing(self, name: str | None) -> str:
        """Encode all samples of a run for the list; an error is shown as a note in it."""
        if not self._folders:
            return payload.encode("list", rows=[], note=NO_RUN, run="")
        try:
            source = self.source(name)
            with readable(source.folder):
                tasks = sorted((result.task for result in source.results), key=lambda task: task != source.task)
                rows = [row for task in tasks for row in _rows(source, task)]
        except Exception as error:  # a damaged run must not stop the app
            return payload.encode("list", rows=[], note=_error_text(error), run=str(name))
        notes = filter(None, (source.no_detector(), source.off_policy()))
        return payload.encode("list", rows=rows, note=" ".join(notes), run=str(name))

    def thumbnails(self, name: str, keys: Sequence[str]) -> str:
        """Encode small pictures of samples for the list; what cannot be had is left out.

        Args:
            name: of the run.
            keys: task and id of every sample, with a tab between them.
        """
        pictures: dict[str, str] = {}
        try:
            source = self.source(name)
            for key in keys:
                task, _, sample_id = key.partition("\t")
                record = source.store.find(task, sample_id)
                if record is not None:
                    pictures[key] = data_uri(self._read_picture(name, source, record, []), THUMBNAIL)
        except StethoscopeError as error:  # the list is of use without pictures
            logger.info("no more thumbnails of %s: %s", name, error)
        return payload.encode("thumbnails", run=name, pictures=pictures)

    def figures(self, name: str | None) -> str:
        """Encode the page of the run's report for the frame that shows it; an error is shown as a note in it."""
        if not self._folders:
            return payload.encode("figures", note=NO_RUN)
        try:
            folder = self.source(name).folder
            page = self._report(str(name), (folder / "metrics.json").stat().st_mtime_ns)
        except Exception as error:
            return payload.encode("figures", note=_error_text(error))
        return payload.encode("figures", page=page, title=f"figures of {name}")

    def question(
        self, name: str, task: str, sample_id: str, pool: ModelPool, model: str, mention: int | None = None
    ) -> Question:
        """Build a question from a sample, its stored answer, and its picture as a file of the app's folder.

        Args:
            name: of the run.
            task: of the sample.
            sample_id: of the sample.
            pool: the models.
            model: chosen on the page; used if the run's own model is not in the pool.
            mention: first character of the tokens of the mention to look at; None for none in particular.

        Raises:
            ArtefactError: there is no such sample, it has no answer, or its picture cannot be read.
        """
        from stethoscope.detection.detector import Detector

        source = self.source(name)
        with readable(source.folder):
            record = source.store.find(task, sample_id)
            if record is not None and record.answer is not None:
                edit_payload(record.edit, record.answer.text)  # a damaged edit is told here
        if record is None or record.answer is None or not record.answer.token_ids:
            raise ArtefactError(f"{name} has no answer to {task} sample {sample_id}")
        notes = [f"Stored answer of the run {name}, sample {sample_id} of {task}."]
        picture = self._read_picture(name, source, record, notes)
        if source.model in pool.names:
            model = source.model
        else:
            notes.append(f"The run was made with {source.model}, which is not loaded; this is how {model} reads it.")
        detector = None
        if (source.folder / "detector").is_dir():
            detector = Detector.load(source.folder / "detector")
            notes.append("Judged by the run's own detector.")
        file = Path(tempfile.mkdtemp(dir=self._picture_folder)) / "sample.png"
        picture.save(file)
        label, objects = record.reference.get("label"), record.reference.get("objects")
        if isinstance(label, str):
            notes.append(f"The right answer is {label}.")
        return Question(
            model,
            file,
            record.question,
            Generation(),
            record.answer,
            detector,
            tuple(notes),
            record.asks,
            tuple(map(str, objects)) if isinstance(objects, list) else None,
            record.mentions or None,
            {"run": name, "mention": mention, **_neighbours(source, task, sample_id)},
            edit=record.edit,
        )

    def _read_picture(self, name: str, source: RunReader, record: Record, notes: list[str]) -> Image:
        """Read the sample's picture from its task, or else the run's small copy of it."""
        reason = "its task no longer has the sample"
        try:
            sample = self._samples(name, record.task).get(record.sample_id)
            if sample is not None and not record.changes(sample):
                return sample.image.load()
        except (StethoscopeError, ImportError) as error:
            reason = str(error)
        media = source.saved_media(record)
        if media is None or media.picture is None:
            raise ArtefactError(f"the picture of sample {record.sample_id} is not to be had: {reason}")
        notes.append(f"The picture is the run's small copy: {reason}.")
        return media.picture

    def _report_page(self, name: str, changed: int) -> str:
        """Write the page of ``stethoscope report``; ``changed``, a time, makes the cache key change."""
        source = self.source(name)

        def picture(record: Record) -> Image | None:
            try:
                return self._read_picture(name, source, record, [])
            except ArtefactError:
                return None

        with readable(source.folder):
            return collect_report(source, image_source=picture).html(sortable=False)

    def _read_samples(self, name: str, task: str) -> dict[str, Sample]:
        rebuilt = saved_task(self.source(name).store, task, self._plugins, offline=True)
        rebuilt.setup()
        return {sample.id: sample for sample in rebuilt.samples()}


def _neighbours(source: RunReader, task: str, sample_id: str) -> dict[str, Any]:
    """Describe the position of a sample among those of its task, see ``answer.Question``."""
    ids = list(source.store.sample_ids(task))
    index = ids.index(sample_id)
    return {
        "task": task,
        "sample": sample_id,
        "previous": ids[index - 1] if index else None,
        "next": ids[index + 1] if index + 1 < len(ids) else None,
        "index": index + 1,
        "count": len(ids),
    }


def _finished(folder: Path) -> bool:
    try:
        RunReader.read(folder)
    except StethoscopeError:  # an unfinished run, or another kind of folder
        return False
    except Exception as error:  # damaged in an unforeseen way, which must not hide the other runs
        logger.error("%s is left out, it cannot be read: %s", folder, type(error).__name__, exc_info=error)
        return False
    return True


def _error_text(error: Exception) -> str:
    """Describe an error as ``payload.failure`` does, as plain text."""
    return json.loads(payload.failure(error))["text"]


def _rows(source: RunReader, task: str) -> list[dict[str, Any]]:
    """Make the rows of the list: samples with their scored mentions."""
    mentions: dict[str, list[Any]] = defaultdict(list)
    folds: dict[str, str] = {}
    warnings = source.warnings
    for row in [] if warnings.empty else warnings[warnings["task"] == task].to_dict("records"):
        outcome = mention_outcome(row["label"], row["warned"])
        shown = [row["object"], outcome, round(row["probability"], 4), int(row["start"])]
        mentions[row["sample_id"]].append(shown)
        folds[row["sample_id"]] = row["fold"]
    rows: list[dict[str, Any]] = []
    for record in source.store.records(task):
        if len(rows) == MOST_SAMPLES:
            break
        text = record.error if record.answer is None else record.answer.text
        rows.append(
            {
                "task": task,
                "sample": record.sample_id,
                "question": record.question,
                "answer": text if len(text) <= ANSWER_LENGTH else text[:ANSWER_LENGTH] + " …",
                "status": record.status,
                "fold": folds.get(record.sample_id, ""),
                "mentions": mentions.get(record.sample_id, []),
            }
        )
    return rows


@dataclass(frozen=True)
class ExamplePicture:
    """A rendered scene to choose from.

    Attributes:
        file: its picture, in the app's own folder.
        name: to be read out where the picture is not seen.
        objects: names of what it shows.
    """

    file: Path
    name: str
    objects: tuple[str, ...]


def write_examples(folder: Path, seed: int, count: int = 6) -> list[ExamplePicture]:
    """Write rendered scenes of the testbed as image files.

    Args:
        folder: to write to.
        seed: index of the first scene.
        count: number of scenes.

    Returns:
        One example for every scene.
    """
    from stethoscope import testbed

    examples = []
    for scene in testbed.scenes(int(seed) + count)[int(seed) :]:
        file = folder / f"{scene.id}.png"
        ImageRef(scene.id, scene.image).load().save(file)
        examples.append(ExamplePicture(file, f"rendered scene {scene.id}, {scene.setting}", scene.visible))
    return examples
