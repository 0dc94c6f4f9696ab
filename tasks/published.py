"""Readers of published benchmark files. Whatever is wrong is said in one line that names the file and the line."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stethoscope.core.errors import DataError, first_line
from stethoscope.core.types import ImageRef

if TYPE_CHECKING:
    from stethoscope.tasks.image_folder import ImageFolder

_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
          codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip
"""Byte order mark -> encoding; the marks of UTF-32 come first, as one of them begins with that of UTF-16."""
_SIGNATURES = {
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"BZh": "a bzip2 archive; unpack it first",
    b"\xfd7zXZ": "an xz archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "a zstandard archive; unpack it first",
    b"PAR1": "a Parquet file; task.source=hub reads a folder of these",
    b"version https://git-lfs": "a pointer of Git LFS in place of the file itself; `git lfs pull` fetches that",
    b"<!doctype html": "a web page, as servers send it where a download needs a login",
    b"<html": "a web page, as servers send it where a download needs a login",
}
_TABLES = {"\t": "tab-separated values (TSV)", ",": "comma-separated values (CSV)", ";": "values between semicolons"}
_OBJECTS = "JSON objects were expected, one on each line or all in one list"


def clipped(value: object) -> str:
    r"""Text for a message of one line: what cannot be printed escaped, what is long cut.

    >>> print(clipped("two\nlines"), clipped("a" * 100)[-4:])
    two\nlines a...
    """
    text = str(value)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 80 else text[:77] + "..."


def shown(value: object) -> str:
    """A value for a message, quoted if it is text; cut if it is long."""
    return repr(value) if isinstance(value, str) and len(value) <= 70 else clipped(repr(value))


def with_suffix(question: str, suffix: str) -> str:
    """A question with what is added to every one; a blank that the command line has lost stands between words again.

    >>> with_suffix("Is there a dog?", "Answer yes or no."), with_suffix("Is it red?", "\\n(yes or no)")
    ('Is there a dog? Answer yes or no.', 'Is it red?\\n(yes or no)')
    """
    return question + (" " if suffix[:1].isalnum() else "") + suffix


def read_text(path: Path) -> str:
    """A whole text file: UTF-8, or UTF-16 and UTF-32 that begin with a byte order mark; lines end with a newline each.

    Raises:
        DataError: it is missing, cannot be read or is not text; archives and the like are called what they are.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    head = data[:32].lstrip().lower()
    for signature, description in _SIGNATURES.items():
        if data.startswith(signature) or (signature.isascii() and head.startswith(signature.lower())):
            raise DataError(f"{path} is {description}")
    mark, encoding = next(((mark, name) for mark, name in _MARKS.items() if data.startswith(mark)), (b"", "utf-8"))
    try:
        text = data.removeprefix(mark).decode("utf-8") if encoding == "utf-8" else data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not {encoding.upper()} text: {error.reason} at byte {error.start}") from None
    if "\0" in text:
        raise DataError(
            f"{path} is no UTF-8 text: zero byte at {text.index(chr(0))}; UTF-16 is read if it has a byte order mark"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


class Row(NamedTuple):
    """An object of a file of objects.

    Attributes:
        number: line on which it begins in a file of JSON lines, place in the list in a JSON list; both from 1.
        where: file and line, for messages.
        values: the object.
    """

    number: int
    where: str
    values: dict[str, Any]


def read_rows(path: Path, keys: Iterable[str], nulls: bool = True) -> Iterator[Row]:
    """The objects of a JSON file: one on each line, or one after another over several lines, or all in one list.

    Args:
        path: of the file, whatever its ending.
        keys: that every object must have.
        nulls: False to take a key with null, which pandas writes for a missing cell, as one that is not there.

    Raises:
        DataError: the file is missing, empty or of another kind (which is named), or a value is no JSON object or
            lacks one of ``keys``.
    """
    text, keys = read_text(path), tuple(keys)
    start = _BLANK.match(text).end()
    if start == len(text):
        raise DataError(f"{path} is empty; {_OBJECTS}")
    _refuse_table(path, text[start:].partition("\n")[0], keys)
    items = _list_items(path, text, start) if text[start] == "[" else _line_items(path, text)
    for number, where, row in items:
        if not nulls and isinstance(row, dict):
            row = {key: value for key, value in row.items() if value is not None}
        yield Row(number, where, _object(row, keys, where))


def _refuse_table(path: Path, line: str, keys: tuple[str, ...]) -> None:
    """Name a table by its header, which has some of the keys that are wanted."""
    if line[0] in "[{":
        return
    for separator, name in _TABLES.items():
        columns = [column.strip().strip("\"'") for column in line.split(separator)]
        if len(columns) > 1 and not set(keys).isdisjoint(columns):
            raise DataError(
                f"{path} holds {name} with the columns {clipped(', '.join(columns))}; {_OBJECTS}: "
                f"pandas.read_csv(..., sep={separator!r}).to_json(..., orient='records', lines=True) makes them"
            )


def _line_items(path: Path, text: str) -> Iterator[tuple[int, str, Any]]:
    """Line number, place and value of every line; a value that goes on over several lines counts as its first."""
    start, number = 0, 1
    while start < len(text):
        end = text.find("\n", start) % (len(text) + 1)  # -1, none, is the text's end
        line, where = text[start:end], f"{path}, line {number}"
        if line.strip():
            indent = _BLANK.match(line).end()
            try:
                value, stop = _value(line, indent, path, number)
                stop += start
            except DataError:
                try:
                    value, stop = _value(text, start + indent, path)
                except DataError:
                    stop = end
                if stop <= end or not isinstance(value, dict):
                    raise
                end = text.find("\n", stop) % (len(text) + 1)
            if text[stop:end].strip():
                column = stop - text.rfind("\n", 0, stop)
                raise DataError(f"{where}: not JSON (more after the object's end, at column {column})")
            yield number, where, value
        number += text.count("\n", start, end) + 1
        start = end + 1


def _list_items(path: Path, text: str, at: int) -> Iterator[tuple[int, str, Any]]:
    """Place in the list, place in the file and value of every item of a JSON list that begins at an offset."""
    seen, line, last, number, mark = 0, 1, 0, 0, "["
    while mark != "]":
        at = _BLANK.match(text, at + 1).end()
        line, seen, number = line + text.count("\n", seen, at), at, number + 1
        if mark == "[" and text[at : at + 1] == "]":
            break
        where = f"{path}, line {line}" + (f", item {number}" if line == last else "")
        row, at = _value(text, at, path)
        yield number, where, row
        last = line
        at = _BLANK.match(text, at).end()
        mark = text[at : at + 1]
        if mark not in (",", "]"):
            line += text.count("\n", seen, at)
            raise DataError(f"{path}, line {line}: not JSON (a comma or the list's end was expected)")
    if text[at + 1 :].strip():
        raise DataError(f"{path}: not JSON (more after the list's end)")


def read_json(path: Path) -> Any:
    """A JSON file as a whole.

    Raises:
        DataError: the file is missing or not JSON.
    """
    text = read_text(path)
    if not text.strip():
        raise DataError(f"{path} is empty; JSON was expected")
    value, end = _value(text, _BLANK.match(text).end(), path)
    if text[end:].strip():
        line = text.count("\n", 0, end) + 1
        hint = "; this is JSON lines, one value was expected" if text[end:].lstrip()[0] in "[{" else ""
        raise DataError(f"{path}, line {line}: not JSON (more after the value's end){hint}")
    return value


_BLANK = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def _value(text: str, at: int, path: Path, line: int | None = None) -> tuple[Any, int]:
    """The JSON value at a place of a text, and where it ends; ``line`` where the text is one line of a file."""
    try:
        value, end = _DECODER.raw_decode(text, at)
        if "\\u" in text[at:end]:
            json.dumps(value, ensure_ascii=False).encode()
        return value, end
    except UnicodeEncodeError as error:
        place = f"line {line or text.count(chr(10), 0, at) + 1}"
        half = error.object[error.start : error.start + 1].encode("unicode_escape").decode()
        raise DataError(f"{path}, {place}: half of a surrogate pair, {half}, which is no text") from None
    except json.JSONDecodeError as error:
        place = f"line {line or error.lineno}"
        raise DataError(f"{path}, {place}: not JSON ({error.msg} at column {error.colno})") from None
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        place = f"line {line or text.count(chr(10), 0, at) + 1}"
        raise DataError(f"{path}, {place}: not JSON that can be read ({first_line(error)})") from None


def _object(row: Any, keys: Iterable[str], where: str) -> dict[str, Any]:
    """A value that must be an object with some keys."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON object was expected, not {json.dumps(row)[:40]}")
    for key in keys:
        if key not in row:
            raise DataError(f"{where}: key {key!r} is missing; there are: {', '.join(map(clipped, sorted(row)))}")
    return row


@dataclass(frozen=True)
class Question:
    """One yes/no question of POPE, from whatever source.

    Attributes:
        id: unique within its subset.
        image: the picture.
        group: name of the image without its ending.
        text: the question.
        label: ``yes`` or ``no``.
    """

    id: str
    image: ImageRef
    group: str
    text: str
    label: str


def question(row: Mapping[str, Any], image: ImageRef, where: str) -> Question:
    """A row of POPE as a question, checked.

    Args:
        row: ``question_id``, ``text`` and ``label``.
        image: the picture it asks about.
        where: file and line, or row, for messages.

    Raises:
        DataError: the question is no text, or the label is neither yes nor no.
    """
    label = str(row["label"]).strip().lower()
    if label not in ("yes", "no"):
        raise DataError(f"{where}: label {shown(row['label'])} is neither yes nor no")
    if not isinstance(row["text"], str) or not row["text"].strip():
        raise DataError(f"{where}: {shown(row['text'])} is no question")
    return Question(str(row["question_id"]), image, image.group, row["text"].strip(), label)


def unique(ids: Iterable[tuple[str, str]]) -> None:
    """Checks that no id comes twice.

    Args:
        ids: pairs (id, where it stands).

    Raises:
        DataError: an id comes twice; both places are named.
    """
    seen: dict[str, str] = {}
    for id_, where in ids:
        if id_ in seen:
            raise DataError(f"{where}: question_id {clipped(id_)} is used before, in {seen[id_]}")
        seen[id_] = where


def read_pope(path: Path, images: ImageFolder) -> list[Question]:
    """The questions of one POPE file: objects with ``question_id``, ``image``, ``text`` and ``label``.

    Raises:
        DataError: a broken line, a label that is neither yes nor no, an id that comes twice, an image that is missing.
    """
    places, questions = [], []
    for _, where, row in read_rows(path, ("question_id", "image", "text", "label")):
        questions.append(question(row, images.find(str(row["image"]), where), where))
        places.append((questions[-1].id, where))
    unique(places)
    if not questions:
        raise DataError(f"{path} holds no question")
    return questions
