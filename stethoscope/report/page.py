"""The whole report of a run: sections of tables, plots and mentions, as Markdown, LaTeX or one HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stethoscope.core.files import check_shape, read_json
from stethoscope.markup import document, escape
from stethoscope.metrics.bootstrap import Interval
from stethoscope.report import curves, figures, gallery, svg, tables
from stethoscope.report.importance import Importance, importances
from stethoscope.report.shapes import SHOWN_TASK
from stethoscope.report.source import Source
from stethoscope.report.tables import Table
from stethoscope.storage.run_dir import REMEDIES

CASES, FEATURES_SHOWN = 6, 15


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        title: its head.
        tables: shown everywhere.
        plots: HTML figures, on the page only; ``folded`` are tables of the same figures, folded away there.
        cards: HTML of the gallery, on the page only; its table is in ``folded``.
        lead: a sentence under the head.
    """

    title: str
    tables: tuple[Table, ...] = ()
    plots: tuple[str, ...] = ()
    folded: tuple[Table, ...] = ()
    cards: str = ""
    lead: str = ""


@dataclass(frozen=True)
class Report:
    """A report, ready to be written.

    Attributes:
        title: name of the run.
        subtitle: model and tasks.
        tiles: the most important figures by name.
        sections: in their order.
    """

    title: str
    subtitle: str
    tiles: Mapping[str, Interval]
    sections: tuple[Section, ...]

    def markdown(self) -> str:
        """All tables, as Markdown."""
        parts = [f"# {tables.markdown_words(self.title)}\n\n{tables.markdown_words(self.subtitle)}\n"]
        for section in self.sections:
            lead = f"\n\n{tables.markdown_words(section.lead)}" if section.lead else ""
            body = [tables.markdown(table) for table in (*section.tables, *section.folded)]
            parts.append("\n".join([f"## {section.title.capitalize()}{lead}\n", *body]))
        return "\n".join(parts)

    def latex(self) -> str:
        """All tables, as LaTeX to be read into a document."""
        found = [table for section in self.sections for table in (*section.tables, *section.folded)]
        return f"% {tables.latex_words(self.title)}\n" + tables.render(found, "latex")

    def html(self) -> str:
        """One page that fetches nothing."""
        tiles = "".join(
            f"<div><dt>{escape(name)}</dt>"
            f"<dd>{found.value:.3f} <small>[{found.low:.3f}, {found.high:.3f}]</small></dd></div>"
            for name, found in self.tiles.items()
        )
        links = "".join(
            f'<a href="#s{number}">{escape(section.title)}</a>' for number, section in enumerate(self.sections)
        )
        body = "\n".join(_section(number, section) for number, section in enumerate(self.sections))
        head = (
            f"<header><h1>{escape(self.title)}</h1><p>{escape(self.subtitle)}</p>"
            f'<dl class="tiles">{tiles}</dl><nav>{links}</nav></header>'
        )
        foot = "<footer>LVLM-Stethoscope: every figure is a function of the run directory.</footer>"
        return page(f"{self.title}: report", f"{head}\n<main>\n{body}\n</main>\n{foot}")


def page(title: str, body: str) -> str:
    """A page in the report's style; the body's texts are escaped already."""
    return document(title, body, Path(__file__).with_name("style.css").read_text(encoding="utf-8"))


def table_page(title: str, found: Sequence[Table]) -> str:
    """A page of tables."""
    body = "".join(map(tables.html, found))
    return page(title, f'<header><h1>{escape(title)}</h1></header><main><div class="tables">{body}</div></main>')


def _section(number: int, section: Section) -> str:
    parts = [f'<section id="s{number}"><h2>{escape(section.title.capitalize())}</h2>']
    if section.lead:
        parts.append(f"<p>{escape(section.lead)}</p>")
    if section.tables:
        parts.append(f'<div class="tables">{"".join(map(tables.html, section.tables))}</div>')
    if section.plots:
        parts.append(f'<div class="plots">{"".join(section.plots)}</div>')
    parts.append(section.cards)
    if section.folded:
        inside = "".join(tables.html(table) for table in section.folded)
        what = "a table" if len(section.folded) == 1 else "tables"
        parts.append(f"<details><summary>the same as {what}</summary>{inside}</details>")
    return "\n".join([*parts, "</section>"])


