"""The way of a batch of samples: prompt, answer, score, traced pass, token rows. A sample that fails is data."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, TypeVar

from stethoscope.core.errors import CapabilityError, CaptureError, ConfigError, DataError, StethoscopeError
from stethoscope.core.system import free_memory, out_of_memory
from stethoscope.core.text import redact_text
from stethoscope.core.types import Answer, Generation, Mention, Sample, Score
from stethoscope.evaluation.state import Run
from stethoscope.storage.records import FAILED, OK, UNPARSED, Record

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from stethoscope.tracing.trace import Encoded, Trace

CHANGED = "changed since it was asked: "
"""How the reason begins why ``extract`` leaves a sample alone; what has changed follows, separated by commas."""

HOPELESS = 16
"""A run in which this many samples have failed and none has succeeded is stopped: the fault is not the sample's."""

TRACED_TOGETHER = 8
"""Answers that share a traced pass: most of the speed of larger batches, at a fraction of their memory for logits."""

Result = TypeVar("Result")


class Features(Protocol):
    """What the evaluator asks of ``stethoscope.features.FeatureSet``."""

    requires: frozenset[str]

    @property
    def names(self) -> Sequence[str]: ...

    def compute(self, trace: Trace) -> Mapping[str, np.ndarray]: ...


class SampleChanged(DataError):
    """A recorded answer is of a sample that was another one when it was asked."""


@dataclass
class Draft:
    """A record in the making."""

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
    error: Exception | None = None
    kept: Record | None = None  # of an answer that is only traced: it stays, whatever happens

    def record(self, task: str) -> Record:
        """The finished record."""
        sample, error = self.sample, self.error
        if self.kept is not None:
            if error is None:
                return replace(self.kept, seconds=self.seconds, untraced="")
            return replace(self.kept, untraced=message(error))
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
            error="" if error is None else message(error),
            answer=self.answer,
            score=self.score if status != FAILED else None,
            mentions=self.mentions,
            prompt_sha256=self.prompt_sha256,
            image_sha256=self.image_sha256,
            seconds=self.seconds,
        )


