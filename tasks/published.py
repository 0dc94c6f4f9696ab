"""Readers of published benchmark files. Whatever is wrong is said in one line that names the file and the line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stethoscope.errors import DataError
from stethoscope.records import ImageRef

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def read_text(path: Path) -> str:
    """A whole UTF-8 text file.

    Raises:
        DataError: it is missing, cannot be read or is not text.
    """
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def read_json_lines(path: Path, keys: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line of a JSON-lines file that is not blank.

    Raises:
        DataError: a line is no JSON object or lacks one of ``keys``; the file is missing.
    """
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: a JSON object was expected, not {line.strip()[:40]!r}")
        for key in keys:
            if key not in row:
                raise DataError(f"{path}, line {number}: key {key!r} is missing; there are: {', '.join(sorted(row))}")
        yield number, row


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
        raise DataError(f"{where}: label {row['label']!r} is neither yes nor no")
    if not isinstance(row["text"], str) or not row["text"].strip():
        raise DataError(f"{where}: {row['text']!r} is no question")
    return Question(str(row["question_id"]), image, Path(image.name).stem, row["text"].strip(), label)


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
            raise DataError(f"{where}: question_id {id_} is used before, in {seen[id_]}")
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
            self._names = frozenset(os.listdir(path))
        except FileNotFoundError:
            raise DataError(f"image folder {path} does not exist") from None
        except OSError as error:
            raise DataError(f"image folder {path} cannot be read: {error.strerror}") from None
        if not any(name.lower().endswith(IMAGE_SUFFIXES) for name in self._names) and not any(
            (path / name).is_dir() for name in self._names
        ):
            raise DataError(f"image folder {path} holds no image (looked for {', '.join(IMAGE_SUFFIXES)})")

    def find(self, name: str, where: str) -> ImageRef:
        """The image of that name, which may be a path inside the folder.

        Args:
            name: file name as an annotation gives it.
            where: file and line of that annotation, for messages.

        Raises:
            DataError: there is no such file.
        """
        if name not in self._names and not (self.path / name).is_file():
            raise DataError(f"{where}: image {name!r} is not in {self.path}")
        return ImageRef(name, self.path / name)
