"""The loop: ask a model the questions of a task, judge the answers, compute features, keep everything."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.adapters.base import Adapter
from stethoscope.core.digests import jsonable
from stethoscope.core.errors import ConfigError, DataError, unknown
from stethoscope.core.system import disk_faults
from stethoscope.core.types import Generation, Sample
from stethoscope.evaluation.callbacks import Callback
from stethoscope.evaluation.distributed import MEETING_MINUTES, Ended, joined
from stethoscope.evaluation.pipeline import Features, Worker, message
from stethoscope.evaluation.results import COUNTS, TaskResults
from stethoscope.evaluation.state import Run
from stethoscope.loggers.base import Logger, Loggers
from stethoscope.storage.lock import RunLock
from stethoscope.storage.records import FAILED, OK, UNPARSED, load_samples, recorded_samples, select_samples
from stethoscope.storage.run_dir import Overwrite, RunStore
from stethoscope.storage.run_fingerprint import (
    answer_fingerprint,
    differences,
    digest,
    feature_fingerprint,
    location_keys,
)
from stethoscope.tasks.base import Task

if TYPE_CHECKING:
    import os

FAST_DEV_RUN_SAMPLES = 2


class Evaluator:
    """Runs tasks on models, in Lightning's manner.

    >>> from stethoscope import load, Evaluator  # doctest: +SKIP
    >>> results = Evaluator(limit=100, run_dir="runs/first").run(load("testbed"), task)  # doctest: +SKIP
    >>> print(results)  # doctest: +SKIP
    """

    def __init__(
        self,
        callbacks: Iterable[Callback] = (),
        loggers: Iterable[Logger] | Loggers = (),
        limit: int | None = None,
        fast_dev_run: bool = False,
        batch_size: int = 16,
        generation: Generation = Generation(),  # noqa: B008 (frozen)
        features: Features | None = None,
        trace: str = "mentions",
        run_dir: str | os.PathLike | None = None,
        on_error: str = "record",
        overwrite: Overwrite = False,
        seed: int = 0,
        meeting_minutes: float = MEETING_MINUTES,
    ) -> None:
        """Stores and checks the settings.

        Args:
            callbacks: hooks into the run.
            loggers: where figures go; ``events.jsonl`` is added where there is a run directory. The evaluator finalizes
                them only when a run fails, so that several runs may share them.
            limit: at most so many samples of a task, taken in turn from its subsets; None for all.
            fast_dev_run: two samples, nothing resumed, the first error stops: does it run at all?
            batch_size: prompts that generate together.
            generation: how answers are written.
            features: what to compute for answer tokens; None for no tracing.
            trace: trace only answers with labelled ``mentions``, or ``all``.
            run_dir: where to keep records, token rows and metrics; None to keep nothing.
            on_error: ``record`` a failing sample as failed and go on, or ``raise``.
            overwrite: throw away what another run of this task has left in the run directory; ``features`` for its
                token rows only.
            seed: of the bootstrap.
            meeting_minutes: how long the processes of one run wait for each other at its start.

        Raises:
            ConfigError: a value is out of range.
        """
        for name, value, allowed in (
            ("on_error", on_error, ("record", "raise")),
            ("trace", trace, ("mentions", "all")),
        ):
            if value not in allowed:
                raise ConfigError(unknown(name, str(value), allowed))
        for name, value in (("limit", limit), ("batch_size", batch_size)):
            if value is not None and not isinstance(value, int):
                raise ConfigError(f"{name}={value!r} should be a whole number")
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} should be at least 1")
        if (
            isinstance(meeting_minutes, bool)
            or not isinstance(meeting_minutes, (int, float))
            or not meeting_minutes > 0
        ):
            raise ConfigError(f"meeting_minutes={meeting_minutes!r} should be a number above 0")
        self.callbacks = tuple(callbacks)
        self.loggers = loggers if isinstance(loggers, Loggers) else Loggers(loggers)
        self.limit, self.fast_dev_run, self.batch_size = limit, fast_dev_run, batch_size
        self.generation, self.features, self.trace = generation, features, trace
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.on_error = "raise" if fast_dev_run else on_error
        self.overwrite, self.seed, self.meeting_minutes = overwrite, seed, meeting_minutes

    def run(self, adapter: Adapter, task: Task) -> TaskResults:
        """Evaluates one model on one task; what the run directory has already is not done again.

        Under ``torchrun`` or ``accelerate launch`` all processes call this together and get the same results: each
        answers the samples that fall to it, the first one does the rest.

        Raises:
            ConfigError: the run directory belongs to a run with other settings, or is in use.
            DataError: the task has no samples, or all of them failed.
            Exception: whatever a callback raises; with ``on_error="raise"``, whatever stopped the first sample.
        """
        for given, kind, example in ((adapter, Adapter, "stethoscope.load('testbed')"), (task, Task, "Pope()")):
            if not isinstance(given, kind):
                what = kind.__name__
                raise ConfigError(f"{what.lower()}={given!r} should be an object of class {what}, such as {example}")
        run = Run(adapter, task, self.loggers if joined().first else Loggers())
        lock = None if self.run_dir is None else RunLock(self.run_dir, run.processes.rank)
        try:
            with disk_faults(self.run_dir):
                return self._run(run, lock)
        except BaseException as error:
            self._fail(run, error)
            raise
        finally:
            if lock is not None:
                lock.release()

    def _run(self, run: Run, lock: RunLock | None) -> TaskResults:
        run.processes.meet(self.meeting_minutes)
        with run.processes.step():
            self._call("on_run_start", run)
            run.task.setup()
            run.adapter.setup()
            limit = FAST_DEV_RUN_SAMPLES if self.fast_dev_run else self.limit
            available = load_samples(run.task)
            samples = select_samples(available, limit)
            if self._keep_answers:
                samples = recorded_samples(RunStore(self.run_dir), run.task, available, samples)
            fingerprint = answer_fingerprint(run.adapter, run.task, self._generation(run.task))
        if run.processes.several:
            self._agree(run, samples, fingerprint)
        with run.processes.step():
            if run.processes.first:
                self._open(run, available, fingerprint, lock)
        with run.processes.step():
            if not run.processes.first:
                lock.acquire()
        run.samples = tuple(sample for sample in samples if run.processes.takes(sample.id))
        self._ask(run)
        with run.processes.step():
            results = self._finish(run, samples) if run.processes.first else None
        if run.processes.several:
            told = run.processes.share(jsonable(results.to_dict()) if results is not None else None)[0]
            results = results or TaskResults.from_dict(run.task.name, told)
        self._call("on_task_end", run, results)
        self._call("on_run_end", run, results)
        return results

    def _ask(self, run: Run) -> None:
        """Does what is left of this process's samples, and waits for the other processes."""
        if run.processes.several:
            run.store = run.store or RunStore(self.run_dir)
            run.store.use_shard(run.processes.rank)
            run.processes.stop = run.store.record_files.stop_file
        on_trace = partial(self._call, "on_trace", run)
        worker = Worker(
            run, self._generation(run.task), self.features, self.trace, self.on_error, on_trace, self._keep_answers
        )
        todo = self._resume(run, worker)
        self._call("on_task_start", run)
        for start in range(0, len(todo), self.batch_size):
            run.processes.check()
            batch = todo[start : start + self.batch_size]
            self._call("on_batch_start", run, batch)
            self._call("on_batch_end", run, worker.do(batch))
        run.resumed = sum(run.processes.share(run.resumed))

    @property
    def _keep_answers(self) -> bool:
        """Whether answers are only traced, as ``extract`` does it, and stay as they are."""
        return self.overwrite == "features" and self.run_dir is not None

    def _generation(self, task: Task) -> Generation:
        """How answers are written, with the task's own length where none was asked for."""
        length = self.generation.max_new_tokens
        return replace(self.generation, max_new_tokens=task.max_new_tokens if length is None else length)

    # --- around the loop --------------------------------------------------------------------------------------------

    def _agree(self, run: Run, samples: Sequence[Sample], fingerprint: Mapping[str, Any]) -> None:
        """Checks that several processes can do the run, and that all have the same before them.

        Raises:
            ConfigError: they have no run directory to share, another model, or other samples.
        """
        if self.run_dir is None:
            raise ConfigError("run_dir=None should be a directory where several processes can share their records")
        run.processes.same(fingerprint, "fingerprint")
        run.processes.same(digest({"samples": [sample.id for sample in samples]}), "list of samples")

    def _open(self, run: Run, available: Sequence[Sample], fingerprint: dict[str, Any], lock: RunLock | None) -> None:
        """Accepts the run directory and starts the loggers."""
        features = None if self.features is None else feature_fingerprint(self.features, self.trace)
        if lock is not None:
            lock.acquire()
            store = RunStore(self.run_dir)
            if store.fingerprints().get(run.task.name, {}).get("fast_dev_run"):
                store.remove_tasks([run.task.name])  # a trial leaves nothing worth keeping
            mark = {"fast_dev_run": True} if self.fast_dev_run else {}
            moved = self._moved(store, run.task, available, fingerprint)
            store.open_task(run.task.name, {**fingerprint, **mark}, features, self.overwrite, moved)
            run.store = store
        self.loggers.setup(self.run_dir)
        settings = {"limit": self.limit, "fast_dev_run": self.fast_dev_run, "batch_size": self.batch_size}
        settings |= {"seed": self.seed, "processes": run.processes.count}
        self.loggers.log_config({run.task.name: {**fingerprint, "features": features, **settings}})

    def _moved(
        self, store: RunStore, task: Task, available: Sequence[Sample], fingerprint: Mapping[str, Any]
    ) -> list[str]:
        """List keys of the fingerprint that may differ from the run's: model or data lie elsewhere, and are the same.

        Of data that the samples of its records have changed in, only ``extract`` takes another location, since it
        leaves those samples alone.
        """
        keys = location_keys(task, fingerprint)
        old = store.fingerprints().get(task.name)
        if old is None or self._keep_answers or self.overwrite:
            return keys
        changed = {key for key, *_ in differences(old, jsonable(fingerprint))}
        if not changed & {key for key in keys if key.startswith("task.")}:
            return keys
        samples = {sample.id: sample for sample in available}
        for record in store.records(task.name):
            if record.sample_id not in samples or record.changes(samples[record.sample_id]):
                return [key for key in keys if key.startswith("adapter.")]
        return keys

    def _resume(self, run: Run, worker: Worker) -> list[Sample]:
        """The samples that are left to do. Failed ones are tried again, changed ones are asked again.

        Where answers are kept, only those are left that lack their token rows.
        """
        if run.store is not None:
            changed: list[list[str]] = []
            samples = {sample.id: sample for sample in run.samples}
            for record in run.store.records(run.task.name):
                sample = samples.get(record.sample_id)
                if sample is None or (record.status == FAILED and not self._keep_answers):
                    continue
                traced = run.store.has_tokens(record)
                if record.status == FAILED or (self._keep_answers and traced):
                    run.note(record)
                elif changes := record.changes(sample):
                    changed.append(changes)
                elif self._keep_answers and record.untraced:
                    continue  # to be tried again, or to lose its note
                elif traced or not worker.wants_rows(record.answer, record.mentions):
                    run.note(replace(record, untraced=""))
            if changed and not self._keep_answers:
                names = ", ".join(dict.fromkeys(name for changes in changed for name in changes))
                warnings.warn(
                    f"changed since they were asked, so asked again: {len(changed)} samples of {run.task.name} "
                    f"({names})",
                    stacklevel=2,
                )
        run.resumed = run.done
        return [sample for sample in run.samples if sample.id not in run.outcomes]

    def _finish(self, run: Run, samples: tuple[Sample, ...]) -> TaskResults:
        """Puts together what all processes have done, computes the results, stores and logs them.

        Raises:
            DataError: all samples of several processes have failed.
        """
        if run.store is not None:
            run.store.finish(run.task.name, [sample.id for sample in samples])
            others = run.store.count(run.task.name) - len(samples)
            if others:
                warnings.warn(
                    f"{self.run_dir} holds {others} more answers of {run.task.name} than are asked for. Its figures "
                    "are without them, but `train`, `report` and `compare` read them: give a smaller run its own name",
                    stacklevel=2,
                )
        if run.processes.several:
            self._gather(run, samples)
        results = self._results(run)
        if run.store is not None:
            if not self._keep_answers:
                run.store.write_metrics(run.task.name, results.to_dict())
            finished = run.task.name in run.store.metrics()
            run.store.set_status(run.task.name, "finished" if finished else "interrupted")
        self.loggers.log_metrics(results.flat())
        self.loggers.log_table(f"{run.task.name}/metrics", *results.rows())
        return results

    def _gather(self, run: Run, samples: tuple[Sample, ...]) -> None:
        """Reads what the other processes have done."""
        run.samples, ids = samples, {sample.id for sample in samples}
        run.forget()
        for record in run.store.records(run.task.name):
            if record.sample_id in ids:
                run.note(record)
        if (
            run.failed == run.total and not self._keep_answers
        ):  # of few samples no single process can tell that all fail
            first = next(run.store.records(run.task.name))
            raise DataError(f"all {run.total} samples failed; sample {first.sample_id}: {first.error}")

    def _results(self, run: Run) -> TaskResults:
        """Metrics of all samples that did not fail, with the three counts of those that did not go well."""
        from stethoscope.metrics.bootstrap import count_metrics

        outcomes = [run.outcomes[sample.id] for sample in run.samples]
        pairs = zip(run.samples, outcomes, strict=True)
        rows = run.task.tally([(sample, outcome.counts) for sample, outcome in pairs if outcome.status != FAILED])
        names = dict.fromkeys(name for row in rows for name in row.counts)
        counts = {status: sum(outcome.status == status for outcome in outcomes) for status in (OK, UNPARSED, FAILED)}
        metrics = count_metrics(
            run.task.metrics(),
            {name: [row.counts.get(name, 0.0) for row in rows] for name in names},
            [row.group for row in rows],
            [row.subset for row in rows],
            macro=run.task.macro,
            seed=self.seed,
            expected=[sample.subset for sample in run.samples] if run.task.macro else (),
        )
        subset_counts: dict[str, dict[str, int]] = {}
        for sample, outcome in zip(run.samples, outcomes, strict=True):
            subset_counts.setdefault(sample.subset, dict.fromkeys(COUNTS[:4], 0))
            for name in ("samples", outcome.status):
                subset_counts[sample.subset][name] += 1
        stages = list(dict.fromkeys(stage for outcome in outcomes for stage in outcome.seconds))
        return TaskResults(
            task=run.task.name,
            primary=run.task.primary,
            metrics=tuple(metrics),
            counts={"samples": len(outcomes), **counts, "truncated": sum(outcome.truncated for outcome in outcomes)},
            subset_counts=subset_counts,
            seconds={stage: sum(outcome.seconds.get(stage, 0.0) for outcome in outcomes) for stage in stages},
        )

    def _fail(self, run: Run, error: BaseException) -> None:
        """The one way out for every error: mark the run, tell callbacks and loggers. Nothing here hides the error."""
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        store = run.store

        def mark() -> None:
            if store is not None and not isinstance(error, Ended) and run.processes.fail():
                store.set_status(run.task.name, status)

        steps = [mark]
        steps += [lambda hook=callback.on_exception: hook(run, error) for callback in self._called(run)]
        for step in steps:
            try:
                step()
            except Exception as second:
                warnings.warn(f"while ending the run: {message(second)}", stacklevel=2)
        run.loggers.finalize(status)

    def _called(self, run: Run) -> Iterator[Callback]:
        """The callbacks of this process."""
        return (callback for callback in self.callbacks if run.processes.first or not callback.first_only)

    def _call(self, hook: str, run: Run, *arguments: Any) -> None:
        for callback in self._called(run):
            getattr(callback, hook)(run, *arguments)
