"""ConvLLaVA from transformers' parts: a ConvNeXt of five stages, LLaVA's projector, Llama.

Source: Ge et al. 2024 (arXiv 2405.15738). Five stages make one token of 64 x 64 pixels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoModel, ConvNextModel, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModel, LlavaMultiModalProjector, LlavaPreTrainedModel

from stethoscope.adapters.words import make_room


class ConvLlavaConfig(LlavaConfig):
    """A LLaVA configuration with a ``ConvNextConfig``, to which ``hidden_size``, the width of the last stage, is added.

    The authors' files call themselves ``llava``, which transformers takes for a LLaVA with a CLIP tower.
    """

    model_type = "convllava"


class ConvTower(ConvNextModel):
    """ConvNeXt beside a language model under any attention implementation: it has no attention to implement."""

    def get_correct_attn_implementation(self, *requested: Any, **options: Any) -> str:
        """The one that transformers lets every class have."""
        return "eager"


class ConvLlavaModel(LlavaModel):
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


class ConvLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """ConvLLaVA."""

    config_class = ConvLlavaConfig

    def __init__(self, config: ConvLlavaConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = ConvLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        make_room(self)
        self.post_init()
