"""Notes on samples: the last one counts, and no content of the file keeps a run from being read."""

import json
import os
from dataclasses import replace

import pytest

from stethoscope.core.errors import ArtefactError, DataError
from stethoscope.storage import sample_notes
from stethoscope.storage.sample_notes import NOTES, Note, append_note, read_notes

NOTE = Note("chair", "a", 3, "dog", 0, ("small", "odd"), "It is there.", "me")


def test_the_last_note_of_a_mention_counts_and_an_empty_one_removes_it(tmp_path):
    assert read_notes(tmp_path) == []
    first = append_note(tmp_path, NOTE)
    of_sample = append_note(tmp_path, replace(NOTE, start=None, object="", label=None, text="all wrong"))
    assert read_notes(tmp_path) == [first, of_sample]
    last = append_note(tmp_path, replace(NOTE, label=-1, author="you"))
    assert read_notes(tmp_path) == [last, of_sample]
    append_note(tmp_path, replace(NOTE, label=None, tags=(), text=""))
    assert read_notes(tmp_path) == [of_sample]
    assert len((tmp_path / NOTES).read_text().splitlines()) == 4  # nothing is ever deleted


WRONG = [
    "", "{", "[]", "3", '"x"', "[" * 9000, '{"task": "chair"}', "\0", "x" * 40_000,
    *(json.dumps({**NOTE.to_dict(), "time": "2026-11-29T20:15:00Z", **values}) for values in (
        {"label": 5}, {"label": True}, {"label": "0"}, {"start": -1}, {"start": 1.5}, {"text": "x" * 2001},
        {"text": None}, {"tags": "x"}, {"tags": [""]}, {"tags": ["x"] * 9}, {"tags": [["x"]]}, {"author": 3},
        {"time": "now"},
        {"task": []},
    )),
]  # fmt: skip


def test_what_is_no_note_is_skipped(tmp_path):
    (tmp_path / NOTES).write_text("\n".join(WRONG) + "\n")
    assert read_notes(tmp_path) == []
    with (tmp_path / NOTES).open("ab") as file:
        file.write(b"\xff\xfe\n" + b'{"task": "cha')  # cut off by a kill
    note = append_note(tmp_path, NOTE)
    assert read_notes(tmp_path) == [note]


@pytest.mark.parametrize("values", [{"text": "x" * 2001}, {"tags": ("x",) * 9}, {"label": 2}, {"author": None}])
def test_what_is_too_long_or_of_another_kind_is_not_written(tmp_path, values):
    with pytest.raises(DataError, match="the note is not written"):
        append_note(tmp_path, replace(NOTE, **values))
    assert not (tmp_path / NOTES).exists()


def test_no_note_is_written_through_a_link_or_into_a_full_file(tmp_path, monkeypatch):
    outside, run = tmp_path / "outside", tmp_path / "run"
    run.mkdir()
    outside.write_text("mine")
    for link in (os.symlink, os.link):
        link(outside, run / NOTES)
        with pytest.raises(ArtefactError, match=NOTES):
            append_note(run, NOTE)
        (run / NOTES).unlink()
    assert outside.read_text() == "mine"
    append_note(run, NOTE)
    monkeypatch.setattr(sample_notes, "LARGEST_FILE", 300)
    with pytest.raises(ArtefactError, match="no note can be added"):
        append_note(run, NOTE)
    (run / NOTES).unlink()
    (run / NOTES).mkdir()
    with pytest.raises(ArtefactError, match="cannot be written to"):
        append_note(run, NOTE)
