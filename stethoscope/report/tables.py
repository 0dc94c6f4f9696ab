"""Write tables for terminals and as aligned text, Markdown, LaTeX (booktabs) and HTML."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from stethoscope.core.errors import ConfigError, unknown
from stethoscope.core.html import escape, render
from stethoscope.core.text import escape_markdown
from stethoscope.metrics.bootstrap import MIN_IMAGES, Interval

if TYPE_CHECKING:
    from markupsafe import Markup
    from rich.table import Table as TerminalTable


class PairedDifference(NamedTuple):
    """A paired difference over the same resampled images, and its two-sided p-value, if there is one."""

    interval: Interval
    p: float | None


Cell = str | int | Interval | PairedDifference | None
"""Text (untrusted: every writer escapes it), a count, an interval or a paired difference; None for an empty cell."""


@dataclass(frozen=True)
class Table:
    """A table to be shown to people.

    Attributes:
        title: the heading; may be empty.
        columns: names of the columns; the first column holds the names of the rows.
        rows: cells, as many in each row as there are columns.
        note: how to read the table; may be empty.
        bold: indices of the rows that are set in bold.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    bold: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        """Check that every row has a cell for every column."""
        assert all(len(row) == len(self.columns) for row in self.rows), (self.title, self.columns)

    @property
    def images_note(self) -> str:
        """From how many images the figures are, and why some have no interval; empty without figures."""
        cells = [cell for row in self.rows for cell in row if isinstance(cell, (Interval, PairedDifference))]
        figures = [cell.interval if isinstance(cell, PairedDifference) else cell for cell in cells]
        counts = sorted({figure.groups for figure in figures if math.isfinite(figure.value)})
        if not counts:
            return ""
        span = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        few = f" –: no interval, from fewer than {MIN_IMAGES} images." if counts[0] < MIN_IMAGES else ""
        return f"From {span} image{'' if counts[-1] == 1 else 's'}.{few}"

    @property
    def full_note(self) -> str:
        """How to read the table, and from how many images its figures are."""
        return " ".join(filter(None, (self.note, self.images_note)))

    def without(self, names: Collection[str]) -> Table:
        """Drop the columns of these names."""
        indices = [index for index, name in enumerate(self.columns) if name not in names]
        rows = tuple(tuple(row[index] for index in indices) for row in self.rows)
        return replace(self, columns=tuple(self.columns[index] for index in indices), rows=rows)


def _number(value: float) -> str:
    """Write a number with three digits and a real minus sign; no sign if it rounds to 0.

    >>> _number(-0.0312), _number(-0.0001), _number(12.3456)
    ('−0.031', '0.000', '12.346')
    """
    text = f"{value:.3f}"
    return text.lstrip("-") if not float(text) else text.replace("-", "−")


def _parts(cell: Cell) -> tuple[str, str]:
    """Write a cell as its main text and its small print, either of which may be empty."""
    if cell is None:
        return "", ""
    if isinstance(cell, PairedDifference):
        main, small = _parts(cell.interval)
        return main, small if cell.p is None or math.isnan(cell.p) else f"{small} p {cell.p:.3f}"
    if isinstance(cell, Interval):
        if not math.isfinite(cell.value):
            return "not defined", ""
        return _number(cell.value), f"[{_number(cell.low)}, {_number(cell.high)}]" if cell.has_bounds else "–"
    return str(cell), ""


def plain(cell: Cell, leading_zero: bool = True) -> str:
    """Write a cell on one line.

    Args:
        cell: of a table.
        leading_zero: write numbers as 0.947; False writes .947, so that more columns fit on a line.

    >>> plain(Interval(0.5, 0.4, 0.6, 90, 30)), plain(Interval(0.5, 0.4, 0.6, 90, 30), leading_zero=False)
    ('0.500 [0.400, 0.600]', '.500 [.400, .600]')
    """
    text = re.sub(r"\s+", " ", " ".join(part for part in _parts(cell) if part))
    if leading_zero or not isinstance(cell, (Interval, PairedDifference)):
        return text
    return re.sub(r"(?<!\d)0\.", ".", text)


def text(table: Table) -> str:
    """Write aligned columns that are never wrapped, for files and pipes.

    >>> print(text(Table("scores", ("", "AUROC"), (("a", Interval(0.5, 0.4, 0.6, 90, 30)), ("bb", None)))))
    scores
        AUROC
    a   0.500 [0.400, 0.600]
    bb
    From 30 images.
    """
    rows = [table.columns, *([plain(cell) for cell in row] for row in table.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*filter(None, [table.title]), *lines, *filter(None, [table.full_note])])


