"""``stethoscope extract``: token features for the answers of a finished run."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from stethoscope.build import build
from stethoscope.commands.session import make_callbacks, report_failures, saved_config
from stethoscope.errors import ArtefactError, ConfigError
from stethoscope.runs.processes import rank

SAVED = ("limit", "batch_size", "seed")
"""Settings of the evaluator that a run goes on with."""


def trusted_settings(saved: Any, typed: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run's model, of which some count only where they are typed again.

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


def run(config: DictConfig) -> None:
    """Traces the stored answers through the model that wrote them; with ``warn`` also applies a saved detector."""
    from stethoscope.adapter import Adapter
    from stethoscope.detection.columns import feature_of, fitting, one_space, shorten
    from stethoscope.detection.finding import load_detector
    from stethoscope.detection.warn import mention_warnings, write_warnings
    from stethoscope.evaluator import Evaluator
    from stethoscope.features import FeatureSet
    from stethoscope.records import Generation
    from stethoscope.runs.store import RunStore
    from stethoscope.task import Task

    folder = Path(config.run)
    saved = saved_config(folder)
    asked = saved.get("task") or saved.get("chair")  # of a benchmark, the task that has features
    lacking = [key for key in (*SAVED, "model", "generation") if key not in saved]
    if asked is None or lacking:
        which = f", its config.yaml has no {lacking[0]}" if lacking else ""
        raise ArtefactError(f"{folder} was made neither by `stethoscope evaluate` nor by `benchmark`{which}")
    detector, plugins = load_detector(config.warn or None), config.plugins
    features = build(config.features, FeatureSet, "features", plugins)
    print(features.head)
    model = trusted_settings(saved["model"], config.model)
    adapter, task = build(model, Adapter, "model", plugins), build(asked, Task, "task", plugins)
    if detector is not None:
        wrote = RunStore(folder).model(task.name)
        one_space(detector.features, detector.notes.get("model") or {}, wrote, str(folder))
        lacking = sorted({feature_of(column) for column in detector.schema.names} - set(features.names))
        if lacking:
            raise ConfigError(
                f"warn={config.warn} was trained on {len(lacking)} features that features= does not choose: "
                f"{shorten(lacking)}; choose what it was trained on"
            )
    results = Evaluator(
        callbacks=make_callbacks(config.callbacks, plugins),
        **{key: saved[key] for key in SAVED},
        generation=build(saved["generation"], Generation, "generation", plugins),
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
        print(f"no answer names an object that {task.name} judges, and none was traced; trace=all traces every answer")
        report_failures([results], folder)
        return
    mentions = int((table["first"] & (table["label"] >= 0)).sum())
    print(f"{len(table)} tokens, {mentions} judged object mentions: {folder / 'tokens.parquet'}")
    if detector is not None:
        table = fitting(table, detector.schema.names, str(folder))
        warnings = mention_warnings(table, detector)
        write_warnings(warnings, folder / "warnings.jsonl")
        print(f"{int(warnings['warned'].sum())} of {len(warnings)} mentions warned: {folder / 'warnings.jsonl'}")
    report_failures([results], folder)
