"""Load processors for images and text, and change how they prepare a picture: padding, largest number of pixels.

The video parts of families that have them are left out: video processors need torchvision, and SmolVLM's processor
needs num2words for the sentence that introduces a video; a question about an image needs neither.
"""

from __future__ import annotations

import inspect
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from stethoscope.core.errors import CapabilityError, ConfigError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, ProcessorMixin
    from transformers import ProcessorMixin as _ProcessorBase
else:
    _ProcessorBase = object

_VIDEO = "video_processor"
BLIP_PROCESSORS = {"blip-2": "Blip2Processor", "instructblip": "InstructBlipProcessor"}
"""Class of the processor by transformers' ``model_type``."""


def load(source: str, hub_kwargs: Mapping[str, Any]) -> ProcessorMixin:
    """Load the processor with ``AutoProcessor``, without its video part where that cannot be loaded.

    Args:
        source: folder or hub id.
        hub_kwargs: arguments of ``from_pretrained``, see ``loading.Loading.hub_kwargs``.

    Raises:
        CapabilityError: the processor's parts for images and text cannot be loaded either.
        Exception: whatever ``AutoProcessor`` raised, where the family reads no videos.
    """
    from transformers import (
        PROCESSOR_MAPPING,
        AutoConfig,
        AutoImageProcessor,
        AutoProcessor,
        AutoTokenizer,
        PreTrainedConfig,
    )

    model_type = PreTrainedConfig.get_config_dict(source, **hub_kwargs)[0].get("model_type")
    if model_type in BLIP_PROCESSORS:
        return _load_blip(source, hub_kwargs, model_type)
    try:
        return AutoProcessor.from_pretrained(source, **hub_kwargs)
    except (ImportError, OSError, ValueError, TypeError, AttributeError) as error:
        try:
            cls = PROCESSOR_MAPPING.get(type(AutoConfig.from_pretrained(source, **hub_kwargs)), None)
        except (OSError, ValueError):
            raise error from None
        if cls is None or _VIDEO not in cls.get_attributes():
            raise
        try:
            image_processor = AutoImageProcessor.from_pretrained(source, **hub_kwargs)
            tokenizer = AutoTokenizer.from_pretrained(source, **hub_kwargs)
            settings, _ = cls.get_processor_dict(source, **hub_kwargs)
        except (ImportError, OSError, ValueError, TypeError, AttributeError) as part_error:
            raise CapabilityError(
                f"the {cls.__name__} of {source} cannot be loaded, even without videos: {first_line(part_error)}"
            ) from error
        parts = cls.get_attributes()
        known = [name for name in inspect.signature(cls.__init__).parameters if name in settings and name not in parts]
        return images_only(cls, image_processor, tokenizer, **{name: settings[name] for name in known})


def complete(model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Set the processor's image-token settings from the model; folders from before 2025 lack them or are wrong."""
    if model.config.model_type in BLIP_PROCESSORS:
        _complete_blip(model, processor)
    vision = getattr(model.config, "vision_config", None)
    if vision is None or not hasattr(processor, "num_additional_image_tokens"):
        return
    values = {
        "patch_size": getattr(vision, "patch_size", None),
        "vision_feature_select_strategy": getattr(model.config, "vision_feature_select_strategy", None),
        "num_additional_image_tokens": int(any("class_embedding" in name for name, _ in model.named_parameters())),
    }
    for name, value in values.items():
        before = getattr(processor, name, None)
        if value is None or before == value:
            continue
        setattr(processor, name, value)
        if before:
            warnings.warn(f"{name}={before} of the processor does not fit the model; {value} is used", stacklevel=3)


def images_only(cls: type[ProcessorMixin], image_processor: Any, tokenizer: Any, **settings: Any) -> ProcessorMixin:
    """Build a processor without its video part.

    Args:
        cls: class of a processor that reads videos too.
        image_processor: for images.
        tokenizer: for text.
        settings: further arguments of its constructor.

    Returns:
        An instance of a subclass of the same name.
    """
    subclass = type(cls.__name__, (_ImagesOnly, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})
    with _without_num2words(cls):
        return subclass(image_processor=image_processor, tokenizer=tokenizer, video_processor=None, **settings)


class _ImagesOnly(_ProcessorBase):
    """Remove the video processor from the class that it is mixed into."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        """List the parts that are checked and saved."""
        return [name for name in super().get_attributes() if name != _VIDEO]

    def apply_chat_template(self, conversation: Any, *arguments: Any, **settings: Any) -> Any:
        """Call the base method; SmolVLM's own first asks its video processor for numbers of frames."""
        from transformers import ProcessorMixin

        return ProcessorMixin.apply_chat_template(self, conversation, *arguments, **settings)


@contextmanager
def _without_num2words(cls: type[ProcessorMixin]) -> Iterator[None]:
    """Satisfy the check for num2words in the constructor of SmolVLM's processor; change no other module."""
    names = vars(sys.modules[cls.__module__])
    missing = names.get("num2words", cls) is None
    if missing:
        names["num2words"] = str
    try:
        yield
    finally:
        if missing:
            names["num2words"] = None


def _load_blip(source: str, hub_kwargs: Mapping[str, Any], model_type: str) -> ProcessorMixin:
    """Build a BLIP processor from its parts, with the image processor that needs no torchvision where that is missing.

    The class that the repository names is ignored: a revision of ``Salesforce/instructblip-vicuna-7b`` names the
    processor of InstructBLIP's video model.
    """
    import transformers
    from transformers import AutoTokenizer
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        from transformers import BlipImageProcessor
    else:
        from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil as BlipImageProcessor
    parts = [part.from_pretrained(source, **hub_kwargs) for part in (BlipImageProcessor, AutoTokenizer)]
    if model_type == "instructblip":
        parts.append(AutoTokenizer.from_pretrained(source, subfolder="qformer_tokenizer", **hub_kwargs))
    return getattr(transformers, BLIP_PROCESSORS[model_type])(*parts)


def _complete_blip(model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Make model and processor agree on the number and the id of image tokens.

    The id's embedding is never read, since image features replace it; a vocabulary without room for it grows by a row.

    Raises:
        CapabilityError: the vocabulary has to grow and its embeddings are offloaded.
    """
    processor.num_query_tokens = model.config.num_query_tokens
    token = processor.tokenizer.convert_tokens_to_ids(str(processor.image_token))
    embeddings = model.get_input_embeddings().weight
    if token >= embeddings.shape[0]:
        if embeddings.is_meta or model.get_output_embeddings().weight.is_meta:
            raise CapabilityError(
                f"an old revision with {embeddings.shape[0]} tokens needs one more for the image, which cannot be "
                "added to offloaded weights; take a newer revision, or a device_map with the language model on a device"
            )
        model.resize_token_embeddings(token + 1)
    model.config.image_token_index = token


# --- how a picture is prepared ----------------------------------------------------------------------------------------


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of CLIP's training pixels (Radford et al. 2021) in red, green and blue; white is 1."""


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


SQUARES = ("none", "pad", "crop", "stretch")
"""Ways to bring a picture to a square before the image processor sees it."""


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
