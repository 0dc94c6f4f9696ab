"""The steps of a ``generate`` call one at a time, in the thread that asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

    from stethoscope.streaming.steps import Steps


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
        first, ended = {"is_first_iteration": True}, False
        while not ended:
            with torch.inference_mode():
                one = first or {"next_sequence_length": 1}
                prepared = model.prepare_inputs_for_generation(input_ids, **one, **inputs)
                with steps.listening():
                    output = model(**prepared, return_dict=True)
                inputs = model._update_model_kwargs_for_generation(
                    output, inputs, is_encoder_decoder=model.config.is_encoder_decoder
                )
                scores = logits_processor(input_ids, output.logits[:, -1].to(input_ids.device, torch.float32))
                token = scores.argmax(-1)
                input_ids = torch.cat([input_ids, token[:, None]], -1)
                ended, first = bool(stopping_criteria(input_ids, None).all()), {}
                follow(int(token))
            yield

    return loop
