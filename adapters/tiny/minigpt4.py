"""MiniGPT-4 with Vicuna and with Llama 2: an image of 4 x 4 (Q-Former) or 8 x 8 patches (merged by fours)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stethoscope.adapters.tiny.parts import SIZES, words
from stethoscope.adapters.tiny.tokenizers import llama_tokenizer

if TYPE_CHECKING:
    from transformers import Blip2QFormerConfig, PreTrainedModel

    from stethoscope.adapters.chunks import ChunkProcessor

_QUERIES = 6


def vicuna() -> tuple[PreTrainedModel, ChunkProcessor]:
    """The version with a Q-Former."""
    from transformers import Blip2QFormerConfig

    return _built(56, (Blip2QFormerConfig(**{**SIZES, "num_hidden_layers": 4}), _QUERIES))


def llama2() -> tuple[PreTrainedModel, ChunkProcessor]:
    """The version without."""
    return _built(112, None)


def _built(size: int, bridge: tuple[Blip2QFormerConfig, int] | None) -> tuple[PreTrainedModel, ChunkProcessor]:
    from transformers import Blip2VisionConfig, LlamaConfig

    from stethoscope.adapters.chunks import add_placeholder
    from stethoscope.adapters.minigpt4 import PLACEHOLDER, make_processor
    from stethoscope.adapters.minigpt4_model import configured

    tokenizer = llama_tokenizer()
    text = LlamaConfig(**words(tokenizer, num_key_value_heads=SIZES["num_attention_heads"]))
    image_token_id = add_placeholder(tokenizer, PLACEHOLDER, text.vocab_size)
    vision = Blip2VisionConfig(**SIZES, image_size=size, patch_size=14)
    cls, config = configured(vision, bridge, text, image_token_id)
    return cls(config), make_processor(config, tokenizer)
