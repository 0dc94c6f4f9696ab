"""Everything that a run tells a logger, once: what each logger's own reader must give back."""

from __future__ import annotations

import time
from pathlib import Path

from PIL import Image

from stethoscope.loggers.base import Logger, Marked, TablePicture
from stethoscope.loggers.combined import Loggers

SETTINGS = {"seed": 3, "choices": {"detector": "logistic"}, "hub_token": "hf_secret", "sets": ["fast", "full"]}
FINALS = {"detector/auroc": 0.875, "baseline/position/auroc": 0.625}
CURVE = [[0.0, 0.0, "detector"], [0.5, 0.75, "detector"], [1.0, 1.0, "detector"], [0.0, 0.0, "chance"]]
TEXT = "a | <b>dog</b>\n*"


def log_everything(logger: Logger, folder: Path, status: str = "finished", pause: float = 0.0) -> Loggers:
    """Log settings (one of them secret), a curve of progress, final figures, tables, a curve and a folder.

    Args:
        logger: to log to.
        folder: the run directory is ``first`` inside it.
        status: at the end.
        pause: seconds before the end, as a real run takes them.
    """
    run_dir, files = folder / "runs" / "first", folder / "files"
    files.mkdir(exist_ok=True)
    (files / "manifest.json").write_text("{}")
    run_dir.mkdir(parents=True, exist_ok=True)
    loggers = Loggers([logger], SETTINGS)
    loggers.setup(run_dir)
    loggers.log_config({"pope": {"task": {"version": "1"}}})
    loggers.log_metrics({"pope/progress/share": 0.5, "undefined": float("nan")}, step=16)
    loggers.log_metrics({"pope/progress/share": 1.0}, step=32)
    loggers.log_config({"pope": {"limit": 8}})
    loggers.log_metrics(FINALS)
    loggers.log_table("pope/samples", ["sample", "answer", "picture"], table())
    loggers.log_curve("detector/roc", ["false alarms", "found", "curve"], CURVE)
    loggers.log_folder("first-detector", "detector", files, {"version": 2, "api_key": "secret"})
    time.sleep(pause)
    loggers.finalize(status)
    return loggers


def table() -> list[list[object]]:
    """Rows with marked text and a red picture of 4 x 2 pixels; the second has none."""
    red = TablePicture(Image.new("RGB", (4, 2), (255, 0, 0)), "red.png")
    return [["s0", Marked("<i>x</i>", TEXT), red], ["s1", Marked("yes", "yes"), None]]
