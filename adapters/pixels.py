"""Image preprocessing with Pillow and NumPy alone, for families whose authors wrote their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image as PIL
from PIL.Image import Image
from torch import Tensor

from stethoscope.core.images import rgb

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels that CLIP was trained on (Radford et al. 2021), in red, green and blue, white being 1."""

Step = Callable[[Image], Image]


def squash(image: Image, size: int) -> Image:
    """A square of ``size`` pixels, bicubic; the proportions are lost.

    >>> squash(PIL.new("RGB", (40, 20)), 8).size
    (8, 8)
    """
    return image.resize((size, size), PIL.Resampling.BICUBIC)


def squash_to_longest(image: Image) -> Image:
    """A square as wide as the image's longer side.

    >>> squash_to_longest(PIL.new("RGB", (40, 20))).size
    (40, 40)
    """
    return squash(image, max(image.size))


def pad_to_square(image: Image, mean: Sequence[float] = CLIP_MEAN) -> Image:
    """The image in the middle of a square of one colour.

    Args:
        mean: colour in [0, 1], rounded down to whole levels as the authors of LLaVA do.

    >>> pad_to_square(PIL.new("RGB", (4, 2), "white")).getpixel((0, 0))
    (122, 116, 104)
    """
    width, height = image.size
    side = max(width, height)
    square = PIL.new("RGB", (side, side), tuple(int(part * 255) for part in mean))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def shortest_edge(image: Image, size: int) -> Image:
    """The image with its shorter side at ``size`` pixels, bicubic; the longer side is rounded down.

    >>> shortest_edge(PIL.new("RGB", (41, 20)), 10).size
    (20, 10)
    """
    width, height = image.size
    longer = int(size * max(width, height) / min(width, height))
    return image.resize((size, longer) if width <= height else (longer, size), PIL.Resampling.BICUBIC)


def centre_crop(image: Image, size: int) -> Image:
    """The middle ``size`` x ``size`` pixels of an image that is at least as large.

    >>> centre_crop(PIL.new("RGB", (41, 20)), 10).size
    (10, 10)
    """
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def normalised(image: Image, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """Pixels as the model reads them: (3, height, width) float32, (level / 255 - mean) / std of each colour."""
    levels = np.asarray(image, dtype=np.float32) / np.float32(255)
    values = (levels - np.asarray(mean, dtype=np.float32)) / np.asarray(std, dtype=np.float32)
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


@dataclass(frozen=True)
class PixelProcessor:
    """Stands where transformers has an image processor: called with ``images``, it gives ``pixel_values``.

    Attributes:
        steps: what is done to the RGB image, one after another.
        mean, std: of the normalisation at the end.
    """

    steps: tuple[Step, ...]
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __call__(self, images: Image, return_tensors: str = "pt") -> dict[str, Tensor]:
        """``pixel_values`` (1, 3, height, width) float32 of one image."""
        image = rgb(images)
        for step in self.steps:
            image = step(image)
        return {"pixel_values": normalised(image, self.mean, self.std)[None]}
