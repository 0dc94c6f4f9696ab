"""What a model needs, counted on its skeleton: no weight is read, only the configuration."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stethoscope.adapters import loading as files
from stethoscope.adapters.loading import Loading
from stethoscope.core.types import Memory
from stethoscope.relevancy.attention_backward import BUDGET

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedConfig, PreTrainedModel

_BLOCK = 64  # weights that share a scale in NF4, a float32
_CODES = 16 * 4  # the table of NF4's values that every matrix carries


@contextmanager
def on_meta_device() -> Iterator[None]:
    """Models made in this block have shapes but no numbers."""
    with torch.device("meta"), files.silenced(True):
        yield


def skeleton(model_id: str, loading: Loading) -> PreTrainedModel:
    """The model of a folder or hub id without its weights, in the dtype that it would be loaded in.

    Raises:
        ConfigError, CapabilityError: as ``loading.load``.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    folder = files.is_folder(model_id)
    with files.translate_loading_errors(model_id):
        hub_kwargs = loading.hub_kwargs(folder)
        config = AutoConfig.from_pretrained(files.source_of(model_id, folder), **hub_kwargs)
        with on_meta_device():
            trusted = {"trust_remote_code": loading.trust_remote_code}
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype_of(config, loading), **trusted)
    _own_head(model)
    return model


def _own_head(model: PreTrainedModel) -> None:
    """Flan-T5 has a head of its own. transformers shares it until a checkpoint proves the opposite."""
    text = model.config.get_text_config()
    head = model.get_output_embeddings()
    if getattr(text, "scale_decoder_outputs", None) is False and head is not None:
        head.weight = nn.Parameter(torch.empty_like(head.weight))


def dtype_of(config: PreTrainedConfig, loading: Loading) -> torch.dtype:
    """The dtype that weights are loaded in; that of the checkpoint, as its configuration tells, for ``auto``."""
    if loading.dtype != "auto":
        return getattr(torch, loading.dtype)
    for part in (config, config.get_text_config()):
        named = getattr(part, "dtype", None)
        if named is not None:
            return getattr(torch, named) if isinstance(named, str) else named
    return torch.float32


def estimate(model: PreTrainedModel, loading: Loading, context: int, batch_size: int, new_tokens: int = 512) -> Memory:
    """Estimate what a model needs to answer and to be explained.

    The weights are exact. Generation keeps keys and values of every layer for the whole context, and the logits of
    every step in float32. Relevancy keeps the inputs of all layers and runs one layer at a time again
    (``relevancy.tape``): of that layer it keeps about six times the hidden and four times the inner width for every
    position, and attention maps up to its budget; of the head the logits of the answer, in the model's precision, in
    float32 and their gradient.

    Args:
        model: with or without weights.
        context: prompt and answer in tokens, image tokens too.
        batch_size: prompts that generate together.
        new_tokens: the longest answer in tokens, of ``context`` at most.
    """
    rows = min(new_tokens, context)
    logits = rows * model.config.get_text_config(decoder=True).vocab_size
    return Memory(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        weights=weights(model, loading),
        cache=batch_size * (context * _cache_of_a_token(model) + 4 * logits),
        relevancy=_kept_for_backward(model, context) + (4 + 2 * model.dtype.itemsize) * logits,
    )


def weights(model: PreTrainedModel, loading: Loading) -> int:
    """Bytes of all parameters as ``loading`` stores them; shared ones once."""
    small = _quantised(model) if loading.quantize else set()
    exact = _stays_exact(model)
    total = 0
    for name, parameter in model.named_parameters():
        if name in small:
            rows, columns = parameter.shape
            blocks = -(-parameter.numel() // _BLOCK)
            four = -(-parameter.numel() // 2) + 4 * blocks + _CODES
            total += four if loading.quantize == "4bit" else rows * columns + 4 * rows
        else:
            wide = exact is not None and exact.search(name)
            total += parameter.numel() * (4 if wide else parameter.element_size())
    return total


def _quantised(model: PreTrainedModel) -> set[str]:
    """Names of the matrices that bitsandbytes would replace, by the rule that transformers applies."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    whole = [files.WHOLE, *(model._keep_in_fp32_modules or ())]
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module) is nn.Linear and should_convert_module(name, whole)
    }


def _stays_exact(model: PreTrainedModel) -> re.Pattern | None:
    """The parameters that transformers keeps in float32 where half precision is asked for, found in names as it does.

    BLIP-2's Q-Former and T5's ``wo`` in float16, for instance.
    """
    names: list[str] = []
    if model.dtype in (torch.float16, torch.bfloat16):
        names += model._keep_in_fp32_modules_strict or ()
    if model.dtype == torch.float16:
        names += model._keep_in_fp32_modules or ()
    return re.compile("|".join(names)) if names else None


def _cache_of_a_token(model: PreTrainedModel) -> int:
    """Bytes of the keys and values of one position in all layers of the language model."""
    text = model.config.get_text_config(decoder=True)
    heads = _first(text, ("num_key_value_heads", "num_attention_heads", "num_heads"), 1)
    width = _first(text, ("head_dim", "d_kv"), 0) or _width(text) // _first(text, ("num_attention_heads",), 1)
    layers = _first(text, ("num_decoder_layers", "num_hidden_layers", "num_layers"), 0)
    both = 2 if text.is_encoder_decoder else 1  # the cross-attention's keys and values are kept too
    return both * 2 * layers * heads * width * model.dtype.itemsize


def _kept_for_backward(model: PreTrainedModel, context: int) -> int:
    """Bytes of the layers' inputs, and of the graph of the largest layer with its attention maps."""
    parts = [(model.config.get_text_config(decoder=True), context)]
    vision = getattr(model.config, "vision_config", None)
    if vision is not None and _first(vision, ("num_attention_heads", "num_heads", "attention_heads"), 0):
        parts.append((vision, _patches(vision, context)))  # relevancy stops before a tower without attention
    kept = again = maps = 0
    for config, positions in parts:
        layers = _first(config, ("num_hidden_layers", "num_layers", "depth"), 0)
        layers += _first(config, ("num_decoder_layers",), 0) if config.is_encoder_decoder else 0
        inner = _first(config, ("intermediate_size", "ffn_dim", "d_ff"), 0) or 4 * _width(config)
        kept += layers * positions * _width(config)
        again = max(again, positions * (6 * _width(config) + 4 * inner))
        heads = _first(config, ("num_attention_heads", "num_heads", "attention_heads"), 1)
        maps = max(maps, 4 * heads * positions**2)
    return (kept + again) * model.dtype.itemsize + min(maps, BUDGET)


def _patches(vision: PreTrainedConfig, context: int) -> int:
    """Positions in the tower: those of one image at its published size, else the context, which holds the image."""
    size, patch = (_first(vision, (name,), 0) for name in ("image_size", "patch_size"))
    return (size // patch) ** 2 + 1 if size and patch else context


def _width(config: PreTrainedConfig) -> int:
    return _first(config, ("hidden_size", "embed_dim", "d_model"), 0)


def _first(config: Any, names: Sequence[str], default: int) -> int:
    """The first of the attributes that the configuration has; of a list (sides of an image, stages) the last."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)) and value:
            value = value[-1]
        if isinstance(value, int):
            return value
    return default
