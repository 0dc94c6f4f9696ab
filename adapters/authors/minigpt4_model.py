"""Build MiniGPT-4 from parts of transformers, and rename its authors' weights to match.

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
from stethoscope.adapters.authors.processor import accept_image_tokens
from stethoscope.core.errors import ConfigError, DataError

MERGED_PATCHES = 4
"""Number of horizontally neighbouring patches that the Llama-2 version merges into one token."""
_LN_VISION_EPS = 1e-5  # of the norm behind the tower; the tower's own norms have 1e-6

TOWER_PREFIXES = ("visual_encoder.", "blocks.", "cls_token", "pos_embed", "patch_embed.", "vision_model.")
"""Prefixes of the tower's weights in a MiniGPT-4, in ``eva_vit_g.pth`` and in transformers' BLIP-2."""
NORM_PREFIXES = ("ln_vision.", "vision_model.post_layernorm.")
QFORMER_PREFIXES = ("Qformer.", "qformer.", "query_tokens")

_BLIP2_NAMES = tuple(
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
_LLAMA2_NAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^vision_model\.", "model.vision_tower."),
        (r"^language_projection\.", "model.multi_modal_projector."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head\.", "lm_head."),
    )
)


class MiniGpt4Vicuna(Blip2ForConditionalGeneration):
    """Implement MiniGPT-4 with Vicuna as a BLIP-2; image tokens are the Q-Former's queries."""

    def __init__(self, config: Blip2Config) -> None:
        super().__init__(config)
        self.vision_model.post_layernorm.eps = _LN_VISION_EPS
        accept_image_tokens(self)


