"""Tiny random models of the real classes, made without files or network: to try a configuration, and for tests.

Sizes are small; the rest follows the published architecture: classes, feature layer, prompt tokens, grouped heads.
Weights are wide enough that attention is far from uniform.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from stethoscope.errors import CapabilityError, unknown

if TYPE_CHECKING:
    from transformers import LlamaTokenizer, PreTrainedModel, ProcessorMixin

_TEXT = (
    "USER: What is in the image? ASSISTANT: A cat and a dog lie on the table.",
    "Is there a red car in the photo? Yes, there is. No, there is no car.",
    "Please describe this image in detail. The image shows two people who look at the camera.",
)
_CHAT = (
    "{% for m in messages %}{{ m['role'].upper() }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n"
    "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_STD = 0.25


def build(family: str, seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A random model in evaluation mode and its processor.

    Args:
        family: transformers' ``model_type``.
        seed: seed of the weights.

    Raises:
        CapabilityError: no tiny model of this family is known.
    """
    if family not in FAMILIES:
        raise CapabilityError(unknown("family for random_init=tiny", family, FAMILIES))
    model, processor = FAMILIES[family]()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or name.endswith("class_embedding"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * _STD
    return model.eval(), processor


def llava(size: int = 56, patch: int = 14) -> tuple[PreTrainedModel, ProcessorMixin]:
    """LLaVA-1.5: CLIP tower read one layer before its last, class token dropped, two-layer projector, Llama."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = llama_tokenizer(("<image>",))
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=size,
        patch_size=patch,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
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


def llama_tokenizer(extra: tuple[str, ...] = ()) -> LlamaTokenizer:
    """Llama's kind of tokenizer: byte-pair encoding with SentencePiece's spaces and bytes for unknown characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import AddedToken, LlamaTokenizer

    pieces = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=True)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces.train_from_iterator(
        _TEXT * 3, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    trained = json.loads(pieces.to_str())["model"]
    merges = [tuple(merge) for merge in trained["merges"]]
    tokenizer = LlamaTokenizer(vocab=trained["vocab"], merges=merges, add_bos_token=True)
    tokenizer.pad_token = "<unk>"
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in extra], special_tokens=True)
    return tokenizer


FAMILIES: dict[str, Callable[[], tuple[PreTrainedModel, ProcessorMixin]]] = {"llava": llava}
