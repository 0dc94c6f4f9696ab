"""Recognise the format of a log of answers, and read our own JSON lines."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stethoscope.core.errors import ConfigError, DataError, unknown
from stethoscope.core.images import file_digest
from stethoscope.core.json_rows import clipped, read_rows, read_text, shown
from stethoscope.core.text import listed, one_line
from stethoscope.storage.foreign_logs import READERS
from stethoscope.storage.inspect_logs import open_archive
from stethoscope.storage.log_values import (
    Contents,
    LoggedAnswer,
    Names,
    as_object,
    error_line,
    int_list,
    is_finished,
    keys_of,
    logged_answer,
    logprob_list,
    row_of_line,
    sample_id,
    text_or_none,
)

FORMATS = ("jsonl", "lmms_eval", "vlmevalkit", "lm_eval", "inspect", "openai_batch", "llama_cpp")

_KNOWN = "which is no log that is known; answers.format is one of " + ", ".join(FORMATS)


@dataclass(frozen=True)
class AnswerLog:
    """The answers of one file.

    Attributes:
        path: the file that was read.
        format: one of ``FORMATS``; the detected one for ``auto``.
        sha256: of the file's bytes, in hexadecimal.
        engine: program that wrote the answers, as logged; empty if not logged, several joined by ", ".
        model: its model, likewise.
        revision: of the model, likewise.
        answers: in the order of the file, one for each sample.
        notes: one line each on what was left out or taken as something else.
    """

    path: Path
    format: str
    sha256: str
    engine: str
    model: str
    revision: str
    answers: tuple[LoggedAnswer, ...]
    notes: tuple[str, ...] = ()


def read_answers(path: Path, format: str = "auto") -> AnswerLog:
    """Read a log of answers.

    Args:
        path: of the log.
        format: one of ``FORMATS``, or ``auto`` to recognise it by the content.

    Raises:
        ConfigError: there is no such format.
        DataError: the file is missing, broken or of no known format, or two answers are of one sample.
    """
    if format not in ("auto", *FORMATS):
        raise ConfigError(unknown("answers.format", str(format), ("auto", *FORMATS)))
    path = _single_file(Path(path))
    taken = detect_format(path) if format == "auto" else format
    contents = READERS[taken](path) if taken in READERS else read_own_lines(path)
    if not contents.answers:
        raise DataError(f"{path} holds no answer")
    check_distinct(contents.answers)
    return AnswerLog(
        path=path,
        format=taken,
        sha256=file_digest(path),
        engine=contents.engine,
        model=contents.model,
        revision=contents.revision,
        answers=tuple(contents.answers),
        notes=contents.notes,
    )


def _single_file(path: Path) -> Path:
    """Return the file to read: the path itself, or the only log in a folder such as lmms-eval's output.

    Raises:
        DataError: it does not exist, is no regular file, or a folder with several logs or none.
    """
    if path.is_dir():
        names = {file for pattern in _IN_FOLDER for depth in ("", "*/") for file in path.glob(depth + pattern)}
        files = sorted(file for file in names if file.is_file())
        if len(files) != 1:
            shown_names = listed([one_line(file.relative_to(path)) for file in files], 8)
            held = f"{len(files)} logs, {shown_names}" if files else "no log in it"
            raise DataError(f"{path} is a folder with {held}; answers.file should be one file")
        return files[0]
    if not path.exists():
        raise DataError(f"{path} does not exist; answers.file should be a log of answers")
    if not path.is_file():
        raise DataError(f"{path} is no regular file; answers.file should be a log of answers")
    return path


# --- recognising a format ---------------------------------------------------------------------------------------------

_IN_FOLDER = ("*_samples_*.jsonl", "samples_*.jsonl", "*.eval")
_MARKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("openai_batch", ("custom_id",)),
    ("openai_batch", ("choices",)),
    ("openai_batch", ("object", "output")),
    ("lm_eval", ("doc_id", "resps", "arguments")),
    ("lmms_eval", ("doc_id", "filtered_resps")),
    ("vlmevalkit", ("index", "prediction")),
    ("inspect", ("eval", "version")),
    ("llama_cpp", ("content", "stop_type")),
    ("llama_cpp", ("content", "generation_settings")),
)
"""Format, and keys that its first object has; the first that fits is taken, and our own lines where none does."""


def detect_format(path: Path) -> str:
    """Recognise the format of a log by its content.

    Raises:
        DataError: it is none that is known; the message says what the file holds.
    """
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"PK\3\4" or zipfile.is_zipfile(path):
        return _archive_format(path)
    text = read_text(path)
    line = text.lstrip().partition("\n")[0]
    if line[:1] not in ("[", "{"):
        if any({"index", "prediction"} <= {cell.strip('"') for cell in line.split(mark)} for mark in ("\t", ",")):
            return "vlmevalkit"
        if line:
            raise DataError(f"{path} begins with {shown(line)}, {_KNOWN}")
    first = next(read_rows(path, (), nulls=False), None)
    if first is None:
        raise DataError(f"{path} holds no answer")
    row = first.values
    for format_, keys in _MARKS:
        for values in (row, row.get("response")):
            if isinstance(values, dict) and all(key in values for key in keys):
                return format_
    if any(key in row for key in _TEXT) or ("error" in row and any(key in row for key in (*_ID, "row"))):
        return "jsonl"
    raise DataError(f"{path} has objects with the keys {keys_of(row)}, {_KNOWN}")


def _archive_format(path: Path) -> str:
    """Recognise a log of inspect_ai or an Excel file by the names of the archive's files."""
    with open_archive(path) as archive:
        names = archive.namelist()
    if "xl/workbook.xml" in names:
        return "vlmevalkit"
    if any(name == "header.json" or name.startswith("_journal/") for name in names):
        return "inspect"
    raise DataError(f"{path} is a zip archive of {clipped(', '.join(names)) or 'nothing'}, {_KNOWN}")


