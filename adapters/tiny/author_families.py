"""Build tiny models of the families that transformers lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stethoscope.adapters.authors.processor import CLIP_STD
from stethoscope.adapters.question_encoder import CLIP_MEAN
from stethoscope.adapters.tiny.tokenizers import SIZES, llama_tokenizer, text_sizes

if TYPE_CHECKING:
    from transformers import Blip2QFormerConfig, PreTrainedModel

    from stethoscope.adapters.authors.processor import ImageTokenProcessor


def convllava() -> tuple[PreTrainedModel, ImageTokenProcessor]:
    """Build a ConvLLaVA: an image of 192 x 192 pixels as 3 x 3 tokens."""
    from transformers import ConvNextConfig, LlamaConfig

    from stethoscope.adapters.authors.convllava import ConvLlavaForConditionalGeneration, make_config, make_processor

    tokenizer = llama_tokenizer()
    text = LlamaConfig(**text_sizes(tokenizer))
    vision = ConvNextConfig(
        hidden_sizes=[4, 8, 12, 16, 24], depths=[1, 1, 2, 1, 1], num_stages=5, layer_scale_init_value=0.05
    )
    processor = make_processor(tokenizer, text, vision, 192, CLIP_MEAN, CLIP_STD)
    return ConvLlavaForConditionalGeneration(make_config(text, vision, processor.image_token_id)), processor


def mplug_owl2() -> tuple[PreTrainedModel, ImageTokenProcessor]:
    """Build an mPLUG-Owl2: 4 x 4 patches, read by 5 queries."""
    from transformers import CLIPVisionConfig, LlamaConfig

    from stethoscope.adapters.authors.mplug_owl2 import check_config, make_processor
    from stethoscope.adapters.authors.mplug_owl2_model import (
        MplugOwl2AbstractorConfig,
        MplugOwl2Config,
        MplugOwl2ForConditionalGeneration,
    )

    tokenizer = llama_tokenizer()
    width = SIZES["hidden_size"]
    abstractor = MplugOwl2AbstractorConfig(
        num_learnable_queries=5, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, hidden_size=width,
        encoder_hidden_size=width, grid_size=4,
    )  # fmt: skip
    config = MplugOwl2Config(
        text_config=LlamaConfig(**text_sizes(tokenizer)),
        vision_config=CLIPVisionConfig(**SIZES, image_size=56, patch_size=14, layer_norm_eps=1e-6),
        abstractor_config=abstractor,
    )
    check_config(config)
    processor = make_processor(tokenizer, config, CLIP_MEAN, CLIP_STD)
    return MplugOwl2ForConditionalGeneration(config), processor


_MINIGPT4_QUERIES = 6


def minigpt4_vicuna() -> tuple[PreTrainedModel, ImageTokenProcessor]:
    """Build a MiniGPT-4 with Vicuna and a Q-Former."""
    from transformers import Blip2QFormerConfig

    return _minigpt4(56, (Blip2QFormerConfig(**{**SIZES, "num_hidden_layers": 4}), _MINIGPT4_QUERIES))


def minigpt4_llama2() -> tuple[PreTrainedModel, ImageTokenProcessor]:
    """Build a MiniGPT-4 with Llama 2 and without a Q-Former."""
    return _minigpt4(112, None)


def _minigpt4(size: int, qformer: tuple[Blip2QFormerConfig, int] | None) -> tuple[PreTrainedModel, ImageTokenProcessor]:
    from transformers import Blip2VisionConfig, LlamaConfig

    from stethoscope.adapters.authors.minigpt4 import PLACEHOLDER, make_processor
    from stethoscope.adapters.authors.minigpt4_model import build_config
    from stethoscope.adapters.authors.processor import add_placeholder

    tokenizer = llama_tokenizer()
    text = LlamaConfig(**text_sizes(tokenizer, num_key_value_heads=SIZES["num_attention_heads"]))
    image_token_id = add_placeholder(tokenizer, PLACEHOLDER, text.vocab_size)
    vision = Blip2VisionConfig(**SIZES, image_size=size, patch_size=14)
    cls, config = build_config(vision, qformer, text, image_token_id)
    return cls(config), make_processor(config, tokenizer)