def collect(source: Source, cases: int = CASES, picture: gallery.Picture | None = lambda record: None) -> Report:
    """Computes everything that the report of a run shows.

    Args:
        source: the run.
        cases: mentions of every kind in the gallery.
        picture: gives the pictures of the gallery that the run has not kept; None for a gallery without pictures.

    Raises:
        ArtefactError: a file of the run is damaged, or two do not fit each other.
    """
    sections = [Section("tasks", (figures.count_table(source.results), *map(figures.task_table, source.results)))]
    if source.detector:
        sections.append(Section("detector", tuple(figures.detector_tables(source.detector))))
    missing = source.no_detector()
    if missing:
        sections.append(Section("detector", lead=f"{missing}."))
    elif not len(source.held_out):
        sections.append(
            Section("warnings", lead="No mention of the run has a label, so that warnings cannot be judged.")
        )
    else:
        sections += _detection(source, cases, picture)
    sections.append(Section("what was run", (_provenance(source),)))
    named = ", ".join(result.task for result in source.results)
    return Report(source.name, f"{source.model} on {named}", _tiles(source), tuple(sections))


def _tiles(source: Source) -> dict[str, Interval]:
    """The primary metric of every task, then what the detector is worth."""
    found = {}
    for result in source.results:
        one = figures.primary(result)
        if one is not None:
            found[f"{result.task} {result.primary}"] = one
    rows = source.detector["leaderboard"]["rows"] if source.detector else []
    for row in rows[:1]:
        for metric in ("auroc", "auroc_controlled", "ece"):
            one = figures.interval(row["metrics"].get(metric))
            if one is not None:
                name = {**figures.RANKING, **figures.AT_WORK}[metric]
                found[f"detector: {name}"] = one
    return {name: one for name, one in found.items() if one.value == one.value}


def _detection(source: Source, cases: int, picture: gallery.Picture | None) -> list[Section]:
    """Plots and gallery of the detector's warnings."""
    rows = source.held_out
    positions, bins, found = curves.by_position(rows), curves.reliability(rows), importances(source)
    plots = [_reliability(bins, source), _positions(positions)]
    if rows["label"].nunique() == 2:
        plots = [_roc(source), _precision_recall(source), *plots]
    mentions = gallery.cases(source, cases, picture)
    where = "the test images" if (source.warnings["fold"] != "").any() else "this run, which it was not fitted on"
    lead = f"{len(rows)} judged mentions of {where}, {int(rows['label'].sum())} of them hallucinated."
    sections = [Section("how good are the warnings?", (), tuple(plots), _bin_tables(positions, bins), lead=lead)]
    if found:
        sections.append(Section("feature importance", (), (_importance(found),), (_importance_table(found),)))
    lead = "The mention stands out; other warned mentions of the answer are underlined."
    if any(case.heat is not None for case in mentions):
        lead += " The second picture is what the name was written from: relevancy after the last layer, red for most."
    table = (gallery.gallery_table(mentions),) if mentions else ()
    return [*sections, Section("mentions to look at", folded=table, cards=gallery.html(mentions), lead=lead)]


def _feature(source: Source) -> tuple[str, Any] | None:
    """The best single feature and its values as a score, oriented and without gaps as the leader board has it."""
    if not source.detector or source.detector["split"]["mentions"]["subtokens"] != "first":
        return None
    board = source.detector["leaderboard"]
    name = board["best_features"].get("auroc")
    sign = next((row["sign"] for row in board["rows"] if row["name"] == name), 1)
    if name not in source.rows:
        return None
    rows = source.rows[(source.rows["fold"] == "train") & (source.rows["label"] >= 0)]
    if source.detector["split"]["mentions"]["repeats"] == "first":
        rows = rows[rows["repeat"] == 0]
    return name, sign * source.held_out[name].astype(float).fillna(float(rows[name].astype(float).median()))


def _curves(source: Source, points: Any, metric: str) -> list[svg.Series]:
    """A curve of the detector and one of the best single feature, named with their areas."""
    rows = source.held_out
    scores = {"detector": rows["probability"]}
    best = _feature(source)
    if best:
        scores[best[0]] = best[1]
    said = {row["name"]: row["metrics"] for row in source.detector["leaderboard"]["rows"]} if source.detector else {}
    found = []
    for name, values in scores.items():
        area = figures.interval(said.get(name, {}).get(metric))
        found.append(svg.Series(*points(rows["label"], values), name if area is None else f"{name}: {area}"))
    return found


def _roc(source: Source) -> str:
    axes = svg.Axes("false alarms among grounded mentions", "hallucinated mentions found")
    note = "In the legend: area under the curve. Dashed: chance."
    return svg.plot("ROC", axes, _curves(source, curves.roc, "auroc"), (0, 0, 1, 1), note=note)


