"""Define pictures and marked text for the cells of logged tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture in a table.

    Attributes:
        image: RGB, at the size to show.
        caption: text under the image.
    """

    image: Image = field(repr=False)
    caption: str


@dataclass(frozen=True)
class Marked:
    """Text with highlights in a table.

    Attributes:
        html: HTML, with escaped texts.
        text: the same as plain text.
    """

    html: str
    text: str


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> tuple[list[str], list[list[Any]]]:
    """Convert marked text in a table to plain text, and drop columns of pictures.

    >>> plain_table(["object", "answer"], [[1, Marked("<b>dog</b>", "dog")]])
    (['object', 'answer'], [[1, 'dog']])
    """
    shown = [index for index in range(len(columns)) if not any(isinstance(row[index], Picture) for row in rows)]
    cells = [[row[index].text if isinstance(row[index], Marked) else row[index] for index in shown] for row in rows]
    return [columns[index] for index in shown], cells
