"""Read answers from logs of lmms-eval, lm-eval and VLMEvalKit, and list all such readers."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from stethoscope.core.errors import CapabilityError, DataError, first_line
from stethoscope.core.json_rows import clipped, read_json, read_rows, read_text, shown
from stethoscope.storage.inspect_logs import check_sizes, open_archive, read_inspect
from stethoscope.storage.log_values import (
    Contents,
    LoggedAnswer,
    as_object,
    error_line,
    logged_answer,
    row_number,
    sample_id,
    with_reasoning,
)
from stethoscope.storage.server_logs import read_llama_cpp, read_openai_batch

_FAILED = "Failed to obtain answer"  # VLMEvalKit writes it in the place of an answer
_MOST_ROWS, _MOST_CELLS = 2**20, 2**24
"""Most rows and cells of a sheet: a file of a few bytes may name a row or column far away, and all before are empty."""


# --- lmms-eval and lm-eval --------------------------------------------------------------------------------------------


def read_lmms_eval(path: Path) -> Contents:
    """Read ``{date}_samples_{task}.jsonl`` of lmms-eval 0.7.

    Names come from ``{date}_results.json`` beside it.

    Raises:
        DataError: a line is broken, or holds log-probabilities of choices in place of an answer.
    """
    answers, further = [], 0
    for _, origin, row in read_rows(path, ("doc_id", "filtered_resps")):
        text, count = _first_response(row.get("resps", row["filtered_resps"]), origin)  # resps have the reasoning
        further += count - 1
        question = row.get("input")
        answers.append(
            logged_answer(
                text,
                origin,
                row=row_number(row["doc_id"], origin),
                question=question if isinstance(question, str) else None,  # chat models log messages or nothing
            )
        )
    date, _, _ = path.name.partition("_samples_")
    return _harness("lmms_eval", answers, further, path.with_name(f"{date}_results.json"))


def read_lm_eval(path: Path) -> Contents:
    """Read ``samples_{task}_{date}.jsonl`` of lm-eval 0.4.

    Names come from ``results_{date}.json`` beside it.

    Raises:
        DataError: a line is broken, or holds log-probabilities of choices in place of an answer.
    """
    answers, further = [], 0
    for _, origin, row in read_rows(path, ("doc_id", "resps")):
        text, count = _first_response(row["resps"], origin)
        further += count - 1
        doc = as_object(row.get("doc"))
        prompt = as_object(as_object(row.get("arguments")).get("gen_args_0")).get("arg_0")
        named = next((doc[key] for key in ("id", "question_id") if isinstance(doc.get(key), (str, int))), None)
        question = next((doc[key] for key in ("question", "query", "text") if isinstance(doc.get(key), str)), None)
        answers.append(
            logged_answer(
                text,
                origin,
                id=None if named is None else sample_id(named, origin),
                row=row_number(row["doc_id"], origin),
                question=question,
                prompt=prompt if isinstance(prompt, str) else None,
            )
        )
    _, _, date = path.stem.rpartition("_")
    return _harness("lm_eval", answers, further, path.with_name(f"results_{date}.json"))


def _first_response(value: Any, origin: str) -> tuple[str, int]:
    """Return the first text of nested lists of responses, and how many there are; ("", 1) for none."""
    texts: list[str] = []
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            if (
                len(item) == 2 and str(item[1]) in ("True", "False") and _is_number(item[0])
            ):  # lm-eval's pairs: log-probability, whether it is greedy
                raise DataError(
                    f"{origin}: {shown(item)} is a choice's log-probability; logs of multiple choice hold no answer"
                )
            waiting += reversed(item)
        elif isinstance(item, str):
            texts.append(item)
        elif item is not None:
            raise DataError(f"{origin}: response {shown(item)} is no text")
    return (texts[0] if texts else ""), max(len(texts), 1)


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _harness(engine: str, answers: list[LoggedAnswer], further: int, results: Path) -> Contents:
    """Add the names in a harness's file of results, and keep one answer for each document.

    A document has a line for each filter.
    """
    notes = [f"{further} further answers (repeats) are left out"] if further else []
    kept: dict[int | None, LoggedAnswer] = {}
    for answer in answers:
        if kept.setdefault(answer.row, answer).text != answer.text:
            before = kept[answer.row].origin
            raise DataError(f"{answer.origin}: doc_id {answer.row} is used before, in {before}, with another answer")
    ids = [answer.id for answer in kept.values() if answer.id is not None]
    if len(set(ids)) < len(ids):
        kept = {row: replace(answer, id=None) for row, answer in kept.items()}
        notes.append("ids in the documents are not unique; samples are known by their rows")
    if len(kept) < len(answers):
        notes.append(f"{len(answers) - len(kept)} lines repeat an answer under another filter and are left out")
    model = revision = version = ""
    if results.is_file():
        try:
            values = read_json(results)
        except DataError as error:
            notes.append(f"the model's name is not known: {error}")
        else:
            model, revision, version = _harness_names(values)
    return Contents(list(kept.values()), f"{engine} {version}" if version else "", model, revision, tuple(notes))


def _harness_names(values: Any) -> tuple[str, str, str]:
    """Return model, revision and version of lmms-eval or lm-eval from the content of its file of results."""
    values = as_object(values)
    config = as_object(values.get("config"))
    settings = config.get("model_args")
    if isinstance(settings, str):
        settings = dict(pair.split("=", 1) for pair in settings.split(",") if "=" in pair)
    settings = as_object(settings)
    names = (
        values.get("model_name") or settings.get("pretrained") or settings.get("model") or config.get("model"),
        config.get("model_revision") or settings.get("revision"),
        values.get("lm_eval_version") or values.get("lmms_eval_version"),
    )
    model, revision, version = (clipped(name) if isinstance(name, (str, int)) else "" for name in names)
    return model, revision, "" if version.startswith("unknown") else version


# --- VLMEvalKit -------------------------------------------------------------------------------------------------------


def read_vlmevalkit(path: Path) -> Contents:
    """Read ``{model}_{dataset}.xlsx``, ``.tsv`` or ``.json`` of VLMEvalKit.

    Raises:
        DataError: it is broken, or a column is missing.
        CapabilityError: it is .xlsx and openpyxl is not installed.
    """
    answers, joined = [], 0
    for number, (origin, row) in enumerate(_table_rows(path)):
        for key in ("index", "prediction"):
            if key not in row:
                names = clipped(", ".join(map(str, row)))
                raise DataError(f"{origin}: a log of VLMEvalKit has a column {key!r}; there are: {names}")
        text, thinking = _cell(row["prediction"]), _cell(row.get("thinking"))
        failed = _FAILED in text
        joined += bool(thinking)
        if thinking.endswith("</think>"):  # several parts, which were left as they are
            spans: tuple[tuple[int, int], ...] = ((0, len(thinking)),)
            text = thinking + text
        else:
            text, spans = with_reasoning(thinking, text)
        answers.append(
            logged_answer(
                "" if failed else text,
                origin,
                error=error_line(text) if failed else "",
                id=sample_id(row["index"], origin),
                row=number,
                question=_cell(row.get("question")) or None,
                reasoning=() if failed else spans,
            )
        )
    note = f"reasoning of {joined} answers is put before them as it may have been written; its line ends are not known"
    return Contents(answers, notes=(note,) if joined else ())


def _cell(value: Any) -> str:
    """Return a cell as text; empty for one without value, which pandas writes as NaN."""
    return "" if value is None or value != value else str(value)


def _table_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield origin and cells by column of every row of a table, whatever its kind of file."""
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"PK\3\4":
        yield from _sheet_rows(path)
        return
    text = read_text(path)
    if text.lstrip()[:1] in ("[", "{"):
        yield from ((origin, row) for _, origin, row in read_rows(path, ()))
        return
    separator = "\t" if "\t" in text.partition("\n")[0] else ","
    limit = csv.field_size_limit(len(text) + 1)  # a cell may hold an image
    try:
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        columns = next(lines, [])
        for cells in lines:
            origin = f"{path}, line {lines.line_num}"
            if len(cells) != len(columns):
                raise DataError(f"{origin}: {len(cells)} cells, but the first line names {len(columns)} columns")
            yield origin, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}, line {lines.line_num}: no table ({first_line(error)})") from None
    finally:
        csv.field_size_limit(limit)


