"""Run a ``generate`` call one token at a time, in the caller's thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria

from stethoscope.tracing.step_inputs import StepInputs

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

    from stethoscope.streaming.step_recorder import StepRecorder


def decode(
    model: PreTrainedModel, arguments: dict[str, Any], recorder: StepRecorder, on_token: Callable[[int], None]
) -> Iterator[None]:
    """Decode greedily for one prompt and call ``on_token`` with every token; no beams.

    ``generate`` prepares everything and is then given a decoding loop that pauses after every token. A thread could do
    the same, but passing a token between threads takes longer than scoring it. The model is free between tokens;
    closing the iterator ends the answer.

    Args:
        model: the model.
        arguments: keyword arguments of ``generate``.
        recorder: records every step, and nothing in between.
        on_token: called with the id of every token.

    Yields:
        None after every token.
    """
    generate = cast("Callable[..., Any]", model.generate)  # the stubs of torch.nn.Module type it as Tensor or Module
    recorder.start(always=False)
    try:
        with torch.inference_mode():
            pauses = generate(**arguments, custom_generate=_decoding_loop(recorder, on_token))
        yield from pauses
    finally:
        recorder.stop()


def _decoding_loop(recorder: StepRecorder, on_token: Callable[[int], None]) -> Callable[..., Iterator[None]]:
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
        step_inputs, criteria, finished = StepInputs(model, inputs), _StoppingCriteria(stopping_criteria), False
        while not finished:
            with torch.inference_mode():
                prepared = step_inputs.prepare(input_ids)
                with recorder.recording():
                    output = model(**prepared, return_dict=True)
                step_inputs.update(output)
                scores = output.logits[:, -1].to(input_ids.device, torch.float32)
                for processor in logits_processor:  # the list itself inspects their signatures every time
                    scores = processor(input_ids, scores)
                best = scores.argmax(-1)
                input_ids, token = torch.cat([input_ids, best[:, None]], -1), best.item()
                finished = criteria(input_ids, token)
                on_token(token)
            yield

    return loop


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
