"""What is shown beside figures where a logger can: pictures and marked text in the cells of tables."""

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
        image: RGB, as small as it is to be shown.
        words: what stands under it.
    """

    image: Image = field(repr=False)
    words: str


@dataclass(frozen=True)
class Marked:
    """Text with marks in a table.

    Attributes:
        html: HTML, its texts escaped already.
        words: the same as plain text.
    """

    html: str
    words: str


def plain(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> tuple[list[str], list[list[Any]]]:
    """A table with words in place of marked text, and without columns of pictures.

    >>> plain(["object", "answer"], [[1, Marked("<b>dog</b>", "dog")]])
    (['object', 'answer'], [[1, 'dog']])
    """
    kept = [at for at in range(len(columns)) if not any(isinstance(row[at], Picture) for row in rows)]
    cells = [[row[at].words if isinstance(row[at], Marked) else row[at] for at in kept] for row in rows]
    return [columns[at] for at in kept], cells