def terminal(table: Table, leading_zero: bool = True) -> TerminalTable:
    """Make a table of rich, which wraps to the width of the terminal; the caller prints the note.

    Args:
        table: to be printed.
        leading_zero: write numbers as 0.947; False writes .947.
    """
    from rich.table import Table as TerminalTable
    from rich.text import Text

    grid = TerminalTable(
        title=Text(table.title) if table.title else None,
        title_justify="left",
    )
    for index, name in enumerate(table.columns):
        grid.add_column(Text(name), no_wrap=index == 0)
    for index, row in enumerate(table.rows):
        style = "bold" if index in table.bold else None
        grid.add_row(*(Text(plain(cell, leading_zero)) for cell in row), style=style)
    return grid


def markdown(table: Table) -> str:
    """Write a pipe table under its title."""

    def write(cell: Cell) -> str:
        if isinstance(cell, (Interval, PairedDifference)):
            return plain(cell)  # numbers in brackets, which need no escape
        return escape_markdown(plain(cell))

    lines = [[escape_markdown(name) for name in table.columns], ["---"] * len(table.columns)]
    for index, row in enumerate(table.rows):
        cells = [write(cell) for cell in row]
        lines.append([f"**{part}**" if part and index in table.bold else part for part in cells])
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    note = f"\n\n{escape_markdown(table.full_note)}" if table.full_note else ""
    return f"### {escape_markdown(table.title)}\n\n{body}{note}\n"


_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "−": "$-$", "–": "--", "—": "---", "…": r"\dots{}", "×": r"$\times$",
}  # fmt: skip
_LATEX_CHARACTER = re.compile("|".join(map(re.escape, _LATEX)))


def escape_latex(text: str) -> str:
    r"""Escape text so that LaTeX prints it as it is, on one line.

    >>> print(escape_latex("50 % of a_b \\input{x}"))
    50 \% of a\_b \textbackslash{}input\{x\}
    """
    return _LATEX_CHARACTER.sub(lambda match: _LATEX[match.group()], re.sub(r"\s+", " ", text))


def _text_columns(table: Table) -> list[bool]:
    """Tell for every column whether it holds text, which is aligned left."""
    return [any(isinstance(row[column], str) for row in table.rows) for column in range(len(table.columns))]


def latex(table: Table) -> str:
    r"""Write a floating table with the rules of booktabs, scaled down if it is wider than the page."""

    def write(cell: Cell, bold: bool) -> str:
        main, small = map(escape_latex, _parts(cell))
        main = rf"\textbf{{{main}}}" if bold and main else main
        return f"{main} {{\\scriptsize {small}}}" if small else main

    def line(cells: Iterable[str]) -> str:
        text = " & ".join(cells)
        return ("{}" if text[:1] in ("[", "*") else "") + text + r" \\"  # both belong to \\ and \midrule before them

    alignment = "".join("l" if is_text or not index else "r" for index, is_text in enumerate(_text_columns(table)))
    caption = f"{escape_latex(table.title)}. {escape_latex(table.full_note)}".removesuffix(". ") + "."
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{caption.replace('..', '.')}}}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{alignment}}}",
        r"\toprule",
        line(map(escape_latex, table.columns)),
        r"\midrule",
        *(line(write(cell, index in table.bold) for cell in row) for index, row in enumerate(table.rows)),
        r"\bottomrule",
        r"\end{tabular}}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def html(table: Table) -> Markup:
    """Write a ``<figure>`` that scrolls sideways on a narrow page."""
    from markupsafe import Markup

    rows = [
        {
            "bold": index in table.bold,
            # let long feature names wrap on a narrow screen
            "name": Markup(re.sub(r"([_/])", r"\1<wbr>", escape(_parts(row[0])[0]))),
            "small": _parts(row[0])[1],
            "cells": [(isinstance(cell, str), *_parts(cell)) for cell in row[1:]],
        }
        for index, row in enumerate(table.rows)
    ]
    columns = list(zip(table.columns, _text_columns(table), strict=True))
    return render("report/table.html", table=table, columns=columns, rows=rows)


FORMATS: dict[str, Callable[[Table], str]] = {"text": text, "markdown": markdown, "latex": latex, "html": html}
LATEX_PACKAGES = "% needs \\usepackage{booktabs,graphicx,textcomp} and \\usepackage[T1]{fontenc}\n"


def render_tables(tables: Sequence[Table], format_name: str) -> str:
    """Write all tables one after another.

    Args:
        tables: in their order.
        format_name: one of ``FORMATS``.

    Raises:
        ConfigError: there is no such format.
    """
    if format_name not in FORMATS:
        raise ConfigError(unknown("format", format_name, FORMATS))
    parts = (str(FORMATS[format_name](table)).rstrip() for table in tables)
    return (LATEX_PACKAGES if format_name == "latex" else "") + "\n\n".join(parts) + "\n"
