"""Print results in a terminal: the tables of ``metrics_tables``, and an answer with its warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stethoscope.core.text import console
from stethoscope.evaluation.given_answers import describe
from stethoscope.report.metrics_tables import detector_tables, task_table
from stethoscope.report.tables import Table, terminal
from stethoscope.storage.run_dir import RunStore, read_warnings

if TYPE_CHECKING:
    from rich.console import Console

    from stethoscope.detection.detector_results import DetectorResults
    from stethoscope.evaluation.results import TaskResults


def print_table(table: Table, output: Console | None = None) -> None:
    """Print a table, with numbers as .947 rather than 0.947 so that more columns fit on a line.

    Args:
        table: to be printed.
        output: where to; standard output by default.
    """
    output = output or console()
    output.print(terminal(table, leading_zero=False))
    for note in filter(None, (table.note, table.images_note)):
        output.print(note, highlight=False, markup=False, soft_wrap=True)


def print_results(results: TaskResults, output: Console | None = None) -> None:
    """Print the metrics of a task; below them its counts, the notes on it, and the number of images.

    Args:
        results: of one model on the task.
        output: where to; standard output by default.
    """
    output = output or console()
    table = task_table(results)
    output.print(terminal(table))
    for note in filter(None, (results.summary(), *results.notes, table.images_note, *describe(results.answers))):
        output.print(note, highlight=False, markup=False, soft_wrap=True)


def print_detector(results: DetectorResults) -> None:
    """Print the leaderboard, the differences, the error rates at the threshold, and the ablation."""
    for index, table in enumerate(detector_tables(results, compact=True)):
        print_table(table.without(("kind",) if index == 0 else ("kind", "cost")))  # only the first shows the cost


def print_answer(store: RunStore, task: str) -> None:
    """Print the answer of a test image that has the most confident correct warning, with all its warnings."""
    from rich.text import Text

    warnings = [row for row in read_warnings(store.run_dir) if row["task"] == task]
    caught = [row for row in warnings if row["fold"] == "test" and row["warned"] and row["label"] == 1]
    if not caught:
        return
    best = max(caught, key=lambda row: row["probability"])
    same_answer = [row for row in warnings if row["sample_id"] == best["sample_id"]]
    record = store.find(task, best["sample_id"])
    if record is not None and record.answer is not None:
        console().print(f"\nan answer of the test images with its warnings ({best['sample_id']}):", markup=False)
        console().print(Text.assemble(*_marked(record.answer.text, same_answer)), highlight=False)


def _marked(text: str, warnings: Sequence[Mapping[str, Any]]) -> list[str | tuple[str, str]]:
    """Split the text into parts; warned mentions are followed by their probability and styled."""
    pieces: list[str | tuple[str, str]] = []
    end = 0
    for row in sorted((row for row in warnings if row["warned"]), key=lambda row: row["start"]):
        mention = f"{text[row['start'] : row['end']]} [{row['probability']:.0%}]"
        pieces += [text[end : row["start"]], (mention, "bold red")]
        end = row["end"]
    return [*pieces, text[end:]]
