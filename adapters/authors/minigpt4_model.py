"""MiniGPT-4 from transformers' parts, and the names that its authors' files have for them.

Source: Zhu et al. 2023 (arXiv 2304.10592). EVA ViT-g, then either the Q-Former of BLIP-2 and Vicuna v0, or four
neighbouring patches as one token and Llama 2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    Blip2VisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModel, LlavaPreTrainedModel

from stethoscope.adapters.authors.checkpoints import Weight, Weights
from stethoscope.adapters.authors.processor import make_room
from stethoscope.core.errors import ConfigError, DataError

MERGED = 4
"""Horizontally neighbouring patches that the Llama-2 version makes one token of."""
_LN_VISION_EPS = 1e-5  # of the norm behind the tower; the tower's own norms have 1e-6

NEEDED = ("visual_encoder.", "blocks.", "cls_token", "pos_embed", "patch_embed.", "vision_model.")
"""How names of the tower's weights start: in a MiniGPT-4, in ``eva_vit_g.pth``, in transformers' BLIP-2."""
NORM = ("ln_vision.", "vision_model.post_layernorm.")
QUERIES = ("Qformer.", "qformer.", "query_tokens")

_RENAMED = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^visual_encoder\.", ""),
        (r"^cls_token$", "vision_model.embeddings.class_embedding"),
        (r"^pos_embed$", "vision_model.embeddings.position_embedding"),
        (r"^patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
        (r"^blocks\.(\d+)\.norm([12])\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
        (r"^blocks\.(\d+)\.attn\.qkv\.", r"vision_model.encoder.layers.\1.self_attn.qkv."),
        (r"^blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
        (r"^blocks\.(\d+)\.mlp\.", r"vision_model.encoder.layers.\1.mlp."),
        (r"^ln_vision\.", "vision_model.post_layernorm."),
        (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
        (r"^Qformer\.bert\.encoder\.layer\.(\d+)\.(\w*attention)\.self\.", r"qformer.encoder.layer.\1.\2.attention."),
        (r"^Qformer\.bert\.", "qformer."),
        (r"^llama_proj\.", "language_projection."),
        (r"^llama_model\.", "language_model."),
    )
)
_UNUSED = re.compile(
    r"Qformer\.cls\.|qformer\.embeddings\.|qformer\.encoder\.layer\.\d+\.(intermediate|output)\.|"  # for text
    r".*\.rotary_emb\.inv_freq$|.*\.relative_position_index$|vision_model\.encoder\.layers\.(?P<layer>\d+)\."
)
_LAYER = r"vision_model\.encoder\.layers\.(\d+)\."
_LLAMA2 = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^vision_model\.", "model.vision_tower."),
        (r"^language_projection\.", "model.multi_modal_projector."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head\.", "lm_head."),
    )
)


class MiniGpt4Vicuna(Blip2ForConditionalGeneration):
    """A BLIP-2 whose language model is Vicuna; image tokens are the Q-Former's queries."""

    def __init__(self, config: Blip2Config) -> None:
        super().__init__(config)
        self.vision_model.post_layernorm.eps = _LN_VISION_EPS
        make_room(self)


