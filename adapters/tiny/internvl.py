"""InternVL3: tiles, then the whole picture; four patches to a token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stethoscope.adapters import processors
from stethoscope.adapters.tiny.parts import SIZES, words
from stethoscope.adapters.tiny.tokenizers import CHATML, chatml_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


def internvl(size: int = 56, patch: int = 14) -> tuple[PreTrainedModel, ProcessorMixin]:
    """InternVL3: InternViT with a class token, Qwen2. It is the whole processor that asks for tiles."""
    from transformers import (
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVisionConfig,
        Qwen2Config,
    )
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    tokenizer = chatml_tokenizer(
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }
    )
    tokens = (size // patch // 2) ** 2
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**SIZES, image_size=(size, size), patch_size=(patch, patch)),
        text_config=Qwen2Config(**words(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=tokens,
    )
    images = GotOcr2ImageProcessorPil(size={"height": size, "width": size}, min_patches=1, max_patches=4)
    processor = processors.images_only(
        InternVLProcessor, images, tokenizer, image_seq_length=tokens,
        chat_template=CHATML.format(image="<IMG_CONTEXT>\n"),
    )  # fmt: skip
    return InternVLForConditionalGeneration(config), processor
