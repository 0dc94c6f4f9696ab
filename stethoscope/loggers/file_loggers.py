"""Log to files in the run directory: ``events.jsonl``, which every one has, and CSV."""

from __future__ import annotations

import csv
import io
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stethoscope.core.files import atomic_write, jsonable, unshare
from stethoscope.loggers.base import Logger, flat_settings, plain_table


class JsonLogger(Logger):
    """Writes one JSON object per line: ``time`` (seconds since 1970), ``event`` and its fields."""

    def __init__(self, path: str | os.PathLike | None = None) -> None:
        """Write to ``path``; None for ``events.jsonl`` in the run directory."""
        self.path = None if path is None else Path(path)

    def setup(self, run_dir: Path | None) -> None:
        """Choose the path; nothing is written without a path and a run directory."""
        if self.path is None and run_dir is not None:
            self.path = Path(run_dir) / "events.jsonl"
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            unshare(self.path)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Write a ``config`` event."""
        self._write("config", config=config)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write a ``metrics`` event."""
        self._write("metrics", step=step, metrics=metrics)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Write a ``table`` event."""
        self._write("table", name=name, columns=columns, rows=rows)

    def finalize(self, status: str) -> None:
        """Write a ``status`` event."""
        self._write("status", status=status)

    def _write(self, event: str, **fields: Any) -> None:
        if self.path is None:
            return
        line = json.dumps({"time": round(time.time(), 3), "event": event, **jsonable(fields)}, ensure_ascii=False)
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line + "\n")


METRIC_COLUMNS = ("time", "step", "name", "value")


class CsvLogger(Logger):
    """Writes metrics, settings, tables and curves as CSV files into the run directory.

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