class MiniGpt4Llama2Model(LlavaModel):
    """MiniGPT-4 with Llama 2, without its head: a LLaVA with its own tower and projector."""

    def __init__(self, config: LlavaConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        vision, text = config.vision_config, config.text_config
        self.vision_tower = Blip2VisionModel._from_config(vision)
        self.vision_tower.post_layernorm.eps = _LN_VISION_EPS
        self.multi_modal_projector = nn.Linear(MERGED * vision.hidden_size, text.hidden_size)
        self.language_model = AutoModel.from_config(text)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """As ``pooler_output`` (patches / 4, D) per image, patches row by row; as ``last_hidden_state`` the patches."""
        patches = self.vision_tower(pixel_values).last_hidden_state[:, 1:]
        tokens = patches.reshape(len(patches), -1, MERGED * patches.shape[-1])
        projected = self.multi_modal_projector(tokens)
        return BaseModelOutputWithPooling(last_hidden_state=patches, pooler_output=list(projected))


class MiniGpt4Llama2(LlavaForConditionalGeneration):
    """MiniGPT-4 with Llama 2."""

    def __init__(self, config: LlavaConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = MiniGpt4Llama2Model(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        make_room(self)


def configured(
    vision: Blip2VisionConfig,
    bridge: tuple[Blip2QFormerConfig, int] | None,
    text: PreTrainedConfig,
    image_token_id: int,
) -> tuple[type[PreTrainedModel], Blip2Config | LlavaConfig]:
    """Class and configuration of a MiniGPT-4 of these parts.

    Args:
        bridge: the Q-Former and its number of queries; None for the version without.

    Raises:
        DataError: the patches cannot be merged by fours.
    """
    if bridge is not None:
        config = Blip2Config(
            vision_config=vision,
            qformer_config=bridge[0],
            text_config=text,
            num_query_tokens=bridge[1],
            image_token_index=image_token_id,
        )
        return MiniGpt4Vicuna, config
    patches = (vision.image_size // vision.patch_size) ** 2
    if patches % MERGED:
        raise DataError(f"MiniGPT-4 with Llama 2: {patches} patches cannot be merged by {MERGED}")
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token_id,
        image_seq_length=patches // MERGED,
    )
    return MiniGpt4Llama2, config


def named(weights: Weights, vision_layers: int) -> Weights:
    """Weights of authors' files, or of transformers' BLIP-2, under the names of ``MiniGpt4Vicuna``.

    Queries' and values' biases of the tower become one, with zeros for the keys between them. Left out is what no
    MiniGPT-4 uses: the Q-Former's parts for text, and the last layer of the tower where it has one too many, as
    ``eva_vit_g.pth`` does.

    Raises:
        ConfigError: the tower has more layers than that.
    """
    found = {}
    for key, weight in _with_biases(weights).items():
        name = _renamed(key, _RENAMED)
        unused = _UNUSED.match(name)
        if unused is not None and unused["layer"] is not None and int(unused["layer"]) > vision_layers:
            layers = _numbers({_renamed(other, _RENAMED): weight for other in weights}, _LAYER)
            raise ConfigError(
                f"model.vision_layers={vision_layers}, but {weight.file} holds {len(layers)} layers; the last is left "
                f"out at most: give {len(layers) - 1} or {len(layers)}"
            )
        if unused is None or (unused["layer"] is not None and int(unused["layer"]) < vision_layers):
            found[name] = weight
    return found


def for_llama2(weights: Weights) -> Weights:
    """Weights of ``named`` under the names of ``MiniGpt4Llama2``."""
    return {_renamed(name, _LLAMA2): weight for name, weight in weights.items()}


def with_plain_norm(weights: Weights, what: str) -> Weights:
    """The tower of the Llama-2 version: its authors' code makes the norm behind it and never loads one.

    Args:
        weights: of ``named``.
        what: the files, for messages.
    """
    classes, name = "vision_model.embeddings.class_embedding", "vision_model.post_layernorm"
    width = _tensor(weights, classes, what).shape[-1]
    plain = {"weight": torch.ones(width), "bias": torch.zeros(width)}
    file = weights[classes].file
    return weights | {f"{name}.{end}": Weight(tensor, file, f"ln_vision.{end}") for end, tensor in plain.items()}


def vision_config(weights: Weights | None, layers: int, heads: int, what: str) -> Blip2VisionConfig:
    """The tower's configuration: what its weights show, and what they do not.

    Args:
        weights: of ``named``; None for the published sizes.
        what: the files, for messages.

    Raises:
        DataError: there are no such weights, or they do not fit one another.
    """
    if weights is None:
        return Blip2VisionConfig(num_hidden_layers=layers, num_attention_heads=heads)
    embeddings = "vision_model.embeddings"
    classes, patches, positions = (
        _tensor(weights, f"{embeddings}.{name}", what)
        for name in ("class_embedding", "patch_embedding.weight", "position_embedding")
    )
    inner = _tensor(weights, "vision_model.encoder.layers.0.mlp.fc1.weight", what)
    width, patch, side = classes.shape[-1], patches.shape[-1], math.isqrt(positions.shape[1] - 1)
    if side * side + 1 != positions.shape[1]:
        raise DataError(f"{what}: {positions.shape[1]} positions of patches are not a class token and a square")
    if width % heads:
        raise DataError(f"{what}: vision_heads={heads} does not divide the width {width} of the tower")
    return Blip2VisionConfig(
        hidden_size=width,
        intermediate_size=inner.shape[0],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=side * patch,
        patch_size=patch,
    )


def qformer_config(weights: Weights | None, heads: int, what: str) -> tuple[Blip2QFormerConfig, int]:
    """The Q-Former's configuration and its number of queries; see ``vision_config``."""
    if weights is None:
        return Blip2QFormerConfig(num_attention_heads=heads), 32
    queries = _tensor(weights, "query_tokens", what)
    inner = _tensor(weights, "qformer.encoder.layer.0.intermediate_query.dense.weight", what)
    layers = _numbers(weights, r"qformer\.encoder\.layer\.(\d+)\.attention\.")
    crossing = _numbers(weights, r"qformer\.encoder\.layer\.(\d+)\.crossattention\.")
    width = queries.shape[-1]
    if width % heads:
        raise DataError(f"{what}: qformer_heads={heads} does not divide the width {width} of the Q-Former")
    config = Blip2QFormerConfig(
        hidden_size=width,
        intermediate_size=inner.shape[0],
        num_hidden_layers=len(layers),
        num_attention_heads=heads,
        cross_attention_frequency=crossing[1] - crossing[0] if len(crossing) > 1 else len(layers),
    )
    return config, queries.shape[1]


def _with_biases(weights: Mapping[str, Weight]) -> Weights:
    found = dict(weights)
    for key in [key for key in weights if key.endswith(".attn.q_bias")]:
        block = key.removesuffix("q_bias")
        if f"{block}v_bias" in found:
            query, value = found.pop(key), found.pop(f"{block}v_bias")
            whole = torch.cat([query.tensor, torch.zeros_like(value.tensor), value.tensor])
            found[f"{block}qkv.bias"] = replace(query, tensor=whole)
    return found


def _renamed(name: str, rules: Iterable[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in rules:
        name = pattern.sub(replacement, name)
    return name


def _tensor(weights: Weights, name: str, what: str) -> Tensor:
    if name not in weights:
        first = next(iter(weights.values()), None)
        hint = f"; the first there is {first.key} in {first.file}" if first else ""
        raise DataError(f"{what}: there is no weight for {name}{hint}")
    return weights[name].tensor


def _numbers(weights: Weights, pattern: str) -> list[int]:
    return sorted({int(match[1]) for name in weights if (match := re.match(pattern, name))})
