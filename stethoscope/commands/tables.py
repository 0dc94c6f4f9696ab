"""Tables of the detector for the terminal, made from the section of ``metrics.json``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stethoscope.core.text import console
from stethoscope.metrics.bootstrap import Interval
from stethoscope.report.figures import (
    AT_WORK,
    FIGURES,
    RANKING,
    difference_note,
    opponent,
    short_cost,
    shown_rows,
    sizes,
)
from stethoscope.report.source import read_warnings

if TYPE_CHECKING:
    from rich.table import Table

    from stethoscope.storage.run_dir import RunStore


def print_detector(results: Mapping[str, Any]) -> None:
    """The leader board: detectors, single features and baselines, how they rank, what they are worth at work, tests."""
    from rich.table import Table

    board, terminal = results["leaderboard"], console()
    rows = shown_rows(board)
    for title, columns in (("leader board: AUROC", RANKING), ("leader board: at work", AT_WORK)):
        found = {metric: name for metric, name in columns.items() if metric in rows[0]["metrics"]}
        cost = ("cost",) if columns is RANKING else ()  # said once
        table = Table("", *cost, *found.values(), title=title, title_justify="left", caption_justify="left")
        table.columns[0].no_wrap = True
        for row in rows:
            cells = [_cell(row["metrics"].get(metric)) for metric in found]
            table.add_row(
                row["name"],
                *(short_cost(row) for _ in cost),
                *cells,
                style="bold" if row["kind"] == "detector" else None,
            )
        table.caption = sizes(results) if columns is RANKING else None
        terminal.print(table, markup=False)
    if board["differences"]:
        terminal.print(_difference_table(board), markup=False)
    for line in [*_ablation(results.get("ablation", ())), *_threshold(results["threshold"])]:
        terminal.print(line, markup=False, highlight=False)


def _interval(plain: Mapping[str, Any] | None) -> str:
    return "" if plain is None else str(Interval.from_dict(plain))


def _cell(plain: Mapping[str, Any] | None) -> str:
    """An interval without the zeros before the points, so that a table fits into 150 columns."""
    return re.sub(r"\b0\.", ".", _interval(plain))


def _short(value: float | None) -> str:
    return "" if value is None else f" p {value:.3f}".replace(" 0.", " .")


def _p(value: float | None) -> str:
    return "" if value is None else f", p = {value:.3f}"


def _difference_table(board: Mapping[str, Any]) -> Table:
    """What every detector is ahead by, a row for each opponent."""
    from rich.table import Table

    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in board["differences"]:
        pair = row["detector"], opponent(board, row)
        cells.setdefault(pair, {})[row["metric"]] = _cell({key: row[key] for key in FIGURES}) + _short(row["p"])
    found = [metric for metric in RANKING if any(metric in row for row in cells.values())]
    table = Table("", *(RANKING[metric] for metric in found), title="ahead by", title_justify="left")
    for (detector, other), row in cells.items():
        table.add_row(f"{detector} - {other}", *(row.get(metric, "") for metric in found))
    table.caption = difference_note(board)
    table.caption_justify = "left"
    return table


def _control(metric: str) -> str:
    return "" if metric == "auroc" else f", {RANKING[metric]}"


def _ablation(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if rows:
        yield "what each feature group adds (the detector - the same without the group):"
    for row in rows:
        gain = Interval.from_dict({key: row[key] for key in FIGURES})
        name = row["other"].removeprefix("without ")
        yield f"  {name} ({row['columns']} columns), AUROC{_control(row['metric'])}: {gain}{_p(row['p'])}"


def _threshold(found: Mapping[str, Any]) -> Iterator[str]:
    """What was promised and what the test images show."""
    yield f"warnings at a probability of {found['value']:.3f} or more: {found['chosen']}"
    promised = found["certificate"]
    if promised:
        yield f"  promised from {promised['mentions']} mentions in {promised['images']} calibration images"
    shown = {"false_alarms": "false alarms", "missed": "missed", "precision": "precision", "recall": "recall"}
    yield "  on the test images: " + ", ".join(f"{title} {_interval(found[key])}" for key, title in shown.items())


def print_answer(store: RunStore, task: str) -> None:
    """One answer of the test images with its warnings, the one with the most confident true warning."""
    from rich.text import Text

    warnings = read_warnings(store.run_dir)
    caught = [row for row in warnings if row["fold"] == "test" and row["warned"] and row["label"] == 1]
    if not caught:
        return
    best = max(caught, key=lambda row: row["probability"])
    mine = [row for row in warnings if row["sample_id"] == best["sample_id"] and row["task"] == task]
    record = store.find(task, best["sample_id"])
    if record is not None and record.answer is not None:
        console().print(f"\nan answer of the test images with its warnings ({best['sample_id']}):", markup=False)
        console().print(Text.assemble(*_marked(record.answer.text, mine)), highlight=False)


def _marked(text: str, warnings: Sequence[Mapping[str, Any]]) -> list[str | tuple[str, str]]:
    """The text in pieces, warned mentions followed by their probability and styled."""
    pieces: list[str | tuple[str, str]] = []
    at = 0
    for row in sorted((row for row in warnings if row["warned"]), key=lambda row: row["start"]):
        pieces += [
            text[at : row["start"]],
            (f"{text[row['start'] : row['end']]} [{row['probability']:.0%}]", "bold red"),
        ]
        at = row["end"]
    return [*pieces, text[at:]]
