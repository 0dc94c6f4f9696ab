"""The steps of a ``generate`` call one at a time, in the thread that asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, EosTokenCriteria, GenerationMixin, MaxLengthCriteria

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

    from stethoscope.streaming.step_recorder import Steps


def run(
    model: PreTrainedModel, arguments: dict[str, Any], steps: Steps, follow: Callable[[int], None]
) -> Iterator[None]:
    """Calls ``follow`` with every token of ``model.generate(**arguments)``: one prompt, the highest score, no beams.

    ``generate`` prepares everything and is then given a decoding loop that pauses after every token. A thread would
    do as well, but handing every token from one thread to another takes longer than judging it. The model is free in
    the meantime; leaving the loop early ends the answer.

    Args:
        arguments: of ``generate``.
        steps: hears every step, and nothing in between.

    Yields:
        After every token.
    """
    steps.start(always=False)
    try:
        with torch.inference_mode():
            pauses = model.generate(**arguments, custom_generate=_loop(steps, follow))
        yield from pauses
    finally:
        steps.stop()


def _loop(steps: Steps, follow: Callable[[int], None]) -> Callable[..., Iterator[None]]:
    """A decoding loop in the form that ``generate`` takes."""

    def loop(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **inputs: Any,
    ) -> Iterator[None]:
        inputs.pop("synced_gpus", None)
        written, ends, ended = _Inputs(model, inputs), _Ends(stopping_criteria), False
        while not ended:
            with torch.inference_mode():
                prepared = written.prepare(input_ids)
                with steps.listening():
                    output = model(**prepared, return_dict=True)
                written.update(output)
                scores = output.logits[:, -1].to(input_ids.device, torch.float32)
                for processor in logits_processor:  # the list itself inspects their signatures every time
                    scores = processor(input_ids, scores)
                best = scores.argmax(-1)
                input_ids, token = torch.cat([input_ids, best[:, None]], -1), best.item()
                ended = ends(input_ids, token)
                follow(token)
            yield

    return loop


class _Inputs:
    """What the model's forward pass is given at every step.

    A model has two functions for it, which look at everything again at every step. Where they are those that
    transformers gives to all models, a step after the second differs from the one before in three inputs alone: the
    token, its position, and the mask, which grows by a one. Asking them anyway takes 5 % of the time of a small model.

    Args:
        model: the model.
        inputs: what ``generate`` has prepared.
    """

    def __init__(self, model: PreTrainedModel, inputs: dict[str, Any]) -> None:
        self._model, self._inputs, self._calls = model, inputs, 0
        self._next: dict[str, Any] | None = None  # of the step before, where the next ones follow from it
        functions = (GenerationMixin.prepare_inputs_for_generation, GenerationMixin._update_model_kwargs_for_generation)
        own = [getattr(getattr(model, one.__name__), "__func__", None) is one for one in functions]
        self._regular = all(own) and not model.config.is_encoder_decoder and not model.is_remote_code()

    def prepare(self, input_ids: Tensor) -> dict[str, Any]:
        """Keyword arguments of the pass that reads the last token of ``input_ids`` (1, n), the first time all."""
        self._calls += 1
        if self._next is None:
            one = {"next_sequence_length": 1} if self._calls > 1 else {"is_first_iteration": True}
            prepared = self._model.prepare_inputs_for_generation(input_ids, **one, **self._inputs)
            if self._regular and self._calls == 2 and _counts_on(prepared, input_ids):
                self._next = prepared
            return prepared
        self._next["input_ids"] = input_ids[:, -1:]
        if (position := self._next.get("position_ids")) is not None:
            self._next["position_ids"] = position + 1
        if (mask := self._next.get("attention_mask")) is not None:
            self._next["attention_mask"] = torch.cat([mask, mask.new_ones(1, 1)], -1)
        return self._next

    def update(self, output: Any) -> None:
        """Takes from the output of the pass what the next one needs."""
        if self._next is None:
            self._inputs = self._model._update_model_kwargs_for_generation(
                output, self._inputs, is_encoder_decoder=self._model.config.is_encoder_decoder
            )
        else:
            self._next["past_key_values"] = output.past_key_values


def _counts_on(prepared: dict[str, Any], input_ids: Tensor) -> bool:
    """Whether the inputs of one token become those of the next by counting on: the cache and the mask just grow."""
    cache, mask = prepared.get("past_key_values"), prepared.get("attention_mask")
    return (
        isinstance(cache, Cache)
        and not cache.is_compileable
        and (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2))
        and prepared["input_ids"].device == input_ids.device
    )


class _Ends:
    """Stopping criteria of one answer; the two that every answer has are asked without a tensor.

    Args:
        criteria: those of ``generate``.
    """

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        self._ids, self._length, self._others = set(), None, []
        for one in criteria:
            if type(one) is EosTokenCriteria:
                self._ids.update(one.eos_token_id.tolist())
            elif type(one) is MaxLengthCriteria and one.max_position_embeddings is None:
                self._length = one.max_length if self._length is None else min(self._length, one.max_length)
            else:
                self._others.append(one)

    def __call__(self, input_ids: Tensor, token: int) -> bool:
        ended = token in self._ids or (self._length is not None and input_ids.shape[1] >= self._length)
        return any([bool(one(input_ids, None).all()) for one in self._others]) or ended