class Worker:
    """Takes the samples of one run through all stages, batch by batch."""

    def __init__(
        self,
        run: Run,
        generation: Generation,
        features: Features | None,
        trace: str,
        on_error: str,
        on_trace: Callable[[Sample, Trace], None],
        keep_answers: bool = False,
    ) -> None:
        """Stores the evaluator's settings.

        Args:
            on_trace: called with every traced sample.
            keep_answers: trace recorded answers and change nothing of their records; a sample of which anything has
                changed is left alone.
        """
        self.keep_answers = keep_answers
        self.run, self.generation, self.features = run, generation, features
        self.trace, self.on_error, self.on_trace = trace, on_error, on_trace
        self._most: dict[str, int] = {}  # by stage, how many samples fit into memory together
        self._batch: Sequence[Draft] = ()

    def do(self, samples: Sequence[Sample]) -> list[Record]:
        """Answers, judges and traces some samples; what is finished is on disk even if an error or Ctrl-C ends it."""
        finished: list[Draft] = []
        try:
            self._batch = drafts = [self._encode(sample) for sample in samples]
            self._generate([draft for draft in drafts if draft.error is None and draft.answer is None])
            for start in range(0, len(drafts), TRACED_TOGETHER):
                some = drafts[start : start + TRACED_TOGETHER]
                for draft in some:
                    if draft.score is None:
                        self._judge(draft)
                _forget([d for d in some if not self._traces(d)])
                self._trace([d for d in some if self._traces(d)])
                for draft in some:
                    draft.encoded = None
                finished += some
        finally:
            self._batch = ()
            records = self._keep(finished)
        self._check_hope(finished)
        return records

    def _encode(self, sample: Sample) -> Draft:
        """A draft with its prompt, and with the answer if the run directory has it and only token rows are missing."""
        draft, record = Draft(sample), self._recorded(sample)
        if record is not None and self.keep_answers:
            draft.kept = record
        with self._stage(draft, "encode"):
            picture = sample.image.load()
            draft.image_sha256 = sample.image.sha256
            draft.encoded = self.run.adapter.encode(picture, sample.question)
            draft.prompt, draft.prompt_sha256 = draft.encoded.text, draft.encoded.sha256
            changes = [] if record is None else record.changes(sample)
            if record is not None and not changes and record.prompt_sha256 != draft.prompt_sha256:
                changes = ["prompt"]
            if record is not None and not changes:
                draft.answer, draft.score, draft.mentions = record.answer, record.score, record.mentions
            elif draft.kept is not None:
                raise SampleChanged(CHANGED + ", ".join(changes))
        if draft.answer is not None:
            draft.seconds = {**record.seconds}
        return draft

    def _recorded(self, sample: Sample) -> Record | None:
        """The record of an answer that token rows can be added to."""
        if self.features is None or self.run.store is None:
            return None
        record = self.run.store.find(self.run.task.name, sample.id)
        return None if record is None or record.status == FAILED else record

    def _generate(self, drafts: Sequence[Draft]) -> None:
        """Writes answers, or reads those that samples bring along."""
        for draft in drafts:
            if draft.sample.answer is not None:
                with self._stage(draft, "generate"):
                    draft.answer = self.run.adapter.answer(draft.encoded, draft.sample.answer)
        drafts = [draft for draft in drafts if draft.sample.answer is None]

        def generate(some: Sequence[Draft]) -> Sequence[Answer]:
            prompts = [draft.encoded for draft in some]
            if self.features is None or "trace" in self._most:  # nothing will be traced, or there is no room to spare
                return self.run.adapter.generate(prompts, self.generation)
            answers, kept = self.run.adapter.generate_with_cache(prompts, self.generation)
            for draft, encoded in zip(some, kept, strict=True):
                draft.encoded = encoded
            return answers

        for draft, answer in zip(drafts, self._together(drafts, "generate", generate), strict=True):
            if answer is None:
                continue
            with self._stage(draft, "generate"):
                draft.answer = _finite(answer)

    def _together(
        self, drafts: Sequence[Draft], stage: str, call: Callable[[Sequence[Draft]], Sequence[Result]]
    ) -> list[Result | None]:
        """Results of a call for a whole batch.

        A batch that does not fit into memory is done in halves, and so are all that follow. A batch that fails
        otherwise is tried again in halves, so that only the samples at fault are lost: their result is None.
        """
        before, results = self._most.get(stage), []
        while len(results) < len(drafts):
            some = drafts[len(results) :][: self._most.get(stage)]
            done = self._attempt(some, stage, call)
            if done is None:
                self._most[stage] = len(some) // 2
                _forget(self._batch)
                free_memory()
            elif done:
                results += done
            else:
                half = len(some) // 2
                results += self._together(some[:half], stage, call)
                results += self._together(some[half:], stage, call)
        most = self._most.get(stage)
        if most != before:
            warnings.warn(
                f"{stage}: {len(drafts)} samples together do not fit into memory; from now on {most} at a time",
                stacklevel=2,
            )
        return results

    def _attempt(
        self, drafts: Sequence[Draft], stage: str, call: Callable[[Sequence[Draft]], Sequence[Result]]
    ) -> list[Result | None] | None:
        """Results of one call, its time shared evenly; none where it fails for several, None if that was memory."""
        start = time.perf_counter()
        results: list[Result | None] | None = []
        try:
            results = list(call(drafts))
            if len(results) != len(drafts):
                raise ValueError(f"{stage}: {len(results)} results for {len(drafts)} samples")
        except (ConfigError, CapabilityError):
            raise
        except Exception as error:
            short = out_of_memory(error)
            if self.on_error == "raise" and not (short and len(drafts) > 1):
                raise
            results = None if short else []
            if len(drafts) == 1:
                drafts[0].error, results = _unbound(error) if short else error, [None]
        share = (time.perf_counter() - start) / len(drafts)
        for draft in drafts:
            draft.seconds[stage] = draft.seconds.get(stage, 0.0) + share
        return results

    def _judge(self, draft: Draft) -> None:
        """Score and labelled mentions."""
        if draft.error is not None or draft.answer is None:
            return
        with self._stage(draft, "score"):
            score = self.run.task.score(draft.sample, draft.answer)
            if score.status not in (OK, UNPARSED):
                raise ValueError(f"{self.run.task.name}.score gave status {score.status!r}, not {OK!r} or {UNPARSED!r}")
            draft.mentions = tuple(self.run.task.mentions(draft.sample, draft.answer))
            draft.score = score

    def _trace(self, drafts: Sequence[Draft]) -> None:
        """Token rows with features."""
        from stethoscope.storage.tokens import token_table
        from stethoscope.tracing.mention_passes import trace_answers

        def trace(some: Sequence[Draft]) -> Sequence[Trace]:
            encoded, answers = [draft.encoded for draft in some], [draft.answer for draft in some]
            pictures, mentions = [draft.sample.image for draft in some], [draft.mentions for draft in some]
            return trace_answers(self.run.adapter, encoded, answers, self.features.requires, pictures, mentions)

        for draft, traced in zip(drafts, self._together(drafts, "trace", trace), strict=True):
            if traced is None:
                continue
            self.on_trace(draft.sample, traced)
            with self._stage(draft, "trace"):
                columns = self.features.compute(traced)
                task = self.run.task
                draft.rows = token_table(
                    task.name, draft.sample, draft.answer, draft.mentions, columns, draft.prompt, task.version
                )

    def wants_rows(self, answer: Answer | None, mentions: Sequence[Mention]) -> bool:
        """Whether an answer is to be traced."""
        return (
            self.features is not None
            and answer is not None
            and len(answer.token_ids) > 0
            and (self.trace == "all" or len(mentions) > 0)
        )

    def _traces(self, draft: Draft) -> bool:
        return draft.error is None and self.wants_rows(draft.answer, draft.mentions)

    @contextmanager
    def _stage(self, draft: Draft, stage: str) -> Iterator[None]:
        """Times a stage of a sample; its error becomes the sample's unless errors are to be raised."""
        start = time.perf_counter()
        try:
            yield
        except (ConfigError, CapabilityError):
            raise
        except Exception as error:
            if self.on_error == "raise":
                raise
            draft.error = error
        finally:
            draft.seconds[stage] = draft.seconds.get(stage, 0.0) + time.perf_counter() - start

    def _keep(self, drafts: Sequence[Draft]) -> list[Record]:
        """Stores finished drafts and counts them."""
        records = [draft.record(self.run.task.name) for draft in drafts]
        if self.run.store is not None and records:
            self.run.store.append(records, {draft.sample.id: draft.rows for draft in drafts if draft.rows is not None})
        for record in records:
            self.run.note(record)
        return records

    def _check_hope(self, drafts: Sequence[Draft]) -> None:
        """Stops a run in which nothing works."""
        several = self.run.processes.several  # a small share that fails says little: the evaluator looks at all of them
        if self.run.failed < self.run.done or self.run.done < (HOPELESS if several else min(HOPELESS, self.run.total)):
            return
        draft = next(draft for draft in drafts if draft.error is not None)
        error = draft.error
        if isinstance(error, SampleChanged):  # nothing is wrong with the model, and all are to be counted
            return
        if isinstance(error, StethoscopeError):
            raise type(error)(f"all of the first {self.run.done} samples failed; sample {draft.sample.id}: {error}")
        raise error


