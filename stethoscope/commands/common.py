"""Share what commands need: components, loggers, given answers, checks of settings."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from stethoscope.commands.command_line import strip_quotes, unquoted
from stethoscope.core.component import TARGET, build
from stethoscope.core.errors import ConfigError, DataError, StethoscopeError, unknown
from stethoscope.core.files import check_shape, jsonable
from stethoscope.core.redaction import redact_override
from stethoscope.core.types import Generation
from stethoscope.evaluation.callbacks import Callback
from stethoscope.loggers.base import Logger
from stethoscope.loggers.combined import Loggers
from stethoscope.metrics.bootstrap import FOLDS
from stethoscope.storage.logged_answers import read_answers
from stethoscope.storage.reuse import reuse_answers
from stethoscope.storage.run_dir import DETECTOR, RunStore, saved_task
from stethoscope.storage.run_fingerprint import describe, differences

if TYPE_CHECKING:
    from PIL.Image import Image

    from stethoscope.adapters.base import Adapter
    from stethoscope.core.types import Sample
    from stethoscope.detection.detector import Detector
    from stethoscope.evaluation.evaluator import Evaluator
    from stethoscope.evaluation.results import TaskResults
    from stethoscope.evaluation.state import RunState
    from stethoscope.storage.logged_answers import AnswerLog
    from stethoscope.storage.records import Record
    from stethoscope.tasks.base import Task


def overrides() -> list[str]:
    """List the user's overrides on the command line."""
    from hydra.core.hydra_config import HydraConfig

    return [unquoted(word) for word in HydraConfig.get().overrides.task]


def as_list(given: Any) -> list[Any]:
    """Convert a value to a list, also a single one that was given without brackets."""
    return list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]


def make_callbacks(nodes: DictConfig, plugins: Sequence[str]) -> list[Callback]:
    """Build the callbacks of a configuration's ``callbacks`` group, in its order."""
    return [build(node, Callback, f"callbacks.{name!s}", plugins) for name, node in nodes.items()]


def require_model(adapter: Adapter, command: str) -> None:
    """Check that there is a model behind the adapter.

    Raises:
        ConfigError: there is none, as with ``model=none``.
    """
    if not adapter.has_model:
        raise ConfigError(
            f"model={adapter.name} only scores the texts of a file (stethoscope evaluate answers.file=...), and "
            f"`stethoscope {command}` needs a model that reads them"
        )


class SaveConfig(Callback):
    """Writes the configuration into the run directory once the directory has been accepted for it."""

    first_only = True

    def __init__(self, config: DictConfig) -> None:
        """Store the composed configuration."""
        self.config = config

    def on_task_start(self, run: RunState) -> None:
        """Write ``config.yaml`` and ``overrides.yaml`` before the first sample."""
        if run.store is not None:
            run.store.write_config(self.config, overrides())


def logger_settings(config: DictConfig) -> dict[str, dict[str, Any]]:
    """Return the settings of every chosen logger, by its path in the configuration.

    A file of the group ``logger`` holds its settings under a name of its own, so that several can be chosen. One that
    holds them bare can only be chosen alone, or beside such files.
    """
    node = config.get("logger") or {}
    plain = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else dict(node)
    assert isinstance(plain, dict)
    named = {str(name): value for name, value in plain.items() if isinstance(value, dict) and TARGET in value}
    bare = {str(name): value for name, value in plain.items() if name not in named}
    return {**({"logger": bare} if bare else {}), **{f"logger.{name}": value for name, value in named.items()}}


