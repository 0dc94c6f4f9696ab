"""Load processors for images and text, and make old ones fit their models.

The video parts of families that have them are left out: video processors need torchvision, and SmolVLM's processor
needs num2words for the sentence that introduces a video; a question about an image needs neither.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from stethoscope.core.errors import CapabilityError, first_line

if TYPE_CHECKING:
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
