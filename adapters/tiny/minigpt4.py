"""MiniGPT-4 with Vicuna and with Llama 2: an image of 4 x 4 (Q-Former) or 8 x 8 patches (merged by fours)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stethoscope.adapters.tiny.parts import SIZES, words
from stethoscope.adapters.tiny.tokenizers import llama_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stethoscope.adapters.chunks import ChunkProcessor

_QUERIES = 6


def vicuna() -> tuple[PreTrainedModel, ChunkProcessor]:
    """The version with a Q-Former."""
    return _built("vicuna", 56)


def llama2() -> tuple[PreTrainedModel, ChunkProcessor]:
    """The version without."""
    return _built("llama2", 112)


def _built(version: str, size: int) -> tuple[PreTrainedModel, ChunkProcessor]:
    from transformers import Blip2QFormerConfig, Blip2VisionConfig, LlamaConfig

    from stethoscope.adapters.minigpt4 import assembled

    tokenizer = llama_tokenizer()
    vision = Blip2VisionConfig(**SIZES, image_size=size, patch_size=14)
    bridge = Blip2QFormerConfig(**{**SIZES, "num_hidden_layers": 4})
    cls, config, processor = assembled(
        version, vision, (bridge, _QUERIES), LlamaConfig(**words(tokenizer, num_key_value_heads=4)), tokenizer
    )
    return cls(config), processor
