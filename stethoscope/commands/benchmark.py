"""Implement ``stethoscope benchmark``: POPE, CHAIR and a detector in one run directory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from stethoscope.adapters.base import Adapter
from stethoscope.commands.common import (
    answer,
    as_list,
    build_generation,
    check_answer_files,
    fractions,
    keep_detector,
    loggers_of,
    report_failures,
    require_model,
)
from stethoscope.core.component import build
from stethoscope.core.system import rank
from stethoscope.core.token_table import check_patterns
from stethoscope.features import FeatureSet
from stethoscope.storage.run_dir import DETECTOR, RunStore
from stethoscope.tasks.base import Task

if TYPE_CHECKING:
    from stethoscope.detection.detector import Detector
    from stethoscope.loggers.combined import Loggers


def run(config: DictConfig) -> None:
    """Run the whole job; errors of the configuration are raised before the model is loaded."""
    start = time.monotonic()
    folder, shares = Path(config.run_dir), fractions(config)
    features = build(config.features, FeatureSet, "features", config.plugins)
    generation = build_generation(config, config.plugins)

    # after what needs neither torch nor scikit-learn: they take seconds to load
    from stethoscope.detection.detector import Detector
    from stethoscope.detection.published import check_sets
    from stethoscope.evaluation.edit_answers import try_features
    from stethoscope.report.metrics_tables import print_results

    adapter = build(config.model, Adapter, "model", config.plugins)
    pope = None if config.get("pope") is None else build(config.pope, Task, "pope", config.plugins)
    chair = build(config.chair, Task, "chair", config.plugins)
    print(features.summary)
    detector = build(config.detector, Detector, "detector", config.plugins)
    check_patterns(detector.settings["features"] or (), features.names)
    check_patterns(detector.settings["exclude"], features.names, "feature to exclude")
    check_sets(as_list(config.sets), features.names)
    if not (config.overwrite or config.fast_dev_run):
        keep_detector(folder, detector, shares, config.seed, chair.name, None)
    tasks = [task for task in (pope, chair) if task is not None]
    require_model(adapter, "benchmark")
    check_answer_files(config, tasks)
    for task in tasks:
        task.setup()
    store = RunStore(folder)
    if features.plugins and chair.name not in store.status():
        try_features(adapter, chair, features, generation)  # POPE may take hours, and features come after it
    with loggers_of(config) as loggers:
        answers = [] if pope is None else [answer(config, folder, loggers, adapter, pope, generation)]
        if not rank() and DETECTOR in store.metrics():
            store.set_status(DETECTOR, "running")  # until it is fitted again, it may be one of fewer answers
        captions = answer(config, folder, loggers, adapter, chair, generation, features=features)
        if rank():  # of several processes the first one does the rest
            return
        for results in (*answers, captions):
            print_results(results)
        if not config.fast_dev_run:  # two samples are no data to learn from
            _train(config, store, chair.name, detector, loggers)
    print(f"run directory: {folder} ({time.monotonic() - start:.0f} s)")
    report_failures([*answers, captions], folder)


def _train(config: DictConfig, store: RunStore, task: str, detector: Detector, loggers: Loggers) -> None:
    """Fit the detector to the answers of a task, log its figures and files, and print them with an answer."""
    from stethoscope.detection.training import fit
    from stethoscope.report.examples import log_detector, log_detector_files
    from stethoscope.report.metrics_tables import print_answer, print_detector

    compared = {"published": config.published, "sets": as_list(config.sets)}
    figures = fit(store, task, detector, fractions(config), config.seed, **compared)
    if figures is None:
        print(f"{store.run_dir / 'detector'}: fitted without a label, so that nothing tells how good it is")
        return
    log_detector(loggers, figures)
    log_detector_files(loggers, store.run_dir)
    print_detector(figures)
    print_answer(store, task)
