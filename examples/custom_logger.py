"""Add a logger: final figures as a CSV file in the run directory, in addition to `events.jsonl`.

    PYTHONPATH=examples stethoscope evaluate --config-dir examples/conf plugins=[custom_logger] \
        logger=csv task=pope task.scenes=50
"""

import csv
from collections.abc import Mapping
from pathlib import Path

from stethoscope.loggers.base import Logger


class CsvLogger(Logger):
    """Write final figures as two columns, name and value; errors of a logger only cause a warning."""

    def __init__(self, file: str = "figures.csv") -> None:
        self.file = file
        self.path: Path | None = None
        self.figures: dict[str, float] = {}

    def setup(self, run_dir: Path | None) -> None:
        """Choose the file, before anything is logged; a run without a directory has none."""
        self.path = None if run_dir is None else run_dir / self.file

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Collect final figures, which have no step; the points of curves are left out."""
        if step is None:
            self.figures |= metrics

    def finalize(self, status: str) -> None:
        """Write the file. `status` is `finished`, `failed` or `interrupted`."""
        if self.path is not None and self.figures:
            with self.path.open("w", newline="") as file:
                csv.writer(file).writerows([("name", "value"), *sorted(self.figures.items())])
