"""Hold the state of an evaluation in progress, and describe failures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from stethoscope.adapters.base import Adapter
from stethoscope.core.errors import StethoscopeError
from stethoscope.core.redaction import redact_text
from stethoscope.core.text import one_line
from stethoscope.core.types import Sample
from stethoscope.evaluation.distributed import DistributedState, current_state
from stethoscope.evaluation.given_answers import count_given
from stethoscope.evaluation.joined_answers import JoinedAnswers
from stethoscope.loggers.combined import Loggers
from stethoscope.storage.records import FAILED, Record
from stethoscope.storage.run_dir import RunStore
from stethoscope.tasks.base import Task

MAX_FAILURES, MAX_FAILED_GROUPS = 16, 3
"""A run in which this many samples of this many pictures have failed and none has succeeded stops, because no sample
and no picture is to blame."""


class Outcome(NamedTuple):
    """The part of a record that the results are computed from."""

    status: str
    truncated: bool
    group: str
    subset: str
    counts: Mapping[str, float]
    seconds: Mapping[str, float]
    given: Mapping[str, float]

    @classmethod
    def of(cls, record: Record) -> Outcome:
        """Reduce a record to its outcome; a failed sample has no counts."""
        counts = record.score.counts if record.score is not None and record.status != FAILED else {}
        return cls(
            record.status, record.truncated, record.group, record.subset, counts, record.seconds, count_given(record)
        )


@dataclass
class RunState:
    """State of an evaluation, as callbacks see it.

    Attributes:
        adapter: the model.
        task: the task.
        loggers: receive the metrics; none on other ranks than the main process.
        store: the run directory; None without one, and until it has been accepted.
        distributed: rank of this process. Every rank sees the samples that it owns; when all are done, the main
            process sees the samples of all ranks.
        samples: the samples of this run in the order of the task; empty before ``on_task_start``.
        outcomes: outcomes of finished samples, by sample id.
        resumed: number of samples that were done before this session.
        failed: number of finished samples that have failed, or could not be traced by ``extract``.
        merged: whether the samples are those of all ranks.
        given: answers of a log, which the model reads instead of writing its own; None without a log.
    """

    adapter: Adapter
    task: Task
    loggers: Loggers
    store: RunStore | None = None
    distributed: DistributedState = field(default_factory=current_state)
    samples: tuple[Sample, ...] = ()
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    resumed: int = 0
    failed: int = 0
    merged: bool = False
    given: JoinedAnswers | None = None

    @property
    def total(self) -> int:
        """Number of samples of the run."""
        return len(self.samples)

    @property
    def done(self) -> int:
        """Number of samples done, failed ones included."""
        return len(self.outcomes)

    @property
    def is_broken(self) -> bool:
        """Whether all samples have failed, so many and of so many pictures that the model or the setup is to blame."""
        if self.failed < self.done:
            return False
        # the few samples of one of several ranks prove little when they fail
        enough = MAX_FAILURES if self.distributed.is_distributed and not self.merged else min(MAX_FAILURES, self.total)
        groups = {sample.group for sample in self.samples}
        failed = {outcome.group for outcome in self.outcomes.values()}
        return self.done >= enough and len(failed) >= min(MAX_FAILED_GROUPS, len(groups))

    def record(self, record: Record) -> None:
        """Count a sample as done."""
        self.outcomes[record.sample_id] = Outcome.of(record)
        self.failed += record.status == FAILED or bool(record.untraced)

    def reset(self) -> None:
        """Count no sample as done."""
        self.outcomes.clear()
        self.failed = 0

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics under the name of the task."""
        self.loggers.log_metrics({f"{self.task.name}/{name}": value for name, value in metrics.items()}, step)


def describe_failure(error: BaseException) -> str:
    """Describe an error in one line, with its type unless it is one of ours."""
    text = redact_text(one_line(error))
    return text if isinstance(error, StethoscopeError) else f"{type(error).__name__}: {text}".rstrip(": ")
