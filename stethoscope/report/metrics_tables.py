"""Make tables of results, and print them: metrics, leaderboard, differences, thresholds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from stethoscope.core.text import console, listed
from stethoscope.core.token_table import stem
from stethoscope.detection.detector_results import (
    Ablation,
    DetectorResults,
    Difference,
    Leaderboard,
    LeaderboardRow,
    read_interval,
)
from stethoscope.evaluation.given_answers import describe
from stethoscope.evaluation.results import COUNTS, TaskResults
from stethoscope.features import FEATURES
from stethoscope.features.columns import feature_of
from stethoscope.metrics.bootstrap import Interval
from stethoscope.report.tables import Cell, PairedDifference, Table, terminal
from stethoscope.storage.run_dir import RunStore, read_warnings

if TYPE_CHECKING:
    from rich.console import Console

RANKING = {
    "auroc": "AUROC",
    "auroc_controlled": "position-controlled",
    "auroc_same_position": "same position",
    "auroc_within_word": "within word",
    "auroc_matched": "same position and word",
    "auroc_first": "first mentions",
}
OPERATING_METRICS = {
    "auprc_hallucinated": "AUPRC, hallucinated",
    "auprc_grounded": "AUPRC, grounded",
    "prr": "PRR",
    "aurc": "AURC",
    "tpr_at_1fpr": "TPR at 1 % FPR",
    "tpr_at_5fpr": "TPR at 5 % FPR",
    "fpr_at_95tpr": "FPR at 95 % TPR",
    "recall_at_90precision": "recall at 0.9 precision",
    "ece": "ECE",
    "brier": "Brier",
}
TITLES = {**RANKING, **OPERATING_METRICS}
"""Column names by metric of the leaderboard."""
PAGE_ONLY = (
    "auroc_same_position", "auprc_grounded", "aurc", "tpr_at_1fpr", "fpr_at_95tpr", "recall_at_90precision",
)  # fmt: skip
"""Metrics that a terminal has no room for; pages, Markdown and ``metrics.json`` have them all."""
COSTS = {
    "same forward pass": "one pass",
    "one more forward pass": "+ forward",
    "a short continuation of the answer": "+ continuation",
    "a backward pass": "+ backward",
    "one more pass per mention": "+ mentions",
    "one more question per mention": "+ question",
    "5 more answers": "+ 5 answers",
}
"""Short labels by cost class (``stethoscope.features.COSTS``)."""
BEST_PUBLISHED = "best published of one pass"
SINGLE_FEATURES = 5  # rows of single features, in addition to those that are best under a control


TASK_TITLES = {
    "amber": "AMBER", "beaf": "BEAF", "chair": "CHAIR", "dash_b": "DASH-B", "h_pope": "H-POPE", "halloc": "HalLoc",
    "hallusion_bench": "HallusionBench", "humble_bench": "HumbleBench", "mhal_detect": "M-HalDetect", "mme": "MME",
    "mmvp": "MMVP", "natural_bench": "NaturalBench", "phd": "PhD", "pope": "POPE",
}  # fmt: skip
METRIC_TITLES = {"chair_i": "CHAIR_i", "chair_s": "CHAIR_s", "f1": "F1", "tpr": "TPR", "tnr": "TNR"}
"""Names as the field writes them; others are shown as they are called in files."""


def task_title(task: str) -> str:
    """Write the name of a task as the field does.

    >>> task_title("pope"), task_title("mine")
    ('POPE', 'mine')
    """
    return TASK_TITLES.get(task, task)


def metric_title(metric: str, task: str = "") -> str:
    """Write the name of a metric as the field does, after that of its task.

    >>> metric_title("chair_i"), metric_title("f1", "pope"), metric_title("length", "mine")
    ('CHAIR_i', 'POPE F1', 'mine length')
    """
    title = METRIC_TITLES.get(metric, metric)
    own = task_title(task)
    return title if not task or title.startswith(f"{own}_") else f"{own} {title}"


def primary(results: TaskResults) -> Interval | None:
    """Return the interval of a task's primary metric; None if it could not be measured."""
    return results.interval() if any(row.metric == results.primary for row in results.metrics) else None


def task_table(results: TaskResults) -> Table:
    """List metrics down and subsets across, with the counts and notes of the task below."""
    intervals = {(row.metric, row.subset): row.interval for row in results.metrics}
    names = list(dict.fromkeys(row.metric for row in results.metrics))
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (metric_title(name), *(intervals.get((name, subset)) for subset in results.subsets)) for name in names
    )
    bold = frozenset(index for index, name in enumerate(names) if name == results.primary)
    answers = (f"{line[0].upper()}{line[1:]}." for line in describe(results.answers))
    note = " ".join([f"{results.summary()}.", *results.notes, "95 % intervals from resampled images.", *answers])
    return Table(task_title(results.task), ("metric", *results.subsets), rows, note, bold)


