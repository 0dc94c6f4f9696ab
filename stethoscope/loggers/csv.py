"""Log to CSV files in the run directory."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stethoscope.core.files import atomic_write, unshare
from stethoscope.loggers.base import Logger, flat_settings, plain_table

METRIC_COLUMNS = ("time", "step", "name", "value")


class CsvLogger(Logger):
    """Writes ``metrics.csv``, ``settings.csv`` and a file for each table and curve into a folder of the run directory.

    ``metrics.csv`` has a line per figure: ``time`` (seconds since 1970), ``step`` (number of samples; empty for a final
    figure), ``name`` and ``value``; a resumed run adds lines. The other files are written anew.
    """

    media = True  # it takes curves; pictures are left out

    def __init__(self, folder: str = "csv") -> None:
        """Name the folder inside the run directory."""
        self.folder = folder
        self._path: Path | None = None
        self._settings: dict[str, Any] = {}

    def setup(self, run_dir: Path | None) -> None:
        """Create the folder; nothing is written without a run directory."""
        if run_dir is not None:
            self._path = Path(run_dir) / self.folder
            self._path.mkdir(parents=True, exist_ok=True)
            unshare(self._path / "metrics.csv")

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Write ``settings.csv``, a line per setting by its dotted name."""
        self._settings |= flat_settings(config)
        self._write("settings", ("name", "value"), self._settings.items())

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add lines to ``metrics.csv``."""
        if self._path is None:
            return
        file = self._path / "metrics.csv"
        new = not file.exists()
        now = round(time.time(), 3)
        with file.open("a", newline="", encoding="utf-8") as opened:
            writer = csv.writer(opened)
            if new:
                writer.writerow(METRIC_COLUMNS)
            writer.writerows((now, step, name, value) for name, value in metrics.items())

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Write the table as plain text into the file of its name."""
        self._write(name, *plain_table(columns, rows))

    def log_curve(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Write the points into the file of the curve's name."""
        self._write(name, columns, rows)

    def _write(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        if self._path is None:
            return
        file = io.StringIO(newline="")
        csv.writer(file).writerows([columns, *rows])
        atomic_write(self._path / f"{name.replace('/', '-')}.csv", file.getvalue())
