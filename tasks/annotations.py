"""Read annotation files: COCO's, and tables in CSV and in the TSV of VLMEvalKit, with pictures inside.

Errors are one line; ``core.json_rows`` reads JSON and text.
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from stethoscope.core.errors import DataError, unknown
from stethoscope.core.images import read_image
from stethoscope.core.json_rows import clipped, read_json, shown
from stethoscope.core.types import ImageRef
from stethoscope.tasks.object_extraction import OBJECTS, MentionExtractor, mentions

if TYPE_CHECKING:
    from PIL.Image import Image


# --- COCO -------------------------------------------------------------------------------------------------------------


def _read_lists(path: Path, keys: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
    """Read an annotation file that has the given lists of objects.

    Raises:
        DataError: not JSON, or a list is missing.
    """
    data = read_json(path)
    for key in keys:
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise DataError(f"{path}: a COCO annotation file has a list {key!r}, this one does not")
    return data


def _field(path: Path, kind: str, index: int, row: Any, key: str) -> Any:
    """Return one value of a row; JSON of one line has no useful line number, so messages name the row's index."""
    if not isinstance(row, dict) or key not in row:
        raise DataError(f"{path}: {kind}[{index}] has no {key!r}")
    if isinstance(row[key], (list, dict)):
        raise DataError(f"{path}: {kind}[{index}], {key!r} should be a single value, not {shown(row[key])}")
    return row[key]


_IMAGE_ID = re.compile(r"(?:.*/)?(?:COCO_\w+_)?0*(\d+)(?:\.[A-Za-z]\w*)?")


def image_id(value: Any) -> int | str:
    """Normalise an id, which files write as a number, as its digits or as the name of COCO's file.

    >>> image_id(42), image_id("42"), image_id(42.0), image_id("COCO_val2014_000000000042.jpg"), image_id("cat.jpg")
    (42, 42, 42, 42, 'cat.jpg')
    """
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    digits = _IMAGE_ID.fullmatch(text)
    return int(digits[1]) if digits and digits[1].isascii() and len(digits[1]) < 20 else text


def read_instances(
    path: Path, synonyms: Mapping[str, str] | None = None
) -> tuple[dict[int | str, str], dict[int | str, frozenset[str]]]:
    """Read the images of a COCO file and the objects annotated in them.

    Args:
        path: COCO ``instances`` file: lists ``images`` (id, file_name), ``annotations`` (image_id, category_id) and
            ``categories`` (id, name).
        synonyms: lower-case name of a category -> name of the object, for a vocabulary of other objects than COCO's;
            categories that it lacks are left out. None for COCO's own, beside which there is none.

    Returns:
        Image id -> file name in the file's order; image id -> canonical names of the objects (empty set for none).

    Raises:
        DataError: the file is not of that form, has no image, or annotates a category that is not one of COCO's 80
            and no vocabulary is given.
    """
    data = _read_lists(path, ("images", "annotations", "categories"))
    images: dict[int | str, str] = {}
    for index, row in enumerate(data["images"]):
        image = image_id(_field(path, "images", index, row, "id"))
        if image in images:
            raise DataError(f"{path}: images[{index}] has the id {shown(row['id'])}, which is used before")
        images[image] = str(_field(path, "images", index, row, "file_name"))
    if not images:
        raise DataError(f"{path} lists no image")
    names = {
        str(_field(path, "categories", index, row, "id")): str(_field(path, "categories", index, row, "name"))
        for index, row in enumerate(data["categories"])
    }
    objects: dict[int | str, set[str]] = {image: set() for image in images}
    for index, row in enumerate(data["annotations"]):
        image = image_id(_field(path, "annotations", index, row, "image_id"))
        category = _field(path, "annotations", index, row, "category_id")
        name = names.get(str(category))
        if name is None:
            raise DataError(
                f"{path}: annotations[{index}] has category_id {shown(category)}, which is not among categories"
            )
        if synonyms is None and name not in OBJECTS:
            raise DataError(f"{path}: annotations[{index}]: {unknown('COCO object', clipped(name), OBJECTS)}")
        if image not in objects:
            name = shown(row["image_id"])
            raise DataError(f"{path}: annotations[{index}] has image_id {name}, which is not among images")
        name = name if synonyms is None else synonyms.get(" ".join(name.lower().split()))
        objects[image].update(() if name is None else (name,))
    return images, {image: frozenset(names) for image, names in objects.items()}


def read_captions(
    path: Path, images: Collection[int | str], extract: MentionExtractor = mentions
) -> Mapping[int | str, frozenset[str]]:
    """Read the objects that people named in the captions of some images.

    Args:
        path: COCO ``captions`` file: list ``annotations`` (image_id, caption).
        images: ids of the images to read captions of.
        extract: finds the objects that a caption names.

    Returns:
        Image id -> canonical names, for those of the images that have captions; how many have none is warned of.

    Raises:
        DataError: the file is not of that form, or has captions of none of the images.
    """
    wanted = set(images)
    objects: dict[int | str, set[str]] = defaultdict(set)
    for index, row in enumerate(_read_lists(path, ("annotations",))["annotations"]):
        image = image_id(_field(path, "annotations", index, row, "image_id"))
        caption = _field(path, "annotations", index, row, "caption")
        if image in wanted:
            objects[image].update(mention.name for mention in extract(str(caption)))
    if wanted and not objects:
        raise DataError(f"{path} has captions of none of the {len(wanted)} images")
    if len(objects) < len(wanted):
        warnings.warn(
            f"{path} has no caption of {len(wanted) - len(objects)} of {len(wanted)} images: "
            "what is in these is known from the annotated boxes alone",
            stacklevel=2,
        )
    return {image: frozenset(names) for image, names in objects.items()}


