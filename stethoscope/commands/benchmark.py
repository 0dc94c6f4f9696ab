"""Implement ``stethoscope benchmark``: POPE, CHAIR and a detector in one run directory."""

from __future__ import annotations

import time
from pathlib import Path

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
    run_dir,
)
from stethoscope.core.component import build
from stethoscope.core.system import rank
from stethoscope.core.token_table import check_patterns
from stethoscope.features import FeatureSet
from stethoscope.storage.run_dir import DETECTOR, RunStore
from stethoscope.tasks.base import Task


def run(config: DictConfig) -> None:
    """Run the whole job; errors of the configuration are raised before the model is loaded."""
    start = time.monotonic()
    folder, shares = run_dir(config), fractions(config)
    features = build(config.features, FeatureSet, "features", config.plugins)
    generation = build_generation(config, config.plugins)

    # after what needs neither torch nor scikit-learn: they take seconds to load
    from stethoscope.detection.detector import Detector
    from stethoscope.detection.published import check_sets
    from stethoscope.detection.training import fit
    from stethoscope.evaluation.edit_answers import try_features
    from stethoscope.report.examples import log_detector, log_detector_files
    from stethoscope.report.metrics_tables import print_answer, print_detector, print_results

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
    if any(item.plugin for item in features.features) and chair.name not in store.status():
        adapter.setup()
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
            compared = {"published": config.published, "sets": as_list(config.sets)}
            figures = fit(store, chair.name, detector, shares, config.seed, **compared)
            if figures is None:
                print(f"{folder / 'detector'}: fitted without a label, so that nothing tells how good it is")
            else:
                log_detector(loggers, figures)
                log_detector_files(loggers, folder)
                print_detector(figures)
                print_answer(store, chair.name)
    print(f"run directory: {folder} ({time.monotonic() - start:.0f} s)")
    report_failures([*answers, captions], Path(folder))
