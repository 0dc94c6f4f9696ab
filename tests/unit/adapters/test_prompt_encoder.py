"""What the encoder keeps of one image or question is right for the next."""

import numpy as np
import pytest
import torch
from PIL import Image

from stethoscope.adapters.hf import HfAdapter

QUESTION = "Is there a dog in the image?"


def picture(seed, width, height):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def internvl():
    adapter = HfAdapter(random_init="tiny", family="internvl", device="cpu")
    adapter.setup()
    return adapter


def test_tiles_that_only_the_whole_processor_asks_for_come_back_for_every_image(internvl):
    """InternVL's image processor alone makes one tile; for a small square picture that is right, for others not."""
    processor, shown = internvl.processor, [picture(0, 50, 50), picture(1, 50, 50)]
    shown += [picture(seed, 200, 60) for seed in range(3)] + [picture(3, 50, 50), picture(4, 200, 60)]
    assert len(processor.image_processor(images=shown[2], return_tensors="pt")["pixel_values"]) == 1
    tiles = []
    for image in shown:
        encoded = internvl.encode(image, QUESTION)
        direct = processor(images=image, text=encoded.text, return_tensors="pt")
        assert torch.equal(encoded.inputs["pixel_values"], direct["pixel_values"])
        assert torch.equal(encoded.inputs["input_ids"], direct["input_ids"])
        assert len(encoded.spans.grids) == len(direct["pixel_values"])
        tiles.append(len(direct["pixel_values"]))
    assert tiles == [1, 1, 4, 4, 4, 1, 4]


def test_an_image_of_a_known_size_is_prepared_without_the_text(internvl, monkeypatch):
    """What is kept saves work: the second image of a size goes through the image processor alone."""
    adapter = HfAdapter(random_init="tiny", family="gemma3", device="cpu")
    adapter.setup()
    for seed in range(2):
        adapter.encode(picture(seed, 60, 40), QUESTION)
    monkeypatch.setattr(type(adapter.processor), "__call__", lambda *arguments, **more: pytest.fail("asked again"))
    third = adapter.encode(picture(2, 60, 40), QUESTION)
    alone = adapter.processor.image_processor(images=picture(2, 60, 40), return_tensors="pt")
    assert torch.equal(third.inputs["pixel_values"], alone["pixel_values"])


def test_what_is_kept_stays_within_its_bounds(monkeypatch):
    """Many questions about many pictures: old ones make room, and what is counted is what is there."""
    monkeypatch.setattr("stethoscope.adapters.prompts._IMAGE_BYTES", 400_000)
    monkeypatch.setattr("stethoscope.adapters.prompts._TEXT_BYTES", 20_000)
    adapter = HfAdapter(random_init="tiny", family="llava", device="cpu")
    adapter.setup()
    for number in range(40):
        adapter.encode(picture(number % 8, 60, 40), f"Is there object {number} in the image?")
    for cache in (adapter._encoder._images, adapter._encoder._texts):
        assert cache.used == sum(cache.size(value) for value in cache.values.values()) <= cache.limit
        assert 1 < len(cache.values) < 40
