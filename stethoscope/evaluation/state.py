"""The state of an evaluation that is going on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from stethoscope.adapters.base import Adapter
from stethoscope.core.types import Sample
from stethoscope.evaluation.distributed import DistributedState, current_state
from stethoscope.loggers.base import Loggers
from stethoscope.storage.records import FAILED, Record
from stethoscope.storage.run_dir import RunStore
from stethoscope.tasks.base import Task


class Outcome(NamedTuple):
    """What of a record the results need."""

    status: str
    truncated: bool
    group: str
    subset: str
    counts: Mapping[str, float]
    seconds: Mapping[str, float]

    @classmethod
    def of(cls, record: Record) -> Outcome:
        """The outcome of a record; a failed sample counts nothing."""
        counts = record.score.counts if record.score is not None and record.status != FAILED else {}
        return cls(record.status, record.truncated, record.group, record.subset, counts, record.seconds)


@dataclass
class RunState:
    """An evaluation that is going on, as callbacks see it.

    Attributes:
        adapter, task: who is asked and what.
        loggers: where figures go; nowhere in other processes than the first.
        store: the run directory; None without one, and until it has been accepted.
        processes: who does the run. Where there are several, each sees its own share of the samples, and the first one
            sees all from when they are done.
        samples: the samples of this run in the order of the task; empty before ``on_task_start``.
        outcomes: by sample id, what is done already.
        resumed: how many samples were done before this sitting.
        failed: how many of the samples done have failed, or could not be traced by ``extract``.
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

    @property
    def total(self) -> int:
        """Number of samples of the run."""
        return len(self.samples)

    @property
    def done(self) -> int:
        """Number of samples done, failed ones included."""
        return len(self.outcomes)

    def record(self, record: Record) -> None:
        """Count a sample as done."""
        self.outcomes[record.sample_id] = Outcome.of(record)
        self.failed += record.status == FAILED or bool(record.untraced)

    def reset(self) -> None:
        """Count no sample as done."""
        self.outcomes.clear()
        self.failed = 0

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs figures under the name of the task."""
        self.loggers.log_metrics({f"{self.task.name}/{name}": value for name, value in metrics.items()}, step)
