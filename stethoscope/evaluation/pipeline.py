"""Take batches of samples from prompt to token rows: encode, generate, score, trace, features.

A failed sample is data: its record says why it failed.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from stethoscope.adapters.base import ForeignTokens
from stethoscope.core.errors import CapabilityError, CaptureError, ConfigError, DataError, StethoscopeError
from stethoscope.core.picture_profile import profile_text
from stethoscope.core.system import free_memory, out_of_memory
from stethoscope.core.text import one_line
from stethoscope.core.types import Answer, Mention, Sample, Score, required
from stethoscope.evaluation.given_answers import read_answer
from stethoscope.evaluation.state import describe_failure
from stethoscope.storage.records import FAILED, OK, UNPARSED, Record
from stethoscope.storage.tokens import TokenRows, token_tables
from stethoscope.tasks.object_extraction import TextMention

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from stethoscope.evaluation.session import RunSession
    from stethoscope.mitigation.base import EditedAnswer
    from stethoscope.storage.log_values import LoggedAnswer
    from stethoscope.tracing.trace import Encoded, Trace

CHANGED = "changed since it was asked: "
"""Start of the reason why ``extract`` skips a sample; the names of what has changed follow, separated by commas."""

TRACE_BATCH = 8
"""Answers per traced pass: most of the speed of larger batches, at a fraction of their memory for logits."""

Result = TypeVar("Result")


class Features(Protocol):
    """The part of ``stethoscope.features.FeatureSet`` that the evaluator uses."""

    requires: frozenset[str]

    @property
    def names(self) -> Sequence[str]: ...

    def compute_batch(self, traces: Sequence[Trace]) -> Sequence[Mapping[str, np.ndarray]]: ...


class SampleChanged(DataError):
    """Raised for a recorded answer whose sample has changed since."""


@dataclass(eq=False)
class SampleState:
    """A sample on its way through the pipeline; what is not known yet is None or empty."""

    sample: Sample
    encoded: Encoded | None = None  # with the prompt's KV cache while there is one
    answer: Answer | None = None
    score: Score | None = None
    mentions: tuple[Mention, ...] = ()
    rows: pa.Table | None = None  # token rows of a traced answer
    seconds: dict[str, float] = field(default_factory=dict)  # by stage
    prompt: str = ""
    prompt_sha256: str = ""
    image_sha256: str = ""
    picture: str = ""  # profile of its pixels
    edit: Mapping[str, Any] = field(default_factory=dict)  # of the answer by a mitigation
    error: Exception | None = None  # that made the sample fail
    given: Mapping[str, Any] = field(default_factory=dict)  # how a given answer was read
    recorded: Record | None = None  # of an answer that is only traced; its record survives any error

    @property
    def inputs(self) -> Encoded:
        """The encoded prompt, which every state has that was encoded without an error."""
        assert self.encoded is not None
        return self.encoded

    @property
    def known_answer(self) -> Answer:
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


class SamplePipeline:
    """Take the samples of a run through encode, generate, score, trace and features, batch by batch.

    Args:
        session: the run, and the evaluator's settings. With ``keeps_answers`` recorded answers are traced and nothing
            of their records is changed; a sample of which anything has changed is left alone.
    """

    def __init__(self, session: RunSession) -> None:
        evaluator = session.evaluator
        self._session, self.run, self.generation = session, session.run, session.generation
        self.features, self.trace, self.on_error = evaluator.features, evaluator.trace, evaluator.on_error
        self.keeps_answers = evaluator.keeps_answers
        self._requires = frozenset[str]() if self.features is None else self.features.requires
        self._max_batch: dict[str, int] = {}  # by stage, how many samples fit into memory together
        self._batch: Sequence[SampleState] = ()
        self._editor = session.editor
        method = self.generation.mitigation
        self._writer = method if method is not None and method.writes else None
        self._unwritten = self.generation if self._writer is None else replace(self.generation, mitigation=None)
        self._has_read_ids = False  # of a log, so that they are of this model's tokenizer

    def __call__(self, samples: Sequence[Sample]) -> list[Record]:
        """Return the records of a batch; what is finished is on disk even if an error or Ctrl-C ends it."""
        finished: list[SampleState] = []
        try:
            self._batch = states = [self._encode(sample) for sample in samples]
            unanswered = [state for state in states if state.error is None and state.answer is None]
            self._generate(unanswered)
            self._edit([state for state in unanswered if state.answer is not None and not state.given])
            for start in range(0, len(states), TRACE_BATCH):
                chunk = states[start : start + TRACE_BATCH]
                for state in chunk:
                    self._score(state)
                to_trace = [state for state in chunk if state.error is None and self.wants_rows(state)]
                _release_cache([state for state in chunk if state not in to_trace])
                self._featurize(to_trace, self._in_batches(to_trace, "trace", self._trace_batch))
                for state in chunk:
                    state.encoded = None
                finished += chunk
        finally:
            self._batch = ()
            records = self._store(finished)
        self._stop_if_all_failed(finished)
        return records

    def _encode(self, sample: Sample) -> SampleState:
        """Encode a sample's prompt; add the recorded answer where only its token rows are missing."""
        record = self._recorded(sample)
        state = SampleState(sample, recorded=record if self.keeps_answers else None)
        if not self.run.adapter.has_model:  # a text is scored, and no picture opened for it
            return state
        with self._stage(state, "encode"):
            picture = sample.image.load()
            state.image_sha256 = sample.image.sha256
            state.encoded = self.run.adapter.encode_as(sample.asks, picture, sample.question)
            if self.features is not None:
                state.picture = profile_text(picture)
            state.prompt, state.prompt_sha256 = state.encoded.text, state.encoded.sha256
            changes = [] if record is None else record.changes(sample)
            if record is not None and not changes and record.prompt_sha256 != state.prompt_sha256:
                changes = ["prompt"]
            if record is not None and not changes:
                state.answer, state.score, state.mentions = record.answer, record.score, record.mentions
                state.given, state.edit = record.given, record.edit
            elif state.recorded is not None:
                raise SampleChanged(CHANGED + ", ".join(changes))
        if record is not None and state.answer is not None:
            state.seconds = {**record.seconds}
        return state

    def _recorded(self, sample: Sample) -> Record | None:
        """Return the record of an answer that token rows can be added to, if any."""
        if self.features is None or self.run.store is None:
            return None
        record = self.run.store.find(self.run.task.name, sample.id)
        return None if record is None or record.status == FAILED else record

    def _generate(self, states: Sequence[SampleState]) -> None:
        """Generate answers, or read those that are given."""
        to_generate = []
        for state in states:
            logged = None if self.run.given is None else self.run.given.answers[state.sample.id]
            if logged is None and state.sample.answer is None:
                to_generate.append(state)
                continue
            with self._stage(state, "generate"):
                self._read_given(state, logged)
        states = to_generate
        if self._writer is not None:
            states = [state for state in to_generate if state.sample.asks != "description"]
            described = [state for state in to_generate if state.sample.asks == "description"]
            for state, item in zip(described, self._in_batches(described, "generate", self._write_batch), strict=True):
                if item is not None:
                    with self._stage(state, "generate"):
                        state.answer, state.edit = _finite(item.answer), item.edit
        for state, answer in zip(states, self._in_batches(states, "generate", self._generate_batch), strict=True):
            if answer is not None:
                with self._stage(state, "generate"):
                    state.answer = _finite(answer)

    def _read_given(self, state: SampleState, logged: LoggedAnswer | None) -> None:
        """Let the model read a given answer.

        Raises:
            ConfigError: the first token ids of a log are another tokenizer's; later ones only fail their sample.
        """
        uses_ids = self.run.given is not None and self.run.given.uses_ids
        try:
            state.answer, state.given = read_answer(self.run.adapter, state.encoded, state.sample, logged, uses_ids)
        except ForeignTokens as error:
            if self._has_read_ids:
                raise
            hint = "choose the model that wrote the answers, or add answers.token_ids=false to tokenise their texts"
            raise ConfigError(f"{logged.origin if logged else state.sample.id}: {error}; {hint}") from None
        self._has_read_ids = self._has_read_ids or state.given["tokens"] == "logged"

    def _generate_batch(self, states: Sequence[SampleState]) -> Sequence[Answer]:
        """Generate the answers of one batch, with the prompts' KV caches where they will be traced and fit."""
        prompts = [state.inputs for state in states]
        traced = self.features is not None or self._editor is not None
        if not traced or "trace" in self._max_batch:  # nothing will be traced, or there is no room to spare
            return self.run.adapter.generate(prompts, self._unwritten)
        prompts = self.run.adapter.prefill(prompts, self._requires)
        answers, prompts = self.run.adapter.generate_with_cache(prompts, self._unwritten)
        for state, encoded in zip(states, prompts, strict=True):
            state.encoded = encoded
        return answers

    def _write_batch(self, states: Sequence[SampleState]) -> Sequence[EditedAnswer]:
        """Let the mitigation write the descriptions of one batch."""
        extractors = [partial(self._text_mentions, state.sample) for state in states]
        prompts = [state.inputs for state in states]
        return required(self._writer).write(self.run.adapter, prompts, self.generation, extractors)

    def _text_mentions(self, sample: Sample, text: str) -> list[TextMention]:
        """List the objects that an unfinished answer names, as the task reads it."""
        mentions = self.run.task.mentions(sample, Answer(text, (), (), ()))
        return [TextMention(mention.object, mention.start, mention.end) for mention in mentions]

    def _edit(self, states: Sequence[SampleState]) -> None:
        """Edit generated answers, where the mitigation does so."""
        if self._editor is None:
            return
        for start in range(0, len(states), TRACE_BATCH):
            chunk = states[start : start + TRACE_BATCH]
            for state, edited in zip(chunk, self._in_batches(chunk, "edit", self._edit_batch), strict=True):
                if edited is not None:
                    state.answer, state.edit = edited

    def _edit_batch(self, states: Sequence[SampleState]) -> Sequence[EditedAnswer]:
        prompts, answers = [state.inputs for state in states], [state.known_answer for state in states]
        return required(self._editor)([state.sample for state in states], prompts, answers)

    def _in_batches(
        self, states: Sequence[SampleState], stage: str, call: Callable[[Sequence[SampleState]], Sequence[Result]]
    ) -> list[Result | None]:
        """Call a function for all states, in as few batches as memory and errors allow, and return its results.

        A batch that does not fit into memory is done in halves, and so are all that follow. A batch that fails
        otherwise is tried again in halves, so that only the samples at fault are lost: their result is None.
        """
        before = self._max_batch.get(stage)
        results: list[Result | None] = []
        while len(results) < len(states):
            batch = states[len(results) :][: self._max_batch.get(stage)]
            done, short = self._try_batch(batch, stage, call)
            half = len(batch) // 2
            if done is not None:
                results += done
            elif short:
                self._max_batch[stage] = half
                _release_cache(self._batch)
                free_memory()
            else:
                results += self._in_batches(batch[:half], stage, call)
                results += self._in_batches(batch[half:], stage, call)
        most = self._max_batch.get(stage)
        if most != before:
            warnings.warn(
                f"{stage}: {len(states)} samples together do not fit into memory; from now on {most} at a time",
                stacklevel=2,
            )
        return results

    def _try_batch(
        self, states: Sequence[SampleState], stage: str, call: Callable[[Sequence[SampleState]], Sequence[Result]]
    ) -> tuple[list[Result | None] | None, bool]:
        """Call a function for one batch, and share its time evenly; return results, and whether memory was short.

        There is no list where several samples failed together; for one that failed by itself the result is None.
        """
        start = time.perf_counter()
        results: list[Result | None] | None = None
        short = False
        try:
            results = list(call(states))
            if len(results) != len(states):
                raise ValueError(f"{stage}: {len(results)} results for {len(states)} samples")
        except (ConfigError, CapabilityError):
            raise
        except Exception as error:
            short = out_of_memory(error)
            if self.on_error == "raise" and not (short and len(states) > 1):
                raise
            results = None
            if len(states) == 1:
                if short:  # a copy without frames, which hold on to memory that other samples need
                    error = DataError(f"does not fit into memory, even by itself: {one_line(error)[:200]}")
                states[0].error, results = error, [None]
        share = (time.perf_counter() - start) / len(states)
        for state in states:
            state.seconds[stage] = state.seconds.get(stage, 0.0) + share
        return results, short

    def _score(self, state: SampleState) -> None:
        """Score the answer and label its mentions, where that is not done."""
        if state.error is not None or state.answer is None or state.score is not None:
            return
        with self._stage(state, "score"):
            score, mentions = self.run.task.evaluate_answer(state.sample, state.answer)
            if score.status not in (OK, UNPARSED):
                raise ValueError(f"{self.run.task.name}.score gave status {score.status!r}, not {OK!r} or {UNPARSED!r}")
            state.score, state.mentions = score, mentions

    def _trace_batch(self, states: Sequence[SampleState]) -> Sequence[Trace]:
        from stethoscope.tracing.mention_passes import Resampling, trace_answers  # torch, which scoring texts needs not

        encoded = [state.inputs for state in states]
        answers = [state.known_answer for state in states]
        images, mentions = [state.sample.image for state in states], [state.mentions for state in states]
        resampling = None
        if "samples" in self._requires:
            resampling = Resampling(self.generation, [partial(self._named, state.sample) for state in states])
        return trace_answers(self.run.adapter, encoded, answers, self._requires, images, mentions, resampling)

    def _named(self, sample: Sample, answer: Answer) -> set[str]:
        """Return the objects that an answer to a sample's question names, as the task reads it."""
        return {mention.object for mention in self.run.task.label_mentions(sample, answer)}

    def _featurize(self, states: Sequence[SampleState], traces: Sequence[Trace | None]) -> None:
        """Compute the token rows of traced answers; the trace is None for those that could not be traced."""
        traced = {id(state): trace for state, trace in zip(states, traces, strict=True) if trace is not None}
        states, task = [state for state in states if id(state) in traced], self.run.task
        for state in states:
            self._session.call("on_trace", state.sample, traced[id(state)])

        def compute(batch: Sequence[SampleState]) -> Sequence[Mapping[str, np.ndarray]]:
            assert self.features is not None  # or nothing is traced
            return self.features.compute_batch([traced[id(state)] for state in batch])

        rows: list[tuple[SampleState, TokenRows]] = []
        for state, columns in zip(states, self._in_batches(states, "trace", compute), strict=True):
            if columns is not None:
                trace = traced[id(state)]
                answered = TokenRows.of_trace(state.sample, trace, state.mentions, columns, state.prompt, state.picture)
                rows.append((state, answered))
        if rows:
            tables = token_tables(task.name, [item for _, item in rows], task.version)
            for (state, _), table in zip(rows, tables, strict=True):
                state.rows = table

    def wants_rows(self, item: SampleState | Record) -> bool:
        """Whether the answer of a state or record is to be traced."""
        return (
            self.features is not None
            and item.answer is not None
            and len(item.answer.token_ids) > 0
            and (self.trace == "all" or len(item.mentions) > 0)
        )

    @contextmanager
    def _stage(self, state: SampleState, stage: str) -> Iterator[None]:
        """Time a stage of a sample, and store its error in the state unless errors are to be raised."""
        start = time.perf_counter()
        try:
            yield
        except (ConfigError, CapabilityError):
            raise
        except Exception as error:
            if self.on_error == "raise":
                raise
            state.error = error
        finally:
            state.seconds[stage] = state.seconds.get(stage, 0.0) + time.perf_counter() - start

    def _store(self, states: Sequence[SampleState]) -> list[Record]:
        """Store the records of finished states and count them."""
        records = [state.record(self.run.task.name) for state in states]
        if self.run.store is not None and records:
            self.run.store.append(records, {state.sample.id: state.rows for state in states if state.rows is not None})
        for record in records:
            self.run.record(record)
        return records

    def _stop_if_all_failed(self, states: Sequence[SampleState]) -> None:
        """Raise the error of a run in which every sample has failed."""
        if not self.run.is_broken:
            return
        sample, error = next((state.sample, state.error) for state in states if state.error is not None)
        if isinstance(error, SampleChanged):  # nothing is wrong with the model, and all are to be counted
            return
        if isinstance(error, StethoscopeError):
            raise type(error)(f"all of the first {self.run.done} samples failed; sample {sample.id}: {error}")
        raise error


def _release_cache(states: Sequence[SampleState]) -> None:
    """Drop the prompts' KV caches to free memory; later traces compute the full prompt."""
    for state in states:
        if state.encoded is not None and (state.encoded.cache is not None or state.encoded.recorded is not None):
            state.encoded = replace(state.encoded, cache=None, recorded=None)


def _finite(answer: Answer) -> Answer:
    """Return the answer if all its log-probabilities are finite.

    Raises:
        CaptureError: a log-probability is not finite, as when weights or activations overflow.
    """
    if all(map(math.isfinite, answer.logprobs)):
        return answer
    token = next(index for index, value in enumerate(answer.logprobs) if not math.isfinite(value))
    raise CaptureError(
        f"the model gave token {token} of its answer the log-probability {answer.logprobs[token]}; its weights are "
        "broken or overflow in this precision (model.dtype=float32 or bfloat16 may help)"
    )