def _precision_recall(source: Source) -> str:
    axes = svg.Axes("recall: hallucinated mentions found", "precision: warnings that are right")
    rate = float(source.held_out["label"].mean())
    series = _curves(source, curves.precision_recall, "auprc_hallucinated")
    note = f"In the legend: average precision. Dashed: the share of hallucinated mentions, {rate:.3f}."
    return svg.plot("precision and recall", axes, series, (0, rate, 1, rate), note=note)


def _reliability(bins: Sequence[curves.Bin], source: Source) -> str:
    axes = svg.Axes("probability that the detector gives", "share that is hallucinated")
    series = svg.Series(
        [one.at for one in bins],
        [one.figure.value for one in bins],
        low=[one.figure.low for one in bins],
        high=[one.figure.high for one in bins],
        marks=True,
    )
    most = max(one.mentions for one in bins)
    columns = [(float(one.name[:3]), float(one.name[:3]) + 0.1, one.mentions / most) for one in bins]
    said = source.detector["leaderboard"]["rows"][0]["metrics"].get("ece") if source.detector else None
    ece = f"Expected calibration error {figures.interval(said)}. " if said else ""
    note = f"{ece}Columns: how many mentions, at most {most}. Dashed: perfectly calibrated."
    return svg.plot("reliability", axes, [series], (0, 0, 1, 1), columns, note)


def _positions(bins: Sequence[curves.Bin]) -> str:
    known = [one for one in bins if one.figure is not None]
    ticks = [(one.at, f"{one.name}\n{one.hallucinated}/{one.mentions}") for one in bins]
    if len(bins) > 7:  # every other label, or they touch
        ticks = ticks[::2]
    low = min([0.5, *(one.figure.low for one in known)])  # NaN is never below
    axes = svg.Axes(
        "token position in the answer", "AUROC", (-0.5, len(bins) - 0.5), (0.5 if low >= 0.5 else 0.0, 1.0), ticks
    )
    series = svg.Series(
        [one.at for one in known],
        [one.figure.value for one in known],
        low=[one.figure.low for one in known],
        high=[one.figure.high for one in known],
        marks=True,
    )
    most = max(one.mentions for one in bins)
    columns = [(one.at - 0.5, one.at + 0.5, one.mentions / most) for one in bins]
    note = "Below the positions: hallucinated mentions / all mentions; columns: all mentions. Dashed: chance."
    return svg.plot("AUROC by token position", axes, [series], (-0.5, 0.5, len(bins) - 0.5, 0.5), columns, note)


def _bin_tables(positions: Sequence[curves.Bin], bins: Sequence[curves.Bin]) -> tuple[Table, ...]:
    def rows(found: Sequence[curves.Bin]) -> tuple[tuple[tables.Cell, ...], ...]:
        return tuple((one.name, one.mentions, one.hallucinated, one.figure) for one in found)

    return (
        Table("AUROC by token position", ("tokens", "mentions", "hallucinated", "AUROC"), rows(positions)),
        Table("reliability", ("probability", "mentions", "hallucinated", "share"), rows(bins)),
    )


def _importance(found: Sequence[Importance]) -> str:
    rows = [(one.feature, one.loss.value, one.loss.low, one.loss.high) for one in found[:FEATURES_SHOWN]]
    note = "All columns of a feature are shuffled together; features that say the same share what they are worth."
    return svg.bars("what the detector leans on", rows, "AUROC lost when the feature is shuffled", note)


def _importance_table(found: Sequence[Importance]) -> Table:
    rows = tuple((one.feature, one.columns, one.loss) for one in found)
    note = "AUROC of the test mentions, less AUROC with the feature's values shuffled among them."
    return Table("feature importance", ("feature", "columns", "AUROC lost"), rows, note)


def _provenance(source: Source) -> Table:
    """What identifies the run: fingerprints, packages, the words of the command."""
    rows: list[tuple[str, str]] = []
    for task, found in source.store.fingerprints().items():
        adapter = found.get("adapter", {})
        rows += [(f"adapter.{key}", _short(adapter[key])) for key in adapter if ("adapter." + key) not in dict(rows)]
        check_shape(
            source.folder / "fingerprint.json", found["task"], SHOWN_TASK, REMEDIES["fingerprint.json"], f"{task}.task"
        )
        rows.append((task, _short({key: found["task"][key] for key in ("class", "version", "settings")})))
        rows.append((f"{task}: generation", _short(found.get("generation"))))
    file, remedy = source.folder / "environment.json", "delete it; the command that made the run writes it again"
    environment = read_json(file, remedy, default={"packages": {}})
    check_shape(file, environment, {"packages": {"*": (str, type(None))}}, remedy)
    packages = environment["packages"]
    rows += [("packages", ", ".join(f"{name} {version}" for name, version in packages.items() if version))]
    return Table("fingerprint", ("", "value"), tuple(rows))


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
