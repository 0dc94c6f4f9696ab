"""Read runs, finished or in progress, for the second tab: samples, figures, comparisons."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.app import payload
from stethoscope.app.answer import Question
from stethoscope.app.model_pool import ModelPool
from stethoscope.core.cache import LRUCache
from stethoscope.core.errors import ArtefactError, ConfigError, StethoscopeError, unknown
from stethoscope.core.html import data_uri
from stethoscope.core.types import Generation
from stethoscope.diagnosis.viewer_parts import edit_payload
from stethoscope.report.compare import compare
from stethoscope.report.export import right_answer, shown_objects
from stethoscope.report.run_report import collect_report, table_page
from stethoscope.report.run_source import RunReader, readable
from stethoscope.report.sample_list import describe_note, find_row, joined_rows, list_samples, read_state
from stethoscope.storage.run_dir import DETECTOR, saved_task
from stethoscope.storage.sample_notes import Note, append_note, notes_csv, read_notes

if TYPE_CHECKING:
    from PIL.Image import Image

    from stethoscope.core.types import Sample
    from stethoscope.storage.records import Record

logger = logging.getLogger(__name__)

THUMBNAIL = 96  # pixels along the longer side
NO_RUN = "There is no run yet: `stethoscope benchmark` makes one."
ALL = "/"  # in place of a run's name: all runs; no folder can be named so
NO_FIGURES = "Figures are of one run, or of two side by side: choose it. `stethoscope compare` sets more side by side."


class Runs:
    """The runs of a folder, finished or in progress.

    Args:
        folder: of run directories; those that are made later are seen, too.
        run: the run directory to show first, inside or outside ``folder``; None for the newest of the folder.
        picture_folder: for opened pictures; the only folder of this machine whose files the server sends.
        plugins: packages from which tasks may be built.
        other: the run directory to show beside the first; None for none.
        writable: whether users may write notes on samples into the run directories.
        author: of notes where there are no accounts.

    Raises:
        ArtefactError: ``run`` or ``other`` is no run.
    """

    def __init__(
        self,
        folder: Path,
        run: Path | None,
        picture_folder: Path,
        plugins: Sequence[str] = (),
        other: Path | None = None,
        writable: bool = False,
        author: str = "anonymous",
    ) -> None:
        self._folder, self._named = folder, [path for path in (run, other) if path is not None]
        self._known: dict[Path, tuple[str, bool]] = {}
        for path in self._named:
            RunReader.read(path, in_progress=True)
        self._writable, self._author = writable, author
        self.other = next((name for name, path in self.folders.items() if path == other), None)
        self._picture_folder, self._plugins = picture_folder, plugins
        self._report = lru_cache(4)(self._report_page)
        self._comparison = lru_cache(4)(self._comparison_page)
        self._reader = lru_cache(256)(self._read_run)
        self._samples = LRUCache(4)  # samples of tasks by id

    @property
    def folders(self) -> dict[str, Path]:
        """Return the readable run directories by name.

        Those that the app was started with come first, then the newest.
        """
        files = sorted(self._folder.glob("*/samples.jsonl"), key=_modified, reverse=True)
        inside = [file.parent for file in files if self._is_readable(file.parent)]
        named = [(path.resolve().name, path) for path in self._named] + [(path.name, path) for path in inside]
        folders: dict[str, Path] = {}
        for name, path in named:
            parts, count = path.resolve().parts, 1
            while name in folders and folders[name].resolve() != path.resolve():  # another run of the same name
                count += 1
                name = "/".join(parts[-count:])
            folders.setdefault(name, path)
        return folders

    @property
    def names(self) -> list[str]:
        """List the names of the runs."""
        return list(self.folders)

    @property
    def first(self) -> str | None:
        """Return the name of the run to show first; None if there is no run."""
        return next(iter(self.folders), None)

    def source(self, name: str | None) -> RunReader:
        """Read a run by its name.

        Raises:
            ArtefactError: there is no run of that name, or it is damaged.
        """
        return RunReader.read(self._run_folder(name), in_progress=True)

    def listing(self, name: str | None, other: str | None = None) -> str:
        """Encode all samples of a run, or of ``ALL``, for the list, or those that two runs share.

        An error is a note in the list.

        Args:
            name: of the run, or ``ALL``; None if there is none.
            other: name of the run that is shown beside it; None or empty for none. All runs have none beside them.
        """
        shown = {"run": str(name or ""), "other": "" if name == ALL else other or "", "writable": self._writable}
        message: dict[str, Any] = {"rows": [], "note": "", **shown}
        if name is None:
            return payload.encode("list", **{**message, "note": NO_RUN})
        try:
            message["state"] = read_state(self._shown_folders(name, other))
            runs = self._every_run() if name == ALL else {}
            sources = list(runs.values()) or [self.source(chosen) for chosen in (name, other) if chosen]
            message["progress"] = _describe_progress(sources)
            message["rows"], message["note"] = joined_rows(runs) if runs else list_samples(sources)
        except Exception as error:  # a damaged run must not stop the app
            message["note"] = payload.error_text(error)
        return payload.encode("list", **message)

    def refreshed(self, name: str, other: str, state: str) -> str | None:
        """Encode the list again if files of its runs have changed.

        Args:
            name: of the run, or ``ALL``.
            other: name of the run beside it; empty for none.
            state: of the list that is shown.
        """
        try:
            folders = self._shown_folders(name, other)
        except StethoscopeError:
            return self.listing(name, other)
        return None if read_state(folders) == state else self.listing(name, other)

    def annotate(self, name: str, values: Mapping[str, Any], account: str = "") -> None:
        """Write a note on a sample, or on one of its mentions, into a run.

        Args:
            name: of the run.
            values: ``task``, ``sample``, ``start`` (of the mention, or None), ``label``, ``tags`` and ``text``, as the
                page sends them.
            account: of the author; empty where there are no accounts.

        Raises:
            ConfigError: the app was started without notes.
            ArtefactError: there is no such sample or mention, or the file cannot be written to.
            DataError: a value is too long or of another kind.
        """
        if not self._writable:
            raise ConfigError("notes are not written here: the app was started with notes=false")
        source = self.source(name)
        task, sample_id, start = (values.get(key) for key in ("task", "sample", "start"))
        with readable(source.folder):
            row = find_row(source, str(task), str(sample_id))
        names = {mention[3]: mention[0] for mention in row["mentions"]} if row else {}
        if row is None or (start is not None and (not isinstance(start, int) or start not in names)):
            raise ArtefactError(f"{name} has no mention at {start!r:.20} of {task!s:.80} sample {sample_id!s:.80}")
        tags = values.get("tags")
        append_note(
            source.folder,
            Note(
                task=row["task"],
                sample_id=row["sample"],
                start=start,
                object=names.get(start, ""),
                label=None if start is None else values.get("label"),
                tags=tuple(tags) if isinstance(tags, list) else (),
                text=values.get("text", ""),
                author=(account or self._author)[:100],
            ),
        )

    def notes(self, name: str, kind: str) -> str:
        """Encode all notes of a run as a file to be saved: ``csv``, or else JSON."""
        notes = read_notes(self.source(name).folder)
        if kind == "csv":
            return payload.encode("file", name="notes.csv", type="text/csv", content=notes_csv(notes))
        content = json.dumps([note.to_dict() for note in notes], indent=1, ensure_ascii=False)
        return payload.encode("file", name="notes.json", type="application/json", content=content)

    def thumbnails(self, name: str, keys: Sequence[str]) -> str:
        """Encode small pictures of samples for the list; what cannot be had is left out.

        Args:
            name: of the run, or ``ALL``.
            keys: task and id of every sample, with a tab between them; for ``ALL`` the run and another tab before.
        """
        pictures: dict[str, str] = {}
        runs = self._every_run() if name == ALL else {}
        for key in keys:
            run, _, rest = key.partition("\t") if name == ALL else (name, "", key)
            task, _, sample_id = rest.partition("\t")
            try:
                source = runs[run] if run in runs else runs.setdefault(run, self.source(run))
                record = source.store.find(task, sample_id)
                if record is not None:
                    pictures[key] = data_uri(self._read_picture(source, record, []), THUMBNAIL)
            except StethoscopeError as error:  # the list is of use without pictures
                logger.info("no thumbnail of %s: %s", key, error)
        return payload.encode("thumbnails", run=name, pictures=pictures)

    def wanted_figures(self, name: str | None, other: str | None = None) -> str:
        """Encode that the figures of other runs are wanted, which the page asks for where they are seen."""
        return payload.encode("figures", run=name or "", other=other or "", note="making the figures …", wanted=True)

    def figures(self, name: str | None, other: str | None = None) -> str:
        """Encode the page of a run's report, or of the comparison of two runs.

        An error is shown as a note in it.

        Args:
            name: of the run, or ``ALL``, which have no figures in common; None if there is none.
            other: name of the run that is compared with it; None or empty for none.
        """
        return payload.encode("figures", run=name or "", other=other or "", **self._figures(name, other))

    def _figures(self, name: str | None, other: str | None) -> dict[str, str]:
        if name is None or name == ALL:
            return {"note": NO_RUN if name is None else NO_FIGURES}
        try:
            sources = [self.source(chosen) for chosen in (name, other) if chosen]
            waiting = _describe_progress(sources)
            if waiting:
                return {"note": f"There are figures once the run is finished. {waiting}"}
            state = read_state([source.folder for source in sources])
            if other:
                page, note = self._comparison(name, other, state)
                return {"page": page, "note": note, "title": f"{other} against {name}"}
            return {"page": self._report(name, state), "title": f"figures of {name}"}
        except Exception as error:
            return {"note": payload.error_text(error)}

    def question(
        self, name: str, task: str, sample_id: str, pool: ModelPool, model: str, mention: int | None = None
    ) -> Question:
        """Build a question from a sample, its stored answer, and its picture as a file of the app's folder.

        Args:
            name: of the run.
            task: of the sample; empty for the first that has a sample of this id.
            sample_id: of the sample.
            pool: the models.
            model: chosen on the page; used if the run's own model is not in the pool.
            mention: first character of the tokens of the mention to look at; None for none in particular.

        Raises:
            ArtefactError: there is no such sample, it has no answer, or its picture cannot be read.
        """
        from stethoscope.detection.detector import Detector

        source = self.source(name)
        record = _answered_record(source, name, task, sample_id)
        notes = [f"Stored answer of the run {name}, sample {sample_id} of {record.task}."]
        picture = self._read_picture(source, record, notes)
        if source.model in pool.names:
            model = source.model
        else:
            notes.append(f"The run was made with {source.model}, which is not loaded; this is how {model} reads it.")
        detector = None
        if (source.folder / "detector").is_dir() and DETECTOR not in source.unfinished:
            detector = Detector.load(source.folder / "detector")
            notes.append("Judged by the run's own detector.")
        file = Path(tempfile.mkdtemp(dir=self._picture_folder)) / "sample.png"
        picture.save(file)
        if right_answer(record):
            notes.append(f"The right answer is {right_answer(record)}.")
        kept = (note for note in read_notes(source.folder) if (note.task, note.sample_id) == (record.task, sample_id))
        notes += map(describe_note, kept)
        objects = shown_objects(record)
        return Question(
            model=model,
            picture=file,
            text=record.question,
            generation=Generation(),
            answer=record.answer,
            detector=detector,
            notes=tuple(notes),
            asks=record.asks,
            truth=None if objects is None else tuple(objects),
            mentions=record.mentions or None,
            edit=record.edit,
            case={"run": name, "mention": mention, **_neighbours(source, record.task, sample_id)},
        )

    def _run_folder(self, name: str | None) -> Path:
        """Return the directory of a run by its name; raise an ArtefactError if there is no run of that name."""
        folders = self.folders
        if name not in folders:  # a name, never a path: users of the page may open only these runs
            raise ArtefactError(unknown("run", str(name), folders))
        return folders[name]

    def _shown_folders(self, name: str, other: str | None) -> list[Path]:
        """List the directories of the runs that the list shows."""
        if name == ALL:
            return list(self.folders.values())
        return [self._run_folder(chosen) for chosen in (name, other) if chosen]

    def _every_run(self) -> dict[str, RunReader]:
        """Read all runs by name; those that have not changed stay in memory with their rows of the list."""
        folders = {name: folder for name, folder in self.folders.items() if self._is_readable(folder)}
        return {name: self._reader(folder, self._known[folder][0]) for name, folder in folders.items()}

    def _is_readable(self, folder: Path) -> bool:
        """Return whether a folder is a run, finished or in progress; it is read again when it has changed."""
        state = read_state([folder])
        if self._known.get(folder, ("", False))[0] != state:
            self._known[folder] = state, _is_run(folder)
        return self._known[folder][1]

    def _read_picture(self, source: RunReader, record: Record, notes: list[str]) -> Image:
        """Read the sample's picture from its task, or else the run's small copy of it."""
        reason = "its task no longer has the sample"
        try:
            sample = self._read_samples(source, record.task).get(record.sample_id)
            if sample is not None and not record.changes(sample):
                return sample.image.load()
        except (StethoscopeError, ImportError) as error:
            reason = str(error)
        media = source.saved_media(record)
        if media is None or media.picture is None:
            raise ArtefactError(f"the picture of sample {record.sample_id} is not to be had: {reason}")
        notes.append(f"The picture is the run's small copy: {reason}.")
        return media.picture

    def _read_run(self, folder: Path, state: str) -> RunReader:
        """Read a run; ``state``, of its files, makes the cache key change."""
        return RunReader.read(folder, in_progress=True)

    def _report_page(self, name: str, state: str) -> str:
        """Write the page of ``stethoscope report``; ``state``, of its files, makes the cache key change."""
        source = self.source(name)

        def picture(record: Record) -> Image | None:
            try:
                return self._read_picture(source, record, [])
            except ArtefactError:
                return None

        with readable(source.folder):
            return collect_report(source, image_source=picture).html(sortable=False)

    def _comparison_page(self, name: str, other: str, state: str) -> tuple[str, str]:
        """Write the page of ``stethoscope compare``, and its remarks; ``state`` makes the cache key change."""
        sources = [self.source(name), self.source(other)]
        with readable(f"{name} or {other}"):
            tables, remarks = compare(
                sources, lambda source, task: saved_task(source.store, task, self._plugins), common=True
            )
            return table_page(f"{other} against {name}", tables, sortable=False), " ".join(map(str, remarks))

    def _read_samples(self, source: RunReader, task: str) -> dict[str, Sample]:
        """Read the samples of a task, once for all runs with these settings.

        Those of the last four tasks stay in memory.
        """
        described = json.dumps([task, source.store.fingerprints().get(task, {}).get("task")], sort_keys=True)
        samples = self._samples.get(described)
        if samples is None:
            rebuilt = saved_task(source.store, task, self._plugins)
            rebuilt.setup()
            samples = {sample.id: sample for sample in rebuilt.samples()}
            self._samples.put(described, samples)
        return samples


def _answered_record(source: RunReader, name: str, task: str, sample_id: str) -> Record:
    """Read the record of a sample that has an answer.

    Args:
        source: the run.
        name: of the run, for the message.
        task: of the sample; empty for the first that has a sample of this id.
        sample_id: of the sample.

    Raises:
        ArtefactError: there is no such sample, it has no answer, or its record is damaged.
    """
    with readable(source.folder):
        holders = (known for known in source.store.fingerprints() if source.store.find(known, sample_id))
        task = task or next(holders, "")
        record = source.store.find(task, sample_id)
        if record is not None and record.answer is not None:
            edit_payload(record.edit, record.answer.text)  # a damaged edit is told here
    if record is None or record.answer is None or not record.answer.token_ids:
        raise ArtefactError(f"{name} has no answer to {task} sample {sample_id}")
    return record


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


def _modified(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:  # the run was deleted since it was listed
        return 0.0


def _is_run(folder: Path) -> bool:
    try:
        RunReader.read(folder, in_progress=True)
    except StethoscopeError:  # another kind of folder
        return False
    except Exception as error:  # damaged in an unforeseen way, which must not hide the other runs
        logger.error("%s is left out, it cannot be read: %s", folder, type(error).__name__, exc_info=error)
        return False
    return True


def _describe_progress(sources: Sequence[RunReader]) -> str:
    return " ".join(f"{source.name}: {source.progress()}." for source in sources if source.unfinished)
