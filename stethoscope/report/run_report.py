"""Write the report of a finished run: tables, plots and examples as Markdown, LaTeX or one HTML page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stethoscope.core.files import check_shape, read_json
from stethoscope.core.html import asset, document, render
from stethoscope.core.text import escape_markdown
from stethoscope.detection.detector_results import DetectorResults
from stethoscope.metrics.bootstrap import Interval
from stethoscope.report import curves, plots, tables
from stethoscope.report.curves import Bin
from stethoscope.report.examples import ImageSource, example_cards, example_table, read_examples
from stethoscope.report.metrics_tables import (
    COSTS,
    TITLES,
    count_table,
    detector_tables,
    metric_title,
    primary,
    shown_rows,
    task_table,
    task_title,
)
from stethoscope.report.plots import Curve, Plot
from stethoscope.report.run_source import SHOWN_TASK_SHAPE, Importance, RunReader, importances
from stethoscope.report.tables import Cell, PairedDifference, Table
from stethoscope.storage.run_dir import REMEDIES
from stethoscope.storage.saved_heatmaps import DESCRIPTIONS

if TYPE_CHECKING:
    from markupsafe import Markup

EXAMPLES, FEATURES_SHOWN = 6, 15


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        title: its heading.
        tables: shown in every format.
        plots: shown on the page only.
        folded: tables with the numbers of the plots and cards, collapsed on the page.
        cards: HTML of the examples, shown on the page only.
        lead: text under the heading.
    """

    title: str
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    folded: tuple[Table, ...] = ()
    cards: Markup | str = ""
    lead: str = ""


@dataclass(frozen=True)
class Report:
    """A report, ready to be written.

    Attributes:
        title: name of the run.
        subtitle: model and tasks.
        tiles: the most important intervals by name, shown at the top.
        sections: in their order.
    """

    title: str
    subtitle: str
    tiles: Mapping[str, Interval]
    sections: tuple[Section, ...]

    def markdown(self) -> str:
        """Write all tables as Markdown."""
        parts = [f"# {escape_markdown(self.title)}\n\n{escape_markdown(self.subtitle)}\n"]
        for section in self.sections:
            lead = f"\n\n{escape_markdown(section.lead)}" if section.lead else ""
            body = [tables.markdown(table) for table in (*section.tables, *section.folded)]
            parts.append("\n".join([f"## {section.title.capitalize()}{lead}\n", *body]))
        return "\n".join(parts)

    def latex(self) -> str:
        """Write all tables as LaTeX, to be included in a document."""
        all_tables = [table for section in self.sections for table in (*section.tables, *section.folded)]
        return f"% {tables.escape_latex(self.title)}\n" + tables.render_tables(all_tables, "latex")

    def html(self, sortable: bool = True) -> str:
        """Write one self-contained HTML page.

        Args:
            sortable: let a script sort the tables; False for a frame that runs none.
        """
        body = render("report/report.html", report=self, write_table=tables.html)
        return _page(f"{self.title}: report", body, sortable)


def table_page(title: str, shown: Sequence[Table], sortable: bool = True) -> str:
    """Write a page of tables; paired differences are also drawn.

    Args:
        title: of the page.
        shown: the tables.
        sortable: let a script sort the tables; False for a frame that runs none.
    """
    drawn = [plot for table in shown if (plot := plot_differences(table)) is not None]
    body = render("report/tables.html", title=title, tables=shown, plots=drawn, write_table=tables.html)
    return _page(title, body, sortable)


def plot_differences(table: Table) -> Plot | None:
    """Draw the differences in a table's last column as a forest plot; None without any."""
    rows = [
        (" ".join(str(cell) for cell in row[:-1] if isinstance(cell, (str, int))), row[-1])
        for row in table.rows
        if isinstance(row[-1], PairedDifference)
    ]
    differences = [(name, cell) for name, cell in rows if isinstance(cell, PairedDifference)]
    shares = [(name, cell) for name, cell in differences if not abs(cell.interval.value) > 1]
    if not differences:
        return None
    named = shares or differences  # words and tokens would hide shares on one axis
    left_out = [name for name, cell in differences if (name, cell) not in named]
    note = "Lines: 95 % intervals, paired over the same resampled images. Blue: the interval excludes 0."
    note += f" Not shown, as no share: {', '.join(left_out)}." if left_out else ""
    return plots.plot_forest(table.title, table.columns[-1], named, note)


def _page(title: str, body: Markup, sortable: bool) -> str:
    style, script = asset("diagnosis/viewer.css") + asset("report/report.css"), asset("report/sort.js")
    return document(title, body, style, script if sortable else "")


