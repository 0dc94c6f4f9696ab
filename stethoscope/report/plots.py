"""Draw plots of a detector's warnings with matplotlib, as SVG for a page.

Importing this module does not import matplotlib. Equal points give equal SVG; text stays text, and colours are CSS
variables of the page, so that a plot fits its light and its dark mode.
"""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from stethoscope.core.html import escape
from stethoscope.metrics.bootstrap import Interval
from stethoscope.report.curves import Bin

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from stethoscope.report.tables import PairedDifference

HOVERED = 40  # points of a curve that show their values
SIZE = 440, 320  # width and height of a plot, in points
COLOURS = {
    "ink": "#1c2024", "soft": "#60666d", "rule": "#e1e4e8", "card": "#ffffff", "count": "#dbe4ef",
    "s0": "#0b63ce", "s1": "#c2620a", "s2": "#1a7f4b", "s3": "#8a4bbd",
}  # fmt: skip
"""Colours by the name of the CSS variable that takes their place; ``s0`` to ``s3`` are those of the curves."""
STYLE: dict[Any, Any] = {  # matplotlib's stubs know keys as literals
    "svg.fonttype": "none",  # text as text
    "svg.hashsalt": "stethoscope",  # the same ids every time
    "text.parse_math": False,  # a $ in a feature name starts no formula
    "font.size": 11,
    "axes.edgecolor": COLOURS["rule"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.labelsize": 12,
    "xtick.color": COLOURS["soft"],
    "ytick.color": COLOURS["soft"],
    "grid.color": COLOURS["rule"],
}
_lock = threading.Lock()  # matplotlib's settings belong to the whole process


@dataclass(frozen=True)
class Curve:
    """A curve with its name for the legend.

    Attributes:
        x, y: (n,) coordinates; points that are not finite are left out.
        name: for the legend.
    """

    x: Sequence[float]
    y: Sequence[float]
    name: str


class Hint(NamedTuple):
    """What a point of a plot says where the pointer rests, in the coordinates of the plot's data."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Plot:
    """A plot for a page.

    Attributes:
        title: the heading.
        svg: the drawing.
        legend: names of its curves, in the order of their colours.
        note: how to read the plot; may be empty.
    """

    title: str
    svg: Markup = field(repr=False)
    legend: tuple[str, ...] = ()
    note: str = ""


def plot_curves(
    title: str, labels: tuple[str, str], curves: Sequence[Curve], reference: Sequence[float], note: str = ""
) -> Plot:
    """Plot at most four curves in the unit square; their points show their values where the pointer rests.

    Args:
        title: the heading.
        labels: of the x and the y axis.
        curves: in the order of their colours; the first lies on top.
        reference: (2,) y at x = 0 and at x = 1 of a dashed line.
        note: how to read the plot.
    """
    with _drawing(SIZE) as (figure, axes):
        _unit_square(axes, *labels)
        axes.plot([0, 1], reference, **_DASHED)
        for index in reversed(range(len(curves))):
            _line(axes, curves[index], index)
        names = [label.partition(":")[0] for label in labels]
        hints = [
            Hint(x, y, f"{curve.name.partition(':')[0]}: {names[0]} {x:.3f}, {names[1]} {y:.3f}")
            for curve in curves
            for x, y in _spread(curve)
        ]
        return _plot(title, figure, hints, note, tuple(curve.name for curve in curves))


def plot_reliability(bins: Sequence[Bin], note: str = "") -> Plot:
    """Plot the share of hallucinated mentions by probability, with columns for the number of mentions."""
    title = "reliability"
    with _drawing(SIZE) as (figure, axes):
        _unit_square(axes, "probability that the detector gives", "share that is hallucinated")
        edges = [float(part.name[:3]) for part in bins]
        _columns(axes, bins, edges, 0.1)
        axes.plot([0, 1], [0, 1], **_DASHED)
        _intervals(axes, bins)
        return _plot(title, figure, _hints_of(bins, "share"), note)


def plot_positions(bins: Sequence[Bin], note: str = "") -> Plot:
    """Plot the AUROC by token position, with columns for the number of mentions."""
    title = "AUROC by token position"
    intervals = [part.interval for part in bins if part.interval is not None]
    with _drawing(SIZE) as (figure, axes):
        axes.set(xlabel="token position in the answer", ylabel="AUROC")
        bounds = [bound for part in intervals for bound in (part.low, part.value)]
        axes.set(xlim=(-0.5, len(bins) - 0.5), ylim=_auroc_limits(bounds))
        labelled = bins if len(bins) <= 7 else bins[::2]  # every other label, or they would touch
        names = [f"{part.name}\n{part.hallucinated}/{part.mentions}" for part in labelled]
        axes.set_xticks([part.x for part in labelled], names)
        axes.grid(axis="y")
        _columns(axes, bins, [part.x - 0.5 for part in bins], 1.0)
        axes.plot([-0.5, len(bins) - 0.5], [0.5, 0.5], **_DASHED)
        _intervals(axes, bins)
        return _plot(title, figure, _hints_of(bins, "AUROC"), note)


def plot_bars(title: str, label: str, bars: Sequence[tuple[str, Interval]], note: str = "") -> Plot:
    """Plot horizontal bars with error bars, the first on top.

    Args:
        title: the heading.
        label: of the axis.
        bars: names and values.
        note: how to read the plot.
    """
    with _drawing((SIZE[0], 60 + 24 * len(bars))) as (figure, axes):
        axes.barh(
            range(len(bars)), [bar.value for _, bar in bars], height=0.6, color=COLOURS["s0"], zorder=2, gid="bars"
        )
        for index, (_, bar) in enumerate(bars):
            if bar.has_bounds:
                axes.plot(
                    [bar.low, bar.high], [index, index], color=COLOURS["ink"], linewidth=1.2, marker="|", zorder=3
                )
        return _plot(title, figure, _named_rows(axes, label, bars), note)


def plot_forest(title: str, label: str, rows: Sequence[tuple[str, PairedDifference]], note: str = "") -> Plot:
    """Plot paired differences with their intervals around a line at 0, the first on top.

    Args:
        title: the heading.
        label: of the axis.
        rows: names and differences; those that are not defined are left out.
        note: how to read the plot.
    """
    shown = [(name, row.interval) for name, row in rows if np.isfinite(row.interval.value)]
    with _drawing((SIZE[0] + 60, 70 + 24 * len(shown))) as (figure, axes):
        axes.axvline(0, **_DASHED)
        for index, (_, interval) in enumerate(shown):
            colour = COLOURS["s0"] if interval.low > 0 or interval.high < 0 else COLOURS["soft"]
            if interval.has_bounds:
                axes.plot([interval.low, interval.high], [index, index], color=colour, linewidth=1.6, gid="interval")
            axes.plot([interval.value], [index], marker="o", markersize=7, color=colour, gid=f"point-{index}")
        return _plot(title, figure, _named_rows(axes, label, shown), note)


def plot_costs(points: Sequence[tuple[str, str, Interval]], costs: Sequence[str], note: str = "") -> Plot:
    """Plot the AUROC of detectors against what they cost beyond the answer itself.

    Args:
        points: name, cost and AUROC of each; the first is ours.
        costs: in their order on the axis, from left to right.
        note: how to read the plot.
    """
    title = "AUROC against cost"
    shown = [point for point in points if np.isfinite(point[2].value)]
    used = [cost for cost in costs if any(point[1] == cost for point in shown)]
    with _drawing((SIZE[0] + 120, SIZE[1] + 20)) as (figure, axes):
        axes.set(
            ylabel="AUROC", xlim=(-0.5, len(used) - 0.5), ylim=_auroc_limits([interval.value for *_, interval in shown])
        )
        axes.set_xticks(range(len(used)), used)
        axes.grid(axis="y")
        hints = []
        for index, (name, cost, interval) in enumerate(shown):
            beside = [point for point in shown if point[1] == cost]
            shift = 0.0 if len(beside) == 1 else 0.6 * beside.index(shown[index]) / (len(beside) - 1) - 0.3
            x, colour = used.index(cost) + shift, COLOURS["s1" if index else "s0"]
            if interval.has_bounds:
                axes.plot([x, x], [interval.low, interval.high], color=colour, linewidth=1.4)
            axes.plot(
                [x], [interval.value], marker="o", markersize=7 if index else 10, color=colour, gid=f"point-{index}"
            )
            hints.append(Hint(x, interval.value, f"{name}, {cost}: {interval}"))
        return _plot(title, figure, hints, note)


def plot_frontier(
    points: Sequence[tuple[str, float, float]],
    front: Sequence[tuple[float, float]],
    note: str = "",
    band: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
) -> Plot:
    """Plot recall against CHAIR_i of every method, and the front of trivial methods.

    Args:
        points: name, CHAIR_i and recall, both in [0, 1]; points that are not finite are left out.
        front: CHAIR_i and recall of the corners of the dashed line, from left to right.
        note: how to read the plot.
        band: CHAIR_i, lower and upper recall of a band around the line, (k,) each.
    """
    title = "recall against CHAIR_i"
    shown = [point for point in points if np.isfinite(point[1:]).all()]
    corners = np.array([*front, *(point[1:] for point in shown)], float).reshape(-1, 2)
    limits = {
        "xlim": (0, 1.15 * corners[:, 0].max(initial=0.05)),
        "ylim": (0, min(1.0, 1.15 * corners[:, 1].max(initial=0.05))),
    }
    with _drawing((SIZE[0] + 120, SIZE[1] + 80)) as (figure, axes):
        axes.set(xlabel="CHAIR_i (hallucinated among named objects)", ylabel="object recall", **limits)
        axes.grid()
        if band is not None:
            axes.fill_between(*band, color=COLOURS["count"], linewidth=0, zorder=0.8, gid="band")
        axes.plot([x for x, _ in front], [y for _, y in front], **_DASHED)
        for index, (_, x, y) in enumerate(shown):
            axes.plot([x], [y], marker="o", markersize=7, color=COLOURS["s0"], clip_on=False, gid=f"point-{index}")
        for index, (names, x, y) in enumerate(_joined(shown, limits["xlim"][1], limits["ylim"][1])):
            below = index % 2  # neighbours are often close: their names take turns above and below
            axes.annotate(
                names, (x, y), xytext=(5, -13 if below else 6), textcoords="offset points", color=COLOURS["ink"],
                fontsize=10,
            )  # fmt: skip
        hints = [Hint(x, y, f"{name}: CHAIR_i {x:.3f}, recall {y:.3f}") for name, x, y in shown]
        return _plot(title, figure, hints, note)


def _auroc_limits(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of an axis of AUROCs, which begins at chance if none is below it.

    NaN is never below.
    """
    return 0.0 if any(value < 0.5 for value in values) else 0.5, 1.0


def _joined(points: Sequence[tuple[str, float, float]], width: float, height: float) -> list[tuple[str, float, float]]:
    """Join the names of points that lie within 2 % of the plot's size of an earlier one."""
    labels: list[tuple[str, float, float]] = []
    for name, x, y in points:
        near = (i for i, (_, a, b) in enumerate(labels) if abs(x - a) < 0.02 * width and abs(y - b) < 0.02 * height)
        index = next(near, None)
        if index is None:
            labels.append((name, x, y))
        else:
            labels[index] = (f"{labels[index][0]}, {name}", *labels[index][1:])
    return labels


_DASHED: dict[str, Any] = {"color": COLOURS["soft"], "linewidth": 1.2, "dashes": (5, 4), "gid": "reference"}


def _named_rows(axes: Axes, label: str, rows: Sequence[tuple[str, Interval]]) -> list[Hint]:
    """Name the rows of a plot, the first on top, above a labelled axis; return what their points say."""
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set(xlabel=label, ylim=(len(rows) - 0.4, -0.6))
    axes.locator_params(axis="x", nbins=6)
    axes.grid(axis="x")
    return [Hint(interval.value, index, f"{name}: {interval}") for index, (name, interval) in enumerate(rows)]


def _spread(curve: Curve) -> list[tuple[float, float]]:
    """Choose at most ``HOVERED`` points, evenly along a curve of points that are not finite everywhere."""
    points = np.array([curve.x, curve.y], float).T
    points = points[np.isfinite(points).all(1)]
    keep = np.unique(np.linspace(0, len(points) - 1, min(HOVERED, len(points))).round().astype(int))
    return [(float(x), float(y)) for x, y in points[keep]]


def _hints_of(bins: Sequence[Bin], what: str) -> list[Hint]:
    return [
        Hint(part.x, part.interval.value, f"{part.name}: {what} {part.interval}, {part.hallucinated}/{part.mentions}")
        for part in bins
        if part.interval is not None and np.isfinite(part.interval.value)
    ]


@contextmanager
def _drawing(size: tuple[int, int]) -> Iterator[tuple[Figure, Axes]]:
    """Open a figure in our style within the block; yield it and its axes.

    ``_plot`` has to be called within the block too.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with _lock, rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # matplotlib's own font lacks a character; the page's has it
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72, layout="constrained")
        axes = figure.add_subplot()
        axes.set_axisbelow(True)
        axes.tick_params(length=0, pad=6)
        axes.spines[:].set_visible(False)
        yield figure, axes


def _plot(title: str, figure: Figure, hints: Sequence[Hint], note: str, legend: tuple[str, ...] = ()) -> Plot:
    """Turn a figure into a plot; to be called within ``_drawing``."""
    return Plot(title, _svg(figure, title, hints), legend, note)


def _unit_square(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set(xlabel=x_label, ylabel=y_label, xlim=(0, 1), ylim=(0, 1))
    ticks = np.linspace(0, 1, 6)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.grid()


def _line(axes: Axes, curve: Curve, index: int) -> None:
    x, y = np.asarray(curve.x, float), np.asarray(curve.y, float)
    finite = np.isfinite(x) & np.isfinite(y)
    axes.plot(
        x[finite], y[finite], color=COLOURS[f"s{index}"], linewidth=2.2, clip_on=False, gid=f"curve-{index}", zorder=3
    )


def _columns(axes: Axes, bins: Sequence[Bin], left: Sequence[float], width: float) -> None:
    """Draw pale columns at the bottom for the number of mentions in each bin."""
    low, high = axes.get_ylim()
    most = max(part.mentions for part in bins)
    heights = [0.22 * (high - low) * part.mentions / most for part in bins]
    axes.bar(left, heights, width=0.96 * width, bottom=low, align="edge", color=COLOURS["count"], zorder=0.6)
    axes.set_ylim(low, high)


def _intervals(axes: Axes, bins: Sequence[Bin]) -> None:
    """Draw the intervals of bins as markers with error bars."""
    points = [
        (part.x, part.interval.value, part.interval.low, part.interval.high)
        for part in bins
        if part.interval is not None and np.isfinite(part.interval.value)
    ]
    x, value, low, high = np.array(points, float).reshape(-1, 4).T
    errors = np.nan_to_num(np.stack([value - low, high - value])).clip(min=0)
    blue = COLOURS["s0"]
    axes.errorbar(
        x, value, yerr=errors, color=blue, linewidth=2.2, elinewidth=1.4, capsize=4, marker="o", markersize=8,
        markeredgecolor=COLOURS["card"], clip_on=False, zorder=3,
    )  # fmt: skip


def _svg(figure: Figure, title: str, hints: Sequence[Hint]) -> Markup:
    """Write a figure as an ``<svg>`` element that takes size, font and colours from the page.

    A hint is an invisible circle with a ``<title>``, which browsers show where the pointer rests.
    """
    from markupsafe import Markup

    file = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # None leaves an entry out
    figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)  # it would style the whole page
    text = re.sub(r"<defs>\s*</defs>|<!--.*?-->|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[\w.]+_\d+"', "", text)  # of groups: they repeat from plot to plot
    text = re.sub(r' id="([a-z]+(?:-\d+)?)"', r' class="\1"', text)
    text = re.sub(r'style="[^"<>]*"', _page_style, text)
    tag, body = text.split(">", 1)
    view = tag[tag.index("viewBox=") :].split('"')[1]
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    opening = f'<svg {namespaces} viewBox="{view}" role="img"'
    return Markup(f'{opening} aria-label="{escape(title)}">{_with_hints(body.strip(), figure, hints)}')


def _with_hints(body: str, figure: Figure, hints: Sequence[Hint]) -> str:
    """Put the circles of hints on top of a drawing, in its coordinates: points from the upper left corner."""
    if not hints:
        return body
    centres = figure.axes[0].transData.transform([(hint.x, hint.y) for hint in hints])  # dots of 1/72 inch, upwards
    height = figure.bbox.height
    circles = "".join(
        f'<circle cx="{x:.1f}" cy="{height - y:.1f}" r="9" fill="transparent">'
        f"<title>{escape(hint.text)}</title></circle>"
        for (x, y), hint in zip(centres, hints, strict=True)
    )
    return f"{body.removesuffix('</svg>')}<g>{circles}</g></svg>"


def _page_style(style: re.Match[str]) -> str:
    """Leave the font to the page, and take the colours from its variables."""
    text = re.sub(r"font-family: [^;\"]*;? ?", "", style[0])
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name}, {colour})")
    return text