def _forget(drafts: Sequence[Draft]) -> None:
    """Lets go of what generation has kept of prompts; a trace is then a pass over the whole prompt."""
    for draft in drafts:
        if draft.encoded is not None and draft.encoded.cache is not None:
            draft.encoded = replace(draft.encoded, cache=None)


def message(error: BaseException) -> str:
    """One line about an error: its own words if it is ours, its type as well if not."""
    text = redact_text(" ".join(str(error).split()))
    return text if isinstance(error, StethoscopeError) else f"{type(error).__name__}: {text}".rstrip(": ")


def _unbound(error: Exception) -> DataError:
    """An error of memory without the frames that led to it: they hold on to the very memory that others need."""
    return DataError(f"does not fit into memory, even by itself: {' '.join(str(error).split())[:200]}")


def _finite(answer: Answer) -> Answer:
    """The answer, if it was written from numbers.

    Raises:
        CaptureError: a log-probability is none, as when weights or activations overflow.
    """
    if all(map(math.isfinite, answer.logprobs)):
        return answer
    at = next(index for index, value in enumerate(answer.logprobs) if not math.isfinite(value))
    raise CaptureError(
        f"the model gave token {at} of its answer the log-probability {answer.logprobs[at]}; its weights are broken or "
        "overflow in this precision (model.dtype=float32 or bfloat16 may help)"
    )
