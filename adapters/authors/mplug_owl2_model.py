"""Build mPLUG-Owl2 from parts of transformers: CLIP tower, the authors' visual abstractor, a two-way Llama.

Source: Ye et al. 2023 (arXiv 2311.04257) and the authors' checkpoint. The abstractor's queries attend to themselves and
to the vision tokens under one softmax. The language model has separate keys, values and norms for text and for image
tokens. The classes save and load like any of transformers; weights have the authors' names where the parts allow it.
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

from stethoscope.adapters.authors.processor import accept_image_tokens


class MplugOwl2AbstractorConfig(PreTrainedConfig):
    """Configure the visual abstractor, with the published sizes by default.

    Attributes:
        num_learnable_queries: number of queries Q; the language model gets Q + 1 image tokens.
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
    """Configure a LLaVA with a visual abstractor in place of the projector."""

    model_type = "mplug_owl2"
    sub_configs_defaults = {**LlavaConfig.sub_configs_defaults, "abstractor_config": MplugOwl2AbstractorConfig}  # noqa: RUF012

    abstractor_config: dict | PreTrainedConfig | None = None


def sine_table(positions: np.ndarray, width: int) -> np.ndarray:
    """Compute sines and cosines of positions at ``width / 2`` wavelengths, sines first.

    Source: Vaswani et al. 2017, section 3.5.

    Args:
        positions: (N,).
        width: number of columns, even.

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
    """Compute the position embeddings of the keys: queries by index, zeros for the class token, patches by position.

    The first half of a patch's embedding encodes its column, the second its row. The authors' files omit these fixed
    tables.

    Returns:
        (queries + 1 + grid * grid, width) float32.
    """
    rows, columns = np.divmod(np.arange(grid * grid), grid)
    patches = np.concatenate([sine_table(columns, width // 2), sine_table(rows, width // 2)], 1)
    parts = [sine_table(np.arange(queries), width), np.zeros((1, width), np.float32), patches]
    with torch.inference_mode(False):  # the cached table may be used outside inference mode later
        return torch.from_numpy(np.concatenate(parts))


class AbstractorAttention(nn.Module):
    """Attend from queries to themselves and to vision tokens in one map with columns [queries ; vision tokens]."""

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
        """Compute (B, Q, D) from queries (B, Q, D) and keys (B, Q + M, D), of which the first Q are the queries."""
        count = queries.shape[1]
        parts = self.query(queries + positions[:count]), self.key(keys + positions), self.value(keys)
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, _ = attention(self, query, key, value, None, scaling=self.scaling, dropout=0.0)
        return output.flatten(-2)


class AbstractorMLP(nn.Module):
    """Apply a gated MLP with a norm before its last layer."""

    def __init__(self, config: MplugOwl2AbstractorConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.ffn_ln = nn.LayerNorm(config.intermediate_size, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute (B, Q, D) from (B, Q, D)."""
        return self.w2(self.ffn_ln(nn.functional.silu(self.w1(hidden)) * self.w3(hidden)))


class AbstractorOutput(nn.Module):
    """Apply output projection, residual and MLP after the attention."""

    def __init__(self, config: MplugOwl2AbstractorConfig) -> None:
        super().__init__()
        self.out_proj = nn.Linear(config.encoder_hidden_size, config.encoder_hidden_size)
        self.norm2 = nn.LayerNorm(config.encoder_hidden_size)
        self.mlp = AbstractorMLP(config)

    def forward(self, attended: Tensor, hidden: Tensor) -> Tensor:
        """Compute (B, Q, D) from attention output and residual, (B, Q, D) each."""
        hidden = hidden + self.out_proj(attended)
        return hidden + self.mlp(self.norm2(hidden))


class AbstractorBlock(nn.Module):
    """Apply norms, attention and output; the residual starts after the norm, as in the authors' code."""

    def __init__(self, config: MplugOwl2AbstractorConfig) -> None:
        super().__init__()
        self.attention, self.output = AbstractorAttention(config), AbstractorOutput(config)
        self.norm1, self.normk = (nn.LayerNorm(config.encoder_hidden_size) for _ in range(2))

    def forward(self, hidden: Tensor, vision: Tensor, positions: Tensor) -> Tensor:
        """Compute (B, Q, D) from queries (B, Q, D) and vision tokens (B, M, D)."""
        hidden = self.norm1(hidden)
        keys = torch.cat([hidden, self.normk(vision)], 1)
        return self.output(self.attention(hidden, keys, positions), hidden)


