"""Implement ``stethoscope mitigate``: compare methods against hallucinations with controls."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, open_dict

from stethoscope.adapters.base import Adapter
from stethoscope.commands.common import (
    answer,
    as_list,
    build_generation,
    loggers_of,
    make_callbacks,
    report_failures,
    require_model,
)
from stethoscope.core.component import build
from stethoscope.core.errors import ConfigError, unknown
from stethoscope.core.files import atomic_write, write_json
from stethoscope.core.system import rank
from stethoscope.core.types import Generation
from stethoscope.evaluation.cost_meter import CostMeter, read_costs
from stethoscope.report.tables import render_tables
from stethoscope.storage.run_dir import RunStore, read_warnings
from stethoscope.tasks.base import Task

if TYPE_CHECKING:
    from stethoscope.core.types import Sample
    from stethoscope.detection.detector import Detector
    from stethoscope.evaluation.results import TaskResults
    from stethoscope.report.method_answers import MethodAnswers
    from stethoscope.report.mitigation_table import MethodComparison
    from stethoscope.report.tables import Table
    from stethoscope.storage.records import Record

UNCHANGED, BRIEF = "none", "brief"


@dataclass(frozen=True, eq=False)
class MethodRun:
    """The run of one method or control.

    Attributes:
        name: for tables.
        config: of the run, as if it were one of ``evaluate``.
        generation: its settings of generation, with the method.
        trivial: whether it is a control, which answers no questions.
    """

    name: str
    config: DictConfig
    generation: Generation
    trivial: bool = False

    @property
    def folder(self) -> Path:
        """The run directory."""
        return Path(self.config.run_dir)


def run(config: DictConfig) -> None:
    """Run every method and compare them.

    Errors of the configuration are raised before the model is loaded.
    """
    from stethoscope.report.metrics_tables import print_table
    from stethoscope.report.mitigation_table import compare_methods, method_tables

    start, folder = time.monotonic(), Path(config.run_dir)
    adapter = build(config.model, Adapter, "model", config.plugins)
    chair = build(config.chair, Task, "chair", config.plugins)
    pope = None if config.get("pope") is None else build(config.pope, Task, "pope", config.plugins)
    runs = method_runs(config)
    check(config, adapter, chair, runs)
    for task in filter(None, (pope, chair)):
        task.setup()
    excluded = fitted_images(detector_folders(config, adapter, runs), chair.samples())
    judge = check_detectors(config, adapter, chair, runs)
    methods, results = [], {}
    for item in runs:
        described = build(item.config.chair, Task, "chair", config.plugins) if item.name == BRIEF else chair
        tasks = [described] if pope is None or item.trivial else [pope, described]
        results[item] = answer_all(item, adapter, tasks, judge)
        if not rank():
            methods.append(collect(item, tasks, excluded, judge))
    if rank():  # of several processes the first one does the rest
        return
    methods += stopped_early(RunStore(runs[0].folder).records(chair.name), chair, stops(config), excluded)
    comparison = compare_methods(methods, chair.metrics())
    notes = [f"{len(excluded)} images that a detector was fitted on are left out."] if excluded else []
    tables = method_tables(comparison.methods, notes)
    for table in tables:
        print_table(table)
    write(folder, comparison, tables)
    print(f"{folder / 'mitigation.md'}, mitigation.json, frontier.svg ({time.monotonic() - start:.0f} s)")
    for item in runs:
        report_failures(results[item], item.folder)


def method_runs(config: DictConfig) -> list[MethodRun]:
    """Make the run of every method, then those of the controls.

    Raises:
        ConfigError: ``methods`` does not begin with none, repeats a name or holds an unknown one, or a temperature is
            no number above 0.
    """
    names = [str(name) for name in as_list(config.methods)]
    if names[:1] != [UNCHANGED] or len(set(names)) < len(names):
        raise ConfigError(f"methods={names} should be a list of different methods of which the first is none")
    for name in names:
        if name not in config.mitigation:
            raise ConfigError(unknown("method", name, config.mitigation))
    jobs = {name: _job(config, name, name) for name in names}
    controls: dict[str, DictConfig] = {}
    for temperature in temperatures(config):
        name = f"temperature {temperature:g}"
        controls[name] = _job(config, UNCHANGED, name.replace(" ", "-"))
        with open_dict(controls[name]):
            controls[name].generation.update({"do_sample": True, "num_beams": 1, "temperature": temperature})
    if config.brief is not None:
        controls[BRIEF] = _job(config, UNCHANGED, BRIEF)
        controls[BRIEF].chair.question = str(config.brief)
    runs = [MethodRun(name, job, build_generation(job, job.plugins)) for name, job in jobs.items()]
    if not runs[0].generation.do_sample and runs[0].generation.num_beams == 1:
        runs[0] = replace(runs[0], name="greedy")
    return runs + [MethodRun(name, job, build_generation(job, job.plugins), True) for name, job in controls.items()]


def _job(config: DictConfig, method: str, folder: str) -> DictConfig:
    """Copy a configuration for the run of one method, as if it were one of ``evaluate``."""
    job = copy.deepcopy(config)
    with open_dict(job):
        job.mitigation = copy.deepcopy(config.mitigation[method])
        job.run_dir = str(Path(config.run_dir) / folder)
    return job


def stops(config: DictConfig) -> list[int]:
    """Read the lengths after which answers are cut off.

    Raises:
        ConfigError: one is no whole number above 0.
    """
    lengths = as_list(config.stop or [])
    for length in lengths:
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ConfigError(f"stop={lengths} should be a list of whole numbers above 0, of tokens")
    return sorted(set(lengths))


def temperatures(config: DictConfig) -> list[float]:
    """Read the temperatures at which answers are sampled.

    Raises:
        ConfigError: one is no number above 0.
    """
    values = as_list(config.temperatures or [])
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ConfigError(f"temperatures={values} should be a list of numbers above 0")
    return sorted({float(value) for value in values})


def check(config: DictConfig, adapter: Adapter, chair: Task, runs: Sequence[MethodRun]) -> None:
    """Check that all methods can be done, before the model is loaded.

    Raises:
        ConfigError: a setting is wrong, or a method has no detector.
        CapabilityError: the model gives a method no access to its decoding.
    """
    from stethoscope.report.mitigation_table import CAPTION_METRICS

    require_model(adapter, "mitigate")
    stops(config)
    if config.answers.file is not None:
        raise ConfigError(
            f"answers.file={config.answers.file} gives the answers, but mitigate changes how they are written"
        )
    lacking = [name for name in CAPTION_METRICS if name not in chair.metrics()]
    if lacking:
        raise ConfigError(
            f"chair: {chair.name} has no {', '.join(lacking)}; mitigate needs a task of descriptions as CHAIR"
        )
    for item in runs:
        adapter.check_mitigation(item.generation)


def detector_folders(config: DictConfig, adapter: Adapter, runs: Sequence[MethodRun]) -> list[Path]:
    """List the folders of all detectors: the one that judges, and those of the methods.

    Args:
        config: of the command.
        adapter: the model; only the embedded one, which brings its own detector, may be loaded here.
        runs: of all methods.

    Raises:
        ConfigError: a method has no detector for this model.
        ArtefactError: there is no such detector.
    """
    from stethoscope.mitigation.base import DetectorMitigation

    methods = [item.generation.mitigation for item in runs]
    judge = judge_folder(config, adapter)
    folders = [method.folder(adapter) for method in methods if isinstance(method, DetectorMitigation)]
    return list(dict.fromkeys([*([] if judge is None else [judge]), *folders]))


def judge_folder(config: DictConfig, adapter: Adapter) -> Path | None:
    """Return the folder of the detector that judges what every method wrote; None without one.

    Raises:
        ArtefactError: there is no such detector.
    """
    from stethoscope.detection.lookup import AUTO, bundled_detectors, detector_folder

    if not config.judged:
        return None
    if config.detector.folder != AUTO:
        return detector_folder(str(config.detector.folder))
    return next(iter(bundled_detectors(adapter)), None)


def fitted_images(folders: Iterable[Path], samples: Sequence[Sample]) -> set[str]:
    """Return the images of a task that a detector was fitted on.

    Args:
        folders: of the detectors.
        samples: of the task. An image of the same name counts unless the run of the detector tells that it is another.

    Raises:
        ConfigError: all images were used to fit them.
        ArtefactError: a file of their runs is damaged.
    """
    seen: set[str] = set()
    for path in folders:
        lines = read_warnings(path.parent) if path.name == "detector" else []
        fitted = {line["group"] for line in lines if line["fold"] in ("train", "calibration")}
        digests = {item.group: item.image_sha256 for item in RunStore(path.parent).records()} if fitted else {}
        seen |= {
            sample.group
            for sample in samples
            if sample.group in fitted
            and not (digests.get(sample.group) and sample.image.differs(digests[sample.group]))
        }
    if seen >= {sample.group for sample in samples}:
        raise ConfigError("the detector was fitted on every image of chair; choose others, or train it on fewer")
    return seen


def check_detectors(config: DictConfig, adapter: Adapter, chair: Task, runs: Sequence[MethodRun]) -> Detector | None:
    """Load all detectors and try them on the model before any method begins; return that which judges.

    Raises:
        ConfigError, CapabilityError: a detector reads what this model does not have, see ``check_detector``.
        ArtefactError: a detector is damaged.
        DataError: a promise cannot be given.
    """
    from stethoscope.detection.detector import Detector
    from stethoscope.evaluation.edit_answers import check_detector
    from stethoscope.evaluation.removal_guarantee import promise_removal
    from stethoscope.mitigation.answers import Drop

    loaded: dict[Path, Detector] = {}
    for folder in detector_folders(config, adapter, runs):
        adapter.setup()
        loaded[folder] = Detector.load(folder)
        check_detector(adapter, chair, loaded[folder], runs[0].generation)
    for item in runs:
        method = item.generation.mitigation
        if isinstance(method, Drop) and method.max_hallucinated is not None:
            promise_removal(method, adapter, loaded[method.folder(adapter)])
    judge = judge_folder(config, adapter)
    return None if judge is None else loaded[judge]


def answer_all(
    item: MethodRun, adapter: Adapter, tasks: Sequence[Task], detector: Detector | None
) -> list[TaskResults]:
    """Let a method answer its tasks, and compute what a detector reads of its descriptions.

    Args:
        item: the method.
        adapter: the model.
        tasks: that of the descriptions last.
        detector: that judges what was written; None for none.
    """
    from stethoscope.evaluation.edit_answers import read_features
    from stethoscope.evaluation.evaluator import Evaluator

    config, method = item.config, item.generation.mitigation
    writes = method is not None and method.writes
    meters = [CostMeter(leaving=writes and task is tasks[-1]) for task in tasks]
    with loggers_of(config) as loggers:
        results = [
            answer(config, item.folder, loggers, adapter, task, item.generation, callbacks=[meter])
            for task, meter in zip(tasks, meters, strict=True)
        ]
    if detector is not None:  # apart from the answers, so that their cost is their own
        Evaluator(
            callbacks=make_callbacks(config.callbacks, config.plugins),
            limit=config.limit,
            batch_size=config.batch_size,
            generation=item.generation,
            features=read_features(detector),
            run_dir=item.folder,
            on_error=config.on_error,
            overwrite="features",
            seed=config.seed,
            meeting_minutes=config.meeting_minutes,
        ).run(adapter, tasks[-1])
    return results


def collect(
    item: MethodRun, tasks: Sequence[Task], excluded: Iterable[str], detector: Detector | None
) -> MethodAnswers:
    """Collect what a method wrote.

    Args:
        item: the method.
        tasks: that it answered, that of the descriptions last.
        excluded: images whose descriptions are left out.
        detector: that judges what was written; None for none.
    """
    from stethoscope.report.method_answers import MethodAnswers, detector_figures, reply_figures, score_counts

    store, task = RunStore(item.folder), tasks[-1].name
    records, cost = list(store.records(task)), read_costs(item.folder, task)
    seconds = [spent for record in records for stage, spent in record.seconds.items() if stage != "trace"]
    return MethodAnswers(
        item.name,
        score_counts(records, excluded),
        item.trivial,
        passes=cost.passes,
        seconds=sum(seconds) / max(len(records), 1),
        peak_memory=cost.peak_memory,
        replies=reply_figures(store.records(tasks[0].name), tasks[0].metrics()) if len(tasks) > 1 else {},
        detector=None if detector is None else detector_figures(store.tokens(task), detector, excluded),
        promised=getattr(item.generation.mitigation, "max_hallucinated", None),
    )


def stopped_early(
    records: Iterable[Record], task: Task, lengths: Sequence[int], excluded: Iterable[str]
) -> list[MethodAnswers]:
    """Score the unchanged answers cut off after so many tokens.

    Args:
        records: of the unchanged answers.
        task: that they belong to, after ``setup``.
        lengths: in tokens.
        excluded: images to leave out.
    """
    from stethoscope.report.method_answers import MethodAnswers, score_counts

    samples = {sample.id: sample for sample in task.samples()}
    written = [(record, record.answer) for record in records if record.answer is not None]
    rows = []
    for length in lengths:
        cut = [
            replace(record, score=task.score_answer(samples[record.sample_id], text.until(length)))
            if len(text.token_ids) > length
            else record
            for record, text in written
        ]
        rows.append(MethodAnswers(f"stop at {length}", score_counts(cut, excluded), trivial=True, passes=1.0))
    return rows


def write(folder: Path, comparison: MethodComparison, tables: Sequence[Table]) -> None:
    """Write the comparison into the run directory.

    Files are ``mitigation.md``, ``mitigation.json`` and ``frontier.svg``.
    """
    from stethoscope.report.mitigation_table import frontier

    plot = frontier(comparison)
    text = f"{render_tables(tables, 'markdown')}\n![{plot.title}](frontier.svg)\n\n{plot.note}\n"
    atomic_write(folder / "frontier.svg", str(plot.svg))
    atomic_write(folder / "mitigation.md", f"# Mitigations\n\n{text}")
    write_json(folder / "mitigation.json", {"methods": [item.to_dict() for item in comparison.methods]})
