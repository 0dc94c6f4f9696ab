"""Implement ``stethoscope extract``: compute token features for the answers of a finished run."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from stethoscope.adapters.base import Adapter
from stethoscope.commands.common import build_generation, make_callbacks, report_failures, require_model
from stethoscope.core.component import build
from stethoscope.core.errors import ArtefactError, ConfigError, DataError, unknown
from stethoscope.core.system import rank
from stethoscope.core.text import listed
from stethoscope.features import FeatureSet
from stethoscope.features.columns import check_same_model, feature_of, matching_columns
from stethoscope.storage.run_dir import RunStore, saved_config
from stethoscope.tasks.base import Task

if TYPE_CHECKING:
    import pandas as pd

    from stethoscope.detection.detector import Detector

SAVED = ("limit", "batch_size", "seed")
"""Settings of the evaluator that are taken from the run."""
TRUSTED = ("trust_remote_code", "offload_folder")
"""Settings of the model that no file may set."""
MODEL_LOCATIONS = ("model_id", "tower", "llm", "vision", "qformer", "projector")
"""Settings of adapters that may name a folder or file of the model."""


def trusted_settings(saved: Any, typed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run's model, of which some count only if they are typed again.

    Args:
        saved: the model in the run's configuration.
        typed: those settings by this command line, off where it does not name them.

    Raises:
        ConfigError: the run was made with one of them; the line says what to type.
        ArtefactError: the run's configuration holds no model.

    >>> trusted_settings({"model_id": "a/b", "trust_remote_code": False}, {"trust_remote_code": False})
    {'model_id': 'a/b', 'trust_remote_code': False}
    """
    if not isinstance(saved, dict):
        raise ArtefactError("the run's config.yaml has no settings under model; it should hold a _target_ and more")
    for key, value in typed.items():
        if not value and saved.get(key):
            wanted = f"{key}={'true' if saved[key] is True else reprlib.repr(saved[key])}"
            raise ConfigError(
                f"the run's model was loaded with {wanted}, which no file can ask for; "
                f"add model.{wanted} if you trust the run"
            )
    return {**saved, **{key: value for key, value in typed.items() if key in saved or value}}


