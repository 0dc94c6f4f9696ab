"""List the samples of one run, of two or of many: for the app, and as an HTML page."""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from stethoscope.core.errors import ArtefactError, StethoscopeError
from stethoscope.core.files import atomic_write, files_state
from stethoscope.core.html import asset, data_uri, document, json_block, render
from stethoscope.core.text import counted
from stethoscope.diagnosis.answer_verdicts import mention_outcome
from stethoscope.relevancy.heatmaps import OPACITY, RAMP
from stethoscope.report.export import RunExport, clean, outcome_of, right_answer, shown_objects
from stethoscope.report.metrics_tables import task_title
from stethoscope.report.run_source import RunReader, readable
from stethoscope.storage.records import Record
from stethoscope.storage.sample_notes import NOTES, Note, read_notes
from stethoscope.storage.saved_heatmaps import CAPTIONS

MOST_SAMPLES = 3000  # of a task in the list, of one run or of all
ANSWER_LENGTH = 320  # characters of an answer in the list
UNJUDGED = {1: "hallucinated", 0: "grounded", -1: "not judged"}
"""Outcome of a mention by its label where no detector has judged it."""
STATE_FILES = ("samples.jsonl", "status.json", "metrics.json", "warnings.jsonl", NOTES, "shards/*.jsonl")

Entry = tuple[Record, dict[str, Any]]
"""A record, and its row of the list."""


def read_state(folders: Sequence[Path]) -> str:
    """Describe the files that the list shows, so that equal descriptions mean no change."""
    return files_state(path for folder in folders for name in STATE_FILES for path in sorted(folder.glob(name)))


def list_samples(sources: Sequence[RunReader]) -> tuple[list[dict[str, Any]], str]:
    """List the samples of one run, or of two side by side.

    Args:
        sources: the one or two runs.

    Returns:
        Rows of ``sample_rows`` or ``paired_rows``, and what is to be known of them, in one line.

    Raises:
        ArtefactError: a run is damaged, or set beside itself.
    """
    if len(sources) == 2:
        if sources[0].folder == sources[1].folder:
            raise ArtefactError(f"{sources[0].name} is shown already; choose another run to set beside it")
        rows, note = paired_rows(*sources)
        return rows, f"{note} {_describe_limit(sources[0])}".strip()
    [source] = sources
    with readable(source.folder):
        notes = [*([] if source.unfinished else [source.no_detector()]), source.off_policy(), _describe_limit(source)]
        return sample_rows(source), " ".join(filter(None, notes))


def sample_rows(source: RunReader, answer_length: int | None = ANSWER_LENGTH) -> list[dict[str, Any]]:
    """Make the rows of all samples of a run, the task that a detector has judged first.

    Args:
        source: the run.
        answer_length: characters of an answer, of which longer ones are cut; None for whole answers.

    Returns:
        Rows with ``task``, ``sample``, ``question``, ``answer``, ``status``, ``fold`` (of the detector), ``right``
        (whether a question that has one right answer got it; None for others), ``truth`` (that answer; empty for
        others), ``objects`` (that the picture shows; None where they are not known), ``mentions`` (object, outcome,
        probability, None without a detector, and the characters of its tokens) and ``notes``, what people have noted
        of the sample and its mentions.
    """
    return [row for task in _tasks(source) for _, row in _entries(source, task, answer_length, MOST_SAMPLES)]


