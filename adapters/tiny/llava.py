"""LLaVA and its direct descendants."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stethoscope.adapters import processors
from stethoscope.adapters.tiny.parts import SIZES, words
from stethoscope.adapters.tiny.tokenizers import CHATML, chatml_tokenizer, llama_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

_CHAT = (
    "{% for m in messages %}{{ m['role'].upper() }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n"
    "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_INST = (
    "{% for m in messages %}[INST] {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %} [/INST]{% endfor %}"
)


def llava(size: int = 56, patch: int = 14) -> tuple[PreTrainedModel, ProcessorMixin]:
    """LLaVA-1.5: CLIP tower read one layer before its last, class token dropped, two-layer projector, Llama."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = llama_tokenizer(("<image>",))
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**SIZES, image_size=size, patch_size=patch),
        text_config=LlamaConfig(**words(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        image_seq_length=(size // patch) ** 2,
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=patch, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=_CHAT,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config), processor


def llava_next(size: int = 28, patch: int = 14) -> tuple[PreTrainedModel, ProcessorMixin]:
    """LLaVA-NeXT over Mistral: the whole picture and tiles of it, a newline token after each row of the tiles."""
    from transformers import (
        CLIPVisionConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextProcessor,
        MistralConfig,
    )
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    tokenizer = llama_tokenizer(("<image>",))
    shapes = [[size, 2 * size], [2 * size, size], [2 * size, 2 * size], [3 * size, size], [size, 3 * size]]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**SIZES, image_size=size, patch_size=patch),
        text_config=MistralConfig(**words(tokenizer), sliding_window=None),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=shapes,
        image_seq_length=(size // patch) ** 2,
    )
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_grid_pinpoints=shapes
    )
    processor = LlavaNextProcessor(
        images, tokenizer, patch_size=patch, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=_INST,
    )  # fmt: skip
    return LlavaNextForConditionalGeneration(config), processor


def llava_onevision(size: int = 56, patch: int = 14) -> tuple[PreTrainedModel, ProcessorMixin]:
    """LLaVA-OneVision: as LLaVA-NeXT, with a SigLIP tower and Qwen2; the picture of tiles is scaled to 9 at most."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    tokenizer = chatml_tokenizer({"image_token": "<image>", "video_token": "<video>"})
    shapes = [[rows * size, columns * size] for rows in range(1, 7) for columns in range(1, 7)]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**SIZES, image_size=size, patch_size=patch, vision_use_head=False),
        text_config=Qwen2Config(**words(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=shapes,
        vision_aspect_ratio="anyres_max_9",
        vision_feature_layer=-1,
    )
    images = LlavaOnevisionImageProcessorPil(size={"height": size, "width": size}, image_grid_pinpoints=shapes)
    processor = processors.images_only(
        LlavaOnevisionProcessor, images, tokenizer, num_image_tokens=(size // patch) ** 2,
        vision_feature_select_strategy="full", chat_template=CHATML.format(image="<image>\n"),
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(config), processor