def _sheet_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of the first sheet of an Excel file."""
    try:
        from openpyxl import load_workbook  # an extra
        from openpyxl.utils.escape import unescape
    except ImportError:
        raise CapabilityError(f"{path} is an Excel file; `pip install lvlm-stethoscope[xlsx]` to read it") from None
    with open_archive(path) as archive:
        check_sizes(path, archive.infolist())
    try:
        book = load_workbook(path, read_only=True)
        rows: list[tuple[Any, ...]] = []
        cells = 0
        for row in book.worksheets[0].iter_rows(values_only=True):
            cells += len(row)
            if len(rows) == _MOST_ROWS or cells > _MOST_CELLS:
                raise DataError(f"{path} has a sheet of more than {_MOST_ROWS:,} rows or {_MOST_CELLS:,} cells")
            rows.append(row)
        book.close()
    except DataError:
        raise
    except Exception as error:  # openpyxl raises what its parsers do: KeyError, ParseError, ValueError, ...
        raise DataError(f"{path} is no Excel file that can be read: {clipped(first_line(error))}") from None
    columns = [str(name) for name in rows[0]] if rows else []
    for number, row in enumerate(rows[1:], 2):
        values = [unescape(cell) if isinstance(cell, str) else cell for cell in row]
        values += [None] * (len(columns) - len(values))
        yield f"{path}, row {number}", dict(zip(columns, values, strict=False))


READERS: Mapping[str, Callable[[Path], Contents]] = {
    "lmms_eval": read_lmms_eval,
    "vlmevalkit": read_vlmevalkit,
    "lm_eval": read_lm_eval,
    "inspect": read_inspect,
    "openai_batch": read_openai_batch,
    "llama_cpp": read_llama_cpp,
}
