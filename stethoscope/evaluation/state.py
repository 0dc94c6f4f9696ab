"""Hold the state of an evaluation in progress: of the run, and of a sample on its way through the pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from stethoscope.adapters.base import Adapter
from stethoscope.core.errors import StethoscopeError
from stethoscope.core.text import redact_text
from stethoscope.core.types import Answer, Mention, Sample, Score
from stethoscope.evaluation.distributed import DistributedState, current_state
from stethoscope.evaluation.given_answers import count_given
from stethoscope.evaluation.joined_answers import JoinedAnswers
from stethoscope.loggers.base import Loggers
from stethoscope.storage.records import FAILED, Record
from stethoscope.storage.run_dir import RunStore
from stethoscope.tasks.base import Task

if TYPE_CHECKING:
    import pyarrow as pa

    from stethoscope.tracing.trace import Encoded


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
    given: JoinedAnswers | None = None

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
        """Log metrics under the name of the task."""
        self.loggers.log_metrics({f"{self.task.name}/{name}": value for name, value in metrics.items()}, step)


@dataclass(eq=False)
class SampleState:
    """A sample on its way through the pipeline."""

    sample: Sample
    encoded: Encoded | None = None
    answer: Answer | None = None
    score: Score | None = None
    mentions: tuple[Mention, ...] = ()
    rows: pa.Table | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    prompt: str = ""
    prompt_sha256: str = ""
    image_sha256: str = ""
    picture: str = ""  # profile of its pixels
    edit: Mapping[str, Any] = field(default_factory=dict)  # of the answer by a mitigation
    error: Exception | None = None
    given: Mapping[str, Any] = field(default_factory=dict)  # how a given answer was read
    recorded: Record | None = None  # of an answer that is only traced; its record survives any error

    @property
    def inputs(self) -> Encoded:
        """The encoded prompt, which every state has that was encoded without an error."""
        assert self.encoded is not None
        return self.encoded

    @property
    def given_answer(self) -> Answer:
        """The answer, which every state has that generated or reused one without an error."""
        assert self.answer is not None
        return self.answer

    def record(self, task: str) -> Record:
        """Build the finished record."""
        sample, error = self.sample, self.error
        if self.recorded is not None:
            if error is None:
                return replace(self.recorded, seconds=self.seconds, untraced="")
            return replace(self.recorded, untraced=describe_failure(error))
        status = FAILED if error is not None or self.score is None else self.score.status
        return Record(
            task=task,
            sample_id=sample.id,
            group=sample.group,
            subset=sample.subset,
            image=sample.image.name,
            question=sample.question,
            reference=sample.reference,
            prompt=self.prompt,
            status=status,
            error="" if error is None else describe_failure(error),
            answer=self.answer,
            score=self.score if status != FAILED else None,
            mentions=self.mentions,
            prompt_sha256=self.prompt_sha256,
            image_sha256=self.image_sha256,
            given=self.given,
            edit=self.edit,
            seconds=self.seconds,
            asks=sample.asks,
        )


def describe_failure(error: BaseException) -> str:
    """Describe an error in one line, with its type unless it is one of ours."""
    text = redact_text(" ".join(str(error).split()))
    return text if isinstance(error, StethoscopeError) else f"{type(error).__name__}: {text}".rstrip(": ")
