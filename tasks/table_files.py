"""Read benchmarks that are published as tables: CSV, and the TSV files of VLMEvalKit with pictures inside."""

from __future__ import annotations

import base64
import binascii
import csv
import io
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from stethoscope.core.errors import DataError
from stethoscope.core.images import read_image
from stethoscope.core.types import ImageRef
from stethoscope.tasks.annotations import clipped, shown

if TYPE_CHECKING:
    from PIL.Image import Image

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
