"""BLIP-2 and InstructBLIP repositories of all ages: what transformers 5 needs and old revisions do not hold.

Before the image tokens were part of ``input_ids`` there was no ``image_token_index`` in the model's configuration, no
``num_query_tokens`` in the processor's and no ``<image>`` in the vocabulary. Both can be told from the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stethoscope.core.errors import CapabilityError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

PROCESSORS = {"blip-2": "Blip2Processor", "instructblip": "InstructBlipProcessor"}
"""Class of the processor by transformers' ``model_type``."""


def model_type(source: str, where: Mapping[str, Any]) -> str | None:
    """The ``model_type`` that the configuration of a folder or hub id names.

    Args:
        where: what ``from_pretrained`` is told about the place, see ``loading.Loading.where``.
    """
    from transformers import PreTrainedConfig

    return PreTrainedConfig.get_config_dict(source, **where)[0].get("model_type")


def load_processor(source: str, where: Mapping[str, Any]) -> ProcessorMixin:
    """The processor for images, put together from its parts.

    The name that the repository gives is not believed: a revision of ``Salesforce/instructblip-vicuna-7b`` calls for
    the processor of InstructBLIP's video model.

    Args:
        source: folder or hub id of a model whose type is one of ``PROCESSORS``. ``where``: as for ``model_type``.
    """
    import transformers
    from transformers import AutoTokenizer

    family = model_type(source, where)
    parts = [_images().from_pretrained(source, **where), AutoTokenizer.from_pretrained(source, **where)]
    if family == "instructblip":
        parts.append(AutoTokenizer.from_pretrained(source, subfolder="qformer_tokenizer", **where))
    return getattr(transformers, PROCESSORS[family])(*parts)


def complete(model: PreTrainedModel, processor: ProcessorMixin) -> None:
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


def _images() -> type:
    """BLIP's image processor; the one that needs no torchvision where that is not installed."""
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        from transformers import BlipImageProcessor
    else:
        from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil as BlipImageProcessor
    return BlipImageProcessor
