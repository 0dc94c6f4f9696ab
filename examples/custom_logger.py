"""Add a logger: latest figures in the text format of Prometheus, for alarms on runs that fail or stand still.

    PYTHONPATH=examples stethoscope evaluate --config-dir examples/conf plugins=[custom_logger] \
        logger=[wandb,prometheus] task=pope task.scenes=50

A node exporter with `--collector.textfile.directory` reads such files.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from stethoscope.loggers.base import Logger


class PrometheusLogger(Logger):
    """Write every figure's latest value, one a line; errors of a logger only cause a warning."""

    def __init__(self, file: str = "figures.prom") -> None:
        self.file = file
        self.path: Path | None = None
        self.figures: dict[str, float] = {}

    def setup(self, run_dir: Path | None) -> None:
        """Choose the file, before anything is logged; a run without a directory has none."""
        self.path = None if run_dir is None else run_dir / self.file

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Replace the file. Points of curves have a `step`, the number of samples; final figures have none."""
        self.figures |= metrics
        self.write(up=1)

    def finalize(self, status: str) -> None:
        """Say that the run has ended. `status` is `finished`, `failed` or `interrupted`."""
        self.write(up=0)

    def write(self, up: int) -> None:
        """Write all lines to a new file and put it in the old one's place, so that no half of it is read."""
        if self.path is None:
            return
        run = json.dumps(self.path.parent.name)
        lines = [f"stethoscope_running{{run={run}}} {up}"]
        lines += [f"stethoscope_figure{{run={run},name={json.dumps(name)}}} {x}" for name, x in self.figures.items()]
        new = self.path.with_suffix(".new")
        new.write_text("\n".join(lines) + "\n")
        new.replace(self.path)
