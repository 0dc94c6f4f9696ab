"""The figures of a run as tables: tasks, leader board, differences, ablation, what warnings are worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stethoscope.evaluation.results import COUNTS, TaskResults
from stethoscope.metrics.bootstrap import Interval
from stethoscope.report.tables import Gap, Table

RANKING = {
    "auroc": "AUROC",
    "auroc_controlled": "position-controlled",
    "auroc_same_position": "same position",
    "auroc_matched": "same position and word",
    "auroc_first": "first mentions",
}
AT_WORK = {
    "auprc_hallucinated": "AUPRC, hallucinated",
    "auprc_grounded": "AUPRC, grounded",
    "fpr_at_95tpr": "FPR at 95 % TPR",
    "recall_at_90precision": "recall at 0.9 precision",
    "ece": "ECE",
    "brier": "Brier",
}
COSTS = {
    "same forward pass": "one pass",
    "one more forward pass": "+ forward",
    "a backward pass": "+ backward",
    "one more pass per mention": "+ mentions",
    "one more question per mention": "+ question",
}
"""Cost classes (``stethoscope.features.COSTS``) in few letters."""
BEST_PUBLISHED = "best published of one pass"
SINGLE_FEATURES = 5  # rows of single features, besides those that are best under a control
FIGURES = ("value", "low", "high", "items", "groups")  # of an interval, in a row of JSON


def interval(plain: Mapping[str, Any] | None) -> Interval | None:
    """The interval of a row of JSON that may say more."""
    return None if plain is None else Interval.from_dict({key: plain[key] for key in FIGURES})


def primary(results: TaskResults) -> Interval | None:
    """The figure that stands for a task; None where it could not be made."""
    return results.interval() if any(row.metric == results.primary for row in results.metrics) else None


def task_table(results: TaskResults) -> Table:
    """Metrics down, subsets across, with the three counts as the note."""
    found = {(row.metric, row.subset): row.interval for row in results.metrics}
    names = list(dict.fromkeys(row.metric for row in results.metrics))
    rows = tuple((name, *(found.get((name, subset)) for subset in results.subsets)) for name in names)
    bold = frozenset(index for index, name in enumerate(names) if name == results.primary)
    note = f"{results.summary()}. 95 % intervals from resampled images."
    return Table(results.task, ("metric", *results.subsets), rows, note, bold)


def count_table(results: Sequence[TaskResults]) -> Table:
    """How many samples went well, and how many did not."""
    rows = tuple((result.task, *(int(result.counts[name]) for name in COUNTS)) for result in results)
    note = (
        "A failed sample gave an error, an unparsed one an answer that the task cannot read; neither is a wrong answer."
    )
    return Table("samples", ("task", *COUNTS), rows, note)


def shown_rows(board: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Detectors, published ones, the most telling single features, baselines; by AUROC within each kind."""
    features = [row["name"] for row in board["rows"] if row["kind"] == "feature"]  # by falling AUROC in training
    wanted = {*features[:SINGLE_FEATURES], *board["best_features"].values()}
    kinds = ("detector", "published", "feature", "baseline")
    rows = [row for row in board["rows"] if row["kind"] != "feature" or row["name"] in wanted]
    return sorted(rows, key=lambda row: (kinds.index(row["kind"]), -(row["metrics"]["auroc"]["value"] or 0)))


def board_tables(results: Mapping[str, Any]) -> Iterator[Table]:
    """The leader board, in two tables: how well mentions are ranked, and what the detectors are worth at work."""
    rows = shown_rows(results["leaderboard"])
    for title, columns in (("leader board: AUROC", RANKING), ("leader board: at work", AT_WORK)):
        found = {metric: name for metric, name in columns.items() if metric in rows[0]["metrics"]}
        cells = tuple(
            (row["name"], row["kind"], short_cost(row), *(interval(row["metrics"].get(metric)) for metric in found))
            for row in rows
        )
        bold = frozenset(index for index, row in enumerate(rows) if row["kind"] == "detector")
        note = sizes(results) if columns is RANKING else _base_rate(rows[0])
        yield Table(title, ("", "kind", "cost", *found.values()), cells, note, bold)


