"""Contrast the scores of every next token with those of a second pass: without the image, or with a noised one.

A file that needs torch and transformers alone: ``stethoscope.mitigation.custom_generate`` copies it, with ``SETTINGS``
filled in, into folders whose ``generate`` transformers itself loads and calls.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from stethoscope.tracing.interventions import noised

SETTINGS: dict[str, Any] = {}
"""Method of such a folder: ``name`` (``no_image`` or ``vcd``) and the settings of its class in ``decoding``."""
IN_STEP = ("logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer", "assistant_model")
"""Arguments of ``generate`` that are about choosing tokens, of which the second pass chooses none."""

Combine = Callable[[Tensor, Tensor, int], Tensor]


def cut_scores(scores: Tensor, original: Tensor, beta: float) -> Tensor:
    """Give minus infinity to tokens that are implausible by the original distribution.

    Args:
        scores: (B, V) scores to cut.
        original: (B, V) logits z of the model.
        beta: tokens with p < beta max p are cut, from 0 (none) to 1 (all but the most probable).

    Returns:
        (B, V) scores.

    >>> cut_scores(torch.zeros(1, 3), torch.tensor([[0.5, 0.3, 0.2]]).log(), 0.5)
    tensor([[0., 0., -inf]])
    """
    if not beta:
        return scores
    lowest = original.amax(-1, keepdim=True) + math.log(beta)
    return scores.masked_fill(original < lowest, -torch.inf)


def weighted_contrast(scores: Tensor, other: Tensor, weight: float) -> Tensor:
    """Compute z + weight (z - z') of (B, V) logits."""
    return scores + weight * (scores - other)


def unsure_contrast(scores: Tensor, other: Tensor, step: int, alpha: float, rate: float) -> Tensor:
    """Compute log p + (e^(rate step) - 1) (log p - log p') where max p < alpha, and log p elsewhere (M3ID).

    Args:
        scores: (B, V) logits z.
        other: (B, V) logits z'.
        step: of the answer, from 0.
        alpha: from 0 to 1.
        rate: 0 or more.
    """
    own, without = scores.log_softmax(-1), other.log_softmax(-1)
    if not alpha:
        return own
    unsure = own.amax(-1, keepdim=True) < math.log(alpha)
    return torch.where(unsure, own + math.expm1(rate * step) * (own - without), own)


class ContrastProcessor(LogitsProcessor):
    """Combine the scores of every step with those of a second pass over a changed prompt.

    Args:
        second: starts the second pass, see ``read_tokens``.
        combine: makes new (B, V) scores of z, z' and the step, from 0.
        beta: of the plausibility cut by z; 0 for none.
    """

    def __init__(self, second: Callable[[], Generator[Tensor, Tensor, None]], combine: Combine, beta: float) -> None:
        self._start, self._combine, self._beta, self._step = second, combine, beta, 0
        self._reader: Generator[Tensor, Tensor, None] | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._reader is None:
            self._reader = self._start()
            other = next(self._reader).to(scores)
        else:
            other = self._reader.send(input_ids[:, -1]).to(scores)
        combined = self._combine(scores, other, self._step).masked_fill(scores == -torch.inf, -torch.inf)
        self._step += 1
        return cut_scores(combined, scores, self._beta)


class PlainSteps:
    """Inputs of the model's forward pass at every step, by the model's own functions.

    Args:
        model: the model.
        inputs: keyword arguments prepared by ``generate``.
    """

    def __init__(self, model: Any, inputs: dict[str, Any]) -> None:
        self._model, self._inputs, self._begun = model, inputs, False

    def prepare(self, input_ids: Tensor) -> dict[str, Any]:
        """Return the keyword arguments of the pass over the last token of (B, n) ids, at first over all."""
        step = {"next_sequence_length": 1} if self._begun else {"is_first_iteration": True}
        self._begun = True
        prepared: dict[str, Any] = self._model.prepare_inputs_for_generation(input_ids, **step, **self._inputs)
        return prepared

    def update(self, output: Any) -> None:
        """Store what the next pass needs of the output of this one."""
        encoder = self._model.config.is_encoder_decoder
        self._inputs = self._model._update_model_kwargs_for_generation(output, self._inputs, is_encoder_decoder=encoder)


def read_tokens(
    model: Any, input_ids: Tensor, make_steps: Callable[..., Any] = PlainSteps, **inputs: Any
) -> Generator[Tensor, Tensor, None]:
    """Yield (B, V) logits after every B tokens that are sent; a loop in the form of ``generate``'s ``custom_generate``.

    Args:
        model: the model.
        input_ids: (B, n) the prompts.
        make_steps: makes ``PlainSteps``, or what does the same.
        inputs: keyword arguments prepared by ``generate``.
    """
    steps = make_steps(model, {name: value for name, value in inputs.items() if name not in IN_STEP})
    while True:
        output = model(**steps.prepare(input_ids), return_dict=True)
        steps.update(output)
        tokens = yield output.logits[:, -1].float()
        input_ids = torch.cat([input_ids, tokens[:, None]], -1)


def image_tokens(model: Any, ids: Tensor) -> Tensor:
    """Find the image tokens of (B, n) prompts, (B, n) bool, by the id in the model's configuration.

    Raises:
        ValueError: a prompt has none.
    """
    token = getattr(model.config, "image_token_id", None) or getattr(model.config, "image_token_index", None)
    image = ids == (-1 if token is None else token)
    if not image.any(-1).all():
        raise ValueError("this decoder hides the image tokens of every prompt, and a prompt has none")
    return image


def hide_image(model: Any, arguments: Mapping[str, Any], image: Tensor) -> dict[str, Any]:
    """Leave the pictures and their tokens out of a batch of prompts, which then read as the text alone.

    Where the model demands a picture or reads the prompt in an encoder, the tokens are masked instead.

    Args:
        model: the model.
        arguments: of ``generate``, of which pictures, prompts and everything by token are tensors.
        image: (B, n) bool, whether a token of ``input_ids`` is one of the image.
    """
    ids, mask = arguments["input_ids"], arguments.get("attention_mask")
    kept = ~image if mask is None else mask.bool() & ~image
    pixels = inspect.signature(model.forward).parameters.get("pixel_values")
    if model.config.is_encoder_decoder or pixels is None or pixels.default is not None:
        return {**arguments, "attention_mask": kept.to(ids)}
    order = kept.int().argsort(dim=-1, stable=True)[:, -int(kept.sum(-1).max()) :]  # padding on the left, then the text
    by_token = {**arguments, "input_ids": ids.masked_fill(~kept, 0), "attention_mask": kept.to(ids)}
    return {
        name: value.gather(1, order) if isinstance(value, Tensor) else value
        for name, value in by_token.items()
        if not isinstance(value, Tensor) or value.shape == ids.shape
    }


def noise_image(arguments: Mapping[str, Any], step: int, seed: int) -> dict[str, Any]:
    """Noise every picture or tile by itself, so that the noise does not depend on the batch."""
    pixels, grid = arguments["pixel_values"], arguments.get("image_grid_thw")
    pictures = pixels.split(1) if grid is None else pixels.split(grid.prod(-1).tolist())
    return {**arguments, "pixel_values": torch.cat([noised(picture, step, seed) for picture in pictures])}


def generate(model: Any, **arguments: Any) -> Any:
    """Generate with the method of ``SETTINGS``; transformers calls this from ``model.generate(custom_generate=...)``.

    Args:
        model: of transformers, with an image among its inputs.
        arguments: those of ``generate``.

    Raises:
        ValueError: beams, whose order changes at every step; the model does not get the picture; or a prompt has none.
    """
    settings, config = SETTINGS, arguments.get("generation_config") or model.generation_config
    if (arguments.get("num_beams") or config.num_beams or 1) > 1:
        raise ValueError("this decoder goes with greedy decoding and sampling, not with beams")
    if arguments.get("inputs") is not None:
        arguments["input_ids"] = arguments.pop("inputs")
    changed = {name: value for name, value in arguments.items() if name not in IN_STEP and value is not None}
    if changed.get("input_ids") is None or changed.get("pixel_values") is None:
        raise ValueError("this decoder needs input_ids and pixel_values, which a BLIP-2's language model does not get")
    if settings["name"] == "vcd":
        changed = noise_image(changed, settings["step"], settings["seed"])

        def combine(scores: Tensor, other: Tensor, step: int) -> Tensor:
            return weighted_contrast(scores, other, settings["alpha"])
    else:
        changed = hide_image(model, changed, image_tokens(model, changed["input_ids"]))

        def combine(scores: Tensor, other: Tensor, step: int) -> Tensor:
            if settings["weight"] is not None:
                return weighted_contrast(scores, other, settings["weight"])
            return unsure_contrast(scores, other, step, settings["alpha"], settings["rate"])

    if (given := arguments.get("generation_config")) is None:
        changed["do_sample"] = False
    else:
        changed["generation_config"] = copy.deepcopy(given)
        changed["generation_config"].do_sample = False

    def second() -> Generator[Tensor, Tensor, None]:
        reader: Generator[Tensor, Tensor, None] = model.generate(**changed, custom_generate=read_tokens)
        return reader

    processor = ContrastProcessor(second, combine, settings["beta"])
    arguments["logits_processor"] = LogitsProcessorList([processor, *(arguments.get("logits_processor") or ())])
    return model.generate(**arguments)
