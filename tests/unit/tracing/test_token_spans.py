"""Grids of LLaVA-NeXT and LLaVA-OneVision at their published sizes, against the processors' own count of tokens."""

import random

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionProcessor,
    SiglipVisionConfig,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from stethoscope.adapters import processors
from stethoscope.adapters.tiny import llama_tokenizer
from stethoscope.tracing.token_spans import image_layout, image_positions

NEXT = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ONEVISION = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
SIZES = [(480, 640), (640, 480), (427, 640), (50, 50), (1, 1), (3000, 40), (40, 3000), (2304, 2304), (1600, 1200)]
DRAWN = random.Random(0)
SIZES += [(DRAWN.randint(20, 2500), DRAWN.randint(20, 2500)) for _ in range(60)]


def llava_next():
    vision = CLIPVisionConfig(image_size=336, patch_size=14)
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, image_grid_pinpoints=NEXT
    )
    processor = LlavaNextProcessor(
        images, llama_tokenizer(("<image>",)), patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    return LlavaNextConfig(vision_config=vision, image_grid_pinpoints=NEXT), processor


def onevision():
    vision = SiglipVisionConfig(image_size=384, patch_size=14)
    images = LlavaOnevisionImageProcessorPil(image_grid_pinpoints=ONEVISION)
    processor = processors.images_only(
        LlavaOnevisionProcessor, images, llama_tokenizer(("<image>", "<video>")), num_image_tokens=729,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    config = LlavaOnevisionConfig(
        vision_config=vision, image_grid_pinpoints=ONEVISION, vision_aspect_ratio="anyres_max_9"
    )
    return config, processor


@pytest.mark.parametrize("family", [llava_next, onevision])
def test_every_size_of_picture_has_its_grids(family):
    config, processor = family()
    side = config.vision_config.image_size // 14
    shapes = set()
    for height, width in SIZES:
        count = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])["num_image_tokens"][0]
        grids, separators = image_layout(config, {"image_sizes": torch.tensor([[height, width]])}, count)
        assert grids[0] == (side, side)
        rows, columns = grids[1]
        assert side * side + rows * columns + len(separators) == count
        assert separators == tuple(side * side + columns + row * (columns + 1) for row in range(rows))
        if min(rows, columns) > side:  # the picture keeps its shape, to a token or so
            assert rows / columns == pytest.approx(height / width, rel=0.1)
        shapes.add(grids[1])
    assert len(shapes) > 15


def test_a_count_that_does_not_fit_has_no_grids():
    config, _ = llava_next()
    assert image_layout(config, {"image_sizes": torch.tensor([[480, 640]])}, 2000) == ((), ())


def test_the_newlines_are_behind_the_rows():
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(image_size=28, patch_size=14), image_grid_pinpoints=[[56, 56], [28, 56]]
    )
    grids, separators = image_layout(config, {"image_sizes": torch.tensor([[30, 60]])}, 4 + 2 * 5)
    assert grids == ((2, 2), (2, 4))
    assert separators == (8, 13)


def test_image_positions_are_sorted():
    assert image_positions([5, 1, 5, 5], 5) == (0, 2, 3)
