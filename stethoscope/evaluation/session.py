"""Open, resume, finish and fail a run: its directory, its processes, its remaining samples and its results."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.adapters.base import Adapter
from stethoscope.core.errors import ConfigError, DataError
from stethoscope.core.files import jsonable
from stethoscope.core.system import disk_faults
from stethoscope.core.types import Sample, required
from stethoscope.evaluation.distributed import PeerFailed, current_state
from stethoscope.evaluation.given_answers import summarise
from stethoscope.evaluation.joined_answers import JoinedAnswers
from stethoscope.evaluation.pipeline import SamplePipeline
from stethoscope.evaluation.results import COUNTS, TaskResults
from stethoscope.evaluation.selection import load_samples, recorded_samples, select_samples
from stethoscope.evaluation.state import RunState, describe_failure
from stethoscope.loggers.combined import Loggers
from stethoscope.metrics.bootstrap import count_metrics
from stethoscope.mitigation.answers import EditingMitigation
from stethoscope.mitigation.base import DetectorMitigation
from stethoscope.storage.lock import RunLock
from stethoscope.storage.logged_answers import read_answers
from stethoscope.storage.records import FAILED, OK, UNPARSED
from stethoscope.storage.run_dir import RunStore
from stethoscope.storage.run_fingerprint import (
    answer_fingerprint,
    differences,
    digest,
    feature_fingerprint,
    location_keys,
)
from stethoscope.tasks.base import Task

if TYPE_CHECKING:
    from stethoscope.evaluation.edit_answers import AnswerEditor
    from stethoscope.evaluation.evaluator import Evaluator

FAST_DEV_RUN_SAMPLES = 2


class RunSession:
    """One run of one model on one task: an open run directory, the processes that share it, and its state.

    ``open`` locks the directory, sets up task and model and decides what belongs to the run.

    Args:
        evaluator: holds the settings.

    Attributes:
        run: the state that callbacks see.
        evaluator: as given.
        generation: settings of generation, with the task's own length where none was set.
        editor: of finished answers, where the mitigation edits them.

    Raises:
        ConfigError: adapter or task is something else.
    """

    def __init__(self, evaluator: Evaluator, adapter: Adapter, task: Task) -> None:
        for given, kind, example in ((adapter, Adapter, "stethoscope.load('testbed')"), (task, Task, "Pope()")):
            if not isinstance(given, kind):
                what = kind.__name__
                raise ConfigError(f"{what.lower()}={given!r} should be an object of class {what}, such as {example}")
        self.evaluator = evaluator
        is_main = current_state().is_main_process
        self.run = RunState(adapter, task, evaluator.loggers if is_main else Loggers())
        self._callbacks = [callback for callback in evaluator.callbacks if is_main or not callback.first_only]
        self.generation = evaluator.generation
        self._lock = None if evaluator.run_dir is None else RunLock(evaluator.run_dir, self.run.distributed.rank)
        self._selected: tuple[Sample, ...] = ()
        self.editor: AnswerEditor | None = None

    @classmethod
    @contextmanager
    def open(cls, evaluator: Evaluator, adapter: Adapter, task: Task) -> Iterator[RunSession]:
        """Begin a run, and end it with the block: an error marks the run and reaches callbacks and loggers."""
        session = cls(evaluator, adapter, task)
        try:
            with disk_faults(evaluator.run_dir):
                session._begin()
                yield session
        except BaseException as error:
            session._fail(error)
            raise
        finally:
            if session._lock is not None:
                session._lock.release()

    def _begin(self) -> None:
        """Set up task and model, and accept the run directory."""
        run, evaluator = self.run, self.evaluator
        run.distributed.connect(evaluator.meeting_minutes)
        with run.distributed.sync_errors():
            self.call("on_run_start")
            run.adapter.check_mitigation(self.generation)
            available = self._load(run.task)
            method = self.generation.mitigation
            if isinstance(method, DetectorMitigation) and not evaluator.keeps_answers:
                method.folder(run.adapter)  # without a detector nothing is loaded
            run.adapter.setup()
            if self.generation.max_new_tokens is None:
                self.generation = replace(self.generation, max_new_tokens=run.task.max_new_tokens)
            if evaluator.keeps_answers:
                self._selected = recorded_samples(
                    RunStore(required(evaluator.run_dir)), run.task, available, self._selected
                )
            if isinstance(method, DetectorMitigation) and method.writes and not evaluator.keeps_answers:
                method.load(run.adapter)  # so that one that does not fit ends the run before its first sample
            if isinstance(method, EditingMitigation) and not evaluator.keeps_answers:
                from stethoscope.evaluation.edit_answers import make_editor  # a detector, which few runs need

                self.editor = make_editor(run.adapter, run.task, method, self.generation)
            fingerprint = answer_fingerprint(run.adapter, run.task, self.generation, self._answers_identity())
        if run.distributed.is_distributed:
            self._check_ranks(self._selected, fingerprint)
        with run.distributed.sync_errors():
            if run.distributed.is_main_process:
                self._open(available, fingerprint)
        with run.distributed.sync_errors():
            if not run.distributed.is_main_process:
                required(self._lock).acquire()
        run.samples = tuple(sample for sample in self._selected if run.distributed.owns(sample.group))
        if run.distributed.is_distributed:
            run.store = run.store or RunStore(required(evaluator.run_dir))
            run.store.use_shard(run.distributed.rank)
            run.distributed.stop_file = run.store.record_files.stop_file

    def _load(self, task: Task) -> Sequence[Sample]:
        """Load all samples of the task, and select those to be answered; given answers are joined with them.

        Raises:
            ConfigError: something needs a model, and there is none.
            DataError: the task has no samples, or the log's answers are not theirs.
        """
        evaluator, adapter = self.evaluator, self.run.adapter
        if not adapter.has_model and (evaluator.features is not None or task.reads_tokens):
            reason = "features are read from a model" if evaluator.features is not None else f"{task.name} reads tokens"
            raise ConfigError(f"model={adapter.name} only scores texts, but {reason}; choose the model that reads them")
        log = evaluator.answers
        if isinstance(log, (str, os.PathLike)):
            log = read_answers(Path(log))
        task.setup()
        available = selectable = load_samples(task)
        if log is not None:
            self.run.given = JoinedAnswers.join(log, available, task.name, evaluator.answer_ids)
            selectable = [sample for sample in available if sample.id in self.run.given.answers]
        elif not adapter.has_model and any(sample.answer is None for sample in available):
            raise ConfigError(
                f"model={adapter.name} writes no answers: name a file of them, answers.file=log.jsonl, or a model"
            )
        limit = FAST_DEV_RUN_SAMPLES if evaluator.fast_dev_run else evaluator.limit
        self._selected = select_samples(selectable, limit, task.unit)
        return available

    def _answers_identity(self) -> Mapping[str, Any] | None:
        """Identify the log of given answers; where recorded answers are only traced, as the run has it."""
        if self.evaluator.keeps_answers:
            store = RunStore(required(self.evaluator.run_dir))
            return store.fingerprints().get(self.run.task.name, {}).get("answers")
        return None if self.run.given is None else self.run.given.fingerprint()

    def check(self) -> None:
        """Stop this process if another one has failed."""
        self.run.distributed.stop_if_failed()

    def finish(self) -> TaskResults:
        """Wait for all processes, compute, store and log the results, and call the last hooks."""
        run = self.run
        run.resumed = sum(run.distributed.all_gather(run.resumed))
        with run.distributed.sync_errors():
            results = self._finish(self._selected) if run.distributed.is_main_process else None
        if run.distributed.is_distributed:
            shared = run.distributed.all_gather(jsonable(results.to_dict()) if results is not None else None)[0]
            results = results or TaskResults.from_dict(run.task.name, shared)
        results = required(results)  # the main process, alone or not, has computed them
        self.call("on_task_end", results)
        self.call("on_run_end", results)
        return results

    def call(self, hook: str, *arguments: Any) -> None:
        """Call a hook of all callbacks of this rank."""
        for callback in self._callbacks:
            getattr(callback, hook)(self.run, *arguments)

    def remaining(self, pipeline: SamplePipeline) -> list[Sample]:
        """List the samples that this rank has left to do; failed ones are tried and changed ones asked again.

        With ``keeps_answers`` these are the answers without token rows. Questions about one picture follow each other,
        as models read it once for all of them; pictures are in the order of the task.
        """
        if self.run.store is not None:
            changed: list[list[str]] = []
            samples = {sample.id: sample for sample in self.run.samples}
            for record in self.run.store.records(self.run.task.name):
                sample = samples.get(record.sample_id)
                if sample is None or (record.status == FAILED and not self.evaluator.keeps_answers):
                    continue
                traced = self.run.store.has_tokens(record)
                if record.status == FAILED or (self.evaluator.keeps_answers and traced):
                    self.run.record(record)
                elif changes := record.changes(sample):
                    changed.append(changes)
                elif self.evaluator.keeps_answers and record.untraced:
                    continue  # to be tried again
                elif traced or not pipeline.wants_rows(record):
                    self.run.record(replace(record, untraced=""))
            if changed and not self.evaluator.keeps_answers:
                names = ", ".join(dict.fromkeys(name for changes in changed for name in changes))
                warnings.warn(
                    f"changed since they were asked, so asked again: {len(changed)} samples of {self.run.task.name} "
                    f"({names})",
                    stacklevel=2,
                )
        self.run.resumed = self.run.done
        by_picture: dict[tuple[str, str], list[Sample]] = {}
        for sample in self.run.samples:
            if sample.id not in self.run.outcomes:
                by_picture.setdefault((sample.group, sample.image.name), []).append(sample)
        return [sample for samples in by_picture.values() for sample in samples]

    # --- the run directory --------------------------------------------------------------------------------------------

    def _check_ranks(self, samples: Sequence[Sample], fingerprint: Mapping[str, Any]) -> None:
        """Check that all ranks share a run directory and have the same model and samples.

        Raises:
            ConfigError: they do not.
        """
        if self.evaluator.run_dir is None:
            raise ConfigError("run_dir=None should be a directory where several processes can share their records")
        self.run.distributed.check_equal(fingerprint, "fingerprint")
        self.run.distributed.check_equal(digest({"samples": [sample.id for sample in samples]}), "list of samples")

    def _open(self, available: Sequence[Sample], fingerprint: dict[str, Any]) -> None:
        """Open the task in the run directory and start the loggers."""
        features = (
            None
            if self.evaluator.features is None
            else feature_fingerprint(self.evaluator.features, self.evaluator.trace)
        )
        if self._lock is not None:
            self._lock.acquire()
            store = RunStore(required(self.evaluator.run_dir))
            if store.fingerprints().get(self.run.task.name, {}).get("fast_dev_run"):
                store.remove_tasks([self.run.task.name])  # a trial leaves nothing worth keeping
            mark = {"fast_dev_run": True} if self.evaluator.fast_dev_run else {}
            moved = self._movable_keys(store, self.run.task, available, fingerprint)
            planned = len(self._selected)
            store.open_task(
                self.run.task.name, {**fingerprint, **mark}, features, self.evaluator.overwrite, moved, planned
            )
            self.run.store = store
        self.evaluator.loggers.setup(self.evaluator.run_dir)
        settings = {
            "limit": self.evaluator.limit,
            "fast_dev_run": self.evaluator.fast_dev_run,
            "batch_size": self.evaluator.batch_size,
        }
        settings |= {"seed": self.evaluator.seed, "processes": self.run.distributed.world_size}
        self.evaluator.loggers.log_config({self.run.task.name: {**fingerprint, "features": features, **settings}})

    def _movable_keys(
        self, store: RunStore, task: Task, available: Sequence[Sample], fingerprint: Mapping[str, Any]
    ) -> list[str]:
        """List keys of the fingerprint that may differ from the run's, because the same model or data have moved.

        Where data have changed as well, only ``extract`` accepts another location, because it skips changed samples.
        """
        keys = location_keys(task, fingerprint)
        old = store.fingerprints().get(task.name)
        if old is None or self.evaluator.keeps_answers or self.evaluator.overwrite:
            return keys
        changed = {key for key, *_ in differences(old, jsonable(fingerprint))}
        if not changed & {key for key in keys if key.startswith("task.")}:
            return keys
        samples = {sample.id: sample for sample in available}
        for record in store.records(task.name):
            if record.sample_id not in samples or record.changes(samples[record.sample_id]):
                return [key for key in keys if key.startswith("adapter.")]
        return keys

    # --- the end ------------------------------------------------------------------------------------------------------

    def _finish(self, samples: tuple[Sample, ...]) -> TaskResults:
        """Merge the records of all ranks, then compute, store and log the results.

        Raises:
            DataError: all samples of several ranks have failed.
        """
        if self.run.store is not None:
            self.run.store.finish(self.run.task.name, [sample.id for sample in samples])
            others = self.run.store.count(self.run.task.name) - len(samples)
            if others:
                warnings.warn(
                    f"{self.evaluator.run_dir} holds {others} more answers of {self.run.task.name} than are asked for. "
                    "Its figures are without them, but `train`, `report` and `compare` read them: give a smaller run "
                    "its own name",
                    stacklevel=2,
                )
        if self.run.distributed.is_distributed:
            self._gather(samples)
        results = self._results()
        if self.run.store is not None:
            if not self.evaluator.keeps_answers:
                self.run.store.write_metrics(self.run.task.name, results.to_dict())
            finished = self.run.task.name in self.run.store.metrics()
            self.run.store.set_status(self.run.task.name, "finished" if finished else "interrupted")
        self.evaluator.loggers.log_metrics(results.flat())
        self.evaluator.loggers.log_table(f"{self.run.task.name}/metrics", *results.rows())
        return results

    def _gather(self, samples: tuple[Sample, ...]) -> None:
        """Read the records of the other ranks."""
        self.run.samples, self.run.merged, ids = samples, True, {sample.id for sample in samples}
        self.run.reset()
        store = required(self.run.store)  # several ranks always have a run directory
        for record in store.records(self.run.task.name):
            if record.sample_id in ids:
                self.run.record(record)
        if self.run.is_broken and not self.evaluator.keeps_answers:
            first = next(iter(store.records(self.run.task.name)))
            raise DataError(f"all {self.run.total} samples failed; sample {first.sample_id}: {first.error}")

    def _results(self) -> TaskResults:
        """Compute the metrics of all samples that did not fail, and count the other ones."""
        outcomes = [self.run.outcomes[sample.id] for sample in self.run.samples]
        pairs = zip(self.run.samples, outcomes, strict=True)
        rows = self.run.task.tally([(sample, outcome.counts) for sample, outcome in pairs if outcome.status != FAILED])
        names = dict.fromkeys(name for row in rows for name in row.counts)
        counts = {status: sum(outcome.status == status for outcome in outcomes) for status in (OK, UNPARSED, FAILED)}
        metrics = count_metrics(
            self.run.task.metrics(),
            {name: [row.counts.get(name, 0.0) for row in rows] for name in names},
            [row.group for row in rows],
            [row.subset for row in rows],
            macro=self.run.task.macro,
            seed=self.evaluator.seed,
            expected=[sample.subset for sample in self.run.samples] if self.run.task.macro else (),
        )
        subset_counts: dict[str, dict[str, int]] = {}
        for sample, outcome in zip(self.run.samples, outcomes, strict=True):
            subset_counts.setdefault(sample.subset, dict.fromkeys(COUNTS[:4], 0))
            for name in ("samples", outcome.status):
                subset_counts[sample.subset][name] += 1
        stages = list(dict.fromkeys(stage for outcome in outcomes for stage in outcome.seconds))
        return TaskResults(
            task=self.run.task.name,
            primary=self.run.task.primary,
            metrics=tuple(metrics),
            counts={"samples": len(outcomes), **counts, "truncated": sum(outcome.truncated for outcome in outcomes)},
            subset_counts=subset_counts,
            notes=(*self.run.task.notes(self.run.samples), *([] if self.editor is None else self.editor.notes)),
            answers={
                **({} if self.run.given is None else self.run.given.to_dict()),
                **summarise(outcome.given for outcome in outcomes),
            },
            seconds={stage: sum(outcome.seconds.get(stage, 0.0) for outcome in outcomes) for stage in stages},
        )

    def _fail(self, error: BaseException) -> None:
        """Mark the run as failed and notify callbacks and loggers; errors here never hide the original one."""
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        store = self.run.store

        def mark() -> None:
            if store is not None and not isinstance(error, PeerFailed) and self.run.distributed.report_failure():
                store.set_status(self.run.task.name, status)

        steps: list[Callable[[], None]] = [mark]
        steps += [partial(callback.on_exception, self.run, error) for callback in self._callbacks]
        for step in steps:
            try:
                step()
            except Exception as second:
                warnings.warn(f"while ending the run: {describe_failure(second)}", stacklevel=2)
        self.run.loggers.finalize(status)
