import pytest

from stethoscope.commands.common import log_detector, logger_settings
from stethoscope.core.component import compose
from stethoscope.detection.detector_results import Leaderboard, LeaderboardRow
from stethoscope.loggers.base import Logger
from stethoscope.loggers.combined import Loggers
from stethoscope.metrics.bootstrap import Interval

WANDB, CSV = "stethoscope.loggers.wandb.WandbLogger", "stethoscope.loggers.file_loggers.CsvLogger"


@pytest.mark.parametrize(
    ("words", "targets"),
    [
        ([], {"logger.wandb": WANDB}),
        (["logger=csv"], {"logger.csv": CSV}),
        (["logger=[csv,wandb]"], {"logger.csv": CSV, "logger.wandb": WANDB}),
        (["logger=[]"], {}),
        (["logger=none"], {"logger.none": "stethoscope.loggers.file_loggers.JsonLogger"}),
        (["~logger"], {}),
        (["+logger._target_=mine.Bare", "+logger.file=x"], {"logger": "mine.Bare", "logger.wandb": WANDB}),
    ],
)
def test_any_number_of_loggers(words, targets):
    settings = logger_settings(compose(words, "evaluate"))
    assert {key: node["_target_"] for key, node in settings.items()} == targets
    if "logger" in settings:
        assert settings["logger"] == {"_target_": "mine.Bare", "file": "x"}


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

    log_detector(Loggers([Collects()]), Results())
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
