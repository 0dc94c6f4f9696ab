"""mPLUG-Owl2 from transformers' parts: a CLIP tower, the authors' visual abstractor, a Llama with two ways.

Source: Ye et al. 2023 (arXiv 2311.04257) and the authors' checkpoint. The abstractor's queries attend to themselves and
to the vision tokens under one softmax. The language model has keys, values and norms for text and others for image
tokens. The classes save and load like any of transformers; weights keep the authors' names where the parts allow it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaModel,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.models.llava.modeling_llava import LlavaModel, LlavaModelOutputWithPast, LlavaPreTrainedModel

from stethoscope.adapters.authors.processor import make_room


class MplugOwl2AbstractorConfig(PreTrainedConfig):
    """Sizes of the visual abstractor; the published ones by default.

    Attributes:
        num_learnable_queries: queries Q; the language model gets Q + 1 image tokens.
        grid_size: rows and columns of the vision tower's patches.
        encoder_hidden_size: width of the vision tower, which the queries share.
    """

    model_type = "mplug_owl2_abstractor"
    base_config_key = "abstractor_config"

    num_learnable_queries: int = 64
    hidden_size: int = 1024
    num_hidden_layers: int = 6
    num_attention_heads: int = 16
    intermediate_size: int = 2816
    layer_norm_eps: float = 1e-6
    encoder_hidden_size: int = 1024
    grid_size: int = 32
    initializer_range: float = 0.02


class MplugOwl2Config(LlavaConfig):
    """A LLaVA configuration with a visual abstractor where LLaVA has a projector."""

    model_type = "mplug_owl2"
    sub_configs_defaults = {**LlavaConfig.sub_configs_defaults, "abstractor_config": MplugOwl2AbstractorConfig}  # noqa: RUF012

    abstractor_config: dict | PreTrainedConfig | None = None


def sine_table(positions: np.ndarray, width: int) -> np.ndarray:
    """Sines and cosines of positions at ``width / 2`` wavelengths (Vaswani et al. 2017, section 3.5), sines first.

    Args:
        positions: (N,).

    Returns:
        (N, width) float32.

    >>> sine_table(np.array([0.0]), 4)
    array([[0., 0., 1., 1.]], dtype=float32)
    """
    half = width // 2
    angles = np.outer(positions.astype(np.float32), 1 / 10000 ** (np.arange(half, dtype=np.float32) / np.float32(half)))
    return np.concatenate([np.sin(angles), np.cos(angles)], 1).astype(np.float32)


@lru_cache(maxsize=8)
def position_table(queries: int, grid: int, width: int) -> Tensor:
    """What is added to the keys: of the queries by their number, of the class token nothing, of patches by their place.

    A patch's first half tells its column, the second its row. The authors' files leave these fixed tables out.

    Returns:
        (queries + 1 + grid * grid, width) float32.
    """
    rows, columns = np.divmod(np.arange(grid * grid), grid)
    patches = np.concatenate([sine_table(columns, width // 2), sine_table(rows, width // 2)], 1)
    parts = [sine_table(np.arange(queries), width), np.zeros((1, width), np.float32), patches]
    with torch.inference_mode(False):  # the table outlives the call that asked for it first
        return torch.from_numpy(np.concatenate(parts))


class AbstractorAttention(nn.Module):
    """Queries look at themselves and at vision tokens, in one map: its columns are [queries ; vision tokens]."""

    def __init__(self, config: MplugOwl2AbstractorConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups, self.is_causal = 1, False
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.encoder_hidden_size, config.hidden_size)
        self.value = nn.Linear(config.encoder_hidden_size, config.hidden_size)

    def forward(self, queries: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
        """(B, Q, D) from queries (B, Q, D) and keys (B, Q + M, D), whose first Q are the queries."""
        count = queries.shape[1]
        parts = self.query(queries + positions[:count]), self.key(keys + positions), self.value(keys)
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, _ = attention(self, query, key, value, None, scaling=self.scaling, dropout=0.0)
        return output.flatten(-2)


class AbstractorMLP(nn.Module):
    """Gated, with a norm before its last layer."""

    def __init__(self, config: MplugOwl2AbstractorConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.ffn_ln = nn.LayerNorm(config.intermediate_size, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, Q, D) from (B, Q, D)."""
        return self.w2(self.ffn_ln(nn.functional.silu(self.w1(hidden)) * self.w3(hidden)))