def count_table(results: Sequence[TaskResults]) -> Table:
    """Count the samples of every task by status."""
    rows: list[tuple[Cell, ...]] = [
        (task_title(result.task), *(int(result.counts[name]) for name in COUNTS)) for result in results
    ]
    note = (
        "A failed sample gave an error, an unparsed one an answer that the task cannot read; neither is a wrong answer."
    )
    return Table("samples", ("task", *COUNTS), tuple(rows), note)


def shown_rows(leaderboard: Leaderboard) -> list[LeaderboardRow]:
    """Select detectors, published ones, the best single features and baselines, each by falling AUROC.

    Features of plugins are shown too, with their best column; of many such features only the best.
    """
    features = [row.name for row in leaderboard.rows if row.kind == "feature"]  # by falling AUROC in training
    best = {*features[:SINGLE_FEATURES], *leaderboard.best_features.values()}
    shown_features = {*best, *_of_plugins(features)[:SINGLE_FEATURES]}
    kinds = ("detector", "published", "feature", "baseline")
    rows = [row for row in leaderboard.rows if row.kind != "feature" or row.name in shown_features]
    return sorted(rows, key=lambda row: (kinds.index(row.kind), -np.nan_to_num(row.metrics["auroc"].value)))


def _of_plugins(columns: Sequence[str]) -> list[str]:
    """Return the first column of every feature that does not come with the package."""
    firsts: dict[str, str] = {}
    for column in columns:
        known = FEATURES.get(feature_of(column))
        if known is None or not known.function.__module__.startswith("stethoscope."):
            firsts.setdefault(stem(column) if known is None else known.name, column)
    return list(firsts.values())


def leaderboard_tables(results: DetectorResults, compact: bool = False) -> Iterator[Table]:
    """List the leaderboard in two tables: areas under the ROC curve, and metrics of a detector in use.

    Args:
        results: of training.
        compact: leave out the metrics of ``PAGE_ONLY``.
    """
    rows = shown_rows(results.leaderboard)
    data = f"{describe_data(results)}{_describe_selection(results.leaderboard, rows)}"
    data += f"{_left_out(results.leaderboard)}{_describe_constant(results.leaderboard)}"
    base_rate = rows[0].metrics.get("base_rate")
    chance_level = "" if base_rate is None else f" (chance {base_rate.value:.3f})"
    note = (
        "PRR: 0 rejects mentions in random order, 1 all hallucinated ones first. TPR at 5 % FPR: hallucinated mentions "
    )
    note += "found when 5 % of the grounded ones are flagged."
    if compact:
        note += " More columns: metrics.json and `stethoscope report`."
    for title, columns in (("leader board: AUROC", RANKING), ("leader board: at work", OPERATING_METRICS)):
        shown = {metric: name for metric, name in select_metrics(columns, compact).items() if metric in rows[0].metrics}
        if "auprc_hallucinated" in shown:
            shown["auprc_hallucinated"] += chance_level
        cells = tuple(
            (row.name, row.kind, COSTS.get(row.cost, ""), *(row.metrics.get(metric) for metric in shown))
            for row in rows
        )
        bold = frozenset(index for index, row in enumerate(rows) if row.kind == "detector")
        yield Table(title, ("", "kind", "cost", *shown.values()), cells, data if columns is RANKING else note, bold)


def select_metrics(columns: Mapping[str, str], compact: bool) -> dict[str, str]:
    """Select the metrics of a table, without those of ``PAGE_ONLY`` if it is to be compact."""
    return {metric: name for metric, name in columns.items() if not (compact and metric in PAGE_ONLY)}


def _describe_selection(leaderboard: Leaderboard, rows: Sequence[LeaderboardRow]) -> str:
    """Say how many single features are left out of the tables, so that nobody looks for theirs in vain."""
    measured, shown = (sum(row.kind == "feature" for row in part) for part in (leaderboard.rows, rows))
    if shown == measured:
        return ""
    mine = " and those of plugins" if _of_plugins([row.name for row in rows if row.kind == "feature"]) else ""
    return (
        f" {shown} of the {measured} single features in metrics.json are shown, the best on the training images{mine}."
    )


def _left_out(leaderboard: Leaderboard) -> str:
    """Name the published detectors of one pass that are not on the board, and say how they get there."""
    if not leaderboard.left_out:
        return ""
    names = ", ".join(name.partition("/")[2] for name in leaderboard.left_out)
    return (
        f" Published detectors of one pass that are not here, for lack of their features: {names}; "
        "`stethoscope extract run=... features=everything` computes them, `stethoscope train` measures them."
    )


