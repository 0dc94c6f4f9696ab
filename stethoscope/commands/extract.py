"""``stethoscope extract``: token features for the answers of a finished run."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from stethoscope.build import build
from stethoscope.commands.session import make_callbacks, report_failures, saved_config
from stethoscope.errors import ArtefactError, ConfigError
from stethoscope.runs.processes import rank


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
    if asked is None:
        raise ArtefactError(f"{folder} was made neither by `stethoscope evaluate` nor by `benchmark`")
    detector = load_detector(config.warn or None)
    plugins = [*saved.plugins, *config.plugins]
    features = build(config.features, FeatureSet, "features", plugins)
    print(features.head)
    adapter, task = build(saved.model, Adapter, "model", plugins), build(asked, Task, "task", plugins)
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
        limit=saved.limit,
        batch_size=saved.batch_size,
        generation=build(saved.generation, Generation, "generation", plugins),
        features=features,
        trace=config.trace,
        run_dir=folder,
        overwrite="features",
        seed=saved.seed,
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
