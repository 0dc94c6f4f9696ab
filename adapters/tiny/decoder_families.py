"""Build tiny models of decoder-only families: LLaVA, Qwen-VL, InternVL, Idefics, PaliGemma, Gemma 3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stethoscope.adapters import processors
from stethoscope.adapters.tiny.tokenizers import (
    CHATML,
    SIZES,
    byte_tokenizer,
    chatml_tokenizer,
    llama_tokenizer,
    text_sizes,
)

if TYPE_CHECKING:
    from transformers import (
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
    )


_LLAVA_CHAT = (
    "{% for m in messages %}{{ m['role'].upper() }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n"
    "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_MISTRAL_CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'][0]['text'] }}</s>{% else %}[INST] "
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %} "
    "[/INST]{% endif %}{% endfor %}"
)


def llava(size: int = 56, patch: int = 14) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Build a LLaVA-1.5: CLIP tower read one layer before its last, class token dropped, two-layer projector, Llama."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = llama_tokenizer(("<image>",))
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**SIZES, image_size=size, patch_size=patch),
        text_config=LlamaConfig(**text_sizes(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        image_seq_length=(size // patch) ** 2,
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=patch, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=_LLAVA_CHAT,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config), processor


def llava_next(size: int = 28, patch: int = 14) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Build a LLaVA-NeXT over Mistral: the whole image and tiles of it, a newline token after each row of the tiles."""
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
        text_config=MistralConfig(**text_sizes(tokenizer), sliding_window=None),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=shapes,
        image_seq_length=(size // patch) ** 2,
    )
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_grid_pinpoints=shapes
    )
    processor = LlavaNextProcessor(
        images, tokenizer, patch_size=patch, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=_MISTRAL_CHAT,
    )  # fmt: skip
    return LlavaNextForConditionalGeneration(config), processor


def llava_onevision(size: int = 56, patch: int = 14) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Build a LLaVA-OneVision: a LLaVA-NeXT with a SigLIP tower, Qwen2 and at most 9 tiles."""
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
        text_config=Qwen2Config(**text_sizes(tokenizer)),
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


_QWEN_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_TOWER = {"depth": 3, "hidden_size": 32, "num_heads": 4}


def qwen2_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Build a Qwen2-VL: a tower with full attention."""
    return _qwen("Qwen2VL", _TOWER | {"embed_dim": 32, "patch_size": 14}, {"rope_parameters": _ROPE})


def qwen2_5_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Build a Qwen2.5-VL: a tower with window attention in all layers but its last."""
    windows = {"window_size": 56, "fullatt_block_indexes": [2], "patch_size": 14}
    tower = _TOWER | {"intermediate_size": 64, "out_hidden_size": 32} | windows
    return _qwen("Qwen2_5_VL", tower, {"rope_parameters": _ROPE})


def qwen3_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Build a Qwen3-VL: learned positions in the tower, inner layers added to the first language layers."""
    inner = {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1], "patch_size": 16}
    tower = _TOWER | {"intermediate_size": 64, "out_hidden_size": 32} | inner
    return _qwen("Qwen3VL", tower, {"rope_parameters": _ROPE | {"mrope_interleaved": True}, "head_dim": 8})


def _qwen(name: str, tower: dict[str, Any], text: dict[str, Any]) -> tuple[PreTrainedModel, ProcessorMixin]:
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = chatml_tokenizer(_QWEN_TOKENS)
    config = getattr(transformers, f"{name}Config")(
        vision_config=tower,
        text_config=getattr(transformers, f"{name}TextConfig")(**text_sizes(tokenizer), **text),
        **{f"{key}_id": tokenizer.convert_tokens_to_ids(token) for key, token in _QWEN_TOKENS.items()},
    )
    side = 2 * tower["patch_size"]  # pixels along the side of a token
    images = Qwen2VLImageProcessorPil(
        patch_size=tower["patch_size"], size={"shortest_edge": 4 * side * side, "longest_edge": 36 * side * side}
    )
    processor = processors.images_only(
        getattr(transformers, f"{name}Processor"), images, tokenizer,
        chat_template=CHATML.format(image="<|vision_start|><|image_pad|><|vision_end|>"),
    )  # fmt: skip
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), processor


