"""ConvLLaVA from transformers' parts: a ConvNeXt of five stages, LLaVA's projector, Llama.

Source: Ge et al. 2024 (arXiv 2405.15738). Five stages make one token of 64 x 64 pixels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AutoModel, ConvNextModel, LlavaConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector, LlavaPreTrainedModel

from stethoscope.adapters.splicing import SplicedForConditionalGeneration, SplicedModel


class ConvLlavaConfig(LlavaConfig):
    """A LLaVA configuration with a ``ConvNextConfig``, to which ``hidden_size``, the width of the last stage, is added.

    The authors' files call themselves ``llava``, which transformers takes for a LLaVA with a CLIP tower.
    """

    model_type = "convllava"


class ConvTower(ConvNextModel):
    """ConvNeXt under any attention implementation: it has no attention."""

    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True


class ConvLlavaModel(SplicedModel):
    """ConvLLaVA without its head."""

    config_class = ConvLlavaConfig

    def __init__(self, config: ConvLlavaConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = ConvTower._from_config(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """As ``pooler_output`` (rows * columns, D) per image; as ``last_hidden_state`` (B, D', rows, columns)."""
        features = self.vision_tower(pixel_values).last_hidden_state
        tokens = self.multi_modal_projector(features.flatten(2).transpose(1, 2))
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=list(tokens))


class ConvLlavaForConditionalGeneration(SplicedForConditionalGeneration):
    """ConvLLaVA."""

    config_class = ConvLlavaConfig
    inner = ConvLlavaModel