def run_settings(config: DictConfig) -> dict[str, Any]:
    """Return all settings of a run for its loggers, with the command and the names chosen from groups."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    chosen = {
        key.partition("@")[2] or key: name
        for key, name in hydra.runtime.choices.items()
        if name is not None and not key.startswith("hydra/")
    }
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return {
        "command": hydra.job.config_name,
        "choices": chosen,
        "overrides": [*map(redact_override, overrides())],
        **plain,
    }


@contextmanager
def loggers_of(config: DictConfig) -> Iterator[Loggers]:
    """Build the configuration's loggers, and finish them with the status at the end of the block.

    The evaluator starts them, once the run directory has been accepted, and adds the file of events.
    """
    settings = run_settings(config)
    labels = [name for group in ("model", "task", "features", "detector") if (name := settings["choices"].get(group))]
    defaults = {"job_type": settings["command"], "tags": labels}
    built = []
    for key, node in logger_settings(config).items():
        node |= {name: value for name, value in defaults.items() if name in node and node[name] is None}
        built.append(build(node, Logger, key, config.plugins))
    loggers = Loggers(built, settings)
    try:
        yield loggers
    except BaseException as error:
        loggers.finalize("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        raise
    loggers.finalize("finished")


def build_generation(config: Mapping[str, Any], plugins: Sequence[str]) -> Generation:
    """Build the settings of generation, with the chosen mitigation if there is one.

    Args:
        config: a composed configuration, or that of a run as plain data.
        plugins: names of packages outside ``stethoscope`` whose classes are allowed.

    Raises:
        ConfigError: a setting is wrong, or the method does not go with the other settings.
    """
    from stethoscope.mitigation.base import Mitigation

    generation, node = build(config["generation"], Generation, "generation", plugins), config.get("mitigation")
    if node is None or (isinstance(node, Mapping) and node.get(TARGET) is None):
        return generation
    return replace(generation, mitigation=build(node, Mitigation, "mitigation", plugins))


def make_evaluator(
    config: DictConfig,
    folder: Path,
    loggers: Loggers,
    generation: Generation,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> Evaluator:
    """Build the evaluator of a command that generates answers.

    ``callbacks`` come in addition to those of the configuration.
    """
    from stethoscope.evaluation.evaluator import Evaluator

    return Evaluator(
        callbacks=[SaveConfig(config), *make_callbacks(config.callbacks, config.plugins), *callbacks],
        loggers=loggers,
        limit=config.limit,
        fast_dev_run=config.fast_dev_run,
        batch_size=config.batch_size,
        generation=generation,
        run_dir=folder,
        on_error=config.on_error,
        overwrite=config.overwrite,
        seed=config.seed,
        meeting_minutes=config.meeting_minutes,
        **settings,
    )


def answer(
    config: DictConfig,
    folder: Path,
    loggers: Loggers,
    adapter: Adapter,
    task: Task,
    generation: Generation,
    **more: Any,
) -> TaskResults:
    """Evaluate a task with the answers of a log, of other runs in a folder, or the model's own.

    Args:
        config: of a command that generates answers.
        folder: the run directory.
        loggers: of the run.
        adapter: the model.
        task: the benchmark.
        generation: of ``build_generation``, so that its settings are checked before the model is built.
        more: settings of the evaluator that are not in the configuration.
    """
    log = given_answers(config, task.name)
    answers = {"answers": log, "answer_ids": config.answers.token_ids}
    evaluator = make_evaluator(config, folder, loggers, generation, **answers, **more)
    if log is not None or config.answers.runs is None or config.overwrite or config.fast_dev_run:
        return evaluator.run(adapter, task)
    with reuse_answers(Path(config.answers.runs), folder, adapter, task, evaluator.generation):
        return evaluator.run(adapter, task)


def given_answers(config: DictConfig, task: str) -> AnswerLog | None:
    """Read the log of answers that the configuration names for a task; None without one.

    Raises:
        ConfigError: ``answers.file`` is neither a path nor a mapping of paths by the name of the task, or
            ``answers.token_ids`` is neither true nor false.
        DataError: the log cannot be read.
    """
    file = config.answers.file
    if not isinstance(config.answers.token_ids, bool):
        raise ConfigError(f"answers.token_ids={config.answers.token_ids} should be true or false")
    if isinstance(file, Mapping):
        file = file.get(task)
    if file is None:
        return None
    if not isinstance(file, str):
        raise ConfigError(f"answers.file={file} should be the path of a log, or a mapping of task names to such paths")

    log = read_answers(Path(file).expanduser(), config.answers.format)
    for note in log.notes:
        print(f"{log.path}: {note}")
    return log


def check_answer_files(config: DictConfig, tasks: Sequence[Task]) -> None:
    """Check that ``answers.file`` names tasks of this command, and each by itself where there are several.

    Raises:
        ConfigError: it names another task, or one file for several tasks.
    """
    file, names = config.answers.file, [task.name for task in tasks]
    if isinstance(file, Mapping):
        for name in file:
            if name not in names:
                raise ConfigError(f"answers.file: {unknown('task', str(name), names)}")
    elif file is not None and len(names) > 1:
        example = ", ".join(f"{name}: {name}.jsonl" for name in names)
        raise ConfigError(f"answers.file={file} should name a file for every task: answers.file={{{example}}}")


def report_failures(results: Sequence[TaskResults], folder: Path) -> None:
    """Raise an error when samples failed, once everything else is done and stored.

    Raises:
        DataError: some samples failed; the message names the first.
    """
    failed = sum(result.counts["failed"] for result in results)
    if not failed:
        return
    records = (record for result in results for record in RunStore(folder).records(result.task))
    first = next(record for record in records if record.status == "failed")
    total = sum(result.counts["samples"] for result in results)
    raise DataError(
        f"{failed} of {total} samples failed, the first is {first.task} sample {first.sample_id}: {first.error}. "
        f"All others are in {folder}; the same command tries the failed ones again"
    )


def parse(command: str, words: Sequence[str], defaults: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Separate the runs and the settings of a command's arguments.

    A word is a setting if what stands before its ``=`` is a name, and no file is called so: paths of swept runs have
    the sign in them too. Quotes around a whole run or value are removed. ``None`` stands for the default.

    Raises:
        ConfigError: an unknown setting or option.
    """
    runs, settings = [], dict(defaults)
    for word in words:
        key, equals, value = word.partition("=")
        if word.startswith("-"):
            raise ConfigError(f"stethoscope {command} has no option {word}; `stethoscope {command} --help` explains it")
        if equals and key.isidentifier() and (key in settings or not Path(word).exists()):
            if key in ("run", "runs") and key not in settings:
                raise ConfigError(f"{word}: runs are given by themselves, as in `stethoscope {command} {value}`")
            if key not in settings:
                raise ConfigError(unknown(f"setting of {command}", key, settings))
            settings[key] = defaults[key] if value in ("None", "null") else strip_quotes(value)
        else:
            runs.append(strip_quotes(word))
    return runs, settings


