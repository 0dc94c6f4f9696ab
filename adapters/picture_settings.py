"""Change how a model's pictures are prepared: bring them to a square, or limit their number of pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stethoscope.core.errors import CapabilityError, ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, ProcessorMixin

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of CLIP's training pixels (Radford et al. 2021) in red, green and blue; white is 1."""

SQUARES = ("none", "pad", "crop", "stretch")
"""Ways to bring a picture to a square before the image processor sees it."""


def make_square(image: Image, square: str, processor: ProcessorMixin, name: str) -> Image:
    """Bring an RGB picture to a square in one of the ways of ``SQUARES``; see ``mean_colour`` for padding."""
    match square:
        case "pad":
            return pad_to_square(image, mean_colour(processor, name))
        case "crop":
            return crop_to_square(image)
        case "stretch":
            return stretch_to_square(image)
    return image


def mean_colour(processor: ProcessorMixin, name: str) -> tuple[float, ...]:
    """Return the mean that the image processor subtracts: red, green and blue in [0, 1].

    Args:
        processor: of the model.
        name: of the model, for the message.

    Raises:
        CapabilityError: the image processor does not subtract a mean of three colours.
    """
    images = processor.image_processor
    mean = getattr(images, "image_mean", None) or getattr(images, "mean", None)
    if not isinstance(mean, (list, tuple)) or len(mean) != 3:
        raise CapabilityError(f"model.pad=true: the {type(images).__name__} of {name} has no mean colour to pad with")
    return tuple(mean)


def pad_to_square(image: Image, mean: Sequence[float] = CLIP_MEAN) -> Image:
    """Pad to a square of one colour, with the image in the middle.

    Args:
        image: RGB.
        mean: colour in [0, 1], rounded down to whole levels as the authors of LLaVA do.

    >>> from PIL import Image
    >>> pad_to_square(Image.new("RGB", (4, 2), "white")).getpixel((0, 0))
    (122, 116, 104)
    """
    from PIL import Image as Images

    width, height = image.size
    side = max(width, height)
    square = Images.new("RGB", (side, side), tuple(int(part * 255) for part in mean))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def crop_to_square(image: Image) -> Image:
    """Crop to the largest square in the middle.

    >>> from PIL import Image
    >>> crop_to_square(Image.new("RGB", (41, 20))).size
    (20, 20)
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def stretch_to_square(image: Image) -> Image:
    """Resize to a square as wide as the image's longer side, bicubic, without keeping the aspect ratio.

    >>> from PIL import Image
    >>> stretch_to_square(Image.new("RGB", (41, 20))).size
    (41, 41)
    """
    from PIL.Image import Resampling

    side = max(image.size)
    return image.resize((side, side), Resampling.BICUBIC)


def limit_pixels(model: PreTrainedModel, processor: ProcessorMixin, most: int, name: str) -> None:
    """Let the image processor scale pictures down to at most so many pixels, by the setting of its family.

    Qwen's ``longest_edge`` is a number of pixels; LLaVA-NeXT and LLaVA-OneVision choose among ``image_grid_pinpoints``,
    InternVL cuts into at most ``max_patches`` tiles, and Idefics and SmolVLM scale the longer side to
    ``longest_edge``. The small copy of the whole picture that some of them add is not counted. A family that
    reads every picture at one size keeps it.

    Args:
        model: its configuration repeats some settings of the processor.
        processor: is changed.
        most: largest number of pixels.
        name: of the model, for messages.

    Raises:
        ConfigError: the family's smallest picture has more pixels.
        CapabilityError: it is not known how the image processor chooses its size.
    """
    images = processor.image_processor
    size = dict(getattr(images, "size", None) or {})
    if getattr(images, "merge_size", None) and {"shortest_edge", "longest_edge"} <= set(size):
        _check_least((images.patch_size * images.merge_size) ** 2, most, name, "one image token")
        longest = min(size["longest_edge"], most)
        shortest = min(size["shortest_edge"], longest)
        images.size = type(images.size)(**{**size, "longest_edge": longest, "shortest_edge": shortest})
    elif grids := getattr(images, "image_grid_pinpoints", None):
        _check_least(min(rows * columns for rows, columns in grids), most, name, "its smallest grid of tiles")
        kept = [[rows, columns] for rows, columns in grids if rows * columns <= most]
        images.image_grid_pinpoints = model.config.image_grid_pinpoints = kept
    elif getattr(images, "max_patches", None):
        tile = size["height"] * size["width"]
        _check_least(tile, most, name, "one tile")
        images.max_patches = min(images.max_patches, most // tile)
        images.min_patches = min(images.min_patches, images.max_patches)
    elif getattr(images, "max_image_size", None) and "longest_edge" in size:
        tile = images.max_image_size["longest_edge"]
        _check_least(tile * tile, most, name, "one tile")
        longest = min(size["longest_edge"], math.isqrt(most // (tile * tile)) * tile)
        images.size = type(images.size)(**{**size, "longest_edge": longest})
    else:
        _check_least(_fixed_pixels(images, name), most, name, "every picture")


def _check_least(pixels: int, most: int, name: str, part: str) -> None:
    """Refuse a limit below the pixels of what a model reads at least."""
    if pixels > most:
        raise ConfigError(
            f"model.max_pixels={most} is too few for {name}: {part} has {pixels:,} pixels; give at least that, or null"
        )


def _fixed_pixels(images: Any, name: str) -> int:
    """Return the pixels of the one size at which a family reads pictures, which two pictures show.

    Raises:
        CapabilityError: the two pictures come out at different sizes.
    """
    from PIL import Image as Images

    shapes = {
        tuple(images(images=Images.new("RGB", size), return_tensors="pt")["pixel_values"].shape)
        for size in ((64, 64), (640, 320))
    }
    shape = shapes.pop()
    if shapes or len(shape) < 4:
        raise CapabilityError(
            f"model.max_pixels: it is not known how the {type(images).__name__} of {name} chooses the size of a "
            "picture; scale the pictures yourself, and leave model.max_pixels at null"
        )
    return int(shape[-2] * shape[-1])
