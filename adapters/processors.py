"""Processors for images and text, also of families whose processor wants to read videos too.

Their video processors need torchvision, and SmolVLM's processor num2words for the sentence that introduces a video;
a question about an image needs neither.
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

_VIDEO = "video_processor"


def load(source: str, hub_kwargs: Mapping[str, Any]) -> ProcessorMixin:
    """What ``AutoProcessor`` loads; where that fails and the family reads videos too, the processor without them.

    Args:
        source: folder or hub id.
        hub_kwargs: what ``from_pretrained`` is told about the place, see ``loading.Loading.hub_kwargs``.

    Raises:
        CapabilityError: the processor's parts for images and text cannot be loaded either.
        Exception: whatever ``AutoProcessor`` raised, where videos have nothing to do with it.
    """
    from transformers import PROCESSOR_MAPPING, AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer

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
            images = AutoImageProcessor.from_pretrained(source, **hub_kwargs)
            tokenizer = AutoTokenizer.from_pretrained(source, **hub_kwargs)
            settings, _ = cls.get_processor_dict(source, **hub_kwargs)
        except (ImportError, OSError, ValueError, TypeError, AttributeError) as second:
            raise CapabilityError(
                f"the {cls.__name__} of {source} cannot be loaded, even without videos: {first_line(second)}"
            ) from error
        parts = cls.get_attributes()
        known = [name for name in inspect.signature(cls.__init__).parameters if name in settings and name not in parts]
        return images_only(cls, images, tokenizer, **{name: settings[name] for name in known})


def complete(model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Set what a LLaVA processor must know of its model, by the model: folders from before 2025 lack or mistake it."""
    vision = getattr(model.config, "vision_config", None)
    if vision is None or not hasattr(processor, "num_additional_image_tokens"):
        return
    facts = {
        "patch_size": getattr(vision, "patch_size", None),
        "vision_feature_select_strategy": getattr(model.config, "vision_feature_select_strategy", None),
        "num_additional_image_tokens": int(any("class_embedding" in name for name, _ in model.named_parameters())),
    }
    for name, value in facts.items():
        before = getattr(processor, name, None)
        if value is None or before == value:
            continue
        setattr(processor, name, value)
        if before:
            warnings.warn(f"{name}={before} of the processor does not fit the model; taken is {value}", stacklevel=3)


def images_only(cls: type[ProcessorMixin], images: Any, tokenizer: Any, **settings: Any) -> ProcessorMixin:
    """A processor of a class that reads videos too, without what it needs for them.

    Args:
        cls: the processor's class.
        images: its image processor.
        settings: what else its constructor takes.

    Returns:
        An instance of a subclass of the same name.
    """
    kind = type(cls.__name__, (_ImagesOnly, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})
    with _words_of_videos(cls):
        return kind(image_processor=images, tokenizer=tokenizer, video_processor=None, **settings)


class _ImagesOnly:
    """Mixed into a processor's class: all but its video processor."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Parts that are checked, kept and saved."""
        return [name for name in super().get_attributes() if name != _VIDEO]

    def apply_chat_template(self, conversation: Any, *arguments: Any, **settings: Any) -> Any:
        """As every processor does; SmolVLM's own method asks its video processor for numbers of frames first."""
        from transformers import ProcessorMixin

        return ProcessorMixin.apply_chat_template(self, conversation, *arguments, **settings)


@contextmanager
def _words_of_videos(cls: type[ProcessorMixin]) -> Iterator[None]:
    """Lets the constructor of SmolVLM's processor pass its check for num2words, and takes nothing else's place."""
    module = sys.modules[cls.__module__]
    missing = getattr(module, "num2words", cls) is None
    if missing:
        module.num2words = str
    try:
        yield
    finally:
        if missing:
            module.num2words = None


BLIP_PROCESSORS = {"blip-2": "Blip2Processor", "instructblip": "InstructBlipProcessor"}
"""Class of the processor by transformers' ``model_type``."""


def model_type_of(source: str, hub_kwargs: Mapping[str, Any]) -> str | None:
    """The ``model_type`` that the configuration of a folder or hub id names.

    Args:
        hub_kwargs: what ``from_pretrained`` is told about the place, see ``loading.Loading.hub_kwargs``.
    """
    from transformers import PreTrainedConfig

    return PreTrainedConfig.get_config_dict(source, **hub_kwargs)[0].get("model_type")


def load_blip(source: str, hub_kwargs: Mapping[str, Any]) -> ProcessorMixin:
    """The processor for images, put together from its parts.

    The name that the repository gives is not believed: a revision of ``Salesforce/instructblip-vicuna-7b`` calls for
    the processor of InstructBLIP's video model.

    Args:
        source: folder or hub id of a model whose type is one of ``BLIP_PROCESSORS``.
        hub_kwargs: as for ``model_type_of``.
    """
    import transformers
    from transformers import AutoTokenizer

    family = model_type_of(source, hub_kwargs)
    parts = [_blip_images().from_pretrained(source, **hub_kwargs), AutoTokenizer.from_pretrained(source, **hub_kwargs)]
    if family == "instructblip":
        parts.append(AutoTokenizer.from_pretrained(source, subfolder="qformer_tokenizer", **hub_kwargs))
    return getattr(transformers, BLIP_PROCESSORS[family])(*parts)


def complete_blip(model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Makes model and processor agree on how many image tokens there are and which id they have.

    The id's embedding is never read, since the image takes its place; a vocabulary without room for it grows by a row.

    Raises:
        CapabilityError: it has to grow and is not on a device.
    """
    processor.num_query_tokens = model.config.num_query_tokens
    token = processor.tokenizer.convert_tokens_to_ids(str(processor.image_token))
    words = model.get_input_embeddings().weight
    if token >= words.shape[0]:
        if words.is_meta or model.get_output_embeddings().weight.is_meta:
            raise CapabilityError(
                f"an old revision with {words.shape[0]} words needs one more for the image, which cannot be added to "
                "offloaded weights; take a newer revision, or a device_map with the language model on a device"
            )
        model.resize_token_embeddings(token + 1)
    model.config.image_token_index = token


def _blip_images() -> type:
    """BLIP's image processor; the one that needs no torchvision where that is not installed."""
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        from transformers import BlipImageProcessor
    else:
        from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil as BlipImageProcessor
    return BlipImageProcessor
