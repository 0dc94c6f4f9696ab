"""Estimate a model's memory from its configuration alone; no weight is read."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from stethoscope.adapters import loading as files
from stethoscope.adapters.load_settings import NOT_QUANTIZED, Loading
from stethoscope.core.types import Memory
from stethoscope.relevancy.attention_backward import BUDGET

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedConfig, PreTrainedModel

SHIPPED = "the sizes that come with stethoscope"
_NF4_BLOCK = 64  # weights that share a scale in NF4, a float32
_KEPT_MAP = 2**20  # entries of the largest attention map that a graph keeps
_NF4_TABLE = 16 * 4  # bytes of the table of NF4's values, of which every matrix has a copy


@contextmanager
def on_meta_device() -> Iterator[None]:
    """Build models in this block on the meta device: with shapes, without values."""
    with torch.device("meta"), files.silenced(True):
        yield


def skeleton(model_id: str, loading: Loading) -> PreTrainedModel:
    """Build the model of a folder or hub id on the meta device, in the dtype that it would be loaded in.

    Raises:
        ConfigError, CapabilityError: as ``loading.load``.
    """
    from transformers import AutoModelForImageTextToText

    config = read_config(model_id, loading)
    with files.translate_loading_errors(model_id), on_meta_device():
        code = {"trust_remote_code": loading.trust_remote_code}
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype_of(config, loading), **code)
    head = model.get_output_embeddings()
    if getattr(config.get_text_config(), "scale_decoder_outputs", None) is False and head is not None:
        # Flan-T5's head has its own weights; transformers ties them to the embeddings unless a checkpoint has them
        head.weight = nn.Parameter(torch.empty_like(head.weight))
    return model


def read_config(model_id: str, loading: Loading) -> PreTrainedConfig:
    """Read the configuration of a folder or hub id; of a known hub id that is not in the cache, take ours.

    The sizes of ``known_configs.json`` are those that the models' cards and repositories give; ours is marked by the
    path ``SHIPPED``.

    Raises:
        ConfigError, CapabilityError: as ``loading.load``.
    """
    from transformers import AutoConfig

    folder = files.is_folder(model_id)
    known = {} if folder else json.loads(Path(__file__).with_name("known_configs.json").read_text("utf-8"))
    with files.translate_loading_errors(model_id):
        path, settings = str(Path(model_id).expanduser()), loading.hub_kwargs(folder)
        if model_id not in known:
            return AutoConfig.from_pretrained(path, **settings)
        try:
            return AutoConfig.from_pretrained(path, **{**settings, "local_files_only": True})
        except OSError:  # not in the cache
            config = AutoConfig.for_model(**known[model_id])
            config.name_or_path = SHIPPED
            return config


def dtype_of(config: PreTrainedConfig, loading: Loading) -> torch.dtype:
    """Return the dtype that weights are loaded in; for ``auto`` that of the configuration, else float32."""
    if loading.dtype != "auto":
        return getattr(torch, loading.dtype)
    for part in (config, config.get_text_config()):
        dtype = getattr(part, "dtype", None)
        if dtype is not None:
            return getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return torch.float32


def estimate(model: PreTrainedModel, loading: Loading, context: int, batch_size: int, new_tokens: int = 512) -> Memory:
    """Estimate the memory for generation and for relevancy, in bytes.

    The weights are exact. Generation stores keys and values of every layer for the whole context, and the logits of
    one step in float32, the model's and the processed ones. Relevancy stores the inputs of all layers and recomputes
    one layer at a time: of that layer about six times the hidden and four times the inner width for every position, and
    attention maps up to its budget; of the head the logits of the answer, in the model's precision, in float32 and
    their gradient.

    Args:
        model: with or without weights.
        loading: settings that the model is loaded with.
        context: length of prompt and answer in tokens, image tokens included.
        batch_size: number of prompts that generate together.
        new_tokens: the longest answer in tokens; at most ``context`` are counted.
    """
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    logits = min(new_tokens, context) * vocabulary
    return Memory(
        shipped=model.config.name_or_path == SHIPPED,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        weights=weights(model, loading),
        cache=batch_size * (context * _cache_bytes_per_token(model) + 8 * vocabulary),
        relevancy=_backward_bytes(model, context) + (4 + 2 * model.dtype.itemsize) * logits,
    )


def weights(model: PreTrainedModel, loading: Loading) -> int:
    """Count the bytes of all parameters as ``loading`` stores them, shared ones once."""
    quantized = _quantized_weights(model) if loading.quantize else set()
    float32_names = _float32_pattern(model)
    total = 0
    for name, parameter in model.named_parameters():
        if name in quantized:
            rows, columns = parameter.shape
            blocks = -(-parameter.numel() // _NF4_BLOCK)
            nf4_bytes = -(-parameter.numel() // 2) + 4 * blocks + _NF4_TABLE
            total += nf4_bytes if loading.quantize == "4bit" else rows * columns + 4 * rows
        else:
            is_float32 = float32_names is not None and float32_names.search(name)
            total += parameter.numel() * (4 if is_float32 else parameter.element_size())
    return total


def _quantized_weights(model: PreTrainedModel) -> set[str]:
    """List the names of the matrices that bitsandbytes would replace, by the rule of transformers."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    excluded = [NOT_QUANTIZED, *(model._keep_in_fp32_modules or ())]
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module) is nn.Linear and should_convert_module(name, excluded)
    }


def _float32_pattern(model: PreTrainedModel) -> re.Pattern | None:
    """Build the pattern of parameter names that transformers stores in float32 in spite of half precision.

    Examples are BLIP-2's Q-Former and T5's ``wo`` in float16.
    """
    names: list[str] = []
    if model.dtype in (torch.float16, torch.bfloat16):
        names += model._keep_in_fp32_modules_strict or ()
    if model.dtype == torch.float16:
        names += model._keep_in_fp32_modules or ()
    return re.compile("|".join(names)) if names else None


