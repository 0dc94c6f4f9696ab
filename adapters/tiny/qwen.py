"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: pictures of any size, four patches to a token, positions in three axes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stethoscope.adapters import processors
from stethoscope.adapters.tiny.parts import words
from stethoscope.adapters.tiny.tokenizers import CHATML, chatml_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

_PLACES = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_TOWER = {"depth": 3, "hidden_size": 32, "num_heads": 4}


def qwen2_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Qwen2-VL: a tower of full attention."""
    return _build("Qwen2VL", _TOWER | {"embed_dim": 32, "patch_size": 14}, {"rope_parameters": _ROPE})


def qwen2_5_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Qwen2.5-VL: a tower that keeps and attends to patches window by window, in all layers but its last."""
    windows = {"window_size": 56, "fullatt_block_indexes": [2], "patch_size": 14}
    tower = _TOWER | {"intermediate_size": 64, "out_hidden_size": 32} | windows
    return _build("Qwen2_5_VL", tower, {"rope_parameters": _ROPE})


def qwen3_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Qwen3-VL: learnt positions in the tower, whose inner layers are added to the first language layers too."""
    inner = {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1], "patch_size": 16}
    tower = _TOWER | {"intermediate_size": 64, "out_hidden_size": 32} | inner
    return _build("Qwen3VL", tower, {"rope_parameters": _ROPE | {"mrope_interleaved": True}, "head_dim": 8})


def _build(name: str, tower: dict[str, Any], text: dict[str, Any]) -> tuple[PreTrainedModel, ProcessorMixin]:
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = chatml_tokenizer(_PLACES)
    config = getattr(transformers, f"{name}Config")(
        vision_config=tower,
        text_config=getattr(transformers, f"{name}TextConfig")(**words(tokenizer), **text),
        **{f"{key}_id": tokenizer.convert_tokens_to_ids(token) for key, token in _PLACES.items()},
    )
    side = 2 * tower["patch_size"]  # of the pixels that a token stands for
    images = Qwen2VLImageProcessorPil(
        patch_size=tower["patch_size"], size={"shortest_edge": 4 * side * side, "longest_edge": 36 * side * side}
    )
    processor = processors.images_only(
        getattr(transformers, f"{name}Processor"), images, tokenizer,
        chat_template=CHATML.format(image="<|vision_start|><|image_pad|><|vision_end|>"),
    )  # fmt: skip
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), processor