def paired_rows(first: RunReader, other: RunReader) -> tuple[list[dict[str, Any]], str]:
    """Join the samples of two runs by task and id, if picture and question are the same.

    Args:
        first: a run.
        other: the run to be shown beside it.

    Returns:
        Rows of the first run as of ``sample_rows``, each with ``other``, the row of the other run, and ``same``,
        whether the answers are equal; and a line about the samples that are left out.
    """
    tasks = [task for task in _tasks(first) if task in set(_tasks(other))]
    if not tasks:
        names = " and ".join(f"{source.name} ({', '.join(_tasks(source))})" for source in (first, other))
        return [], f"{names} have no task in common, so that nothing can be set side by side."
    rows: list[dict[str, Any]] = []
    common, unequal, sizes = 0, 0, [0, 0]
    for task in tasks:
        with readable(other.folder):
            others = {record.sample_id: (record, row) for record, row in _entries(other, task)}
        with readable(first.folder):
            entries = list(_entries(first, task))
        sizes = [sizes[0] + len(entries), sizes[1] + len(others)]
        listed = 0
        for record, row in entries:
            beside = others.get(record.sample_id)
            if beside is None:
                continue
            common += 1
            if not _same_sample(record, beside[0]):
                unequal += 1
            elif listed < MOST_SAMPLES:
                listed += 1
                rows.append({**row, "other": beside[1], "same": _text(record) == _text(beside[0])})
    left_out = [
        f"{counted(number, 'sample')} only in {source.name}"
        for number, source in zip((sizes[0] - common, sizes[1] - common), (first, other), strict=True)
        if number
    ]
    left_out += [
        f"task {task} only in {source.name}"
        for source in (first, other)
        for task in _tasks(source)
        if task not in tasks
    ]
    left_out += [f"{counted(unequal, 'sample')} with another picture or question"] if unequal else []
    remark = f"Left out: {', '.join(left_out)}." if left_out else ""
    return rows, remark if rows else f"{first.name} and {other.name} share no sample. {remark}".strip()


def joined_rows(sources: Mapping[str, RunReader]) -> tuple[list[dict[str, Any]], str]:
    """List the samples of many runs, of a task no more than of a single run.

    Args:
        sources: the runs by name, which keep their rows. Where they have more samples of a task, each is listed up to
            the same number of them.

    Returns:
        Rows as of ``sample_rows``, run by run, each with the name of its ``run``; and a line about what is left out,
        runs without a detector, and answers that a run's model did not write.
    """
    sizes: dict[str, dict[str, int]] = {}
    rows: list[dict[str, Any]] = []
    damaged: list[str] = []  # these say what is wrong when they are chosen alone
    unjudged: list[str] = []
    given: list[str] = []
    for name, source in sources.items():
        try:
            with readable(source.folder):
                sizes[name] = {task: source.store.count(task) for task in source.store.fingerprints()}
        except StethoscopeError:
            damaged.append(name)
    counts: dict[str, list[int]] = defaultdict(list)
    for task, count in (item for own in sizes.values() for item in own.items()):
        counts[task].append(count)
    limits = {task: even_limit(numbers, MOST_SAMPLES) for task, numbers in counts.items()}
    for name, own in sizes.items():
        source, most = sources[name], {task: min(count, limits[task]) for task, count in own.items()}
        try:
            with readable(source.folder):
                listed = source.cached(("rows", *most.items()), partial(_limited_rows, source, most))
                judged = any(mention[2] is not None for row in listed for mention in row["mentions"])
                unjudged += [] if judged or source.unfinished else [name]
                given += [f"{name}, {source.off_policy()}"] if source.off_policy() else []
                rows += [{**row, "run": name} for row in listed]
        except StethoscopeError:
            damaged.append(name)
    notes = [
        f"{task}: of {sum(numbers):,} samples the first {limits[task]:,} of every run are listed; choose a run for all."
        for task, numbers in counts.items()
        if max(numbers) > limits[task]
    ]
    notes += [f"Left out, since files of them are damaged: {', '.join(damaged)}."] if damaged else []
    notes += [f"Without a detector: {', '.join(unjudged)}."] if unjudged else []
    return rows, " ".join([*notes, *given])


def _limited_rows(source: RunReader, limits: Mapping[str, int]) -> list[dict[str, Any]]:
    """Make the rows of a run up to a number of each task, without keeping what else was read of the run."""
    source.release()  # of rows up to another number
    reader = replace(source)
    return [row for task in _tasks(reader) for _, row in _entries(reader, task, most=limits[task])]


