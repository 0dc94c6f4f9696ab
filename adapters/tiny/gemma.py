"""PaliGemma, PaliGemma 2 and Gemma 3: a SigLIP tower and Google's language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stethoscope.adapters.tiny.parts import SIZES, words
from stethoscope.adapters.tiny.tokenizers import llama_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

_TURNS = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<start_of_image>{% else %}{{ c['text'] | trim }}{% endif %}{% endfor %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def paligemma() -> tuple[PreTrainedModel, ProcessorMixin]:
    """PaliGemma: a prompt that is read in both directions, Gemma with one key-value head."""
    from transformers import GemmaConfig

    return _paligemma(lambda tokenizer: GemmaConfig(**words(tokenizer, num_key_value_heads=1), head_dim=8))


def paligemma2() -> tuple[PreTrainedModel, ProcessorMixin]:
    """PaliGemma 2: the same over Gemma 2, with soft-capped scores and layers that see a window only."""
    from transformers import Gemma2Config

    return _paligemma(
        lambda tokenizer: Gemma2Config(
            **words(tokenizer), head_dim=8, query_pre_attn_scalar=8, sliding_window=32, attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
        )
    )  # fmt: skip


def _paligemma(text: Any, size: int = 56, patch: int = 14) -> tuple[PreTrainedModel, ProcessorMixin]:
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration, PaliGemmaProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    tokenizer = llama_tokenizer()
    images = SiglipImageProcessorPil(size={"height": size, "width": size}, image_seq_length=(size // patch) ** 2)
    processor = PaliGemmaProcessor(images, tokenizer)  # adds its words to the tokenizer
    config = PaliGemmaConfig(
        vision_config=_siglip(size, patch),
        text_config=text(tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=SIZES["hidden_size"],
        hidden_size=SIZES["hidden_size"],
    )
    return PaliGemmaForConditionalGeneration(config), processor


def gemma3(size: int = 84, patch: int = 14) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Gemma 3: the tower's patches are averaged in blocks; image tokens see each other; two layers see a window."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor, Gemma3TextConfig
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    places = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    tokenizer = llama_tokenizer(("<start_of_turn>", "<end_of_turn>"), places)
    tokens = (size // patch // 2) ** 2
    text = Gemma3TextConfig(
        **words(tokenizer), head_dim=8, query_pre_attn_scalar=8, sliding_window=32,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    config = Gemma3Config(
        vision_config=_siglip(size, patch),
        text_config=text,
        mm_tokens_per_image=tokens,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    images = Gemma3ImageProcessorPil(size={"height": size, "width": size})
    processor = Gemma3Processor(images, tokenizer, image_seq_length=tokens, chat_template=_TURNS)
    return Gemma3ForConditionalGeneration(config), processor


def _siglip(size: int, patch: int) -> PreTrainedConfig:
    from transformers import SiglipVisionConfig

    return SiglipVisionConfig(**SIZES, image_size=size, patch_size=patch, vision_use_head=False)