def check_distinct(answers: Iterable[LoggedAnswer]) -> None:
    """Check that no two answers are of one sample.

    Raises:
        DataError: two have the same id, or the same row where they have no id.
    """
    origins: dict[tuple[str, str | int], str] = {}
    for answer in answers:
        key = ("id", answer.id) if answer.id is not None else ("row", -1 if answer.row is None else answer.row)
        if key in origins:
            raise DataError(f"{answer.origin}: {key[0]} {clipped(key[1])} is used before, in {origins[key]}")
        origins[key] = answer.origin


# --- our own JSON lines -----------------------------------------------------------------------------------------------

_ID = ("id", "question_id", "image_id")  # LLaVA's and POPE's scripts write the second, captioners the third
_TEXT = ("answer", "response", "caption", "text", "model_prediction")  # AMBER, CHAIR, LLaVA, HallusionBench


def read_own_lines(path: Path) -> Contents:
    """Read JSON lines, or one list, with an ``answer`` and an ``id`` each.

    ``docs/answers.md`` has all keys.

    A line without ``id`` and without ``row`` belongs to the data set's row at its own position.

    Raises:
        DataError: a line is broken, or a value is not of its kind.
    """
    answers, names = [], Names()
    for index, (_, origin, row) in enumerate(read_rows(path, (), nulls=False)):
        row = _of_run(row) if "sample_id" in row else row
        key = next((key for key in _TEXT if key in row), None)
        if key is None and not row.get("error"):
            raise DataError(
                f"{origin}: no answer; keys {', '.join(map(repr, _TEXT))} were looked for in {keys_of(row)}"
            )
        names_sample = key != "model_prediction"  # HallusionBench numbers questions of one figure
        id_ = next((sample_id(row[name], origin) for name in _ID if name in row), None) if names_sample else None
        question = row.get("question", row.get("prompt") if key == "text" else None)  # LLaVA's prompt is the question
        names.add(row, model=("model", "model_id"), revision=("revision",), engine=("engine",))
        answers.append(
            logged_answer(
                row.get(key, "") if key else "",
                origin,
                id=id_,
                row=row_of_line(row, index, id_, origin),
                question=text_or_none(question, "question", origin),
                token_ids=int_list(row.get("answer_token_ids"), "answer_token_ids", origin),
                logprobs=logprob_list(row.get("answer_logprobs"), "answer_logprobs", origin),
                prompt=None if key == "text" else text_or_none(row.get("prompt"), "prompt", origin),
                prompt_token_ids=int_list(row.get("prompt_token_ids"), "prompt_token_ids", origin),
                finished=is_finished(row.get("finish_reason")),
                error=error_line(row.get("error")),
            )
        )
    return Contents(answers, names["engine"], names["model"], names["revision"], names.notes())


def _of_run(row: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a line of a run's ``samples.jsonl``."""
    answer = as_object(row.get("answer"))
    return {
        "id": row["sample_id"],
        "answer": answer.get("text", ""),
        "answer_token_ids": answer.get("token_ids"),
        "answer_logprobs": answer.get("logprobs"),
        "question": row.get("question"),
        "prompt": row.get("prompt") or None,
        "finish_reason": {"True": "stop", "False": "length"}.get(str(answer.get("finished"))),
        "error": row.get("error"),
    }
