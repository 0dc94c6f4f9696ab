"""Preprocessing of two photographs: the levels of transformers' processors, and the values of the formulas."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from stethoscope.adapters.authors.processor import (
    CLIP_STD,
    PixelProcessor,
    normalise,
    squash,
)
from stethoscope.adapters.question_encoder import CLIP_MEAN, pad_to_square, stretch_to_square

PHOTOGRAPHS = [Image.fromarray(image) for image in load_sample_images().images]
PHOTOGRAPHS += [PHOTOGRAPHS[0].rotate(90, expand=True), PHOTOGRAPHS[1].crop((3, 5, 340, 81))]


@pytest.fixture(params=range(len(PHOTOGRAPHS)), ids=["china", "flower", "upright", "wide"])
def photograph(request):
    return PHOTOGRAPHS[request.param]


def levels(image):
    return np.asarray(image).astype(int)


def by_processor(processor, image):
    """Levels (height, width, 3) before they are normalised."""
    plain = processor(images=image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    return plain.transpose(1, 2, 0).astype(int)


def in_double(image):
    """(3, height, width) by the formula, in double precision."""
    return ((levels(image) / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)).transpose(2, 0, 1)


def test_squash_is_blips(photograph):
    theirs = BlipImageProcessorPil(size={"height": 224, "width": 224})
    assert np.array_equal(levels(squash(photograph, 224)), by_processor(theirs, photograph))
    ours = PixelProcessor((partial(squash, size=224),))(images=photograph)["pixel_values"]
    assert ours.dtype == torch.float32
    assert ours.shape == (1, 3, 224, 224)
    assert (ours - theirs(images=photograph, return_tensors="pt")["pixel_values"]).abs().max() < 1e-5


def test_normalise_is_clips(photograph):
    theirs = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
    expected = theirs(images=photograph, return_tensors="pt")["pixel_values"][0]
    assert (normalise(photograph) - expected).abs().max() < 1e-5


def test_values_are_those_of_the_formula(photograph):
    assert np.abs(normalise(photograph).numpy() - in_double(photograph)).max() < 1e-6


def test_padding_is_the_mean_colour_around_the_middle(photograph):
    padded, (width, height) = levels(pad_to_square(photograph)), photograph.size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    expected = np.empty((side, side, 3), dtype=int)
    expected[:] = [122, 116, 104]
    expected[top : top + height, left : left + width] = levels(photograph)
    assert np.array_equal(padded, expected)


def test_stretch_to_square(photograph):
    side = max(photograph.size)
    expected = photograph.resize((side, side), Image.Resampling.BICUBIC)
    assert np.array_equal(levels(stretch_to_square(photograph)), levels(expected))


@pytest.mark.parametrize("size", [(1, 1), (8000, 100), (1, 300)])
def test_extreme_sizes(size):
    image = Image.new("RGB", size, (10, 200, 30))
    for steps in ((partial(squash, size=28),), (pad_to_square, partial(squash, size=28))):
        pixels = PixelProcessor(steps)(images=image)["pixel_values"]
        assert pixels.shape == (1, 3, 28, 28)
        assert pixels.isfinite().all()


def test_other_modes_are_read_as_rgb():
    processor = PixelProcessor((partial(squash, size=28),))
    grey = PHOTOGRAPHS[0].convert("L")
    assert torch.equal(processor(images=grey)["pixel_values"], processor(images=grey.convert("RGB"))["pixel_values"])
