"""LLaVA's frame for models of our own: image features take the place of an id that no text has.

The authors' checkpoints have no row of the vocabulary for the image. transformers' LLaVA wants one, which would add a
column to the logits and change every probability; here the placeholder may be any id, also one behind the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModel, LlavaModelOutputWithPast, LlavaPreTrainedModel


class SplicedModel(LlavaModel):
    """LLaVA without its head; subclasses bring ``get_image_features``."""

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Image features as ``pooler_output``, one (tokens, hidden) per image of ``pixel_values``."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> LlavaModelOutputWithPast:
        """As LLaVA's, which gets embeddings that the image is in already.

        Raises:
            ValueError: the numbers of placeholders and of image features differ.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            at = input_ids == self.config.image_token_id
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(at, 0))
            known = (mm_encoder_outputs or {}).get("image")
            if known is None and pixel_values is not None:
                known = self.get_image_features(pixel_values)
            if known is not None:
                inputs_embeds = splice(inputs_embeds, at, known.pooler_output)
                kwargs |= self.image_arguments(at)
        return super().forward(inputs_embeds=inputs_embeds, **kwargs)

    def image_arguments(self, at: Tensor) -> dict[str, Any]:
        """What the language model is told about an input with an image; nothing by default.

        Args:
            at: (B, S) bool, where the image tokens are.
        """
        return {}


class SplicedForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA with its head around a subclass of ``SplicedModel``, which subclasses name as ``inner``."""

    inner: type[SplicedModel]

    def __init__(self, config: Any) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = self.inner(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


def splice(embeddings: Tensor, at: Tensor, features: list[Tensor]) -> Tensor:
    """Embeddings (B, S, D) with image features in the places ``at`` (B, S).

    Raises:
        ValueError: there are not as many places as features.
    """
    count, given = int(at.sum()), sum(len(part) for part in features)
    if count != given:
        raise ValueError(f"the prompt has {count} image tokens, the images give {given}")
    joined = torch.cat([part.to(embeddings.device, embeddings.dtype) for part in features])
    return embeddings.masked_scatter(at[..., None].to(embeddings.device), joined)
