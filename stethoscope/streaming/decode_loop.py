"""Run a ``generate`` call one token at a time, in the caller's thread, and go back where the listener says so."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria, StoppingCriteria

from stethoscope.tracing.step_inputs import RewindableProcessor, StepInputs

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

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
    """What hears of every token; with a ``Rewind`` it has taken the tokens back itself, its recorder's steps too."""

    def add_token(self, token: int) -> Rewind | None:
        """Add the next token, or the end."""

    def end(self) -> Rewind | None:
        """Finish the answer."""


def decode(
    model: PreTrainedModel,
    arguments: dict[str, Any],
    recorder: StepRecorder,
    listener: TokenListener,
    rewinds: bool = False,
) -> Iterator[None]:
    """Decode one prompt, without beams, from token to token.

    ``generate`` prepares everything and is then given a decoding loop that pauses after every token. A thread could do
    the same, but passing a token between threads takes longer than scoring it. The model is free between tokens;
    closing the iterator ends the answer.

    After a ``Rewind`` everything is as in an answer that has reached the kept tokens for the first time (cache, inputs,
    noise of sampling), but for the forbidden tokens. The step that predicts the token after them is not run again: its
    logits are in the recorder.

    Args:
        model: the model.
        arguments: keyword arguments of ``generate``.
        recorder: records every step, and nothing in between.
        listener: hears of every token, and of the end.
        rewinds: whether the listener may order a ``Rewind``.

    Yields:
        None after every token.

    Raises:
        CapabilityError: with ``rewinds``, the model's cache cannot be cropped.
    """
    generate = cast("Callable[..., Any]", model.generate)  # the stubs of torch.nn.Module type it as Tensor or Module
    recorder.start(always=False)
    try:
        with torch.inference_mode():
            pauses = generate(**arguments, custom_generate=_decoding_loop(recorder, listener, rewinds))
        yield from pauses
    finally:
        recorder.stop()


def _decoding_loop(recorder: StepRecorder, listener: TokenListener, rewinds: bool) -> Callable[..., Iterator[None]]:
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
        start, step_inputs = input_ids.shape[1], StepInputs(model, inputs, rewinds)
        criteria, processors = _StoppingCriteria(stopping_criteria), _Processors(logits_processor, rewinds)
        rewind: Rewind | None = None
        finished = False
        while rewind is not None or not finished:
            with torch.inference_mode():
                if rewind is None:
                    prepared = step_inputs.prepare(input_ids)
                    with recorder.recording():
                        output = model(**prepared, return_dict=True)
                    step_inputs.update(output)
                    scores = output.logits[:, -1].to(input_ids.device, torch.float32)
                else:
                    input_ids = input_ids[:, : start + rewind.kept]
                    for part in (step_inputs, processors):
                        part.rewind(rewind.kept + 1)
                    criteria.reset()
                    scores = recorder.logits[-1][None].to(input_ids.device, torch.float32)
                scores = processors(input_ids, scores)
                if rewind is not None:
                    forbidden = torch.tensor(list(rewind.forbidden), device=scores.device)
                    scores = scores.index_fill(-1, forbidden, -torch.inf)  # not in place: the recorder has the row too
                best = scores.argmax(-1)
                input_ids, token = torch.cat([input_ids, best[:, None]], -1), int(best)
                finished = criteria(input_ids, token)
                rewind = listener.add_token(token)
                if rewind is None and finished:
                    rewind = listener.end()
            yield

    return loop


class _Processors:
    """Logits processors of one answer, which can be taken back to an earlier step.

    Args:
        processors: those of ``generate``.
        rewinds: whether ``rewind`` will be called.
    """

    def __init__(self, processors: LogitsProcessorList, rewinds: bool) -> None:
        self._processors = list(processors)  # the list itself inspects their signatures every time
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


class _StoppingCriteria:
    """Stopping criteria of one answer; the two that every answer has are evaluated without a tensor.

    Args:
        criteria: those of ``generate``.
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
                self._others.append(criterion)

    def __call__(self, input_ids: Tensor, token: int) -> bool:
        finished = token in self._end_ids or (self._length is not None and input_ids.shape[1] >= self._length)
        return any([bool(criterion(input_ids, None).all()) for criterion in self._others]) or finished

    def reset(self) -> None:
        """Reset the criteria that keep something from step to step."""
        for criterion in self._others:
            if isinstance(criterion, NextStep):
                criterion.reset()