def _describe_constant(leaderboard: Leaderboard) -> str:
    """Name the features that say nothing, so that nobody takes them for used."""
    if not leaderboard.constant:
        return ""
    return f" Features that never change in the training images, and so say nothing: {listed(leaderboard.constant)}."


def opponent(leaderboard: Leaderboard, difference: Difference) -> str:
    """Name what a detector is compared with; the best feature and published detector depend on the metric."""
    if difference.other == leaderboard.best_features.get(difference.metric):
        return "best single feature"
    best_published = leaderboard.best_published.get(difference.metric)
    return BEST_PUBLISHED if difference.other == best_published else difference.other


def describe_data(results: DetectorResults) -> str:
    """Describe the mentions and images that the leaderboard was measured and fitted on."""
    folds, matched = results.split["folds"], results.leaderboard.controls["auroc_matched"]
    test = folds["test"]
    counted = "first mentions of an object" if results.first_mentions_only else "object mentions"
    return (
        f"{test['mentions']} {counted} in {test['images']} test images, "
        f"{test['hallucinated'] / max(test['mentions'], 1):.1%} hallucinated; fitted on {folds['train']['images']} "
        f"images, calibrated on {folds['calibration']['images']}. Same position (within ten tokens) and word: "
        f"{matched['pairs']} pairs with {matched['share']:.0%} of the mentions."
    )


def difference_table(leaderboard: Leaderboard, compact: bool = False) -> Table | None:
    """List by how much every detector is ahead, with a row for each opponent; None without differences.

    Args:
        leaderboard: of a detector.
        compact: leave out the metrics of ``PAGE_ONLY``.
    """
    cells: dict[tuple[str, str], dict[str, PairedDifference]] = {}
    for difference in leaderboard.differences:
        pair = difference.detector, opponent(leaderboard, difference)
        cells.setdefault(pair, {})[difference.metric] = PairedDifference(difference.interval, difference.p)
    shown = [name for name in select_metrics(RANKING, compact) if any(name in row for row in cells.values())]
    if not shown:
        return None
    rows = tuple(
        (f"{detector} − {other}", *(row.get(metric) for metric in shown)) for (detector, other), row in cells.items()
    )
    return Table("ahead by", ("", *(RANKING[metric] for metric in shown)), rows, difference_note(leaderboard))


def difference_note(leaderboard: Leaderboard) -> str:
    """Describe how the differences are tested, and name the best published detectors of one pass."""
    note = "Paired over images; p is two-sided and not corrected for the number of comparisons."
    names = ", ".join(dict.fromkeys(leaderboard.best_published.values()))
    chosen = f" The {BEST_PUBLISHED} is chosen with hindsight, for every column on the test images: {names}."
    return note + chosen if names else note


def ablation_table(ablations: Sequence[Ablation]) -> Table | None:
    """List what each feature group adds to the detector; None without an ablation."""
    cells: dict[tuple[str, int], dict[str, PairedDifference]] = {}
    for group, columns, difference in ablations:
        row = cells.setdefault((group, columns), {})
        row[difference.metric] = PairedDifference(difference.interval, difference.p)
    if not cells:
        return None
    shown = [metric for metric in RANKING if any(metric in row for row in cells.values())]
    rows = tuple((group, columns, *(row.get(metric) for metric in shown)) for (group, columns), row in cells.items())
    column_names = ("feature group", "columns", *(RANKING[metric] for metric in shown))
    note = "The detector − the same refitted without the group."
    return Table("what each feature group adds", column_names, rows, note)


def threshold_table(threshold: Mapping[str, Any]) -> Table:
    """List precision, recall and error rates at the threshold on the test images, and its guarantee."""
    shown = {"false_alarms": "false alarms", "missed": "missed", "precision": "precision", "recall": "recall"}
    row: tuple[Cell, ...] = (f"{threshold['value']:.3f}", *(read_interval(threshold[key]) for key in shown))
    note, guarantee = f"Warned at or above the threshold: {threshold['chosen']}.", threshold["certificate"]
    if guarantee:
        note += f" Promised from {guarantee['mentions']} mentions in {guarantee['images']} calibration images."
    return Table("warnings on the test images", ("threshold", *shown.values()), (row,), note)


def detector_tables(results: DetectorResults, compact: bool = False) -> list[Table]:
    """List the detector's figures in ``metrics.json`` as tables.

    Args:
        results: of training.
        compact: for a terminal: leave out the metrics of ``PAGE_ONLY``.
    """
    tables = [
        *leaderboard_tables(results, compact),
        difference_table(results.leaderboard, compact),
        threshold_table(results.threshold),
        ablation_table(results.ablations or ()),
    ]
    return [table for table in tables if table is not None]


# --- in a terminal ----------------------------------------------------------------------------------------------------


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