# --- tables -----------------------------------------------------------------------------------------------------------

SEPARATORS = {".tsv": "\t", ".csv": ","}
_LONGEST_CELL = 1 << 28
"""Characters of a cell: a picture of 200 MB in base64."""
_LONGEST_REFERENCE = 64
"""VLMEvalKit's rule: a cell of at most so many characters names the row whose picture it shares."""


class TableRow(NamedTuple):
    """One row of a table.

    Attributes:
        origin: file and line on which it begins, for messages.
        values: cells by column.
        span: first byte of the row in the file, and the one after its last.
    """

    origin: str
    values: dict[str, str]
    span: tuple[int, int]


def read_table(path: Path, columns: Iterable[str]) -> Iterator[TableRow]:
    """Yield the rows of a table in UTF-8 whose first line names its columns; never more than one row is in memory.

    Args:
        path: of a file called ``.tsv`` (between tabs) or ``.csv`` (between commas); cells may be in quotation marks.
        columns: that it must have.

    Raises:
        DataError: it is missing, of another kind or no text, lacks a column or a row, or a row has too many or too few
            cells.
    """
    separator = SEPARATORS.get(path.suffix.lower())
    if separator is None:
        raise DataError(f"{path} should be a table, called {' or '.join(SEPARATORS)}")
    try:
        with path.open("rb") as file:
            yield from _rows(file, path, separator, tuple(columns))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _rows(file: IO[bytes], path: Path, separator: str, columns: tuple[str, ...]) -> Iterator[TableRow]:
    header: list[str] = []
    line, start = 1, 0
    for cells, count in _records(file, path, separator):
        origin, end = f"{path}, line {line}", file.tell()
        if not header:
            header = [cell.strip() for cell in cells]
            missing = [column for column in columns if column not in header]
            if missing:
                raise DataError(f"{origin}: column {missing[0]!r} is missing; there are: {clipped(', '.join(header))}")
        elif cells:
            if len(cells) != len(header):
                raise DataError(f"{origin}: {len(cells)} cells, but {len(header)} columns")
            yield TableRow(origin, dict(zip(header, cells, strict=True)), (start, end))
        line, start = line + count, end
    if not header:
        raise DataError(f"{path} is empty; a table with the columns {', '.join(columns)} was expected")


def _records(file: IO[bytes], path: Path, separator: str) -> Iterator[tuple[list[str], int]]:
    """Yield the cells of every record and the number of its lines; the file then stands at the record's end."""
    count = 0

    def lines() -> Iterator[str]:
        nonlocal count
        while line := file.readline():  # not by iteration, which reads ahead
            count += 1
            try:
                yield line.decode("utf-8-sig" if file.tell() == len(line) else "utf-8")
            except UnicodeDecodeError:
                raise DataError(f"{path}, line {count}: not UTF-8 text") from None

    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CELL))
    before = 0
    records = csv.reader(lines(), delimiter=separator, strict=True)
    while True:
        try:
            cells = next(records)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}, line {count}: no row of a table ({error})") from None
        yield cells, count - before
        before = count


class TableImages:
    """Pictures inside a table, in base64, each read from its row when it is needed."""

    def __init__(self, path: Path, column: str = "image") -> None:
        """Store the table and the column that holds the pictures; nothing is read."""
        self.path, self.column = path, column
        self._spans: dict[str, tuple[int, int]] = {}

    def ref(self, row: TableRow, index: str) -> ImageRef:
        """Return the picture of a row, or of an earlier one whose index its cell names.

        Args:
            row: of the table.
            index: what identifies the row; also the name of its picture.

        Raises:
            DataError: the cell is empty, or names a row that is not there.
        """
        cell = row.values[self.column].strip()
        if not cell:
            raise DataError(f"{row.origin}: there is no picture in the column {self.column!r}")
        owner = index
        if len(cell) <= _LONGEST_REFERENCE:
            owner = cell
            if owner not in self._spans:
                raise DataError(f"{row.origin}: {self.column} {shown(cell)} names no row before this one")
        else:
            self._spans[index] = row.span
        return ImageRef(owner, partial(self._decode, owner))

    def _decode(self, owner: str) -> Image:
        start, end = self._spans[owner]
        name = f"image {owner!r} of {self.path}"
        with self.path.open("rb") as file:
            header = file.readline().decode("utf-8-sig")
            file.seek(start)
            text = file.read(end - start).decode()
        separator = SEPARATORS[self.path.suffix.lower()]
        columns, cells = (next(csv.reader(io.StringIO(part, ""), delimiter=separator)) for part in (header, text))
        try:
            data = base64.b64decode(cells[[column.strip() for column in columns].index(self.column)], validate=True)
        except (binascii.Error, ValueError, IndexError):
            raise DataError(f"{name} is not in base64") from None
        return read_image(data, name)
