"""Read and check JSON objects and text that users write.

Errors are one line that names the file and the line.

JSON Schemas, published as they are, say what lines and files hold. They may carry two keywords of ours, which other
validators ignore. ``x-message`` is what to say of a wrong value: ``{value}`` stands for it, ``{type}`` for its Python
type, and any key for its neighbour of that name. ``x-kind`` says what the values of an ``enum`` choose, so that close
ones are suggested.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from stethoscope.core.errors import DataError, first_line, unknown
from stethoscope.core.files import damaged

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
    r"""Shorten text for a message of one line, with what cannot be printed escaped.

    >>> print(clipped("two\nlines"), clipped("a" * 100)[-4:])
    two\nlines a...
    """
    text = str(value)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 80 else text[:77] + "..."


def shown(value: object) -> str:
    """Write a value for a message, quoted if it is text, cut if it is long."""
    return repr(value) if isinstance(value, str) and len(value) <= 70 else clipped(repr(value))


def read_text(path: Path) -> str:
    """Read a whole text file as UTF-8, or as its byte order mark says.

    Lines end with a newline.

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


class JsonRow(NamedTuple):
    """One object of a JSON file.

    Attributes:
        number: line on which it begins in a file of JSON lines, position in a JSON list; both from 1.
        origin: file and line, for messages.
        values: the object.
    """

    number: int
    origin: str
    values: dict[str, Any]


def read_rows(path: Path, keys: Iterable[str], nulls: bool = True) -> Iterator[JsonRow]:
    """Yield the objects of a JSON file.

    They stand one on each line, one after another over several lines, or all in one list.

    Args:
        path: of the file, whatever its ending.
        keys: that every object must have.
        nulls: False to take a key with null, which pandas writes for a missing cell, as one that is not there.

    Raises:
        DataError: the file is missing, empty or of another kind (which is named), or a value is no JSON object or
            lacks one of ``keys``.
    """
    text, keys = read_text(path), tuple(keys)
    start = _skip_blanks(text)
    if start == len(text):
        raise DataError(f"{path} is empty; {_OBJECTS}")
    _refuse_table(path, text[start:].partition("\n")[0], keys)
    items = _list_items(path, text, start) if text[start] == "[" else _line_items(path, text)
    for number, origin, row in items:
        if not nulls and isinstance(row, dict):
            row = {key: value for key, value in row.items() if value is not None}
        yield JsonRow(number, origin, _object(row, keys, origin))


def _refuse_table(path: Path, line: str, keys: tuple[str, ...]) -> None:
    """Raise an error for a table, which is recognised by the wanted keys in its header."""
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
    """Yield line number, origin and value of every line; a value over several lines counts as its first."""
    start, number = 0, 1
    while start < len(text):
        end = _line_end(text, start)
        line, origin = text[start:end], f"{path}, line {number}"
        if line.strip():
            indent = _skip_blanks(line)
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
                end = _line_end(text, stop)
            if text[stop:end].strip():
                column = stop - text.rfind("\n", 0, stop)
                raise DataError(f"{origin}: not JSON (more after the object's end, at column {column})")
            yield number, origin, value
        number += text.count("\n", start, end) + 1
        start = end + 1


def _line_end(text: str, start: int) -> int:
    """Return the index of the first newline at or after ``start``; that of the text's end without one."""
    end = text.find("\n", start)
    return len(text) if end < 0 else end


def _list_items(path: Path, text: str, offset: int) -> Iterator[tuple[int, str, Any]]:
    """Yield position, origin and value of every item of a JSON list that begins at an offset."""
    seen, line, last, number, mark = 0, 1, 0, 0, "["
    while mark != "]":
        offset = _skip_blanks(text, offset + 1)
        line, seen, number = line + text.count("\n", seen, offset), offset, number + 1
        if mark == "[" and text[offset : offset + 1] == "]":
            break
        origin = f"{path}, line {line}" + (f", item {number}" if line == last else "")
        row, offset = _value(text, offset, path)
        yield number, origin, row
        last = line
        offset = _skip_blanks(text, offset)
        mark = text[offset : offset + 1]
        if mark not in (",", "]"):
            line += text.count("\n", seen, offset)
            raise DataError(f"{path}, line {line}: not JSON (a comma or the list's end was expected)")
    if text[offset + 1 :].strip():
        raise DataError(f"{path}: not JSON (more after the list's end)")


def read_json(path: Path) -> Any:
    """Read a JSON file as a whole.

    Raises:
        DataError: the file is missing or not JSON.
    """
    text = read_text(path)
    if not text.strip():
        raise DataError(f"{path} is empty; JSON was expected")
    value, end = _value(text, _skip_blanks(text), path)
    if text[end:].strip():
        line = text.count("\n", 0, end) + 1
        hint = "; this is JSON lines, one value was expected" if text[end:].lstrip()[0] in "[{" else ""
        raise DataError(f"{path}, line {line}: not JSON (more after the value's end){hint}")
    return value


_BLANK = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def _skip_blanks(text: str, offset: int = 0) -> int:
    """Return the index of the first character at or after an offset that is not JSON whitespace."""
    match = _BLANK.match(text, offset)
    return match.end() if match else offset