def relocated(kind: str, saved: Mapping[str, Any], typed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run's model or task, replaced by those of this command line.

    Raises:
        ConfigError: the model or task has no such setting.

    >>> relocated("task", {"file": "q.jsonl", "images": "img"}, {"images": "/mnt/img", "folder": None})
    {'file': 'q.jsonl', 'images': '/mnt/img'}
    """
    typed = {key: value for key, value in typed.items() if value is not None}
    for key in typed:
        if key not in saved:
            raise ConfigError(unknown(f"setting of the run's {kind}", key, [key for key in saved if key[:1] != "_"]))
    return {**saved, **typed}


def from_origin(settings: Mapping[str, Any], keys: Collection[str], folder: Path, run_dir: Any) -> dict[str, Any]:
    """Resolve relative paths that do not exist here from the folder in which the run was started.

    Args:
        settings: of the run's model or task.
        keys: those that may hold paths.
        folder: the run directory.
        run_dir: the run directory as the command that made it named it; what precedes it in ``folder`` is the origin.
    """
    parts, absolute = Path(str(run_dir)).parts, folder.resolve()
    if absolute.parts[-len(parts) :] != parts:
        return dict(settings)
    origin = Path(*absolute.parts[: -len(parts)])
    paths = {key: settings[key] for key in keys if isinstance(settings.get(key), str) and settings[key]}
    elsewhere = {key: origin / path for key, path in paths.items() if not Path(path).expanduser().exists()}
    return {**settings, **{key: str(path) for key, path in elsewhere.items() if path.exists()}}


def check_data(settings: Mapping[str, Any], keys: Collection[str], folder: Path) -> None:
    """Check that the files of the run's data are there.

    Raises:
        DataError: one is not; the line says how to name its new location.
    """
    for key in keys:
        path = settings.get(key)
        if key != "dataset" and isinstance(path, str) and path and not Path(path).expanduser().exists():
            raise DataError(f"{folder} was made with task.{key}={path}, which does not exist; name its new location")


def report_untraced(store: RunStore, task: str) -> None:
    """Count the samples that have no token rows because they have changed or could not be traced.

    Raises:
        DataError: there are some.
    """
    from stethoscope.evaluation.pipeline import CHANGED

    records = list(store.records(task))
    untraced = [record for record in records if record.untraced]
    if not untraced:
        return
    changed = [record.untraced.removeprefix(CHANGED) for record in untraced if record.untraced.startswith(CHANGED)]
    kinds = sorted({kind for names in changed for kind in names.split(", ")})
    counted = [f"{len(changed)} have changed since they were asked ({', '.join(kinds)})"] if changed else []
    if len(changed) < len(untraced):
        counted.append(f"{len(untraced) - len(changed)} could not be traced")
    first = untraced[0]
    raise DataError(
        f"{len(untraced)} of {len(records)} samples of {task} have no features: {', '.join(counted)}; the first is "
        f"sample {first.sample_id}: {first.untraced}. Their answers stay as they are; "
        "the command that made the run asks changed samples again"
    )


def run(config: DictConfig) -> None:
    """Trace the stored answers through the model that wrote them.

    With ``warn``, a saved detector is applied too.
    """
    from stethoscope.detection.lookup import load_detector
    from stethoscope.evaluation.edit_answers import try_features
    from stethoscope.evaluation.evaluator import Evaluator

    folder = Path(config.run)
    saved = saved_config(folder)
    asked = saved.get("task") or saved.get("chair")  # of a benchmark, the task that has features
    lacking = [key for key in (*SAVED, "model", "generation") if key not in saved]
    if not isinstance(asked, dict) or lacking:
        which = f", its config.yaml has no {lacking[0]}" if lacking else ""
        raise ArtefactError(f"{folder} was made neither by `stethoscope evaluate` nor by `benchmark`{which}")
    detector, plugins = load_detector(config.warn or None), config.plugins
    features = build(config.features, FeatureSet, "features", plugins)
    print(features.summary)
    adapter, task = _saved_model_and_task(config, folder, saved, asked)
    require_model(adapter, "extract")
    if detector is not None:
        _check_detector(detector, features, config.warn, folder, task.name)
    generation = build_generation(saved, plugins)
    if features.plugins:  # before the token rows of other features are replaced
        try_features(adapter, task, features, generation)
    results = Evaluator(
        callbacks=make_callbacks(config.callbacks, plugins),
        **{key: saved[key] for key in SAVED},
        generation=generation,
        features=features,
        trace=config.trace,
        run_dir=folder,
        overwrite="features",
        meeting_minutes=config.meeting_minutes,
    ).run(adapter, task)
    if rank():  # of several processes the first one does the rest
        return
    table = RunStore(folder).tokens(task.name)
    if table.empty:
        report_untraced(RunStore(folder), task.name)
        print(f"no answer names an object that {task.name} judges, and none was traced; trace=all traces every answer")
        report_failures([results], folder)
        return
    mentions = int((table["is_first_subtoken"] & (table["label"] >= 0)).sum())
    print(f"{len(table)} tokens, {mentions} judged object mentions: {folder / 'tokens.parquet'}")
    if detector is not None:
        _apply(detector, table, task, folder)
    report_untraced(RunStore(folder), task.name)
    report_failures([results], folder)


def _saved_model_and_task(
    config: DictConfig, folder: Path, saved: dict[str, Any], asked: dict[str, Any]
) -> tuple[Adapter, Task]:
    """Build the model and the task of the run, from the places that they have today."""
    from stethoscope.tasks.extraction import FILES

    trusted = {key: config.model[key] for key in TRUSTED}
    model = trusted_settings(saved["model"], trusted)
    model = relocated("model", model, {key: value for key, value in config.model.items() if key not in trusted})
    model = from_origin(model, MODEL_LOCATIONS, folder, saved.get("run_dir"))
    asked = relocated("task", asked, config.task)
    vocabulary = ("extraction",) if str(asked.get("extraction")).lower().endswith(FILES) else ()
    asked = from_origin(asked, (*Task.locations, *vocabulary), folder, saved.get("run_dir"))
    check_data(asked, (*Task.locations, *vocabulary), folder)
    task = build(asked, Task, "task", config.plugins)
    if "prompt" in model and model["prompt"] is None:  # a chat template may render another one today
        model["prompt"] = RunStore(folder).model(task.name).get("prompt")
    return build(model, Adapter, "model", config.plugins), task


def _apply(detector: Detector, table: pd.DataFrame, task: Task, folder: Path) -> None:
    """Write the warnings of a saved detector, and say whether they can be relied on."""
    from stethoscope.detection.lookup import mention_warnings, write_warnings
    from stethoscope.tasks.extraction import other_words

    table = matching_columns(table, detector.schema.names, str(folder))
    warnings, file = mention_warnings(table, detector), folder / "warnings.jsonl"
    write_warnings(warnings, file)
    print(f"{int(warnings['warned'].sum())} of {len(warnings)} mentions warned: {file}")
    if words := other_words(task.identity().get("extraction", ""), detector.notes.get("task")):
        print(f"detector: {words}")
    elif (shift := detector.shift(table)) is not None:
        print(f"detector: {shift.sentence}")


def _check_detector(detector: Detector, features: FeatureSet, warn: str, folder: Path, task: str) -> None:
    """Check that the run's model and the chosen features are those that the detector reads.

    Raises:
        ConfigError: they are not.
    """
    check_same_model(detector.features, detector.notes.get("model") or {}, RunStore(folder).model(task), str(folder))
    lacking = sorted({feature_of(column) for column in detector.schema.names} - set(features.names))
    if lacking:
        raise ConfigError(
            f"warn={warn} was trained on {len(lacking)} features that features= does not choose: "
            f"{listed(lacking)}; choose what it was trained on"
        )
