"""Store what people note of samples: corrected labels, tags, remarks. No result changes.

``notes.jsonl`` is only appended to. The last line of a sample, or of one of its mentions, counts; an empty one takes
the note back. Whatever else the file holds is skipped, so that no content of it can keep a run from being read.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stethoscope.core.errors import ArtefactError, DataError
from stethoscope.core.files import open_regular
from stethoscope.core.json_rows import violation
from stethoscope.storage.records import encode_line

NOTES = "notes.jsonl"
LARGEST_FILE, LARGEST_LINE = 2**24, 2**15  # bytes
COLUMNS = ("task", "sample_id", "start", "object", "label", "tags", "text", "author", "time")


@dataclass(frozen=True)
class Note:
    """What a person notes of a sample, or of one of its mentions.

    Attributes:
        task, sample_id: of the sample.
        start: first character of the mention's tokens; None for the whole sample.
        object: that the mention names; empty for the whole sample.
        label: corrected label of the mention: 1 hallucinated, 0 grounded, -1 not to be judged; None for no correction.
        tags: of any words.
        text: of the remark.
        author: name of the account; without accounts of the user of the machine, or ``anonymous``.
        time: in UTC, as ``2026-11-29T20:15:00Z``.
    """

    task: str
    sample_id: str
    start: int | None = None
    object: str = ""
    label: int | None = None
    tags: tuple[str, ...] = ()
    text: str = ""
    author: str = ""
    time: str = ""

    @property
    def empty(self) -> bool:
        """Whether nothing is noted, which takes an earlier note back."""
        return self.label is None and not self.tags and not self.text

    def to_dict(self) -> dict[str, Any]:
        """Return the note as plain values, as its line holds it."""
        return {**{name: getattr(self, name) for name in COLUMNS}, "tags": list(self.tags)}


def read_notes(run_dir: Path) -> list[Note]:
    """Read the notes that count, in the order in which samples were first noted.

    Broken lines are skipped.
    """
    path = run_dir / NOTES
    if not os.path.lexists(path):
        return []
    with open_regular(path) as file:
        lines = file.read(LARGEST_FILE).split(b"\n")
    notes: dict[tuple[str, str, int | None], Note] = {}
    for line in lines:
        note = _decode(line)
        if note is not None:
            notes[note.task, note.sample_id, note.start] = note
    return [note for note in notes.values() if not note.empty]


def _decode(line: bytes) -> Note | None:
    if not line or len(line) > LARGEST_LINE:
        return None
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if violation("notes", values) is not None:
        return None
    return Note(**{**{name: values[name] for name in COLUMNS}, "tags": tuple(values["tags"])})


def append_note(run_dir: Path, note: Note) -> Note:
    """Append a note to a run, with the present time.

    Args:
        run_dir: the run directory.
        note: without its time.

    Returns:
        The note as it was written.

    Raises:
        DataError: a part of it is too long, or of another kind than it should be.
        ArtefactError: the file cannot be written to, or is full.
    """
    values = {**note.to_dict(), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    broken = violation("notes", values)
    if broken is not None:
        raise DataError(f"the note is not written: {broken.message or broken.reason}")
    path, line = run_dir / NOTES, encode_line(values)
    try:  # a run from elsewhere may hold a link to any other file
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0), 0o644)
        with os.fdopen(handle, "r+b", buffering=0) as file:
            status = os.fstat(handle)
            size = status.st_size
            if status.st_nlink > 1 or not stat.S_ISREG(status.st_mode):
                raise ArtefactError(f"{path} has further names or is no regular file, so that no note is written to it")
            if size + len(line) > LARGEST_FILE:
                raise ArtefactError(f"{path} has {size} bytes, and no note can be added")
            file.seek(max(0, size - 1))
            cut_off = size > 0 and file.read(1) != b"\n"  # by a kill
            file.write((b"\n" if cut_off else b"") + line)  # in one write, as several people may append
    except OSError as error:
        raise ArtefactError(f"{path} cannot be written to: {error.strerror or error}") from None
    return Note(**{**values, "tags": tuple(values["tags"])})


def notes_csv(notes: Sequence[Note]) -> str:
    """Write notes as a table with a header; tags are separated by semicolons.

    A text with which a spreadsheet would calculate gets an apostrophe before it.

    >>> print(notes_csv([Note("chair", "7", 3, "dog", 0, ("small",), "=1+1", "me", "2026-11-29T20:15:00Z")]).strip())
    task,sample_id,start,object,label,tags,text,author,time
    chair,7,3,dog,0,small,'=1+1,me,2026-11-29T20:15:00Z
    """
    import csv
    import io

    def cell(value: Any) -> Any:
        return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value

    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for note in notes:
        values = {**note.to_dict(), "tags": "; ".join(note.tags)}
        writer.writerow([cell(values[name]) for name in COLUMNS])
    return file.getvalue()
