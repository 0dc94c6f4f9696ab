"""Ask a model the questions of a task, score the answers, compute features and store everything."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from stethoscope.core.errors import ConfigError, check_list, unknown, wrong_type
from stethoscope.core.files import as_path
from stethoscope.core.types import Generation
from stethoscope.evaluation.callbacks import Callback
from stethoscope.evaluation.distributed import MEETING_MINUTES
from stethoscope.evaluation.pipeline import Features, SamplePipeline
from stethoscope.evaluation.results import TaskResults
from stethoscope.evaluation.session import RunSession
from stethoscope.loggers.base import Logger
from stethoscope.loggers.combined import Loggers
from stethoscope.storage.logged_answers import AnswerLog
from stethoscope.storage.run_dir import Overwrite

if TYPE_CHECKING:
    from stethoscope.adapters.base import Adapter
    from stethoscope.tasks.base import Task


class Evaluator:
    """Evaluate models on tasks.

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
        answers: AnswerLog | str | os.PathLike | None = None,
        answer_ids: bool = True,
    ) -> None:
        """Check the settings.

        Args:
            callbacks: hooks into the run.
            loggers: receive the metrics; ``events.jsonl`` is added where there is a run directory. The evaluator
                finalizes them only when a run fails, so that several runs may share them.
            limit: largest number of samples of a task, drawn evenly over its subsets, labels and images; None for all.
            fast_dev_run: do two samples, resume nothing, and stop at the first error.
            batch_size: number of prompts that generate together.
            generation: settings of generation.
            features: features of answer tokens to compute; None for no tracing.
            trace: trace only answers with labelled ``mentions``, or ``all``.
            run_dir: folder for records, token rows and metrics; None to store nothing.
            on_error: ``record`` a failing sample as failed and go on, or ``raise``.
            overwrite: delete what another run of this task has stored in the run directory; ``features`` for its
                token rows only.
            seed: seed of the bootstrap.
            meeting_minutes: minutes that the processes of one run wait for each other at its start.
            answers: a log of answers that were written elsewhere, or its path: the model reads them (teacher forcing)
                and generates none. Samples without an answer in it are left out, and counted.
            answer_ids: take the log's token ids, where it has them; False tokenises every text again.

        Raises:
            ConfigError: a value is out of range or of a wrong type, or ``answers`` go with ``overwrite="features"``.
        """
        for name, value, allowed in (
            ("on_error", on_error, ("record", "raise")),
            ("trace", trace, ("mentions", "all")),
        ):
            if value not in allowed:
                raise ConfigError(unknown(name, str(value), allowed))
        for name, number, least in (("limit", limit, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            if number is None and name == "limit":
                continue
            if type(number) is not int:
                raise ConfigError(f"{name}={number!r} should be a whole number")
            if number < least:
                raise ConfigError(f"{name}={number} should be at least {least}")
        if (
            isinstance(meeting_minutes, bool)
            or not isinstance(meeting_minutes, (int, float))
            or not meeting_minutes > 0
        ):
            raise ConfigError(f"meeting_minutes={meeting_minutes!r} should be a number above 0")
        check_list("callbacks", "a list of callbacks", callbacks)
        if not isinstance(loggers, Loggers):
            check_list("loggers", "a list of loggers", loggers)
        if not isinstance(generation, Generation):
            raise wrong_type("generation", "a Generation(max_new_tokens=...)", generation)
        if answers is not None and not isinstance(answers, (AnswerLog, str, os.PathLike)):
            raise wrong_type("answers", "an AnswerLog, or the path of a log", answers)
        self.callbacks = tuple(callbacks)
        self.loggers = loggers if isinstance(loggers, Loggers) else Loggers(loggers)
        self.limit, self.fast_dev_run, self.batch_size = limit, fast_dev_run, batch_size
        self.generation, self.features, self.trace = generation, features, trace
        self.run_dir = None if run_dir is None else as_path(run_dir, "run_dir")
        self.on_error = "raise" if fast_dev_run else on_error
        self.overwrite, self.seed, self.meeting_minutes = overwrite, seed, meeting_minutes
        self.answers, self.answer_ids = answers, answer_ids
        if answers is not None and overwrite == "features":
            raise ConfigError("overwrite='features' traces the answers that a run has; it takes no others (answers)")
        if answers is not None and generation.mitigation is not None:
            raise ConfigError(
                f"mitigation={generation.mitigation.name} changes how answers are written, but a log gives them; "
                "set mitigation=none"
            )

    def run(self, adapter: Adapter, task: Task) -> TaskResults:
        """Evaluate one model on one task; samples that the run directory has already are not done again.

        Under ``torchrun`` or ``accelerate launch`` all processes call this together and get the same results: each
        answers the samples that fall to it, the main process does the rest.

        Raises:
            ConfigError: the run directory belongs to a run with other settings, or is in use.
            DataError: the task has no samples, or all of them failed.
            Exception: whatever a callback raises; with ``on_error="raise"``, whatever stopped the first sample.
        """
        with RunSession.open(self, adapter, task) as session:  # lock, fingerprint, resume, ranks
            pipeline = SamplePipeline(session)
            samples = session.remaining(pipeline)
            session.call("on_task_start")
            with adapter.sharing_prefixes():
                for start in range(0, len(samples), self.batch_size):
                    batch = samples[start : start + self.batch_size]
                    session.check()
                    session.call("on_batch_start", batch)
                    records = pipeline(batch)  # encode, generate, score, trace, features
                    session.call("on_batch_end", records)
            return session.finish()  # merge ranks, metrics with intervals, log

    @property
    def keeps_answers(self) -> bool:
        """Whether answers are only traced, as ``extract`` does it, and stay as they are."""
        return self.overwrite == "features" and self.run_dir is not None