def _cache_bytes_per_token(model: PreTrainedModel) -> int:
    """Count the bytes of the keys and values of one position in all layers of the language model."""
    text = model.config.get_text_config(decoder=True)
    heads = _first_size(text, ("num_key_value_heads", "num_attention_heads", "num_heads"), 1)
    width = _first_size(text, ("head_dim", "d_kv"), 0) or _width(text) // _first_size(text, ("num_attention_heads",), 1)
    layers = _first_size(text, ("num_decoder_layers", "num_hidden_layers", "num_layers"), 0)
    attentions = 2 if text.is_encoder_decoder else 1  # cross-attention has keys and values too
    return attentions * 2 * layers * heads * width * model.dtype.itemsize


def graph_bytes(model: PreTrainedModel, context: int, sparse: bool = False) -> int:
    """Count the bytes of the graph of a pass over one prompt, and of the attention maps that it keeps.

    Args:
        model: with or without weights.
        context: number of positions.
        sparse: whether the graph is sparse, see ``relevancy.checkpointing``, and keeps no maps.
    """
    parts, inner_share = _parts(model, context), 0.45 if sparse else 1
    values = sum(
        part.layers * part.positions * round(6 * part.width + 4 * inner_share * part.inner_width) for part in parts
    )
    maps = 0 if sparse else sum(part.layers * part.map_size for part in parts if part.map_size <= _KEPT_MAP)
    return values * model.dtype.itemsize + 4 * maps


def input_bytes(model: PreTrainedModel, context: int) -> int:
    """Count the bytes of the inputs of all layers in a pass over one prompt, from which these can run again."""
    values = sum(part.layers * part.positions * part.width for part in _parts(model, context))
    return values * model.dtype.itemsize


def attention_bytes(model: PreTrainedModel, length: int) -> int:
    """Count the bytes of the language model's attention maps over one sequence."""
    text = model.config.get_text_config()
    return text.num_hidden_layers * text.num_attention_heads * length**2 * model.dtype.itemsize


def step_bytes(model: PreTrainedModel) -> int:
    """Count the bytes that a record of one answer token takes: scores, and residual stream and query of every layer."""
    text = model.config.get_text_config()
    return 4 * text.vocab_size + 2 * text.num_hidden_layers * text.hidden_size * model.dtype.itemsize


def _backward_bytes(model: PreTrainedModel, context: int) -> int:
    """Count the bytes of the layers' inputs, and of the graph of the largest layer with its attention maps."""
    parts = _parts(model, context)
    recomputed = max(part.positions * (6 * part.width + 4 * part.inner_width) for part in parts)
    maps = max(4 * part.map_size for part in parts)
    return input_bytes(model, context) + recomputed * model.dtype.itemsize + min(maps, BUDGET)


class _Part(NamedTuple):
    """The sizes of the language model or of the vision tower.

    Attributes:
        layers: number of layers.
        positions: length of its sequence.
        width: of the residual stream.
        inner_width: of the feed-forward layers.
        heads: number of attention heads.
    """

    layers: int
    positions: int
    width: int
    inner_width: int
    heads: int

    @property
    def map_size(self) -> int:
        """Number of entries of a layer's attention maps."""
        return self.heads * self.positions**2


def _parts(model: PreTrainedModel, context: int) -> list[_Part]:
    """List the sizes of the language model and of a vision tower with attention."""
    configs = [(model.config.get_text_config(decoder=True), context)]
    vision = getattr(model.config, "vision_config", None)
    if vision is not None and _first_size(vision, ("num_attention_heads", "num_heads", "attention_heads"), 0):
        # relevancy stops before a tower without attention
        configs.append((vision, _tower_positions(model.config, vision, context)))
    parts = []
    for config, positions in configs:
        layers = _first_size(config, ("num_hidden_layers", "num_layers", "depth"), 0)
        layers += _first_size(config, ("num_decoder_layers",), 0) if config.is_encoder_decoder else 0
        inner = _first_size(config, ("intermediate_size", "ffn_dim", "d_ff"), 0) or 4 * _width(config)
        heads = _first_size(config, ("num_attention_heads", "num_heads", "attention_heads"), 1)
        parts.append(_Part(layers, positions, _width(config), inner, heads))
    return parts


def _tower_positions(config: PreTrainedConfig, vision: PreTrainedConfig, context: int) -> int:
    """Count the vision tower's positions: of an image at the published size, or of as many tiles as the context holds.

    Args:
        config: of the model.
        vision: of the tower.
        context: number of positions of the language model; where there are tiles, all are taken for image tokens.
    """
    size, patch = (_first_size(vision, (name,), 0) for name in ("image_size", "patch_size"))
    single = (size // patch) ** 2 + 1 if size and patch else context
    merged = _first_size(vision, ("spatial_merge_size",), 0) or _first_size(config, ("scale_factor",), 0)
    merged = merged or round(1 / (getattr(config, "downsample_ratio", None) or 1))
    has_tiles = merged > 1 or getattr(config, "image_grid_pinpoints", None)
    return max(single, context * merged**2) if has_tiles else single


def _width(config: PreTrainedConfig) -> int:
    return _first_size(config, ("embed_dim", "hidden_size", "d_model"), 0)  # Qwen2-VL's tower has both


def _first_size(config: Any, names: Sequence[str], default: int) -> int:
    """Return the first of the attributes that the configuration has; of a list (sides, stages) the last item."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)) and value:
            value = value[-1]
        if isinstance(value, int):
            return value
    return default
