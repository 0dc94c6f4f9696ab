"""Run a ``generate`` call one token at a time, in the caller's thread, and go back where a listener orders it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria, StoppingCriteria

from stethoscope.tracing.hooks import each_row
from stethoscope.tracing.step_inputs import RewindableProcessor, StepInputs

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

    from stethoscope.streaming.recorded_steps import RecordedSteps
    from stethoscope.streaming.step_recorder import StepRecorder


class Rewind(NamedTuple):
    """An order to take tokens back.

    Attributes:
        kept: number of tokens of the answer that stay.
        forbidden: tokens that may not follow them.
    """

    kept: int
    forbidden: Collection[int]


class TokenListener(Protocol):
    """Receives every token; one that returns a ``Rewind`` has taken back the tokens and its recorded steps itself."""

    steps: RecordedSteps

    def add_token(self, token: int) -> Rewind | None:
        """Add the next token, or the end."""

    def end(self) -> Rewind | None:
        """Finish the answer."""


def decode(
    model: PreTrainedModel,
    arguments: dict[str, Any],
    recorder: StepRecorder,
    listeners: Sequence[TokenListener],
    rewinds: bool = False,
) -> Iterator[None]:
    """Decode a batch of prompts, without beams, from token to token.

    ``generate`` prepares everything and is then given a decoding loop that pauses after every pass. A thread could do
    the same, but passing a token between threads takes longer than scoring it. The model is free between passes;
    closing the iterator ends the answers.

    After a ``Rewind`` everything is as in an answer that has reached the kept tokens for the first time (cache, inputs,
    noise of sampling), but for the forbidden tokens. The step that predicts the token after them is not run again: its
    logits have been recorded. The other answers of the batch go on; one that ends leaves the batch, after
    the second pass at the earliest.

    Args:
        model: the model; for several prompts one of ``takes_rows_back``.
        arguments: keyword arguments of ``generate``.
        recorder: records every step, and nothing in between.
        listeners: one for every prompt; receives its tokens and the end.
        rewinds: whether the listeners may order a ``Rewind``.

    Yields:
        None after every pass.

    Raises:
        CapabilityError: with ``rewinds``, the model's cache cannot be cropped.
    """
    generate = cast("Callable[..., Any]", model.generate)  # the stubs of torch.nn.Module type it as Tensor or Module
    recorder.start(always=False)
    try:
        with torch.inference_mode():
            pauses = generate(**arguments, custom_generate=_decoding_loop(recorder, listeners, rewinds))
        yield from pauses
    finally:
        recorder.stop()


def _decoding_loop(
    recorder: StepRecorder, listeners: Sequence[TokenListener], rewinds: bool
) -> Callable[..., Iterator[None]]:
    """Build a decoding loop in the form of the ``custom_generate`` argument of ``generate``."""

    def loop(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **inputs: Any,
    ) -> Iterator[None]:
        inputs.pop("synced_gpus", None)
        step_inputs = StepInputs(model, inputs, rewinds)
        rows = [
            _Row(ids, listener, _Processors(logits_processor, index, rewinds), _StoppingCriteria(stopping_criteria))
            for index, (ids, listener) in enumerate(zip(input_ids.split(1), listeners, strict=True))
        ]
        while rows:
            with torch.inference_mode():
                prepared = step_inputs.prepare(_align([row.input_ids for row in rows]))
                with recorder.recording():
                    output = model(**prepared, return_dict=True)
                step_inputs.update(output)
                scores = output.logits[:, -1].to(input_ids.device, torch.float32)
                for index, (row, own) in enumerate(zip(rows, each_row(scores), strict=True)):
                    if not row.finished:
                        row.advance(own, partial(step_inputs.rewind, index))
                unfinished = [index for index, row in enumerate(rows) if not row.finished]
                if not unfinished:
                    rows = []
                elif len(unfinished) < len(rows) and step_inputs.selects:
                    for part in (step_inputs, recorder):
                        part.select(unfinished)
                    rows = [rows[index] for index in unfinished]
            yield

    return loop


def _align(input_ids: list[Tensor]) -> Tensor:
    """Stack (1, n) ids of several rows by their last tokens, as many as the shortest has."""
    if len(input_ids) == 1:
        return input_ids[0]
    length = min(ids.shape[1] for ids in input_ids)
    return torch.cat([ids[:, -length:] for ids in input_ids])


class _Row:
    """One answer of a batch as it is decoded.

    Args:
        input_ids: (1, n) prompt, with its padding.
        listener: receives the tokens.
        processors: of the answer.
        criteria: by which the answer ends.

    Attributes:
        input_ids: (1, n + tokens) prompt and answer.
        finished: whether the answer has ended.
    """

    def __init__(
        self, input_ids: Tensor, listener: TokenListener, processors: _Processors, criteria: _StoppingCriteria
    ) -> None:
        self.input_ids, self._start = input_ids, input_ids.shape[1]
        self._listener, self._processors, self._criteria = listener, processors, criteria
        self.finished = False

    def advance(self, scores: Tensor, take_back: Callable[[int], None]) -> None:
        """Choose the next token, again where it is taken back.

        Args:
            scores: (1, V) logits of the newest step.
            take_back: takes so many steps of the answer back.
        """
        rewind = self._add(self._processors(self.input_ids, scores))
        while rewind is not None:
            take_back(self.input_ids.shape[1] - 1 - self._start - rewind.kept)
            self.input_ids = self.input_ids[:, : self._start + rewind.kept]
            self._processors.rewind(rewind.kept + 1)
            self._criteria.reset()
            scores = self._listener.steps.logits[-1][None].to(scores.device, torch.float32)
            scores = self._processors(self.input_ids, scores)
            forbidden = torch.tensor(list(rewind.forbidden), device=scores.device)
            # not in place: the recorded steps have the row too
            rewind = self._add(scores.index_fill(-1, forbidden, -torch.inf))

    def _add(self, scores: Tensor) -> Rewind | None:
        """Add the best token; return what is taken back instead, if anything."""
        best = scores.argmax(-1)
        self.input_ids, token = torch.cat([self.input_ids, best[:, None]], -1), int(best)
        ends = self._criteria(self.input_ids, token)
        rewind = self._listener.add_token(token)
        if rewind is None and ends:
            rewind = self._listener.end()
        self.finished = ends and rewind is None
        return rewind


class _Processors:
    """Logits processors of one answer, which can be taken back to an earlier step.

    Args:
        processors: those of ``generate``, for the whole batch.
        row: of the answer in the batch.
        rewinds: whether ``rewind`` will be called.
    """

    def __init__(self, processors: LogitsProcessorList, row: int, rewinds: bool) -> None:
        # a list of our own: theirs inspects the signatures every time
        self._processors = [item.row(row) if isinstance(item, RewindableProcessor) else item for item in processors]
        self._stateful = [item for item in self._processors if rewinds and isinstance(item, RewindableProcessor)]
        self._states: list[list[Any]] = []  # before every step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._stateful:
            self._states.append([processor.state() for processor in self._stateful])
        for processor in self._processors:
            scores = processor(input_ids, scores)
        return scores

    def rewind(self, steps: int) -> None:
        """Go back to before the last one of so many steps, which comes again."""
        if self._stateful:
            for processor, state in zip(self._stateful, self._states[steps - 1], strict=True):
                processor.restore(state)
            del self._states[steps - 1 :]


class NextStep(StoppingCriteria):
    """Stopping criterion that takes effect one step after another one."""

    def __init__(self, criterion: StoppingCriteria) -> None:
        self._criterion, self._before = criterion, False

    def __call__(self, input_ids: Tensor, scores: Tensor, **more: object) -> Tensor:
        now, before = self._criterion(input_ids, scores, **more), self._before
        self._before = before or bool(now.any())
        return now & before

    def reset(self) -> None:
        """Forget that the other criterion was met: the tokens that met it have been taken back."""
        self._before = False


def look_ahead(arguments: dict[str, Any]) -> None:
    """Let ``generate`` take a step more than with these arguments, in which the last token is read too."""
    arguments["generation_config"].max_new_tokens += 1
    arguments["stopping_criteria"] = [NextStep(criterion) for criterion in arguments["stopping_criteria"]]


class _StoppingCriteria:
    """Stopping criteria of one answer; the two that every answer has are evaluated without a tensor.

    Args:
        criteria: those of ``generate``; each answer has its own copy.
    """

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        self._end_ids: set[int] = set()
        self._length: int | None = None
        self._others = []
        for criterion in criteria:
            if type(criterion) is EosTokenCriteria:
                self._end_ids.update(criterion.eos_token_id.tolist())
            elif type(criterion) is MaxLengthCriteria and criterion.max_position_embeddings is None:
                length = criterion.max_length
                self._length = length if self._length is None else min(self._length, length)
            else:
                self._others.append(copy.copy(criterion))

    def __call__(self, input_ids: Tensor, token: int) -> bool:
        finished = token in self._end_ids or (self._length is not None and input_ids.shape[1] >= self._length)
        return any([bool(criterion(input_ids, None).all()) for criterion in self._others]) or finished

    def reset(self) -> None:
        """Reset the criteria that keep something from step to step."""
        for criterion in self._others:
            if isinstance(criterion, NextStep):
                criterion.reset()
