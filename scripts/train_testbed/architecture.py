"""Build the tokenizer, processor and model of the testbed from stock transformers classes, very small."""

from __future__ import annotations

import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # the one without torchvision

from stethoscope.testbed import language
from stethoscope.testbed.drawing import SIZE
from stethoscope.testbed.scene import sample_scene
from stethoscope.testbed.vocabulary import COCO_IDS

PATCH = 12
IMAGE_TOKENS = (SIZE // PATCH) ** 2
PIXEL_MEAN, PIXEL_STD = 0.5, 0.27
WIDTH, DEPTH, HEADS, HIDDEN = 128, 4, 4, 384
VOCABULARY = 896
INITIAL_STD = 0.05
"""Between Llama's 0.02 (grounding is learned late at this width) and 0.08 (the projector cannot follow)."""


def build_tokenizer(examples: int = 2500) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the testbed's captions; it can encode any Unicode text."""
    rng, corpus = random.Random(0), []
    for i in range(examples):
        scene = sample_scene(rng, "prior" if i % 2 else "counter")
        corpus += [language.detailed_caption(scene, rng), language.brief_caption(scene, rng)]
        corpus += [f"\n{q.text} ASSISTANT: {q.answer}" for q in language.yes_no_questions(scene, rng, 3)]
        corpus += [f"USER: \n{rng.choice(language.DETAIL_PROMPTS + language.BRIEF_PROMPTS)} ASSISTANT:"]
    corpus += [language.pope_question(name) for name in COCO_IDS] * 60
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Build a processor that resizes to 96 x 96 pixels and inserts 64 image tokens."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_STD] * 3,
    )
    # The select strategy "default" drops the class token: one additional image token in, one out.
    return LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """Build a LLaVA with a 4-layer CLIP tower and a 4-layer Llama, both 128 wide, randomly initialised."""
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
    }
    vision = CLIPVisionConfig(**sizes, image_size=SIZE, patch_size=PATCH, projection_dim=WIDTH)
    text = LlamaConfig(
        **sizes,
        vocab_size=len(tokenizer),
        num_key_value_heads=HEADS,
        initializer_range=INITIAL_STD,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)
