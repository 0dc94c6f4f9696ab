"""Readers of published benchmark files. Whatever is wrong is said in one line that names the file and the line."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from stethoscope.errors import DataError
from stethoscope.records import ImageRef

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


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
    """A whole UTF-8 text file, with a byte order mark or without.

    Raises:
        DataError: it is missing, cannot be read or is not text.
    """
    try:
        return path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def read_json_lines(path: Path, keys: Iterable[str], nulls: bool = True) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line of a JSON-lines file that is not blank.

    Args:
        path: of the file.
        keys: that every object must have.
        nulls: False to take a key with null, which pandas writes for a missing cell, as one that is not there.

    Raises:
        DataError: a line is no JSON object or lacks one of ``keys``; the file is missing.
    """
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row, end = _value(line, _BLANK.match(line).end(), path, number)
        if line[end:].strip():
            raise DataError(f"{where}: not JSON (more after the object's end, at column {end + 1})")
        if not nulls and isinstance(row, dict):
            row = {key: value for key, value in row.items() if value is not None}
        yield number, _object(row, keys, where)


def read_json_list(path: Path, keys: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number on which it starts, object) of every item of a file that is one JSON list of objects.

    Raises:
        DataError: the file is missing or no such list, an item is no object or lacks one of ``keys``.
    """
    text = read_text(path)
    at, seen, line, mark = _BLANK.match(text).end(), 0, 1, "["
    if text[at : at + 1] != mark:
        raise DataError(f"{path}: a JSON list was expected, not {text[at : at + 40]!r}")
    while mark != "]":
        at = _BLANK.match(text, at + 1).end()
        line, seen = line + text.count("\n", seen, at), at
        if mark == "[" and text[at : at + 1] == "]":
            break
        row, at = _value(text, at, path)
        yield line, _object(row, keys, f"{path}, line {line}")
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
    value, end = _value(text, _BLANK.match(text).end(), path)
    if text[end:].strip():
        line = text.count("\n", 0, end) + 1
        raise DataError(f"{path}, line {line}: not JSON (more after the value's end)")
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
        raise DataError(f"{path}, {place}: not JSON that can be read ({str(error).splitlines()[0]})") from None


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
    """The questions of one POPE file: JSON lines with ``question_id``, ``image``, ``text`` and ``label``.

    Raises:
        DataError: a broken line, a label that is neither yes nor no, an id that comes twice, an image that is missing.
    """
    places, questions = [], []
    for number, row in read_json_lines(path, ("question_id", "image", "text", "label")):
        where = f"{path}, line {number}"
        questions.append(question(row, images.find(str(row["image"]), where), where))
        places.append((questions[-1].id, where))
    unique(places)
    if not questions:
        raise DataError(f"{path} holds no question")
    return questions


class ImageFolder:
    """A folder of images, listed once so that missing files are found before anything runs.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        """Lists the folder.

        Raises:
            DataError: it does not exist, is no folder or holds no image.
        """
        self.path = path
        try:
            entries = list(os.scandir(path))
        except FileNotFoundError:
            raise DataError(f"image folder {path} does not exist") from None
        except OSError as error:
            raise DataError(f"image folder {path} cannot be read: {error.strerror}") from None
        self._names = frozenset(entry.name for entry in entries)
        folders = {entry.name for entry in entries if entry.is_dir()}
        self._images = sorted(
            name
            for name in self._names - folders
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")  # as macOS leaves beside every file
        )
        if not self._images and not folders:
            raise DataError(f"image folder {path} holds no image (looked for {', '.join(IMAGE_SUFFIXES)})")

    def find(self, name: str, where: str) -> ImageRef:
        """The image of that name, which may be a path inside the folder.

        Args:
            name: file name as an annotation gives it.
            where: file and line of that annotation, for messages.

        Raises:
            DataError: there is no such file, or the name leads out of the folder.
        """
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if ".." in parts or parts[:1] == ("/",) or re.match(r"[A-Za-z]:[\\/]", name):
            raise DataError(f"{where}: image {shown(name)} leads out of {self.path}; it should be inside it")
        if name not in self._names and not self._holds(name):
            raise DataError(f"{where}: image {shown(name)} is not in {self.path}")
        return ImageRef(name, self.path / name)

    def _holds(self, name: str) -> bool:
        try:
            return (self.path / name).is_file()
        except (OSError, ValueError):  # a name that no file can have: too long, or with a zero byte
            return False

    def names(self) -> list[str]:
        """Names of the images that lie directly in the folder, sorted; hidden files are none."""
        return self._images