def true_or_false(settings: Mapping[str, str], key: str) -> bool:
    """Read a setting of ``parse`` that is true or false.

    Raises:
        ConfigError: it is something else.
    """
    text = settings[key].lower()
    if text not in ("true", "false"):
        raise ConfigError(f"{key}={settings[key]} should be true or false")
    return text == "true"


def picture_loader(store: RunStore, plugins: Sequence[str], missing: str) -> Callable[[Record], Image | None]:
    """Return a loader of the pictures of a run's samples from their source.

    Args:
        store: the run.
        plugins: packages besides our own that its tasks may come from.
        missing: note to print where a task's pictures cannot be had any more, once for each task.
    """

    @cache
    def samples(name: str) -> dict[str, Sample]:
        try:
            task = saved_task(store, name, plugins)
            task.setup()
        except (StethoscopeError, ImportError) as error:
            print(f"note: {missing}: {error}", file=sys.stderr)
            return {}
        return {sample.id: sample for sample in task.samples()}

    def picture(record: Record) -> Image | None:
        sample = samples(record.task).get(record.sample_id)
        if sample is None or record.changes(sample):
            return None
        try:
            return sample.image.load()
        except StethoscopeError:
            return None

    return picture


def fractions(config: DictConfig) -> tuple[float, float, float]:
    """Read the shares of train, calibration and test.

    Raises:
        ConfigError: they leave no images for one of the three.
    """
    try:
        train, calibration = float(config.split.train), float(config.split.calibration)
        test = round(1 - train - calibration, 9)
    except (TypeError, ValueError):
        train, calibration, test = config.split.train, config.split.calibration, 0.0
    if not test > 0 or min(train, calibration) <= 0:
        raise ConfigError(
            f"split.train={train} and split.calibration={calibration} should be numbers above 0 that leave images "
            "for the test"
        )
    return train, calibration, test


def keep_detector(
    folder: Path, detector: Detector, shares: Sequence[float], seed: int, task: str, columns: Sequence[str] | None
) -> None:
    """Check that a detector in a run directory is not replaced by one of other settings.

    Args:
        folder: the run directory.
        detector: unfitted, that is to take its place.
        shares: of the images for train, calibration and test.
        seed: of the split.
        task: whose mentions it learns from.
        columns: features that it may choose from; None where they are all of the table's, whatever those are.

    Raises:
        ConfigError: the one that is there was made with other settings.
    """
    from stethoscope.detection.artifact import MANIFEST, read_manifest

    file, remedy = folder / "detector" / MANIFEST, "delete the folder and train again"
    if not file.is_file() or RunStore(folder).status().get(DETECTOR):  # one that is not all written is no loss
        return
    manifest = read_manifest(file.parent, remedy)
    check_shape(file, manifest, {"settings": dict}, remedy)
    split, learned_from = manifest.get("split"), manifest.get("task")
    before, now = {"detector": manifest["settings"]}, {"detector": jsonable(detector.settings)}
    if isinstance(split, Mapping):  # without labels there is none
        folds = dict(zip(FOLDS, map(float, shares), strict=True))
        before |= {"split": split.get("fractions"), "seed": split.get("seed")}
        now |= {"split": folds, "seed": seed}
    if isinstance(learned_from, Mapping):
        before["mentions"], now["mentions"] = learned_from.get("name"), task
    if columns is not None:
        before["features"], now["features"] = sorted(manifest.get("table_features", ())), sorted(columns)
    changes = differences(before, now)
    if changes:
        raise ConfigError(
            f"{folder / 'detector'} was made with other settings ({describe(changes)}); set overwrite=true to replace "
            "it, or choose another folder for the new one"
        )