def _value(text: str, offset: int, path: Path, line: int | None = None) -> tuple[Any, int]:
    """Read the JSON value at an offset of a text, and return it with its end.

    ``line`` is given where the text is one line of a file.
    """
    try:
        value, end = _DECODER.raw_decode(text, offset)
        if "\\u" in text[offset:end]:
            json.dumps(value, ensure_ascii=False).encode()
        return value, end
    except UnicodeEncodeError as error:
        number = line or text.count("\n", 0, offset) + 1
        half = error.object[error.start : error.start + 1].encode("unicode_escape").decode()
        raise DataError(f"{path}, line {number}: half of a surrogate pair, {half}, which is no text") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {line or error.lineno}: not JSON ({error.msg} at column {error.colno})"
        ) from None
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        number = line or text.count("\n", 0, offset) + 1
        raise DataError(f"{path}, line {number}: not JSON that can be read ({first_line(error)})") from None


def _object(row: Any, keys: Iterable[str], origin: str) -> dict[str, Any]:
    """Check that a value is an object with some keys."""
    if not isinstance(row, dict):
        raise DataError(f"{origin}: a JSON object was expected, not {json.dumps(row)[:40]}")
    for key in keys:
        if key not in row:
            raise DataError(f"{origin}: key {key!r} is missing; there are: {', '.join(map(clipped, sorted(row)))}")
    return row


# --- schemas -----------------------------------------------------------------------------------------------------

FOLDER = Path(__file__).with_name("schemas")
KINDS = {
    "object": "an object",
    "array": "a list",
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
}


@dataclass(frozen=True)
class Violation:
    """What is wrong with a value.

    Attributes:
        path: dotted name of the part that is wrong, such as ``spans[0].type``; empty for the whole value.
        reason: what is wrong with it, naming the part.
        message: the schema's own sentence, which is clear without the path but for list indices; empty without one.
    """

    path: str
    reason: str
    message: str = ""


@cache
def read_schema(name: str) -> dict[str, Any]:
    """Read a schema (JSON Schema, draft 2020-12) by its name, such as ``custom``."""
    return json.loads((FOLDER / f"{name}.schema.json").read_text(encoding="utf-8"))


@cache
def _validator(name: str) -> Callable[[Any], Any]:
    """Compile a schema to a function that raises an error.

    It needs 2 us for a line of ten keys, where jsonschema needs 37.
    """
    import fastjsonschema  # here, so that light commands do not import it

    return fastjsonschema.compile(read_schema(name), use_default=False, use_formats=False)


def violation(name: str, value: Any) -> Violation | None:
    """Return the first way in which a value does not follow a schema; None if it does.

    Args:
        name: of the schema, such as ``custom``.
        value: plain JSON values.

    >>> violation("halloc", {"image": "1.jpg", "question": "?", "answer": "A bus.", "spans": 3}).message
    'spans should be a list, not 3'
    """
    from fastjsonschema import JsonSchemaValueException

    try:
        _validator(name)(value)
    except JsonSchemaValueException as error:
        return _describe(error, value)
    return None


def check_line(name: str, row: Mapping[str, Any], origin: str, ignored: Collection[str] = ()) -> None:
    """Check a line that users write.

    Args:
        name: of the schema.
        row: the line's object.
        origin: file and line, for the message.
        ignored: keys that are not read this time and may hold anything.

    Raises:
        DataError: it does not follow the schema.
    """
    broken = violation(name, {key: value for key, value in row.items() if key not in ignored} if ignored else row)
    if broken is None:
        return
    inside = broken.path.rpartition("]")[0]
    raise DataError(f"{origin}{f', {inside}]' if inside and broken.message else ''}: {broken.message or broken.reason}")


def check_content(name: str, value: Any, path: object, remedy: str = "") -> None:
    """Check a file that a run has written.

    Args:
        name: of the schema.
        value: the content.
        path: of the file, for the message.
        remedy: advice to the user, at the end of the message.

    Raises:
        ArtefactError: it does not follow the schema.
    """
    broken = violation(name, value)
    if broken is not None:
        raise damaged(path, broken.message or broken.reason, remedy) from None


def _describe(error: Any, whole: Any) -> Violation:
    """Turn an error of the validator into the words of the house."""
    path = "".join(f"[{part}]" if part.isdecimal() else f".{part}" for part in error.path[1:]).lstrip(".")
    value, definition = error.value, error.definition
    name, message = path or "it", ""
    if error.rule == "required" and isinstance(value, Mapping):
        key = next(key for key in error.rule_definition if key not in value)
        there = clipped(", ".join(map(str, value))) or "none"
        reason = f"{path}.{key} is missing" if path else f"key {key!r} is missing; there are: {there}"
    elif error.rule == "type":
        kinds = [error.rule_definition] if isinstance(error.rule_definition, str) else error.rule_definition
        reason = f"{name} should be {' or '.join(KINDS[kind] for kind in kinds)}, not {type(value).__name__}"
    elif error.rule == "enum" and "x-kind" in definition:
        message = reason = unknown(definition["x-kind"], clipped(value), definition["enum"])
    else:
        reason = f"{name} is {shown(value)}, which breaks the rule {error.rule}: {clipped(error.rule_definition)}"
    if "x-message" in definition:
        neighbours = {key: shown(item) for key, item in _container(whole, error.path[1:-1]).items()}
        message = definition["x-message"].format_map(
            {**neighbours, "value": shown(value), "type": type(value).__name__}
        )
    return Violation(path, reason, message)


def _container(whole: Any, path: list[str]) -> Mapping[str, Any]:
    """Return the object at a path of keys and indices; an empty one where it is none."""
    for part in path:
        try:
            whole = whole[int(part)] if isinstance(whole, list) else whole[part]
        except (KeyError, IndexError, TypeError, ValueError):
            return {}
    return whole if isinstance(whole, Mapping) else {}
