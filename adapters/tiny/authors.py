"""Families that transformers lacks, of their published shape: five stages, two ways, a token behind the queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stethoscope.adapters.pixels import CLIP_MEAN, CLIP_STD
from stethoscope.adapters.tiny.parts import SIZES, words
from stethoscope.adapters.tiny.tokenizers import llama_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stethoscope.adapters.chunks import ChunkProcessor


def convllava() -> tuple[PreTrainedModel, ChunkProcessor]:
    """ConvLLaVA: an image of 192 x 192 pixels as 3 x 3 tokens."""
    from transformers import ConvNextConfig, LlamaConfig

    from stethoscope.adapters.convllava import make_config, make_processor
    from stethoscope.adapters.convllava_model import ConvLlavaForConditionalGeneration

    tokenizer = llama_tokenizer()
    text = LlamaConfig(**words(tokenizer))
    vision = ConvNextConfig(
        hidden_sizes=[4, 8, 12, 16, 24], depths=[1, 1, 2, 1, 1], num_stages=5, layer_scale_init_value=0.05
    )
    processor = make_processor(tokenizer, text, vision, 192, CLIP_MEAN, CLIP_STD)
    return ConvLlavaForConditionalGeneration(make_config(text, vision, processor.image_token_id)), processor


def mplug_owl2() -> tuple[PreTrainedModel, ChunkProcessor]:
    """mPLUG-Owl2: 4 x 4 patches, read by 5 queries."""
    from transformers import CLIPVisionConfig, LlamaConfig

    from stethoscope.adapters.mplug_owl2 import check, make_processor
    from stethoscope.adapters.mplug_owl2_model import (
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
        text_config=LlamaConfig(**words(tokenizer)),
        vision_config=CLIPVisionConfig(**SIZES, image_size=56, patch_size=14, layer_norm_eps=1e-6),
        abstractor_config=abstractor,
    )
    check(config)
    processor = make_processor(tokenizer, config, CLIP_MEAN, CLIP_STD)
    return MplugOwl2ForConditionalGeneration(config), processor
