"""Which mentions are shown as examples, their surroundings, and what loggers get of a leader board."""

import pandas as pd

from stethoscope.detection.detector_results import Leaderboard, LeaderboardRow
from stethoscope.loggers.base import Logger
from stethoscope.loggers.combined import Loggers
from stethoscope.metrics.bootstrap import Interval
from stethoscope.report import examples


def test_the_gallery_takes_the_clearest_and_different_ones():
    rows = pd.DataFrame(
        {
            "label": [1, 1, 1, 1, 0, 0],
            "warned": [True, True, True, False, True, False],
            "probability": [0.9, 0.8, 0.7, 0.1, 0.6, 0.05],
            "object": ["cat", "cat", "dog", "cup", "car", "car"],
            "sample_id": ["a", "b", "c", "a", "b", "c"],
        }
    )
    chosen = {kind: list(mentions.index) for kind, mentions in examples.select_mentions(rows, 2).items()}
    assert chosen == {"caught": [0, 2], "missed": [3], "false alarm": [4]}
    assert list(examples.select_mentions(rows, 3)["caught"].index) == [0, 1, 2]


def test_pieces_spell_the_answer():
    text = "A cat and a dog and a cat."
    pieces = list(examples.cut_answer(text, (11, 15), [(1, 5), (11, 15), (21, 25)]))
    assert pieces == [
        ("A ", ""), ("cat", "warned"), (" and a ", ""), ("dog", "this"), (" and a ", ""), ("cat", "warned"), (".", ""),
    ]  # fmt: skip
    long = "x " * 400 + "dog" + " y" * 400
    pieces = list(examples.cut_answer(long, (800, 803), []))
    assert (pieces[0], pieces[-1]) == (("… ", ""), (" …", ""))
    assert ("dog", "this") in pieces
    assert sum(len(part) for part, _ in pieces) < 2 * examples.CONTEXT + 10


def test_a_leader_board_has_flat_names_and_a_row_each():
    def row(name, kind, value):
        return LeaderboardRow(name, kind, 1, {"auroc": Interval(value, value - 0.1, value + 0.1, 5, 3)}, "one pass")

    rows = [row("detector", "detector", 0.9), row("boosting", "detector", 0.8), row("svar", "published", 0.7)]
    rows += [row("position only", "baseline", 0.6), row("shuffled labels", "baseline", float("nan"))]
    rows += [row("nll", "feature", 0.55)]

    class Results:
        leaderboard = Leaderboard(tuple(rows), (), {}, {}, ())

    figures, tables = {}, {}

    class Collects(Logger):
        def log_metrics(self, metrics, step=None):
            figures.update(metrics)

        def log_table(self, name, columns, rows):
            tables[name] = [dict(zip(columns, row, strict=True)) for row in rows]

    examples.log_detector(Loggers([Collects()]), Results())
    assert figures == {
        "detector/auroc": 0.9, "detector/boosting/auroc": 0.8, "published/svar/auroc": 0.7,
        "baseline/position/auroc": 0.6,
    }  # fmt: skip
    board = tables["detector/leaderboard"]
    assert [line["name"] for line in board] == [row.name for row in rows]
    assert board[0] == {
        "name": "detector", "kind": "detector", "cost": "one pass", "auroc": 0.9, "auroc low": 0.8, "auroc high": 1.0,
    }  # fmt: skip
    assert board[4]["auroc"] is None
