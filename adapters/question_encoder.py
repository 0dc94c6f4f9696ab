"""Encode pictures and questions as one model takes them: a phrase for what is asked, a picture of the right shape.

Pictures are brought to a square, or limited in their number of pixels, where the configuration says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from PIL import Image as Images

from stethoscope.adapters.prompts import QUESTION
from stethoscope.core.errors import CapabilityError, ConfigError, DataError, unknown
from stethoscope.core.system import ModelFaults
from stethoscope.core.text import counted
from stethoscope.core.types import Picture, load_picture
from stethoscope.tracing.trace import Encoded

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, ProcessorMixin

ASKS = ("question", "description")
"""What a task can ask for."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of CLIP's training pixels (Radford et al. 2021) in red, green and blue; white is 1."""

SQUARES = ("none", "pad", "crop", "stretch")
"""Ways to bring a picture to a square before the image processor sees it."""


class QuestionEncoder:
    """Encode pictures and questions for one loaded model.

    Args:
        name: of the model, for messages.
        model: whose configuration says how long a prompt may be.
        processor: of the model.
        encoder: builds a prompt around a picture, a question and, where there are any, earlier questions and answers.
        phrases: by what is asked for, the text that stands in place of the question, see ``check_phrases``.
        square: how pictures are brought to a square, one of ``SQUARES``.

    Attributes:
        square: as given.
        template: the prompt as rendered, with ``{question}``; None where the encoder does not say.

    Raises:
        ConfigError: there is no such way to a square, or the prompt lacks the image placeholder.
        CapabilityError: the processor has no colour to pad with, or refuses a picture.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        encoder: Callable[..., Encoded],
        phrases: Mapping[str, str],
        square: str,
    ) -> None:
        self._name, self._processor, self._phrases = name, processor, phrases
        self.encoder, self.template = encoder, getattr(encoder, "template", None)
        self._context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.square = self._checked(square)
        try:  # a broken processor is detected before the first sample
            encoder(Images.new("RGB", (336, 336), "grey"), "Is there a dog in the image?")
        except DataError as error:
            raise CapabilityError(f"the processor of {name} does not work: {error}") from error

    def with_square(self, square: str) -> QuestionEncoder:
        """Return the same encoder with another way to bring pictures to a square; errors are those of the class."""
        other = copy(self)
        other.square = self._checked(square)
        return other

    def _checked(self, square: str) -> str:
        if square not in SQUARES:
            raise ConfigError(unknown("way to make a picture square", square, SQUARES))
        if square == "pad":
            mean_colour(self._processor, self._name)
        return square

    @property
    def has_turns(self) -> bool:
        """Whether the prompt has room for earlier questions and answers."""
        return getattr(self.encoder, "turns", None) is not None

    def __call__(self, asks: str, image: Picture, question: str, turns: tuple[tuple[str, str], ...] = ()) -> Encoded:
        """Encode the phrase for what is asked for, with the picture as a square where that is set.

        Args:
            asks: one of ``ASKS``.
            image: that is asked about.
            question: the text.
            turns: earlier questions and their answers, for a prompt that ``has_turns``.

        Raises:
            DataError: see ``HfAdapter.encode``.
        """
        image = load_picture(image)
        phrase, earlier_phrase = (self._phrases.get(key, QUESTION) for key in (asks, "question"))
        earlier = tuple((earlier_phrase.replace(QUESTION, old), answer) for old, answer in turns)
        with ModelFaults(f"the processor of {self._name} fails on this picture and question"):
            picture = make_square(image, self.square, self._processor, self._name)
            encoded = self.encoder(picture, phrase.replace(QUESTION, question), *([earlier] if turns else []))
            encoded = replace(encoded, question=question, asks=asks, history=turns)
        if self._context and encoded.spans.length >= self._context:
            begin = f", with {counted(len(turns), 'earlier turn')}" if turns else ""
            raise DataError(
                f"the prompt has {encoded.spans.length:,} tokens, image tokens included{begin}; {self._name} reads "
                f"fewer than {self._context:,}"
            )
        return encoded


def check_phrases(phrases: Any) -> dict[str, str]:
    """Return the phrases by what a task asks for; raise ConfigError for an unknown key or one without a question."""
    if phrases is None:
        return {}
    if not isinstance(phrases, Mapping) or not all(isinstance(phrase, str) for phrase in phrases.values()):
        raise ConfigError(
            f"model.phrases={phrases!r} should be texts by what is asked for, as "
            f"{{question: 'answer en {QUESTION}', description: caption en}}"
        )
    for asks, phrase in phrases.items():
        if asks not in ASKS:
            raise ConfigError(unknown("key of model.phrases", str(asks), ASKS))
        if phrase.count(QUESTION) > 1 or (asks == "question" and QUESTION not in phrase) or not phrase.strip():
            raise ConfigError(f"model.phrases.{asks}={phrase!r} should hold {QUESTION} once")
    return dict(phrases)


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
    side = max(image.size)
    return image.resize((side, side), Images.Resampling.BICUBIC)


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
