"""Tables keep their words as words in every format."""

import math

import numpy as np
import pytest

from stethoscope.core.errors import ConfigError
from stethoscope.metrics.bootstrap import Interval
from stethoscope.report import tables
from stethoscope.report.tables import PairedDifference, Table

NASTY = "\\input{x} $1 & <b>50%</b> #_^~|`*\n[a](b)"
FIGURE = Interval(-0.25, -0.5, 0.0, 100, 50)


def _table(**settings):
    return Table(
        "a & b",
        ("name", "figure", "tested"),
        ((NASTY, FIGURE, PairedDifference(FIGURE, 0.5)), ("empty", None, PairedDifference(FIGURE, None))),
        **settings,
    )


def test_latex_escapes_every_special_character():
    text = tables.latex(_table())
    line = next(line for line in text.splitlines() if "input" in line)
    assert line == (
        r"\textbackslash{}input\{x\} \$1 \& \textless{}b\textgreater{}50\%\textless{}/b\textgreater{} "
        r"\#\_\textasciicircum{}\textasciitilde{}\textbar{}`* [a](b) & $-$0.250 {\scriptsize [$-$0.500, 0.000]} & "
        r"$-$0.250 {\scriptsize [$-$0.500, 0.000] p 0.500} \\"
    )
    assert r"\caption{a \& b. From 50 images.}" in text
    assert r"\begin{tabular}{lrr}" in text
    rules = [line for line in text.splitlines() if line.endswith("rule")]
    assert rules == [r"\toprule", r"\midrule", r"\bottomrule"]


def test_latex_lines_that_begin_with_a_bracket_are_no_options():
    text = tables.latex(Table("", ("[a]", "b"), (("[1cm]", 1), ("*", 2), ("c", 3))))
    lines = text.splitlines()
    assert lines[lines.index(r"\toprule") + 1] == r"{}[a] & b \\"
    assert lines[lines.index(r"\midrule") + 1 :][:3] == [r"{}[1cm] & 1 \\", r"{}* & 2 \\", r"c & 3 \\"]


def test_markdown_keeps_cells_and_lines():
    lines = tables.markdown(_table(note="n*", bold=frozenset({1}))).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 4
    assert all(len(row.replace("\\|", "").split("|")) == 5 for row in rows)
    assert "&lt;b&gt;50%&lt;/b&gt;" in rows[2]
    assert r"\[a\](b)" in rows[2]
    assert rows[3].startswith("| **empty** |  | **−0.250 [−0.500, 0.000]** |")
    assert lines[-1] == r"n\* From 50 images."


def test_below_ten_images_a_dash_and_the_reason():
    few = Interval.of(np.array([0.5, 0.4, 0.6]), items=9, groups=9)
    table = Table("t", ("", "x"), (("a", few), ("b", PairedDifference(FIGURE, 0.5)), ("c", 7)))
    for form in tables.FORMATS:
        text = tables.render_tables([table], form)
        assert "no interval, from fewer than 10 images" in text
        assert "From 9 to 50 images" in text
        assert "nan" not in text
    assert tables.plain(few) == str(few) == "0.500 –"
    assert Table("t", ("", "x"), (("c", 7),)).full_note == ""


def test_html_escapes():
    text = tables.html(_table())
    assert "<b>" not in text
    assert "&lt;b&gt;50%&lt;/<wbr>b&gt;" in text
    assert "<figcaption>a &amp; b</figcaption>" in text


def test_text_is_aligned():
    lines = tables.text(Table("t", ("", "x"), (("a", 1), ("long", 22)))).splitlines()
    assert lines == ["t", "      x", "a     1", "long  22"]


def test_a_figure_that_is_not_defined_says_so():
    table = Table("t", ("", "x"), (("a", Interval(math.nan, math.nan, math.nan, 0, 0)),))
    for form in tables.FORMATS:
        text = tables.render_tables([table], form)
        assert "not defined" in text
        assert "nan" not in text


def test_unknown_format():
    with pytest.raises(ConfigError, match="did you mean 'markdown'"):
        tables.render_tables([], "markdwon")