class AbstractorLayer(GradientCheckpointingLayer):
    """Wrap one block, with the module names of the checkpoint."""

    def __init__(self, config: MplugOwl2AbstractorConfig) -> None:
        super().__init__()
        self.crossattention = AbstractorBlock(config)

    def forward(self, hidden: Tensor, vision: Tensor, positions: Tensor) -> Tensor:
        """See ``AbstractorBlock``."""
        return self.crossattention(hidden, vision, positions)


class AbstractorEncoder(nn.Module):
    """Hold the layers, with the module names of the checkpoint."""

    def __init__(self, config: MplugOwl2AbstractorConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([AbstractorLayer(config) for _ in range(config.num_hidden_layers)])


class MplugOwl2Abstractor(PreTrainedModel):
    """Read vision tokens with Q queries, in the width of the language model, and append one learned token.

    Args:
        config: of the abstractor.
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
        """Compute image tokens (B, Q + 1, width) from vision tokens (B, 1 + grid * grid, D), the class token first."""
        config, count = self.config, len(vision)
        positions = position_table(config.num_learnable_queries, config.grid_size, config.hidden_size).to(vision)
        hidden = self.query_embeds.to(vision.device).expand(count, -1, -1)
        for layer in self.encoder.layers:
            hidden = layer(hidden, vision, positions)
        hidden = self.visual_fc(hidden)
        return torch.cat([hidden, self.vit_eos.to(hidden.device).expand(count, -1, -1)], 1)


class Multiway(nn.Module):
    """Apply one of two modules of the same kind: the first to text tokens, the second to image tokens."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.multiway = nn.ModuleList([make(), make()])

    def forward(self, hidden: Tensor, is_image: Tensor | None) -> Tensor:
        """Apply its module to every token of (B, S, D); ``is_image`` (B, S) bool, None if all tokens are text."""
        text = self.multiway[0](hidden)
        if is_image is None:
            return text
        return torch.where(is_image.to(text.device)[..., None], self.multiway[1](hidden), text)


class MultiwayAttention(LlamaAttention):
    """Apply Llama's attention with separate keys and values for text and image tokens."""

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
        is_image: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``LlamaAttention``; ``is_image`` as for ``Multiway``."""
        parts = self.q_proj(hidden_states), self.k_proj(hidden_states, is_image), self.v_proj(hidden_states, is_image)
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
    """Apply Llama's layer with separate norms, keys and values for text and image tokens."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = MultiwayAttention(config, layer_idx)
        self.input_layernorm, self.post_attention_layernorm = (
            Multiway(lambda: LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)) for _ in range(2)
        )  # fmt: skip

    def forward(self, hidden_states: Tensor, is_image: Tensor | None = None, **kwargs: Any) -> Tensor:
        """See ``LlamaDecoderLayer``; ``is_image`` as for ``Multiway``."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states, is_image), is_image=is_image, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states, is_image))


class MultiwayLlamaModel(LlamaModel):
    """Implement Llama with ``MultiwayDecoderLayer``; its forward pass takes ``is_image`` as for ``Multiway``."""

    _no_split_modules = ["MultiwayDecoderLayer"]  # noqa: RUF012

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList([MultiwayDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.post_init()


class MplugOwl2Model(LlavaModel):
    """Implement mPLUG-Owl2 without its head."""

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
        """Compute image tokens.

        The tower's last norm, which CLIP applies to the class token alone, is applied to all tokens.

        Returns:
            ``pooler_output``: (Q + 1, D) per image; ``last_hidden_state``: (B, M, D'), the tower's tokens.
        """
        vision = self.vision_model.post_layernorm(self.vision_model(pixel_values).last_hidden_state)
        tokens = self.visual_abstractor(vision)
        return BaseModelOutputWithPooling(last_hidden_state=vision, pooler_output=list(tokens))

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> LlavaModelOutputWithPast:
        """See ``LlavaModel``; all image tokens, the appended learned one included, use the image modules."""
        if input_ids is not None and (kwargs.get("pixel_values") is not None or kwargs.get("mm_encoder_outputs")):
            kwargs["is_image"] = input_ids == self.config.image_token_id
        return super().forward(input_ids=input_ids, **kwargs)


class MplugOwl2ForConditionalGeneration(LlavaForConditionalGeneration):
    """Implement mPLUG-Owl2 with its head."""

    config_class = MplugOwl2Config

    def __init__(self, config: MplugOwl2Config) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = MplugOwl2Model(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        accept_image_tokens(self)
        self.post_init()