def _base_rate(row: Mapping[str, Any]) -> str:
    found = interval(row["metrics"].get("base_rate"))
    return "" if found is None else f"A score without information has an AUPRC, hallucinated, of {found.value:.3f}."


def short_cost(row: Mapping[str, Any]) -> str:
    """Return the most expensive cost class of what a row reads; empty for baselines and rows that do not say."""
    return COSTS.get(row.get("cost", ""), "")


def opponent(board: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """What to call the other side of a difference; who is best differs between metrics."""
    if row["other"] == board["best_features"].get(row["metric"]):
        return "best single feature"
    return BEST_PUBLISHED if row["other"] == board.get("best_published", {}).get(row["metric"]) else row["other"]


def sizes(results: Mapping[str, Any]) -> str:
    """What the leader board rests on."""
    split, controls = results["split"], results["leaderboard"]["controls"]
    folds, matched = split["folds"], controls["auroc_matched"]
    test = folds["test"]
    which = "first mentions of an object" if split["mentions"]["repeats"] == "first" else "object mentions"
    return (
        f"{test['mentions']} {which} in {test['images']} test images, "
        f"{test['hallucinated'] / max(test['mentions'], 1):.1%} hallucinated; fitted on {folds['train']['images']} "
        f"images, calibrated on {folds['calibration']['images']}. Same position (within ten tokens) and word: "
        f"{matched['pairs']} pairs with {matched['share']:.0%} of the mentions."
    )


def difference_table(board: Mapping[str, Any]) -> Table | None:
    """What every detector is ahead by, a row for each opponent."""
    cells: dict[tuple[str, str], dict[str, Gap]] = {}
    for row in board["differences"]:
        pair = row["detector"], opponent(board, row)
        cells.setdefault(pair, {})[row["metric"]] = Gap(interval(row), row["p"])
    found = [metric for metric in RANKING if any(metric in row for row in cells.values())]
    if not found:
        return None
    rows = tuple((f"{one} − {other}", *(row.get(metric) for metric in found)) for (one, other), row in cells.items())
    return Table("ahead by", ("", *(RANKING[metric] for metric in found)), rows, difference_note(board))


def difference_note(board: Mapping[str, Any]) -> str:
    """What the differences rest on, and which published detectors are the best of one pass."""
    note = "Paired over images; p is two-sided and not corrected for the number of comparisons."
    names = ", ".join(dict.fromkeys(board.get("best_published", {}).values()))
    chosen = f" The {BEST_PUBLISHED} is chosen with hindsight, for every column on the test images: {names}."
    return note + chosen if names else note


def ablation_table(rows: Sequence[Mapping[str, Any]]) -> Table | None:
    """What each feature group adds to the detector."""
    cells: dict[tuple[str, int], dict[str, Gap]] = {}
    for row in rows:
        group = row["other"].removeprefix("without "), int(row["columns"])
        cells.setdefault(group, {})[row["metric"]] = Gap(interval(row), row["p"])
    found = [metric for metric in RANKING if any(metric in row for row in cells.values())]
    if not cells:
        return None
    made = tuple((name, columns, *(row.get(metric) for metric in found)) for (name, columns), row in cells.items())
    heads = ("feature group", "columns", *(RANKING[metric] for metric in found))
    return Table("what each feature group adds", heads, made, "The detector − the same refitted without the group.")


def threshold_table(found: Mapping[str, Any]) -> Table:
    """What warnings at the threshold are worth on the test images, and what was promised."""
    shown = {"false_alarms": "false alarms", "missed": "missed", "precision": "precision", "recall": "recall"}
    row = (f"{found['value']:.3f}", *(interval(found[key]) for key in shown))
    note, promised = f"Warned at or above the threshold: {found['chosen']}.", found["certificate"]
    if promised:
        note += f" Promised from {promised['mentions']} mentions in {promised['images']} calibration images."
    return Table("warnings on the test images", ("threshold", *shown.values()), (row,), note)


def detector_tables(results: Mapping[str, Any]) -> list[Table]:
    """Everything that ``metrics.json`` says of the detector."""
    found = [
        *board_tables(results),
        difference_table(results["leaderboard"]),
        threshold_table(results["threshold"]),
        ablation_table(results.get("ablation", ())),
    ]
    return [table for table in found if table is not None]
