"""Implement ``stethoscope train``: fit a detector to a run and compare it with baselines."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from stethoscope.commands.common import as_list, fractions, keep_detector, loggers_of, overrides
from stethoscope.core.component import build, choices, compose
from stethoscope.core.errors import ArtefactError, ConfigError, unknown
from stethoscope.core.files import remove_temporaries
from stethoscope.core.token_table import feature_names, select_features
from stethoscope.detection.design_matrix import Inputs
from stethoscope.detection.detector import Detector
from stethoscope.detection.lookup import load_detector
from stethoscope.detection.training import fit, missing_rows_error
from stethoscope.detection.transfer import Target, of_subset
from stethoscope.features import FeatureSet
from stethoscope.features.columns import check_same_model, keep_columns, matching_columns, select_columns
from stethoscope.report.compare import transfer_table
from stethoscope.report.examples import log_detector, log_detector_files
from stethoscope.report.metrics_tables import print_detector
from stethoscope.report.tables import text
from stethoscope.storage.lock import RunLock
from stethoscope.storage.reuse import copy_task
from stethoscope.storage.run_dir import RunStore

if TYPE_CHECKING:
    import pandas as pd

    from stethoscope.detection.detector_results import DetectorResults
    from stethoscope.loggers.combined import Loggers


def run(config: DictConfig) -> None:
    """Fit, calibrate, evaluate and save the detector of a finished run; print its table."""
    source, folder = Path(config.run), Path(config.run_dir)
    _check_run(source)
    if config.recalibrate:
        recalibrate(config, source, folder)
        return
    detector = build(config.detector, Detector, "detector", config.plugins)
    same = [f"detector.{key}={detector.settings[key]}" for key in ("repeats", "subtokens")]  # or no row is common
    compare_with = {name: _compared_detector(name, same, config.plugins) for name in as_list(config.compare_with)}
    shares, store = fractions(config), RunStore(source)
    task = config.mentions or _traced_task(store)
    table = read_token_rows(config, store, task, config.subset)
    columns = feature_names(table) if "features" in config else None
    if not config.overwrite:
        keep_detector(folder, detector, shares, config.seed, task, columns)
    targets = [_read_target(config, node, task) for node in as_list(config.test)]
    if targets:
        table, detector = _shared_features(table, detector, targets, store.model(task))
    with RunLock(folder), loggers_of(config) as loggers:
        store = _open_folder(config, store, folder, task, loggers)
        results = fit(
            store,
            task,
            detector,
            shares,
            config.seed,
            table=table,
            targets=targets,
            source_run=source.resolve().name,
            compare_with=compare_with,
            ablation=config.ablation,
            published=config.published,
            sets=as_list(config.sets),
            progress=lambda line: print(f"{line} ...", file=sys.stderr),
        )
        if results is not None:
            log_detector(loggers, results)
            loggers.log_metrics(_transfer_metrics(results.transfer or ()))
            log_detector_files(loggers, folder)
    _print(results)
    print(f"detector: {folder / 'detector'}")


def _check_run(source: Path) -> None:
    """Check that the run is there, and say how to make it.

    Raises:
        ArtefactError: it is not.
    """
    if source.is_dir():
        return
    chosen = HydraConfig.get().runtime.choices.get("experiment")
    hint = "name a run of `stethoscope extract` or `benchmark` (run=runs/...)"
    if chosen:
        hint = f"`stethoscope train experiment={chosen} --help` tells how to make it"
    raise ArtefactError(f"run={source} is no directory; {hint}")


def _open_folder(config: DictConfig, store: RunStore, folder: Path, task: str, loggers: Loggers) -> RunStore:
    """Return the run that the detector is written into: the given one, or a copy of its task in another folder."""
    remove_temporaries(folder)
    if folder.resolve() != store.run_dir.resolve():
        store = copy_task(store, folder, task)
        store.write_config(config, overrides())
    loggers.setup(folder)
    loggers.log_config({task: store.fingerprints().get(task, {})})
    return store


def _print(results: DetectorResults | None) -> None:
    """Print the tables of a training."""
    if results is None:
        print("no mention has a label, so that nothing tells how good the detector is")
        return
    print_detector(results)
    if results.transfer:
        print(text(transfer_table(results.transfer)))


def _shared_features(
    table: pd.DataFrame, detector: Detector, targets: Sequence[Target], model: Mapping[str, Any]
) -> tuple[pd.DataFrame, Detector]:
    """Reduce a table and a detector to the features that the detector reads.

    The tables of ``test`` need no others.

    Args:
        table: that the detector learns from.
        detector: unfitted.
        targets: the runs that it is judged on.
        model: fingerprint of the model that answered.

    Raises:
        ArtefactError: a run lacks such a feature.
        ConfigError: a feature is a state of the model, and a run is of another model.
    """
    settings = detector.settings
    names = select_features(feature_names(table), settings["features"], settings["exclude"])
    names = names if settings["visual_consistency"] else Inputs(tuple(names)).without_evidence
    for target in targets:
        matching_columns(target.table, names, target.name)
        check_same_model(names, model, target.model, target.name)
    return keep_columns(table, names), Detector(**{**settings, "features": list(names), "exclude": []})


def recalibrate(config: DictConfig, source: Path, folder: Path) -> None:
    """Calibrate a saved detector for the pictures of this run, with its labels or without.

    Raises:
        ConfigError: ``labels`` is no number of pictures, or the run lacks a column of the detector.
        ArtefactError: there is no such detector, or the run has no token rows.
    """
    old, store, most = load_detector(str(config.recalibrate)), RunStore(source), config.labels
    if (folder / "detector").exists() and not config.overwrite:
        raise ConfigError(
            f"{folder / 'detector'} exists already; run_dir= names another folder for the recalibrated one, "
            "overwrite=true replaces it"
        )
    if most is not None and (type(most) is not int or most < 0):
        raise ConfigError(f"labels={most} should be a number of labelled pictures, 0 for none, or null for all")
    task = config.mentions or _traced_task(store)
    table = store.tokens(task)
    if old is None or table.empty:
        raise missing_rows_error(store, task)
    check_same_model(old.features, old.notes.get("model") or {}, store.model(task), str(source))
    table = matching_columns(table, old.schema.names, str(source))
    labelled = most != 0 and bool((table["label"] >= 0).any())
    if labelled and most is not None:
        judged = table.loc[table["label"] >= 0, "group"].drop_duplicates()
        table = table[table["group"].isin(set(judged.sample(min(most, len(judged)), random_state=config.seed)))]
    new = old.recalibrate(table.reset_index(drop=True), labelled)
    new.save(folder / "detector")
    a, b = new.notes["recalibrated"]["line"]
    print(
        f"recalibrated on {new.notes['recalibrated']['images']} pictures {'with' if labelled else 'without'} labels: "
        f"log-odds times {a:.2f} plus {b:.2f}; warns from {new.threshold:.2f} ({new.manifest['threshold']['chosen']}); "
        "no guarantee is carried over"
    )
    print(f"detector: {folder / 'detector'}")


def _traced_task(store: RunStore) -> str:
    """Return the only task of a run that has token rows, or CHAIR."""
    tasks = store.traced_tasks()
    return tasks[0] if len(tasks) == 1 else "chair"


def read_token_rows(config: DictConfig, store: RunStore, task: str, subset: str | None) -> pd.DataFrame:
    """Read the token rows of a run: one task, one subset or all, the chosen features or all.

    Raises:
        ArtefactError: the run has no token rows of that task, or not the features.
        ConfigError: the task has no such subset.
    """
    table = store.tokens(task)
    if table.empty:
        raise missing_rows_error(store, task)
    if (table["label"] < 0).all() and config.detector.get("labels") != "none":
        raise ArtefactError(f"{task} judges no mention in {store.run_dir}, so that there is nothing to learn from")
    _warn_of_gaps(store, task)
    if "features" in config:
        chosen = HydraConfig.get().runtime.choices.get("features", "...")
        wanted = build(config.features, FeatureSet, "features", config.plugins).names
        remedy = f"stethoscope extract run={store.run_dir} features={chosen}"
        table = select_columns(table, wanted, str(store.run_dir), remedy)
    return of_subset(table, subset, str(store.run_dir))


def _warn_of_gaps(store: RunStore, task: str) -> None:
    """Warn of answers that have no token rows, as after a run was continued beyond what was extracted."""
    named = [record for record in store.records(task) if record.mentions]
    lacking = sum(not store.has_tokens(record) for record in named)
    if lacking:
        warnings.warn(
            f"{lacking} of {len(named)} answers of {task} that name an object have no token features and are left out; "
            f"`stethoscope extract run={store.run_dir}` with the same features adds them",
            stacklevel=2,
        )


def _read_target(config: DictConfig, node: Any, own: str) -> Target:
    """Read an entry of ``test``: a run directory, or ``{run: ..., mentions: ..., subset: ...}``.

    Without ``mentions`` they are of the task that the detector is trained on or, where the run has no such, of its only
    one.

    Raises:
        ConfigError: the entry says something else, or does not say which of several tasks.
        ArtefactError: there is no such run, or it has no token rows.
    """
    wanted = {"run": node} if isinstance(node, str) else dict(node)
    if "run" not in wanted or not set(wanted) <= {"run", "mentions", "subset"}:
        raise ConfigError(f"test={node} should be a run directory or {{run: ..., mentions: ..., subset: ...}}")
    store = RunStore(wanted["run"])
    tasks = store.traced_tasks()
    task = wanted.get("mentions") or (own if own in tasks else None)
    if task is None:
        if not tasks:
            raise missing_rows_error(store)
        if len(tasks) > 1:
            raise ConfigError(f"test={node} has tokens of {', '.join(tasks)}: say which, {{run: ..., mentions: ...}}")
        task = tasks[0]
    subset = wanted.get("subset")
    same = store.run_dir.resolve() == Path(config.run).resolve()
    if same and (task, subset) == (own, config.subset):
        raise ConfigError(f"test={node} is what the detector is trained on; its own test images are judged anyway")
    name = " ".join(part for part in (store.run_dir.name, task, subset) if part)
    return Target(name, read_token_rows(config, store, task, subset), store.model(task))


def _transfer_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Flatten the metrics of a transfer by name, for loggers."""
    return {
        f"transfer/{row['target']}/{which}/{metric}": interval["value"]
        for row in rows
        for which, figures in row.items()
        if isinstance(figures, dict)
        for metric, interval in figures.items()
    }


def _compared_detector(name: str, same: Sequence[str], plugins: Sequence[str]) -> Detector:
    """Build a detector of ``conf/detector`` with some settings of the main one.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in choices("detector"):
        raise ConfigError(unknown("detector of compare_with", str(name), choices("detector")))
    return build(compose([f"+detector={name}", *same]).detector, Detector, f"compare_with.{name}", plugins)
