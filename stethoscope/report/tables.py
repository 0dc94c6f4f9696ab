"""A table for people, as aligned text, Markdown, LaTeX (booktabs) or HTML."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from stethoscope.core.errors import ConfigError, unknown
from stethoscope.markup import escape
from stethoscope.metrics.bootstrap import Interval


class Gap(NamedTuple):
    """A difference and its p-value, None where there is none."""

    interval: Interval
    p: float | None


Cell = str | int | Interval | Gap | None
"""Text (as it is, of whomever it comes), a count, a figure, a tested difference; None for an empty cell."""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: what it shows.
        columns: heads; the first is that of the row names.
        rows: cells, as many as there are columns.
        note: what one must know to read it; empty for nothing.
        bold: indices of rows that stand out.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    bold: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        """A row that is too short would shift its cells unseen."""
        assert all(len(row) == len(self.columns) for row in self.rows), (self.title, self.columns)


def _number(value: float, digits: int = 3) -> str:
    """With a real minus, and no minus before 0.

    >>> _number(-0.0312), _number(-0.0001), _number(12.3456)
    ('−0.031', '0.000', '12.346')
    """
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if not float(text) else text.replace("-", "−")


def _parts(cell: Cell) -> tuple[str, str]:
    """What a cell says, and what it adds in small print."""
    if cell is None:
        return "", ""
    if isinstance(cell, Gap):
        main, small = _parts(cell.interval)
        return main, small if cell.p is None or math.isnan(cell.p) else f"{small} p {cell.p:.3f}"
    if isinstance(cell, Interval):
        if not math.isfinite(cell.value):
            return "not defined", ""
        return _number(cell.value), f"[{_number(cell.low)}, {_number(cell.high)}]"
    return str(cell), ""


def plain(cell: Cell) -> str:
    """A cell on one line."""
    return re.sub(r"\s+", " ", " ".join(part for part in _parts(cell) if part))


def text(table: Table) -> str:
    """Aligned columns for a terminal.

    >>> print(text(Table("scores", ("", "AUROC"), (("a", Interval(0.5, 0.4, 0.6, 9, 3)), ("bb", None)))))
    scores
        AUROC
    a   0.500 [0.400, 0.600]
    bb
    """
    rows = [table.columns, *([plain(cell) for cell in row] for row in table.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([table.title, *lines, *([table.note] if table.note else [])])


_MARKDOWN = re.compile(r"([\\`*_{}\[\]|~<>])")


def markdown_words(words: str) -> str:
    """Words that Markdown shows as they are, on one line.

    >>> print(markdown_words("a|b *c* <script>"))
    a\\|b \\*c\\* &lt;script&gt;
    """
    words = re.sub(r"\s+", " ", words).replace("&", "&amp;")
    return _MARKDOWN.sub(r"\\\1", words).replace(r"\<", "&lt;").replace(r"\>", "&gt;")


def markdown(table: Table) -> str:
    """A pipe table under its title."""

    def cell(found: Cell) -> str:
        if isinstance(found, (Interval, Gap)):
            return plain(found)  # our own figures: brackets need no escape
        return markdown_words(plain(found))

    lines = [[markdown_words(name) for name in table.columns], ["---"] * len(table.columns)]
    for index, row in enumerate(table.rows):
        cells = [cell(found) for found in row]
        lines.append([f"**{part}**" if part and index in table.bold else part for part in cells])
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    note = f"\n\n{markdown_words(table.note)}" if table.note else ""
    return f"### {markdown_words(table.title)}\n\n{body}{note}\n"


_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "−": "$-$", "–": "--", "—": "---", "…": r"\dots{}", "×": r"$\times$",
}  # fmt: skip
_LATEX_CHARACTER = re.compile("|".join(map(re.escape, _LATEX)))


def latex_words(words: str) -> str:
    r"""Words that LaTeX prints as they are, on one line.

    >>> print(latex_words("50 % of a_b \\input{x}"))
    50 \% of a\_b \textbackslash{}input\{x\}
    """
    return _LATEX_CHARACTER.sub(lambda found: _LATEX[found.group()], re.sub(r"\s+", " ", words))


def _words(table: Table) -> list[bool]:
    """Which columns hold words, and begin at the left."""
    return [any(isinstance(row[column], str) for row in table.rows) for column in range(len(table.columns))]


def latex(table: Table) -> str:
    r"""A floating table with the rules of booktabs, made narrower where it is wider than the page."""

    def cell(found: Cell, bold: bool) -> str:
        main, small = map(latex_words, _parts(found))
        main = rf"\textbf{{{main}}}" if bold and main else main
        return f"{main} {{\\scriptsize {small}}}" if small else main

    layout = "".join("l" if left or not index else "r" for index, left in enumerate(_words(table)))
    caption = f"{latex_words(table.title)}. {latex_words(table.note)}".removesuffix(". ") + "."
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{caption.replace('..', '.')}}}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{layout}}}",
        r"\toprule",
        " & ".join(latex_words(name) for name in table.columns) + r" \\",
        r"\midrule",
        *(
            " & ".join(cell(found, index in table.bold) for found in row) + r" \\"
            for index, row in enumerate(table.rows)
        ),
        r"\bottomrule",
        r"\end{tabular}}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def html(table: Table) -> str:
    """A ``<figure>`` that scrolls sideways where the page is narrow; all texts are escaped."""

    def cell(found: Cell, name: str) -> str:
        main, small = map(escape, _parts(found))
        if name == "th":  # names of features may be broken where a screen is narrow
            main = re.sub(r"([_/])", r"\1<wbr>", main)
        kind = ' class="words"' if isinstance(found, str) and name == "td" else ""
        return f"<{name}{kind}>{main}{f' <small>{small}</small>' if small else ''}</{name}>"

    head = "".join(
        f'<th scope="col"{" class=words" if left else ""}>{escape(name)}</th>'
        for name, left in zip(table.columns, _words(table), strict=True)
    )
    body = "".join(
        f"<tr{' class=main' if index in table.bold else ''}>"
        + cell(row[0], "th").replace("<th>", '<th scope="row">')
        + "".join(cell(found, "td") for found in row[1:])
        + "</tr>\n"
        for index, row in enumerate(table.rows)
    )
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<figure class="table"><figcaption>{escape(table.title)}</figcaption>\n<div class="scroll" tabindex="0">'
        f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>{note}</figure>\n"
    )


FORMATS: dict[str, Callable[[Table], str]] = {"text": text, "markdown": markdown, "latex": latex, "html": html}
LATEX_HEAD = "% needs \\usepackage{booktabs,graphicx,textcomp} and \\usepackage[T1]{fontenc}\n"


def render(tables: Sequence[Table], form: str) -> str:
    """All tables one after another.

    Raises:
        ConfigError: there is no such format.
    """
    if form not in FORMATS:
        raise ConfigError(unknown("format", form, FORMATS))
    return (
        (LATEX_HEAD if form == "latex" else "") + "\n\n".join(FORMATS[form](table).rstrip() for table in tables) + "\n"
    )
