"""Tables of the detector for the terminal, made from the section of ``metrics.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stethoscope.stats import Interval

if TYPE_CHECKING:
    from rich.console import Console

    from stethoscope.store import RunStore

SHOWN = {
    "auroc": "AUROC",
    "auroc_controlled": "AUROC, position-controlled",
    "auroc_same_position": "AUROC, same position only",
    "auprc_hallucinated": "AUPRC, hallucinated",
    "auprc_grounded": "AUPRC, grounded",
    "fpr_at_95tpr": "FPR at 95 % TPR",
    "ece": "ECE",
    "brier": "Brier",
}


def terminal() -> Console:
    """Standard output; 150 columns where it is a file or a pipe, so that tables stay in one piece."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal else Console(width=150)


def print_detector(results: Mapping[str, Any]) -> None:
    """Detector, best single feature and baselines side by side, then what the detector is ahead by."""
    from rich.table import Table

    board, folds = results["leaderboard"], results["split"]["folds"]
    rows = {row["name"]: row for row in board["rows"]}
    names = ["detector", *dict.fromkeys(board["best_features"].values()), "position only", "text prior"]
    kinds = {"detector": "", "feature": "best feature: ", "baseline": ""}
    table = Table("", *(kinds[rows[name]["kind"]] + name for name in names))
    for metric, title in SHOWN.items():
        cells = [
            str(Interval.from_dict(rows[n]["metrics"][metric])) if metric in rows[n]["metrics"] else "" for n in names
        ]
        table.add_row(title, *cells, style="bold" if metric.startswith("auroc") else None)
    test = folds["test"]
    rate = test["hallucinated"] / max(test["mentions"], 1)
    table.caption = (
        f"{test['mentions']} object mentions in {test['images']} test images, {rate:.1%} hallucinated; fitted on "
        f"{folds['train']['images']} images, calibrated on {folds['calibration']['images']}"
    )
    table.caption_justify = "left"
    console = terminal()
    console.print(table, markup=False)
    for difference in board["differences"]:
        if difference["metric"] in SHOWN:
            ahead = Interval.from_dict({key: difference[key] for key in ("value", "low", "high", "items", "groups")})
            text = f"detector - {difference['other']}, {SHOWN[difference['metric']]}: {ahead}"
            console.print(text, markup=False, highlight=False)


def print_answer(store: RunStore, task: str) -> None:
    """One answer of the test images with its warnings, the one with the most confident true warning."""
    from rich.text import Text

    path = store.run_dir / "warnings.jsonl"
    warnings = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    caught = [row for row in warnings if row["fold"] == "test" and row["warned"] and row["label"] == 1]
    if not caught:
        return
    best = max(caught, key=lambda row: row["probability"])
    mine = [row for row in warnings if row["sample_id"] == best["sample_id"] and row["task"] == task]
    record = store.find(task, best["sample_id"])
    if record is not None and record.answer is not None:
        terminal().print(f"\nan answer of the test images with its warnings ({best['sample_id']}):", markup=False)
        terminal().print(Text.assemble(*_marked(record.answer.text, mine)), highlight=False)


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
