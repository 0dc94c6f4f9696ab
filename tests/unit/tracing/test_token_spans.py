"""Grids of LLaVA-NeXT and LLaVA-OneVision against the processors' own count of tokens, and characters of tokens."""

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
from stethoscope.tracing.token_spans import GrowingText, decode_with_offsets, image_layout, image_positions

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


@pytest.fixture(scope="module")
def decode():
    tokenizer = llama_tokenizer()
    return tokenizer, lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_no_tokens(decode):
    assert decode_with_offsets([], decode[1]) == ("", ())


@pytest.mark.parametrize("text", ["a cat", "😀😀", "日本 a", "é", "a  b", "x\ny", "A dog. 😀 and é"])
def test_round_trip(decode, text):
    tokenizer, of = decode
    decoded, offsets = decode_with_offsets(tokenizer.encode(text, add_special_tokens=False), of)
    assert decoded == text
    assert "".join(text[start:end] for start, end in offsets) == text


def test_a_character_belongs_to_the_token_that_completes_it(decode):
    tokenizer, of = decode
    ids = tokenizer.convert_tokens_to_ids(["▁a", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "▁", "a"])
    assert decode_with_offsets(ids, of) == ("a😀 a", ((0, 1), (1, 1), (1, 1), (1, 1), (1, 2), (2, 3), (3, 4)))


def test_bytes_that_never_become_a_character_are_covered(decode):
    tokenizer, of = decode
    ids = tokenizer.convert_tokens_to_ids(["▁a", "<0xF0>", "<0x9F>", "a"])
    text, offsets = decode_with_offsets(ids, of)
    assert "".join(text[start:end] for start, end in offsets) == text
    assert text.startswith("a")
    assert text.endswith("a")


def test_special_tokens_write_nothing(decode):
    tokenizer, of = decode
    ids = tokenizer.convert_tokens_to_ids(["▁a", "<s>", "▁a"])
    assert decode_with_offsets(ids, of) == ("a a", ((0, 1), (1, 1), (1, 3)))


def test_any_ids_are_covered_in_order(decode):
    tokenizer, of = decode
    draw = random.Random(0)
    for _ in range(50):
        ids = [draw.randrange(len(tokenizer)) for _ in range(20)]
        text, offsets = decode_with_offsets(ids, of)
        assert len(offsets) == len(ids)
        assert "".join(text[start:end] for start, end in offsets) == text
        assert all(start <= end for start, end in offsets)


@pytest.mark.parametrize("seed", range(4))
def test_text_that_grows_is_that_of_the_whole(decode, seed):
    tokenizer, of = decode
    written = random.Random(seed).choices(["a cat", "é", "😀", "日本", "  two", "\n", " dog."], k=60)
    ids = [token for word in written for token in tokenizer.encode(word, add_special_tokens=False)]
    text, offsets = decode_with_offsets(ids, of)
    growing, asked = GrowingText(lambda tokens: asked.append(len(tokens)) or of(tokens)), []
    pieces = [growing.add(token) for token in ids]
    assert "".join(part for part, _, _ in pieces) == text
    assert [(start, end) for _, start, end in pieces] == list(offsets)
    assert max(asked) < 40 < 100 < len(ids)
