"""Run a ``generate`` call one token at a time, in the caller's thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import Cache, EosTokenCriteria, GenerationMixin, MaxLengthCriteria

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
        step_inputs, criteria, finished = _StepInputs(model, inputs), _StoppingCriteria(stopping_criteria), False
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


class _StepInputs:
    """Inputs of the model's forward pass at every step.

    Two functions of the model prepare them, which inspect all inputs again at every step. Where these are the common
    ones of transformers, a step after the second differs from the previous one only in the token, its position and the
    mask, which grows by a one. Calling the functions anyway takes 5 % of the time of a small model; this fast path
    was not measured on a GPU. All other models use their own functions.

    Args:
        model: the model.
        inputs: keyword arguments prepared by ``generate``.
    """

    def __init__(self, model: PreTrainedModel, inputs: dict[str, Any]) -> None:
        self._model, self._inputs, self._calls = model, inputs, 0
        self._next: dict[str, Any] | None = None  # of the previous step, where the next ones follow from it
        # the stubs of torch.nn.Module type both as Tensor or Module
        self._prepare = cast("Callable[..., dict[str, Any]]", model.prepare_inputs_for_generation)
        self._update = cast("Callable[..., dict[str, Any]]", model._update_model_kwargs_for_generation)
        common = (GenerationMixin.prepare_inputs_for_generation, GenerationMixin._update_model_kwargs_for_generation)
        inherited = [getattr(getattr(model, function.__name__), "__func__", None) is function for function in common]
        self._regular = all(inherited) and not model.config.is_encoder_decoder and not model.is_remote_code()

    def prepare(self, input_ids: Tensor) -> dict[str, Any]:
        """Return the keyword arguments of the pass over the last token of (1, n) ids, at first over all."""
        self._calls += 1
        if self._next is None:
            step = {"next_sequence_length": 1} if self._calls > 1 else {"is_first_iteration": True}
            prepared = self._prepare(input_ids, **step, **self._inputs)
            if self._regular and self._calls == 2 and _can_increment(prepared, input_ids):
                self._next = prepared
            return prepared
        self._next["input_ids"] = input_ids[:, -1:]
        if (position := self._next.get("position_ids")) is not None:
            self._next["position_ids"] = position + 1
        if (mask := self._next.get("attention_mask")) is not None:
            self._next["attention_mask"] = torch.cat([mask, mask.new_ones(1, 1)], -1)
        return self._next

    def update(self, output: Any) -> None:
        """Store what the next pass needs of the output of this one."""
        if self._next is None:
            self._inputs = self._update(output, self._inputs, is_encoder_decoder=self._model.config.is_encoder_decoder)
        else:
            self._next["past_key_values"] = output.past_key_values


def _can_increment(prepared: dict[str, Any], input_ids: Tensor) -> bool:
    """Decide whether the inputs of one token become those of the next by growing the cache and the mask."""
    cache, mask = prepared.get("past_key_values"), prepared.get("attention_mask")
    return (
        isinstance(cache, Cache)
        and not cache.is_compileable
        and (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2))
        and prepared["input_ids"].device == input_ids.device
    )


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
