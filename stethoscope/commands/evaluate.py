"""``stethoscope evaluate``: one model on one task."""

from __future__ import annotations

from omegaconf import DictConfig

from stethoscope.build import build
from stethoscope.commands.session import make_evaluator, make_loggers, report_failures, run_dir, use_threads


def run(config: DictConfig) -> None:
    """Answers, scores, metrics; prints the task's table."""
    from stethoscope.adapter import Adapter
    from stethoscope.commands.tables import terminal
    from stethoscope.task import Task

    folder = run_dir(config)
    adapter = build(config.model, Adapter, "model", config.plugins)
    task = build(config.task, Task, "task", config.plugins)
    loggers = make_loggers(config, folder)
    evaluator = make_evaluator(config, folder, loggers)
    use_threads(config)
    results = evaluator.run(adapter, task)
    loggers.finalize("finished")
    results.print(terminal())
    print(f"run directory: {folder}")
    report_failures([results], folder)