def collect_report(
    source: RunReader, examples: int = EXAMPLES, image_source: ImageSource | None = lambda record: None
) -> Report:
    """Compute the tables, plots and examples of a run's report.

    Args:
        source: the run.
        examples: mentions of every kind, at most.
        image_source: loads the images of examples that the run has not saved; None for examples without images.

    Raises:
        ArtefactError: a file of the run is damaged, or two files do not match.
    """
    sections = [
        Section("tasks", (count_table(source.results), *map(task_table, source.results)), lead=source.off_policy())
    ]
    if source.detector:
        sections.append(Section("detector", tuple(detector_tables(source.detector)), _cost_plots(source.detector)))
    missing = source.no_detector()
    if missing:
        sections.append(Section("detector", lead=f"{missing}."))
    elif not len(source.held_out):
        sections.append(
            Section("warnings", lead="No mention of the run has a label, so that warnings cannot be judged.")
        )
    else:
        sections += _warning_sections(source, examples, image_source)
    sections.append(Section("what was run", (_provenance(source),)))
    tasks = ", ".join(task_title(result.task) for result in source.results)
    return Report(source.name, f"{source.model} on {tasks}", _tiles(source), tuple(sections))


def _cost_plots(results: DetectorResults) -> tuple[Plot, ...]:
    """Plot AUROC against cost of our detector and the published ones.

    Nothing is plotted where only one has a known cost.
    """
    ranked = [row for row in shown_rows(results.leaderboard) if row.kind in ("detector", "published") and row.cost]
    points = [(row.name, COSTS[row.cost], row.metrics["auroc"]) for row in ranked]
    if len(points) < 2:
        return ()
    note = (
        "Large and blue: this run's detector; orange: published ones. Cost: what the features need beyond generating "
        "the answer. Lines: 95 % intervals over images."
    )
    return (plots.plot_costs(points, tuple(COSTS.values()), note),)


def _tiles(source: RunReader) -> dict[str, Interval]:
    """Choose the primary metric of every task, then the detector's AUROC and calibration error."""
    tiles = {metric_title(result.primary, result.task): primary(result) for result in source.results}
    if source.detector:
        for metric in ("auroc", "auroc_controlled", "ece"):
            tiles[f"detector: {TITLES[metric]}"] = source.detector.detector.metrics.get(metric)
    return {name: tile for name, tile in tiles.items() if tile is not None and tile.value == tile.value}


def _warning_sections(source: RunReader, examples: int, image_source: ImageSource | None) -> list[Section]:
    """Make the sections about the detector's warnings: plots, feature importance, examples."""
    rows = source.held_out
    positions, bins, features = curves.by_position(rows), curves.reliability(rows), importances(source)
    shown = tuple(_warning_plots(source, positions, bins))
    mentions = read_examples(source, examples, image_source)
    origin = "the test images" if (source.warnings["fold"] != "").any() else "this run, which it was not fitted on"
    lead = f"{len(rows)} judged mentions of {origin}, {int(rows['label'].sum())} of them hallucinated."
    sections = [Section("how good are the warnings?", (), shown, _bin_tables(positions, bins), lead=lead)]
    if features:
        sections.append(_importance_section(features))
    lead = "The mention is boxed; other warned mentions of the answer are underlined."
    descriptions = [text for kind, text in DESCRIPTIONS.items() if kind in {mention.shows for mention in mentions}]
    if descriptions:
        lead += f" The second picture shows, red for most, {'; or '.join(descriptions)}."
    table = (example_table(mentions),) if mentions else ()
    return [*sections, Section("mentions to look at", folded=table, cards=example_cards(mentions), lead=lead)]


def _best_feature(source: RunReader) -> tuple[str, pd.Series] | None:
    """Read the best single feature as a score, with its sign and gaps treated as on the leaderboard."""
    if not source.detector or source.detector.split["mentions"]["subtokens"] != "first":
        return None
    leaderboard = source.detector.leaderboard
    name = leaderboard.best_features.get("auroc", "")
    sign = next((row.sign for row in leaderboard.rows if row.name == name), 1)
    if name not in source.rows:
        return None
    rows = source.rows[(source.rows["fold"] == "train") & (source.rows["label"] >= 0)]
    if source.detector.first_mentions_only:
        rows = rows[rows["repeat_index"] == 0]
    return name, sign * source.held_out[name].astype(float).fillna(float(rows[name].astype(float).median()))


