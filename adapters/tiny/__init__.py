"""Tiny random models of the real classes, made without files or network: to try a configuration, and for tests.

Sizes are small; the rest follows the published architecture: classes, feature layer, prompt tokens, grouped heads.
Weights are wide enough that attention is far from uniform.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from stethoscope.adapters.tiny import authors, blip, gemma, idefics, internvl, llava, minigpt4, qwen
from stethoscope.adapters.tiny.tokenizers import llama_tokenizer
from stethoscope.core.errors import CapabilityError, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

__all__ = ["FAMILIES", "build", "llama_tokenizer"]

_STD = 0.25

FAMILIES: dict[str, Callable[[], tuple[PreTrainedModel, ProcessorMixin]]] = {
    "llava": llava.llava,
    "llava_next": llava.llava_next,
    "llava_onevision": llava.llava_onevision,
    "qwen2_vl": qwen.qwen2_vl,
    "qwen2_5_vl": qwen.qwen2_5_vl,
    "qwen3_vl": qwen.qwen3_vl,
    "internvl": internvl.internvl,
    "idefics3": idefics.idefics3,
    "smolvlm": idefics.smolvlm,
    "paligemma": gemma.paligemma,
    "paligemma2": gemma.paligemma2,
    "gemma3": gemma.gemma3,
    "blip-2-opt": blip.blip2_opt,
    "blip-2-t5": blip.blip2_t5,
    "instructblip-vicuna": blip.instructblip_vicuna,
    "instructblip-t5": blip.instructblip_t5,
    "convllava": authors.convllava,
    "mplug_owl2": authors.mplug_owl2,
    "minigpt4-vicuna": minigpt4.vicuna,
    "minigpt4-llama2": minigpt4.llama2,
}
"""What ``family`` in a model's configuration may say: transformers' ``model_type``, or a family of our own."""


def build(family: str, seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A random model in evaluation mode and its processor.

    Args:
        family: transformers' ``model_type``.
        seed: seed of the weights.

    Raises:
        CapabilityError: no tiny model of this family is known.
    """
    if family not in FAMILIES:
        raise CapabilityError(unknown("family for random_init=tiny", family, FAMILIES))
    with torch.random.fork_rng(devices=[]):  # what is not drawn below is drawn by transformers
        torch.manual_seed(seed)
        model, processor = FAMILIES[family]()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or name.endswith(("class_embedding", "image_newline")):
            std = _STD / 4 if name.endswith("Attention.q.weight") else _STD  # T5 does not scale its scores
            parameter.data = torch.randn(parameter.shape, generator=generator) * std
    return model.eval(), processor
