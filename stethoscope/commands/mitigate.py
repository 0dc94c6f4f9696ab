"""Implement ``stethoscope mitigate``: methods against hallucinations beside greedy decoding and trivial controls."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, open_dict

from stethoscope.commands.common import (
    answer,
    as_list,
    build_generation,
    loggers_of,
    report_failures,
    require_model,
    run_dir,
)
from stethoscope.core.component import build
from stethoscope.core.errors import ConfigError, unknown
from stethoscope.core.files import atomic_write, write_json
from stethoscope.core.system import rank

if TYPE_CHECKING:
    from stethoscope.adapters.base import Adapter
    from stethoscope.core.types import Generation, Sample
    from stethoscope.report.mitigation_table import MethodAnswers, MethodFigures
    from stethoscope.report.tables import Table
    from stethoscope.storage.records import Record
    from stethoscope.tasks.base import Task

UNCHANGED, BRIEF = "none", "brief"


def run(config: DictConfig) -> None:
    """Run every method and compare them; errors of the configuration are raised before the model is loaded."""
    from stethoscope.adapters.base import Adapter
    from stethoscope.report.console import print_table
    from stethoscope.report.mitigation_table import compare_methods, method_tables
    from stethoscope.storage.run_dir import RunStore
    from stethoscope.tasks.base import Task

    start, folder = time.monotonic(), run_dir(config)
    adapter = build(config.model, Adapter, "model", config.plugins)
    chair = build(config.chair, Task, "chair", config.plugins)
    pope = None if config.get("pope") is None else build(config.pope, Task, "pope", config.plugins)
    jobs = method_configs(config)
    generations = {name: build_generation(job, job.plugins) for name, job in jobs.items()}
    check(config, adapter, chair, generations)
    for task in filter(None, (pope, chair)):
        task.setup()
    excluded = fitted_images(generations.values(), adapter, chair.samples())
    methods, results = [], {}
    for name, job in jobs.items():
        tasks = [task for task in (pope, chair) if task is not None]
        if name == BRIEF:
            tasks = [build(job.chair, Task, "chair", config.plugins)]
        with loggers_of(job) as loggers:
            results[name] = [answer(job, Path(job.run_dir), loggers, adapter, task) for task in tasks]
        if not rank():
            methods.append(collect(name, Path(job.run_dir), generations[name], tasks, excluded))
    if rank():  # of several processes the first one does the rest
        return
    methods += stopped_early(RunStore(folder / UNCHANGED).records(chair.name), chair, stops(config), excluded)
    figures = compare_methods(methods, chair.metrics())
    notes = [f"{len(excluded)} images that a detector was fitted on are left out."] if excluded else []
    tables = method_tables(figures, notes)
    for table in tables:
        print_table(table)
    write(folder, figures, tables)
    print(f"{folder / 'mitigation.md'}, mitigation.json, frontier.svg ({time.monotonic() - start:.0f} s)")
    for name, job in jobs.items():
        report_failures(results[name], Path(job.run_dir))


def method_configs(config: DictConfig) -> dict[str, DictConfig]:
    """Make the configuration of every method's own run, by its name.

    Raises:
        ConfigError: ``methods`` does not begin with none, repeats a name or holds an unknown one.
    """
    names = [str(name) for name in as_list(config.methods)]
    if names[:1] != [UNCHANGED] or len(set(names)) < len(names):
        raise ConfigError(f"methods={names} should be a list of different methods of which the first is none")
    for name in names:
        if name not in config.mitigation:
            raise ConfigError(unknown("method", name, config.mitigation))
    jobs = {name: _job(config, name, name) for name in names}
    if config.brief is not None:
        jobs[BRIEF] = _job(config, UNCHANGED, BRIEF)
        jobs[BRIEF].chair.question = str(config.brief)
    return jobs


def _job(config: DictConfig, method: str, name: str) -> DictConfig:
    """Copy a configuration for the run of one method, as if it were one of ``evaluate``."""
    job = copy.deepcopy(config)
    with open_dict(job):
        job.mitigation = copy.deepcopy(config.mitigation[method])
        job.run_dir = str(run_dir(config) / name)
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


def check(config: DictConfig, adapter: Adapter, chair: Task, generations: Mapping[str, Generation]) -> None:
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
    for generation in generations.values():
        adapter.check_mitigation(generation)


def fitted_images(generations: Iterable[Generation], adapter: Adapter, samples: Sequence[Sample]) -> set[str]:
    """Return the images of a task that the detector of a method was fitted on.

    Args:
        generations: with the methods.
        adapter: the model; only the embedded one, which brings its own detector, may be loaded here.
        samples: of the task. An image of the same name counts unless the run of the detector tells that it is another.

    Raises:
        ConfigError: a method has no detector for this model, or all images were used to fit it.
        ArtefactError: a detector cannot be read.
    """
    from stethoscope.mitigation.answers import EditingMitigation
    from stethoscope.report.run_source import read_warnings
    from stethoscope.storage.run_dir import RunStore

    editors = [item.mitigation for item in generations if isinstance(item.mitigation, EditingMitigation)]
    if not editors:
        return set()
    seen: set[str] = set()
    for path in {method.folder(adapter) for method in editors}:
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


def collect(
    name: str, folder: Path, generation: Generation, tasks: Sequence[Task], excluded: Iterable[str]
) -> MethodAnswers:
    """Collect what a method wrote.

    Args:
        name: of the method.
        folder: its run directory.
        generation: with the method.
        tasks: that it answered, that of the descriptions last.
        excluded: images whose descriptions are left out.
    """
    from stethoscope.mitigation.base import Mitigation
    from stethoscope.report.mitigation_table import MethodAnswers, reply_figures, score_counts
    from stethoscope.storage.run_dir import RunStore

    store = RunStore(folder)
    records = list(store.records(tasks[-1].name))
    replies = reply_figures(store.records(tasks[0].name), tasks[0].metrics()) if len(tasks) > 1 else {}
    seconds = sum(sum(record.seconds.values()) for record in records) / max(len(records), 1)
    method = generation.mitigation
    passes = method.passes_per_token if isinstance(method, Mitigation) else 1.0
    if name == UNCHANGED and not generation.do_sample and generation.num_beams == 1:
        name = "greedy"
    return MethodAnswers(name, score_counts(records, excluded), name == BRIEF, passes, seconds, replies)


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
    from stethoscope.report.mitigation_table import MethodAnswers, score_counts

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


def write(folder: Path, figures: Sequence[MethodFigures], tables: Sequence[Table]) -> None:
    """Write the comparison into the run directory: ``mitigation.md``, ``mitigation.json`` and ``frontier.svg``."""
    from stethoscope.report.mitigation_table import frontier
    from stethoscope.report.tables import render_tables

    plot = frontier(figures)
    text = f"{render_tables(tables, 'markdown')}\n![{plot.title}](frontier.svg)\n\n{plot.note}\n"
    atomic_write(folder / "frontier.svg", str(plot.svg))
    atomic_write(folder / "mitigation.md", f"# Mitigations\n\n{text}")
    write_json(folder / "mitigation.json", {"methods": [item.to_dict() for item in figures]})