def _curves(
    source: RunReader, points: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]], metric: str
) -> list[Curve]:
    """Compute the curves of the detector and of the best single feature, named with their areas."""
    rows = source.held_out
    scores = {"detector": rows["probability"]}
    best = _best_feature(source)
    if best:
        scores[best[0]] = best[1]
    areas = {row.name: row.metrics.get(metric) for row in source.detector.leaderboard.rows} if source.detector else {}
    curves = []
    for name, values in scores.items():
        x, y = points(rows["label"].to_numpy(), values.to_numpy())
        curves.append(Curve(x.tolist(), y.tolist(), name if areas.get(name) is None else f"{name}: {areas[name]}"))
    return curves


def _warning_plots(source: RunReader, positions: Sequence[Bin], bins: Sequence[Bin]) -> Iterator[Plot]:
    """Plot ROC, precision and recall (if both labels occur), reliability, and AUROC by position."""
    labels = source.held_out["label"]
    if labels.nunique() == 2:
        axes = "false alarms among grounded mentions", "hallucinated mentions found"
        note = "In the legend: area under the curve. Dashed: chance."
        yield plots.plot_curves("ROC", axes, _curves(source, curves.roc, "auroc"), (0, 1), note)
        axes = "recall: hallucinated mentions found", "precision: warnings that are right"
        rate = float(labels.mean())
        note = f"In the legend: average precision. Dashed: the share of hallucinated mentions, {rate:.3f}."
        lines = _curves(source, curves.precision_recall, "auprc_hallucinated")
        yield plots.plot_curves("precision and recall", axes, lines, (rate, rate), note)
    error = source.detector.detector.metrics.get("ece") if source.detector else None
    calibration = "" if error is None else f"Expected calibration error {error}. "
    most = max(part.mentions for part in bins)
    note = f"{calibration}Columns: how many mentions, at most {most}. Dashed: perfectly calibrated."
    yield plots.plot_reliability(bins, note)
    note = "Below the positions: hallucinated mentions / all mentions; columns: all mentions. Dashed: chance."
    yield plots.plot_positions(positions, note)


def _bin_tables(positions: Sequence[Bin], bins: Sequence[Bin]) -> tuple[Table, ...]:
    def rows(parts: Sequence[Bin]) -> tuple[tuple[Cell, ...], ...]:
        return tuple((part.name, part.mentions, part.hallucinated, part.interval) for part in parts)

    return (
        Table("AUROC by token position", ("tokens", "mentions", "hallucinated", "AUROC"), rows(positions)),
        Table("reliability", ("probability", "mentions", "hallucinated", "share"), rows(bins)),
    )


def _importance_section(features: Sequence[Importance]) -> Section:
    bars = [(importance.feature, importance.loss) for importance in features[:FEATURES_SHOWN]]
    note = "All columns of a feature are shuffled together; features that say the same share what they are worth."
    plot = plots.plot_bars("what the detector leans on", "AUROC lost when the feature is shuffled", bars, note)
    rows = tuple((importance.feature, importance.columns, importance.loss) for importance in features)
    note = "AUROC of the test mentions, less AUROC with the feature's values shuffled among them."
    table = Table("feature importance", ("feature", "columns", "AUROC lost"), rows, note)
    return Section("feature importance", (), (plot,), (table,))


def _provenance(source: RunReader) -> Table:
    """List the run's fingerprints and package versions."""
    rows: list[tuple[str, str]] = []
    for task, section in source.store.fingerprints().items():
        adapter = section.get("adapter", {})
        rows += [(f"adapter.{key}", _as_text(adapter[key])) for key in adapter if ("adapter." + key) not in dict(rows)]
        file, remedy = source.folder / "fingerprint.json", REMEDIES["fingerprint.json"]
        check_shape(file, section["task"], SHOWN_TASK_SHAPE, remedy, f"{task}.task")
        rows.append((task, _as_text({key: section["task"][key] for key in ("class", "version", "settings")})))
        rows.append((f"{task}: generation", _as_text(section.get("generation"))))
        if section.get("answers"):
            rows.append((f"{task}: given answers", _as_text(section["answers"])))
    file = source.folder / "environment.json"
    remedy = REMEDIES[file.name]
    environment = read_json(file, remedy, default={"packages": {}})
    check_shape(file, environment, {"packages": {"*": (str, type(None))}}, remedy)
    packages = environment["packages"]
    rows += [("packages", ", ".join(f"{name} {version}" for name, version in packages.items() if version))]
    return Table("fingerprint", ("", "value"), tuple(rows))


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