def internvl(size: int = 56, patch: int = 14) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Build an InternVL3: InternViT with a class token, Qwen2; only the whole processor requests tiles."""
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
        text_config=Qwen2Config(**text_sizes(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=tokens,
    )
    images = GotOcr2ImageProcessorPil(size={"height": size, "width": size}, min_patches=1, max_patches=4)
    processor = processors.images_only(
        InternVLProcessor, images, tokenizer, image_seq_length=tokens,
        chat_template=CHATML.format(image="<IMG_CONTEXT>\n"),
    )  # fmt: skip
    return InternVLForConditionalGeneration(config), processor


_IDEFICS_CHAT = (
    "{bos}{{% for m in messages %}}{{{{ m['role'] | capitalize }}}}:{{% for c in m['content'] %}}"
    "{{% if c['type'] == 'image' %}}<image>{{% else %}}{{{{ c['text'] }}}}{{% endif %}}{{% endfor %}}"
    "<end_of_utterance>\n{{% endfor %}}{{% if add_generation_prompt %}}Assistant:{{% endif %}}"
)
_TILES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
_MARKS = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *_TILES]
_SIDE, _PATCH, _MERGE = 56, 14, 2


def idefics3() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Build an Idefics3: SigLIP-like tower, four patches to a token, Llama 3."""
    from transformers import Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = byte_tokenizer(
        "<|finetune_right_pad_id|>", "<|begin_of_text|>", "<|end_of_text|>", extra=_MARKS, add_bos=True
    )
    images = Idefics3ImageProcessorPil(size={"longest_edge": 2 * _SIDE}, max_image_size={"longest_edge": _SIDE})
    processor = Idefics3Processor(
        images, tokenizer, image_seq_len=_idefics_tokens(), chat_template=_IDEFICS_CHAT.format(bos="<|begin_of_text|>")
    )
    return _idefics(Idefics3ForConditionalGeneration, tokenizer), processor


def smolvlm() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Build a SmolVLM: an Idefics3 over SmolLM2 with its own special tokens."""
    from transformers import SmolVLMForConditionalGeneration, SmolVLMProcessor
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    tokenizer = byte_tokenizer("<|im_end|>", "<|im_start|>", "<end_of_utterance>", extra=_MARKS)
    images = SmolVLMImageProcessorPil(size={"longest_edge": 2 * _SIDE}, max_image_size={"longest_edge": _SIDE})
    processor = processors.images_only(
        SmolVLMProcessor,
        images,
        tokenizer,
        image_seq_len=_idefics_tokens(),
        chat_template=_IDEFICS_CHAT.format(bos="<|im_start|>"),
    )
    return _idefics(SmolVLMForConditionalGeneration, tokenizer), processor


def _idefics_tokens() -> int:
    return (_SIDE // _PATCH // _MERGE) ** 2


def _idefics(cls: type[PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    from transformers import LlamaConfig

    return cls(
        cls.config_class(
            vision_config={**SIZES, "image_size": _SIDE, "patch_size": _PATCH},
            text_config=LlamaConfig(**text_sizes(tokenizer)),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            scale_factor=_MERGE,
        )
    )


_GEMMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<start_of_image>{% else %}{{ c['text'] | trim }}{% endif %}{% endfor %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def paligemma() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Build a PaliGemma: a prompt read in both directions, Gemma with one key-value head."""
    from transformers import GemmaConfig

    return _paligemma(lambda tokenizer: GemmaConfig(**text_sizes(tokenizer, num_key_value_heads=1), head_dim=8))


def paligemma2() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Build a PaliGemma 2: over Gemma 2, with soft-capped scores and sliding-window layers."""
    from transformers import Gemma2Config

    return _paligemma(
        lambda tokenizer: Gemma2Config(
            **text_sizes(tokenizer), head_dim=8, query_pre_attn_scalar=8, sliding_window=32,
            attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
        )
    )  # fmt: skip


def _paligemma(text: Any, size: int = 56, patch: int = 14) -> tuple[PreTrainedModel, ProcessorMixin]:
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration, PaliGemmaProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    tokenizer = llama_tokenizer()
    images = SiglipImageProcessorPil(size={"height": size, "width": size}, image_seq_length=(size // patch) ** 2)
    processor = PaliGemmaProcessor(images, tokenizer)  # adds its tokens to the tokenizer
    config = PaliGemmaConfig(
        vision_config=_siglip(size, patch),
        text_config=text(tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=SIZES["hidden_size"],
        hidden_size=SIZES["hidden_size"],
    )
    return PaliGemmaForConditionalGeneration(config), processor


def gemma3(size: int = 84, patch: int = 14) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Build a Gemma 3: patches averaged in blocks, image tokens that attend to each other, two window layers."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor, Gemma3TextConfig
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    named_tokens = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    tokenizer = llama_tokenizer(("<start_of_turn>", "<end_of_turn>"), named_tokens)
    tokens = (size // patch // 2) ** 2
    text = Gemma3TextConfig(
        **text_sizes(tokenizer), head_dim=8, query_pre_attn_scalar=8, sliding_window=32,
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
    processor = Gemma3Processor(images, tokenizer, image_seq_length=tokens, chat_template=_GEMMA_CHAT)
    return Gemma3ForConditionalGeneration(config), processor


def _siglip(size: int, patch: int) -> PreTrainedConfig:
    from transformers import SiglipVisionConfig

    return SiglipVisionConfig(**SIZES, image_size=size, patch_size=patch, vision_use_head=False)
