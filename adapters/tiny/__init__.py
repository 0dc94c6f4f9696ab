"""Build tiny random models of the real classes, without files or network, for tests and to try a configuration.

Sizes are small; the rest follows the published architecture: classes, feature layer, prompt tokens, grouped heads.
Weights have a large variance, so that attention is far from uniform.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

from stethoscope.adapters.tiny import decoder_families, qformer_families
from stethoscope.adapters.tiny.tokenizers import llama_tokenizer
from stethoscope.core.errors import CapabilityError, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

__all__ = ["FAMILIES", "build", "build_from", "llama_tokenizer"]

Processor = TypeVar("Processor", bound="ProcessorMixin")

_STD = 0.25

FAMILIES: dict[str, Callable[[], tuple[PreTrainedModel, ProcessorMixin]]] = {
    "llava": decoder_families.llava,
    "llava_next": decoder_families.llava_next,
    "llava_onevision": decoder_families.llava_onevision,
    "qwen2_vl": decoder_families.qwen2_vl,
    "qwen2_5_vl": decoder_families.qwen2_5_vl,
    "qwen3_vl": decoder_families.qwen3_vl,
    "internvl": decoder_families.internvl,
    "idefics3": decoder_families.idefics3,
    "smolvlm": decoder_families.smolvlm,
    "paligemma": decoder_families.paligemma,
    "paligemma2": decoder_families.paligemma2,
    "gemma3": decoder_families.gemma3,
    "blip-2-opt": qformer_families.blip2_opt,
    "blip-2-t5": qformer_families.blip2_t5,
    "instructblip-vicuna": qformer_families.instructblip_vicuna,
    "instructblip-t5": qformer_families.instructblip_t5,
}
"""Builders by ``family``: transformers' ``model_type``, or a name of ours. Those of families that transformers lacks
stand beside their adapters."""


def build(family: str, seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Build a random model in evaluation mode and its processor.

    Args:
        family: one of ``FAMILIES``.
        seed: seed of the weights.

    Raises:
        CapabilityError: no tiny model of this family is known.
    """
    if str(family) not in FAMILIES:
        raise CapabilityError(unknown("family for random_init=tiny", str(family), FAMILIES))
    return build_from(FAMILIES[family], seed)


def build_from(
    make: Callable[[], tuple[PreTrainedModel, Processor]], seed: int = 0
) -> tuple[PreTrainedModel, Processor]:
    """Build a model and its processor by a function, and give it random weights and evaluation mode.

    Args:
        make: builds both.
        seed: seed of the weights.
    """
    with torch.random.fork_rng(devices=[]):  # transformers draws the parameters that are not drawn below
        torch.manual_seed(seed)
        model, processor = make()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or name.endswith(("class_embedding", "image_newline")):
            std = _STD / 4 if name.endswith("Attention.q.weight") else _STD  # T5 does not scale its scores
            parameter.data = torch.randn(parameter.shape, generator=generator) * std
    return model.eval(), processor
