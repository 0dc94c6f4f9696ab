"""Drawings by their coordinates."""

import re
import subprocess
import sys

import numpy as np
import pytest

from stethoscope.metrics.bootstrap import Interval
from stethoscope.report import curves, plots
from stethoscope.report.tables import PairedDifference


def points_of(svg, name):
    """Read the points of a group's path from the SVG."""
    group = re.search(rf'<g class="{name}">(.*?)</g>', svg, re.DOTALL)[1]
    return [tuple(map(float, pair)) for pair in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", group)]


def test_points_lie_where_the_axes_say():
    curve = plots.Curve([0, 0.5, 1], [0, 1, float("nan")], "s<i>")
    plot = plots.plot_curves("t", ("a $x$", "b & <c>"), [curve], (0, 1))
    (left, bottom), (right, top) = points_of(plot.svg, "reference")
    assert left < right
    assert bottom > top
    assert points_of(plot.svg, "curve-0") == [
        (left, bottom), (pytest.approx((left + right) / 2), pytest.approx(top)),
    ]  # fmt: skip
    assert ">b &amp; &lt;c&gt;</text>" in plot.svg
    assert ">a $x$</text>" in plot.svg
    assert plot.legend == ("s<i>",)
    assert "nan" not in plot.svg


def test_bars_are_as_long_as_their_values():
    values = {"a": (0.2, 0.1, 0.4), "b": (0.1, 0.0, 0.2), "c": (-0.1, -0.2, 0.0)}
    bars = [(name, Interval(*value, 9, 3)) for name, value in values.items()]
    svg = plots.plot_bars("t", "x", bars).svg
    groups = re.findall(r'<path d="([^"]*)"[^>]*style="fill: var\(--s0', svg)
    ends = [[float(x) for x, _ in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", group)] for group in groups]
    widths = [max(xs) - min(xs) for xs in ends]
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.01)
    assert max(ends[2]) == pytest.approx(min(ends[0]), abs=0.01)  # it ends where the others begin


def hints_of(svg):
    """Read the hidden circles: their centre, and the text that they show."""
    return [(float(x), float(y), text) for x, y, text in re.findall(
        r'<circle cx="([-.\d]+)" cy="([-.\d]+)"[^>]*><title>(.*?)</title>', svg
    )]  # fmt: skip


def test_values_show_at_their_points():
    curve = plots.Curve([0, 0.5, 1], [0, 0.25, 1], "detector: 0.9")
    svg = plots.plot_curves("t", ("x", "y: all"), [curve], (0, 1)).svg
    (left, bottom), (right, top) = points_of(svg, "reference")
    assert hints_of(svg)[1] == (
        pytest.approx((left + right) / 2, abs=0.1), pytest.approx(bottom + (top - bottom) / 4, abs=0.1),
        "detector: x 0.500, y 0.250",
    )  # fmt: skip
    many = plots.Curve(np.linspace(0, 1, 300), np.linspace(0, 1, 300), "<b>")
    shown = hints_of(plots.plot_curves("t", ("x", "y"), [many], (0, 1)).svg)
    assert len(shown) == plots.HOVERED
    assert shown[0][2] == "&lt;b&gt;: x 0.000, y 0.000"


def test_a_forest_of_differences():
    rows = [
        ("a", PairedDifference(Interval(0.2, 0.1, 0.3, 9, 3), 0.01)),
        ("b", PairedDifference(Interval(-0.1, -0.2, 0.1, 9, 3), 0.4)),
        ("c", PairedDifference(Interval(float("nan"), float("nan"), float("nan"), 0, 0), None)),
    ]
    svg = plots.plot_forest("t", "x", rows).svg
    (zero, _), *_ = points_of(svg, "reference")
    first, second = hints_of(svg)
    assert first[2].startswith("a: 0.200 [0.100, 0.300]")
    assert (first[0] - zero) == pytest.approx(-2 * (second[0] - zero), abs=0.3)
    assert first[1] < second[1]  # the first on top
    (start, _), (end, _) = points_of(svg, "interval")[:2]
    assert (end - start) == pytest.approx(first[0] - zero, abs=0.3)


def test_costs_stand_side_by_side_in_their_order():
    points = [("ours", "dear", Interval(0.9, 0.8, 1.0, 9, 30)), ("theirs", "free", Interval(0.7, 0.6, 0.8, 9, 30))]
    svg = plots.plot_costs(points, ("free", "middling", "dear")).svg
    ours, theirs = hints_of(svg)
    assert theirs[0] < ours[0]
    assert ours[1] < theirs[1]
    assert ours[2] == f"ours, dear: {points[0][2]}"
    assert ">middling</text>" not in svg  # nothing costs that


def test_a_plot_is_the_same_every_time_and_takes_its_colours_from_the_page():
    bins = [curves.Bin(0.05, "0.0–0.1", 9, 1, Interval(0.1, 0.0, 0.3, 9, 3))]
    positions = [curves.Bin(0, "0–9", 9, 1, None)]
    for make in (lambda: plots.plot_reliability(bins), lambda: plots.plot_positions(positions)):
        svg = make().svg
        assert svg == make().svg
        assert "<style" not in svg  # it would hold for the whole page
        assert "<metadata" not in svg
        assert not re.findall(r":\s*#[0-9a-f]{6}", svg)
        assert not [name for name in re.findall(r' id="([^"]*)"', svg) if not re.fullmatch("[mp][0-9a-f]{10}", name)]


def test_importing_plots_imports_no_matplotlib():
    script = "import sys, stethoscope.report.run_report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_points_that_lie_on_each_other_share_their_names():
    plot = plots.plot_frontier([("greedy", 0.2, 0.8), ("drop", 0.1, 0.8), ("cut", 0.2, 0.801)], [(0, 0), (0.2, 0.8)])
    assert ">greedy, cut</text>" in plot.svg
    assert ">drop</text>" in plot.svg
    assert plot.svg.count('class="point-') == 3