def even_limit(counts: Sequence[int], most: int) -> int:
    """Return how many of each of several may be taken, so that all together are at most ``most``.

    From 10 on it is a multiple of 10, so that it does not change with every sample of a run in progress; it is at least
    1, so that none is left out.

    >>> even_limit([10, 500, 700], 1000), even_limit([10, 20], 1000), even_limit([5, 5, 5], 2)
    (490, 1000, 1)
    """
    left = most
    for index, count in enumerate(sorted(counts)):
        share = left // (len(counts) - index)
        if count > share:
            return share // 10 * 10 or max(1, share)
        left -= count
    return most


def find_row(source: RunReader, task: str, sample_id: str) -> dict[str, Any] | None:
    """Make the row of one sample, without notes; None if there is no such sample."""
    record = source.store.find(task, sample_id)
    return None if record is None else _row(record, _judged_mentions(source, task).get(sample_id, ()), None)


def describe_note(note: Note) -> str:
    """Write a note in one line.

    >>> describe_note(Note("chair", "7", 3, "dog", 0, ("small",), "It is there.", "me", "2026-11-29T20:15:00Z"))
    'Note by me, 2026-11-29: dog: label corrected to grounded; #small; It is there.'
    """
    parts = [f"label corrected to {UNJUDGED[note.label]}"] if note.label is not None else []
    parts += [*(f"#{tag}" for tag in note.tags), *([note.text] if note.text else [])]
    return f"Note by {note.author}, {note.time[:10]}: {f'{note.object}: ' if note.object else ''}{'; '.join(parts)}"


def _tasks(source: RunReader) -> list[str]:
    return sorted(source.store.fingerprints(), key=lambda task: task != source.task)


def _same_sample(first: Record, other: Record) -> bool:
    digests = {record.image_sha256 for record in (first, other) if record.image_sha256}
    return (first.image, first.question) == (other.image, other.question) and len(digests) < 2


def _describe_limit(source: RunReader) -> str:
    """Say that a task has more samples than the list shows; empty if none has."""
    larger = [task for task in _tasks(source) if source.store.count(task) > MOST_SAMPLES]
    return f"{', '.join(larger)}: only the first {MOST_SAMPLES} samples are listed." if larger else ""


def _entries(
    source: RunReader, task: str, answer_length: int | None = ANSWER_LENGTH, most: int | None = None
) -> Iterator[Entry]:
    """Yield the records of a task, ``most`` of them or all, with their rows."""
    records = islice(source.store.records(task), most)
    return noted_rows(source, task, records, _judged_mentions(source, task), answer_length)


def noted_rows(
    source: RunReader,
    task: str,
    records: Iterable[Record],
    judged: Mapping[str, Sequence[Mapping[Any, Any]]],
    answer_length: int | None,
) -> Iterator[Entry]:
    """Yield records with their rows and the notes on them.

    Args:
        source: the run.
        task: of the records.
        records: of the run.
        judged: by sample the lines of ``warnings.jsonl``; they do not count for an answer without mentions.
        answer_length: as of ``sample_rows``.
    """
    noted: dict[str, list[Note]] = defaultdict(list)
    for note in read_notes(source.folder):
        if note.task == task:
            noted[note.sample_id].append(note)
    for record in records:
        row = _row(record, judged.get(record.sample_id, ()) if record.mentions else (), answer_length)
        yield record, {**row, "notes": [note.to_dict() for note in noted.get(record.sample_id, ())]}


def _judged_mentions(source: RunReader, task: str) -> dict[str, list[Mapping[Any, Any]]]:
    """Group the lines of ``warnings.jsonl`` about a task by sample."""
    judged: dict[str, list[Mapping[Any, Any]]] = defaultdict(list)
    warnings = source.warnings
    for line in [] if warnings.empty else warnings[warnings["task"] == task].to_dict("records"):
        judged[line["sample_id"]].append(line)
    return judged


def _text(record: Record) -> str:
    return record.error if record.answer is None else record.answer.text


