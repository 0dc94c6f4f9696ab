"""Plots as inline SVG that takes its colours from the page, so that they are right in light and in dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from stethoscope.markup import escape

WIDTH, HEIGHT = 440, 320
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 62  # room around the axes


@dataclass(frozen=True)
class Series:
    """One curve, or one set of points.

    Attributes:
        x, y: where the points are.
        name: for the legend; empty for none.
        low, high: ends of error bars, as many as there are points; empty without.
        line: join the points.
        marks: draw the points.
    """

    x: Sequence[float]
    y: Sequence[float]
    name: str = ""
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    line: bool = True
    marks: bool = False


@dataclass(frozen=True)
class Axes:
    """Where a plot lies in its data.

    Attributes:
        x, y: names of the axes.
        x_range, y_range: ends of the axes.
        x_ticks: value and label, which may have a second line after a newline; empty for a tick every fifth.
    """

    x: str
    y: str
    x_range: tuple[float, float] = (0.0, 1.0)
    y_range: tuple[float, float] = (0.0, 1.0)
    x_ticks: Sequence[tuple[float, str]] = field(default=())

    def px(self, value: float) -> float:
        """Horizontal place in the drawing."""
        low, high = self.x_range
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / (high - low)

    def py(self, value: float) -> float:
        """Vertical place in the drawing."""
        low, high = self.y_range
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)


def _text(x: float, y: float, words: str, kind: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}"{more}>{escape(words)}</text>'


def _fifths(low: float, high: float) -> list[tuple[float, str]]:
    values = [low + (high - low) * step / 5 for step in range(6)]
    return [(value, f"{value:.2f}".removesuffix("0").removesuffix(".0")) for value in values]


def _frame(axes: Axes) -> list[str]:
    """Grid, ticks and names of the axes."""
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for value, label in _fifths(*axes.y_range):
        y = axes.py(value)
        parts += [
            f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>',
            _text(LEFT - 7, y + 4, label, "tick end"),
        ]
    for value, label in axes.x_ticks or _fifths(*axes.x_range):
        x = axes.px(value)
        if not axes.x_ticks:
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts += [_text(x, bottom + 16 + 14 * at, line, "tick middle") for at, line in enumerate(label.split("\n"))]
    lines = max((label.count("\n") for _, label in axes.x_ticks), default=0)
    parts.append(_text((LEFT + right) / 2, bottom + 38 + 14 * lines, axes.x, "name middle"))
    middle = (TOP + bottom) / 2
    parts.append(_text(13, middle, axes.y, "name middle", f' transform="rotate(-90 13 {middle:.1f})"'))
    return parts


def _series(axes: Axes, number: int, series: Series) -> list[str]:
    points = [
        (axes.px(x), axes.py(y))
        for x, y in zip(series.x, series.y, strict=True)
        if math.isfinite(x) and math.isfinite(y)
    ]
    parts = []
    if series.line and len(points) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="line s{number}" points="{path}"/>')
    for x, low, high in zip(series.x, series.low, series.high, strict=False):
        if math.isfinite(low) and math.isfinite(high):
            at = axes.px(x)
            parts.append(
                f'<path class="line bar s{number}" d="M{at:.1f} {axes.py(low):.1f}V{axes.py(high):.1f}'
                f'M{at - 4:.1f} {axes.py(low):.1f}h8M{at - 4:.1f} {axes.py(high):.1f}h8"/>'
            )
    if series.marks:
        parts += [f'<circle class="mark s{number}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in points]
    return parts


def _columns(axes: Axes, columns: Sequence[tuple[float, float, float]]) -> list[str]:
    """Pale columns at the bottom that show how many items there are: from, to, and a height of 0 to 1."""
    tall = (HEIGHT - TOP - BOTTOM) * 0.22
    bottom = HEIGHT - BOTTOM
    return [
        f'<rect class="count" x="{axes.px(low) + 1:.1f}" y="{bottom - tall * height:.1f}" '
        f'width="{axes.px(high) - axes.px(low) - 2:.1f}" height="{tall * height:.1f}"/>'
        for low, high, height in columns
        if height > 0
    ]


def plot(
    title: str,
    axes: Axes,
    series: Sequence[Series],
    reference: tuple[float, float, float, float] | None = None,
    columns: Sequence[tuple[float, float, float]] = (),
    note: str = "",
) -> str:
    """A ``<figure>`` with a plot, its legend and a note.

    Args:
        title: what it shows; also what a screen reader says.
        axes: names and ranges.
        series: at most four, in the order of their colours.
        reference: x and y of both ends of a dashed line.
        columns: from, to and height (0 to 1) of pale columns.
        note: what one must know to read it.
    """
    parts = [*_columns(axes, columns), *_frame(axes)]
    if reference:
        x1, y1, x2, y2 = reference
        parts.append(
            f'<line class="reference" x1="{axes.px(x1):.1f}" y1="{axes.py(y1):.1f}" '
            f'x2="{axes.px(x2):.1f}" y2="{axes.py(y2):.1f}"/>'
        )
    for number in reversed(range(len(series))):  # the first, on which the plot is about, lies on top
        parts += _series(axes, number, series[number])
    legend = "".join(
        f'<li><i class="s{number}"></i>{escape(one.name)}</li>' for number, one in enumerate(series) if one.name
    )
    return _figure(title, WIDTH, HEIGHT, parts, f'<ul class="legend">{legend}</ul>' if legend else "", note)


def bars(title: str, rows: Sequence[tuple[str, float, float, float]], name: str, note: str = "") -> str:
    """A ``<figure>`` of horizontal bars with error bars, from the first row down.

    Args:
        title: what it shows.
        rows: label, value, and the ends of the interval.
        name: of the axis.
        note: what one must know to read it.
    """
    left, step = 170, 24
    height = TOP + step * len(rows) + 44
    low = min([0.0, *(row[2] for row in rows if math.isfinite(row[2]))])
    high = max([1e-6, *(row[3] for row in rows if math.isfinite(row[3]))])

    def px(value: float) -> float:
        return left + (WIDTH - left - RIGHT) * (value - low) / (high - low)

    bottom = TOP + step * len(rows)
    parts = []
    for value in _round_ticks(low, high):
        parts += [
            f'<line class="grid" x1="{px(value):.1f}" x2="{px(value):.1f}" y1="{TOP}" y2="{bottom}"/>',
            _text(px(value), bottom + 16, f"{value:g}".replace("-", "−"), "tick middle"),
        ]
    for index, (label, value, start, end) in enumerate(rows):
        y = TOP + step * index + step / 2
        from_, to = sorted((px(0), px(value)))
        parts += [
            _text(left - 8, y + 4, label, "tick end"),
            f'<rect class="fill s0" x="{from_:.1f}" y="{y - 7:.1f}" width="{max(to - from_, 0.5):.1f}" '
            'height="14" rx="2"/>',
        ]
        if math.isfinite(start) and math.isfinite(end):
            parts.append(
                f'<path class="line whisker" d="M{px(start):.1f} {y:.1f}H{px(end):.1f}'
                f'M{px(start):.1f} {y - 3:.1f}v6M{px(end):.1f} {y - 3:.1f}v6"/>'
            )
    parts.append(_text((left + WIDTH - RIGHT) / 2, height - 6, name, "name middle"))
    return _figure(title, WIDTH, height, parts, "", note)


def _round_ticks(low: float, high: float) -> list[float]:
    """Three to six round values.

    >>> _round_ticks(-0.01, 0.13)
    [0.0, 0.05, 0.1]
    """
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [round(step * at, 10) for at in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _figure(title: str, width: int, height: int, parts: Sequence[str], legend: str, note: str) -> str:
    drawing = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    small = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<figure class="plot"><figcaption>{escape(title)}</figcaption>{drawing}{legend}{small}</figure>\n'
