"""Idefics3 and SmolVLM: tiles with tokens around them that say row and column, then the whole picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stethoscope.adapters import processors
from stethoscope.adapters.tiny.parts import SIZES, words
from stethoscope.adapters.tiny.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

_CHAT = (
    "{bos}{{% for m in messages %}}{{{{ m['role'] | capitalize }}}}:{{% for c in m['content'] %}}"
    "{{% if c['type'] == 'image' %}}<image>{{% else %}}{{{{ c['text'] }}}}{{% endif %}}{{% endfor %}}"
    "<end_of_utterance>\n{{% endfor %}}{{% if add_generation_prompt %}}Assistant:{{% endif %}}"
)
_TILES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
_MARKS = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *_TILES]
_SIDE, _PATCH, _MERGE = 56, 14, 2


def idefics3() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Idefics3: SigLIP-like tower, four patches to a token, Llama 3."""
    from transformers import Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = byte_tokenizer(
        "<|finetune_right_pad_id|>", "<|begin_of_text|>", "<|end_of_text|>", extra=_MARKS, add_bos=True
    )
    images = Idefics3ImageProcessorPil(size={"longest_edge": 2 * _SIDE}, max_image_size={"longest_edge": _SIDE})
    processor = Idefics3Processor(
        images, tokenizer, image_seq_len=_tokens(), chat_template=_CHAT.format(bos="<|begin_of_text|>")
    )
    return _model(Idefics3ForConditionalGeneration, tokenizer), processor


def smolvlm() -> tuple[PreTrainedModel, ProcessorMixin]:
    """SmolVLM: as Idefics3, over SmolLM2 with its own words."""
    from transformers import SmolVLMForConditionalGeneration, SmolVLMProcessor
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    tokenizer = byte_tokenizer("<|im_end|>", "<|im_start|>", "<end_of_utterance>", extra=_MARKS)
    images = SmolVLMImageProcessorPil(size={"longest_edge": 2 * _SIDE}, max_image_size={"longest_edge": _SIDE})
    processor = processors.images_only(
        SmolVLMProcessor, images, tokenizer, image_seq_len=_tokens(), chat_template=_CHAT.format(bos="<|im_start|>")
    )
    return _model(SmolVLMForConditionalGeneration, tokenizer), processor


def _tokens() -> int:
    return (_SIDE // _PATCH // _MERGE) ** 2


def _model(cls: type[PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    from transformers import LlamaConfig

    return cls(
        cls.config_class(
            vision_config={**SIZES, "image_size": _SIDE, "patch_size": _PATCH},
            text_config=LlamaConfig(**words(tokenizer)),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            scale_factor=_MERGE,
        )
    )