def _row(record: Record, judged: Sequence[Mapping[Any, Any]], answer_length: int | None) -> dict[str, Any]:
    text = _text(record)
    if answer_length is not None and len(text) > answer_length:
        text = text[:answer_length] + " …"
    mentions: list[list[Any]] = [
        [
            line["object"],
            mention_outcome(line["label"], line["warned"]),
            round(line["probability"], 4),
            line["start"],
            line["end"],
        ]
        for line in judged
    ]
    counts = {} if record.score is None else record.score.counts
    outcome = None if "captions" in counts else outcome_of(record, ())
    if not judged and outcome is None:  # where an answer is right or wrong, its mentions would only repeat that
        mentions = [
            [mention.object, UNJUDGED.get(mention.label, "not judged"), None, mention.start, mention.end]
            for mention in record.mentions
        ]
    return {
        "task": record.task,
        "sample": record.sample_id,
        "question": record.question,
        "answer": text,
        "status": record.status,
        "fold": str(judged[0]["fold"]) if judged else "",
        "right": None if outcome is None else outcome.correct,
        "truth": right_answer(record),
        "objects": shown_objects(record),
        "mentions": mentions,
    }


# --- the page of a run: the app's list, with pictures and heat maps ---------------------------------------------------

SIDE = 320  # pixels along the longer side of a picture


def write_html(run: RunExport, folder: Path) -> list[Path]:
    """Write ``index.html``: all samples of a run with filters, order and search.

    Names of people who have noted something are left out. Questions about one picture share it.

    Args:
        run: the run.
        folder: to write into.

    Returns:
        The file.
    """
    rows: list[dict[str, Any]] = []
    pictures: dict[str, str] = {}
    for result in run.tasks:
        listed = noted_rows(run.source, result.task, run.records(result.task), run.warnings(result.task), None)
        for record, row in listed:
            row["notes"] = [{**note, "author": ""} for note in row["notes"]]
            own = run.record_picture(record)
            key = record.image_sha256 or record.image
            if own is not None and key not in pictures:
                pictures[key] = data_uri(own, SIDE)
            rows.append({**clean(row), "picture": key if key in pictures else "", "maps": _heatmaps(run, record)})
    keys = {key: index for index, key in enumerate(pictures)}  # digests would be most of a row
    for row in rows:
        row["picture"] = keys.get(row["picture"])
    data = {
        "run": clean(run.source.name),
        "other": "",
        "note": clean(run.source.off_policy()),
        "rows": rows,
        "pictures": list(pictures.values()),
        "ramp": RAMP.tolist(),
        "opacity": OPACITY,
    }
    tasks = ", ".join(task_title(result.task) for result in run.tasks)
    subtitle = clean(f"{run.source.model} on {tasks}")
    body = render(
        "report/samples_page.html",
        title=data["run"],
        subtitle=subtitle,
        samples=render("report/samples.html"),
        data=json_block(data),
    )
    code = render("diagnosis/page.js", viewer=asset("diagnosis/parts.js") + asset("report/samples.js"))
    style = asset("diagnosis/viewer.css") + asset("report/samples.css")
    file = folder / "index.html"
    atomic_write(file, document(f"{data['run']}: samples", body, style, code))
    return [file]


def _heatmaps(run: RunExport, record: Record) -> dict[str, Any]:
    """Return the heat maps of a record by the start of their mention, with shape and caption."""
    media = run.source.saved_media(record) if run.settings.pictures else None
    if media is None or record.answer is None:
        return {}
    starts = {token: start for token, (start, _) in enumerate(record.answer.offsets)}
    maps = {
        starts[token]: base64.b64encode(values.tobytes()).decode("ascii")
        for token, values in media.maps.items()
        if token in starts
    }
    if not maps:
        return {}
    return {
        "shape": list(next(iter(media.maps.values())).shape),
        "caption": CAPTIONS[media.shows].split("{}"),
        "values": maps,
    }