class AbstractorOutput(nn.Module):
    """What follows the attention."""

    def __init__(self, config: MplugOwl2AbstractorConfig) -> None:
        super().__init__()
        self.out_proj = nn.Linear(config.encoder_hidden_size, config.encoder_hidden_size)
        self.norm2 = nn.LayerNorm(config.encoder_hidden_size)
        self.mlp = AbstractorMLP(config)

    def forward(self, attended: Tensor, hidden: Tensor) -> Tensor:
        """(B, Q, D) from (B, Q, D) twice."""
        hidden = hidden + self.out_proj(attended)
        return hidden + self.mlp(self.norm2(hidden))


class AbstractorBlock(nn.Module):
    """Norms, attention, output. The residual begins behind the norm, as in the authors' code."""

    def __init__(self, config: MplugOwl2AbstractorConfig) -> None:
        super().__init__()
        self.attention, self.output = AbstractorAttention(config), AbstractorOutput(config)
        self.norm1, self.normk = (nn.LayerNorm(config.encoder_hidden_size) for _ in range(2))

    def forward(self, hidden: Tensor, vision: Tensor, positions: Tensor) -> Tensor:
        """(B, Q, D) from (B, Q, D) and vision tokens (B, M, D)."""
        hidden = self.norm1(hidden)
        keys = torch.cat([hidden, self.normk(vision)], 1)
        return self.output(self.attention(hidden, keys, positions), hidden)


class AbstractorLayer(GradientCheckpointingLayer):
    """One layer; a level of its own because the checkpoint has one."""

    def __init__(self, config: MplugOwl2AbstractorConfig) -> None:
        super().__init__()
        self.crossattention = AbstractorBlock(config)

    def forward(self, hidden: Tensor, vision: Tensor, positions: Tensor) -> Tensor:
        """See ``AbstractorBlock``."""
        return self.crossattention(hidden, vision, positions)


class AbstractorEncoder(nn.Module):
    """The layers."""

    def __init__(self, config: MplugOwl2AbstractorConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([AbstractorLayer(config) for _ in range(config.num_hidden_layers)])


class MplugOwl2Abstractor(PreTrainedModel):
    """Q queries that read the vision tokens, in the width of the language model, and one learned token behind them.

    Args:
        width: width of the language model.
    """

    config_class = MplugOwl2AbstractorConfig
    main_input_name = "vision"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MplugOwl2Abstractor"]  # noqa: RUF012  (small, and it has weights of its own)
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: MplugOwl2AbstractorConfig, width: int) -> None:
        super().__init__(config)
        self.encoder = AbstractorEncoder(config)
        self.visual_fc = nn.Linear(config.hidden_size, width)
        self.query_embeds = nn.Parameter(torch.empty(1, config.num_learnable_queries, config.hidden_size))
        self.vit_eos = nn.Parameter(torch.empty(1, 1, width))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            initialization.normal_(self.query_embeds, std=self.config.initializer_range)
            initialization.normal_(self.vit_eos, std=self.config.initializer_range)

    def forward(self, vision: Tensor) -> Tensor:
        """Image tokens (B, Q + 1, width) from vision tokens (B, 1 + grid * grid, D), the class token first."""
        config, count = self.config, len(vision)
        positions = position_table(config.num_learnable_queries, config.grid_size, config.hidden_size).to(vision)
        hidden = self.query_embeds.to(vision.device).expand(count, -1, -1)
        for layer in self.encoder.layers:
            hidden = layer(hidden, vision, positions)
        hidden = self.visual_fc(hidden)
        return torch.cat([hidden, self.vit_eos.to(hidden.device).expand(count, -1, -1)], 1)