class MiniGpt4Llama2Model(LlavaModel):
    """Implement MiniGPT-4 with Llama 2, without its head, as a LLaVA with its own tower and projector."""

    def __init__(self, config: LlavaConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        vision, text = config.vision_config, config.text_config
        self.vision_tower = Blip2VisionModel._from_config(vision)
        self.vision_tower.post_layernorm.eps = _LN_VISION_EPS
        self.multi_modal_projector = nn.Linear(MERGED_PATCHES * vision.hidden_size, text.hidden_size)
        self.language_model = AutoModel.from_config(text)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Compute image tokens.

        Returns:
            ``pooler_output``: (patches / 4, D) per image, row by row; ``last_hidden_state``: the tower's patches.
        """
        patches = self.vision_tower(pixel_values).last_hidden_state[:, 1:]
        tokens = patches.reshape(len(patches), -1, MERGED_PATCHES * patches.shape[-1])
        projected = self.multi_modal_projector(tokens)
        return BaseModelOutputWithPooling(last_hidden_state=patches, pooler_output=list(projected))


class MiniGpt4Llama2(LlavaForConditionalGeneration):
    """Implement MiniGPT-4 with Llama 2."""

    def __init__(self, config: LlavaConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = MiniGpt4Llama2Model(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        accept_image_tokens(self)


def build_config(
    vision: Blip2VisionConfig,
    qformer: tuple[Blip2QFormerConfig, int] | None,
    text: PreTrainedConfig,
    image_token_id: int,
) -> tuple[type[PreTrainedModel], Blip2Config | LlavaConfig]:
    """Build class and configuration of a MiniGPT-4 from those of its parts.

    Args:
        vision: of the tower.
        qformer: of the Q-Former, and its number of queries; None for the version without.
        text: of the language model.
        image_token_id: id of an image token.

    Raises:
        DataError: the patches cannot be merged by fours.
    """
    if qformer is not None:
        config = Blip2Config(
            vision_config=vision,
            qformer_config=qformer[0],
            text_config=text,
            num_query_tokens=qformer[1],
            image_token_index=image_token_id,
        )
        return MiniGpt4Vicuna, config
    patches = (vision.image_size // vision.patch_size) ** 2
    if patches % MERGED_PATCHES:
        raise DataError(f"MiniGPT-4 with Llama 2: {patches} patches cannot be merged by {MERGED_PATCHES}")
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token_id,
        image_seq_length=patches // MERGED_PATCHES,
    )
    return MiniGpt4Llama2, config


def vicuna_weights(weights: Weights, vision_layers: int) -> Weights:
    """Rename weights of authors' files, or of transformers' BLIP-2, to the names of ``MiniGpt4Vicuna``.

    Query and value biases of the tower are joined, with zeros for the keys between them. Weights that no MiniGPT-4 uses
    are dropped: the Q-Former's parts for text, and the last layer of the tower where it has one too many, as
    ``eva_vit_g.pth`` does.

    Raises:
        ConfigError: the tower has more than one layer beyond ``vision_layers``.
    """
    renamed = {}
    for key, weight in _join_biases(weights).items():
        name = _rename(key, _BLIP2_NAMES)
        unused = _UNUSED.match(name)
        if unused is not None and unused["layer"] is not None and int(unused["layer"]) > vision_layers:
            layers = _layer_numbers((_rename(other, _BLIP2_NAMES) for other in weights), _LAYER)
            raise ConfigError(
                f"model.vision_layers={vision_layers}, but {weight.file} holds {len(layers)} layers, of which only the "
                f"last can be left out: give {len(layers) - 1} or {len(layers)}"
            )
        if unused is None or (unused["layer"] is not None and int(unused["layer"]) < vision_layers):
            renamed[name] = weight
    return renamed


def llama2_weights(weights: Weights) -> Weights:
    """Rename weights of ``vicuna_weights`` to the names of ``MiniGpt4Llama2``."""
    return {_rename(name, _LLAMA2_NAMES): weight for name, weight in weights.items()}


def add_identity_norm(weights: Weights, source: str) -> Weights:
    """Add the norm behind the tower of the Llama-2 version, which its authors' code creates and never loads.

    Args:
        weights: of ``vicuna_weights``.
        source: name of the files in messages.
    """
    classes, name = "vision_model.embeddings.class_embedding", "vision_model.post_layernorm"
    width = _tensor(weights, classes, source).shape[-1]
    norm = {"weight": torch.ones(width), "bias": torch.zeros(width)}
    file = weights[classes].file
    return weights | {f"{name}.{end}": Weight(tensor, file, f"ln_vision.{end}") for end, tensor in norm.items()}


def vision_config(weights: Weights | None, layers: int, heads: int, source: str) -> Blip2VisionConfig:
    """Build the tower's configuration from the shapes of its weights.

    Args:
        weights: of ``vicuna_weights``; None for the published sizes.
        layers: number of layers.
        heads: number of attention heads, which no weight shows.
        source: name of the files in messages.

    Raises:
        DataError: weights of the tower are missing, or do not fit one another.
    """
    if weights is None:
        return Blip2VisionConfig(num_hidden_layers=layers, num_attention_heads=heads)
    embeddings = "vision_model.embeddings"
    classes, patches, positions = (
        _tensor(weights, f"{embeddings}.{name}", source)
        for name in ("class_embedding", "patch_embedding.weight", "position_embedding")
    )
    inner = _tensor(weights, "vision_model.encoder.layers.0.mlp.fc1.weight", source)
    width, patch, side = classes.shape[-1], patches.shape[-1], math.isqrt(positions.shape[1] - 1)
    if side * side + 1 != positions.shape[1]:
        raise DataError(f"{source}: {positions.shape[1]} positions of patches are not a class token and a square")
    if width % heads:
        raise DataError(f"{source}: vision_heads={heads} does not divide the width {width} of the tower")
    return Blip2VisionConfig(
        hidden_size=width,
        intermediate_size=inner.shape[0],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=side * patch,
        patch_size=patch,
    )


def qformer_config(weights: Weights | None, heads: int, source: str) -> tuple[Blip2QFormerConfig, int]:
    """Build the Q-Former's configuration and count its queries; see ``vision_config``."""
    if weights is None:
        return Blip2QFormerConfig(num_attention_heads=heads), 32
    queries = _tensor(weights, "query_tokens", source)
    inner = _tensor(weights, "qformer.encoder.layer.0.intermediate_query.dense.weight", source)
    layers = _layer_numbers(weights, r"qformer\.encoder\.layer\.(\d+)\.attention\.")
    crossing = _layer_numbers(weights, r"qformer\.encoder\.layer\.(\d+)\.crossattention\.")
    width = queries.shape[-1]
    if width % heads:
        raise DataError(f"{source}: qformer_heads={heads} does not divide the width {width} of the Q-Former")
    config = Blip2QFormerConfig(
        hidden_size=width,
        intermediate_size=inner.shape[0],
        num_hidden_layers=len(layers),
        num_attention_heads=heads,
        cross_attention_frequency=crossing[1] - crossing[0] if len(crossing) > 1 else len(layers),
    )
    return config, queries.shape[1]


def _join_biases(weights: Mapping[str, Weight]) -> Weights:
    joined = dict(weights)
    for key in [key for key in weights if key.endswith(".attn.q_bias")]:
        block = key.removesuffix("q_bias")
        if f"{block}v_bias" in joined:
            query, value = joined.pop(key), joined.pop(f"{block}v_bias")
            bias = torch.cat([query.tensor, torch.zeros_like(value.tensor), value.tensor])
            joined[f"{block}qkv.bias"] = replace(query, tensor=bias)
    return joined


def _rename(name: str, rules: Iterable[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in rules:
        name = pattern.sub(replacement, name)
    return name


def _tensor(weights: Weights, name: str, source: str) -> Tensor:
    if name not in weights:
        first = next(iter(weights.values()), None)
        hint = f"; the first weight there is {first.key} in {first.file}" if first else ""
        raise DataError(f"{source}: there is no weight for {name}{hint}")
    return weights[name].tensor


def _layer_numbers(names: Iterable[str], pattern: str) -> list[int]:
    return sorted({int(match[1]) for name in names if (match := re.match(pattern, name))})
