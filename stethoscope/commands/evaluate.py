"""Implement ``stethoscope evaluate``: one model on one task."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from stethoscope.adapters.base import Adapter
from stethoscope.commands.common import (
    answer,
    build_generation,
    check_answer_files,
    loggers_of,
    report_failures,
)
from stethoscope.core.component import build
from stethoscope.core.system import rank
from stethoscope.tasks.base import Task


def run(config: DictConfig) -> None:
    """Evaluate the model, store the run and print the task's table."""
    folder = Path(config.run_dir)
    generation = build_generation(config, config.plugins)
    adapter = build(config.model, Adapter, "model", config.plugins)
    task = build(config.task, Task, "task", config.plugins)
    check_answer_files(config, [task])
    with loggers_of(config) as loggers:
        results = answer(config, folder, loggers, adapter, task, generation)
    if rank():  # of several processes the first one tells of the results
        return
    from stethoscope.report.metrics_tables import print_results  # its libraries can wait until there are results

    print_results(results)
    print(f"run directory: {folder}")
    report_failures([results], folder)