class Multiway(nn.Module):
    """Two modules of one kind: the first for text tokens, the second for image tokens."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.multiway = nn.ModuleList([make(), make()])

    def forward(self, hidden: Tensor, image_at: Tensor | None) -> Tensor:
        """Every token (B, S, D) through its own; ``image_at`` (B, S) bool, None where all is text."""
        text = self.multiway[0](hidden)
        if image_at is None:
            return text
        return torch.where(image_at.to(text.device)[..., None], self.multiway[1](hidden), text)


class MultiwayAttention(LlamaAttention):
    """Llama's attention with keys and values of two ways."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        sizes = config.hidden_size, config.num_key_value_heads * self.head_dim
        self.k_proj, self.v_proj = (
            Multiway(lambda: nn.Linear(*sizes, bias=config.attention_bias)) for _ in range(2)
        )  # fmt: skip

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        image_at: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``LlamaAttention``; ``image_at`` as for ``Multiway``."""
        parts = self.q_proj(hidden_states), self.k_proj(hidden_states, image_at), self.v_proj(hidden_states, image_at)
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attention(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.flatten(-2)), weights


class MultiwayDecoderLayer(LlamaDecoderLayer):
    """Llama's layer with norms, keys and values of two ways."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = MultiwayAttention(config, layer_idx)
        self.input_layernorm, self.post_attention_layernorm = (
            Multiway(lambda: LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)) for _ in range(2)
        )  # fmt: skip

    def forward(self, hidden_states: Tensor, image_at: Tensor | None = None, **kwargs: Any) -> Tensor:
        """As ``LlamaDecoderLayer``; ``image_at`` as for ``Multiway``."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states, image_at), image_at=image_at, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states, image_at))


class MultiwayLlamaModel(LlamaModel):
    """Llama whose layers have two ways; everything else is transformers'. Takes ``image_at`` as ``Multiway`` does."""

    _no_split_modules = ["MultiwayDecoderLayer"]  # noqa: RUF012

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList([MultiwayDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.post_init()


class MplugOwl2Model(LlavaModel):
    """mPLUG-Owl2 without its head."""

    config_class = MplugOwl2Config

    def __init__(self, config: MplugOwl2Config) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_model = CLIPVisionModel._from_config(config.vision_config)
        self.visual_abstractor = MplugOwl2Abstractor._from_config(
            config.abstractor_config, width=config.text_config.hidden_size
        )
        self.language_model = MultiwayLlamaModel._from_config(config.text_config)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """As ``pooler_output`` (Q + 1, D) per image; as ``last_hidden_state`` (B, M, D') the tower's tokens.

        The tower's last norm, which CLIP applies to the class token alone, is applied to all tokens.
        """
        vision = self.vision_model.post_layernorm(self.vision_model(pixel_values).last_hidden_state)
        tokens = self.visual_abstractor(vision)
        return BaseModelOutputWithPooling(last_hidden_state=vision, pooler_output=list(tokens))

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> LlavaModelOutputWithPast:
        """As LLaVA's; image tokens, the learned one behind the queries among them, go the second way."""
        if input_ids is not None and (kwargs.get("pixel_values") is not None or kwargs.get("mm_encoder_outputs")):
            kwargs["image_at"] = input_ids == self.config.image_token_id
        return super().forward(input_ids=input_ids, **kwargs)


class MplugOwl2ForConditionalGeneration(LlavaForConditionalGeneration):
    """mPLUG-Owl2."""

    config_class = MplugOwl2Config

    def __init__(self, config: MplugOwl2Config) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = MplugOwl2Model(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        make_room(self)
        self.post_init()
