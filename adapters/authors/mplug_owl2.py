"""Adapt mPLUG-Owl2 (Ye et al. 2023, arXiv 2311.04257): 64 queries and one learned token per image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from stethoscope.adapters import tiny
from stethoscope.adapters.authors import checkpoints
from stethoscope.adapters.authors.checkpoints import Weight, Weights
from stethoscope.adapters.authors.mplug_owl2_model import (
    MplugOwl2AbstractorConfig,
    MplugOwl2Config,
    MplugOwl2ForConditionalGeneration,
)
from stethoscope.adapters.authors.processor import (
    CLIP_STD,
    ImageTokenEncoder,
    ImageTokenProcessor,
    PixelProcessor,
    add_placeholder,
    load_llama_tokenizer,
    read_mean_and_std,
    squash,
)
from stethoscope.adapters.hf import HfAdapter
from stethoscope.adapters.question_encoder import CLIP_MEAN, stretch_to_square
from stethoscope.adapters.tiny.tokenizers import SIZES, text_sizes
from stethoscope.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import LlamaTokenizer, PreTrainedModel

    from stethoscope.tracing.trace import Encoded

PLACEHOLDER = "<|image|>"
PROMPT = f"USER: {PLACEHOLDER}{{question}} ASSISTANT:"
VISION = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 448, "patch_size": 14, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-6,
}  # fmt: skip
"""Published sizes of the vision tower, CLIP's ViT-L/14."""

_TOWER_NAMES = {
    "embeddings.patch_embed.": "embeddings.patch_embedding.",
    "embeddings.pre_layernorm.": "pre_layrnorm.",  # CLIP's own spelling
    ".self_attn.dense.": ".self_attn.out_proj.",
    ".input_layernorm.": ".layer_norm1.",
    ".post_attention_layernorm.": ".layer_norm2.",
}


class MplugOwl2Adapter(HfAdapter):
    """Adapt mPLUG-Owl2 from its authors' files.

    Args:
        model_id: folder or hub id.
        prompt: template with ``{question}`` and ``<|image|>``.
        text, vision, abstractor: sizes that differ from the ``config.json``, by the names of ``LlamaConfig``,
            ``CLIPVisionConfig`` and ``MplugOwl2AbstractorConfig``.
        settings: as for ``HfAdapter``.

    Raises:
        ConfigError: a setting is wrong.
    """

    def __init__(
        self,
        model_id: str | None = None,
        *,
        prompt: str | None = None,
        text: Mapping[str, Any] | None = None,
        vision: Mapping[str, Any] | None = None,
        abstractor: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(model_id, prompt=prompt or PROMPT, **{"family": "mplug_owl2", **settings})
        self.text, self.vision, self.abstractor = text, vision, abstractor

    def _load(self) -> tuple[PreTrainedModel, ImageTokenProcessor]:
        config = self._config()
        tokenizer = load_llama_tokenizer(self._source, self.loading)
        processor = make_processor(tokenizer, config, *read_mean_and_std(self._source, self.loading))
        weights = checkpoints.read_weights(self._source, self.loading, setting="model.model_id")
        weights = model_weights(weights, config.vision_config.num_attention_heads)
        model, self.report = checkpoints.build_model(
            MplugOwl2ForConditionalGeneration, config, weights, self.loading, self.name
        )
        return model, processor

    def _config(self) -> MplugOwl2Config:
        """Build the configuration; the placeholder has no id yet."""
        from transformers import CLIPVisionConfig, LlamaConfig

        text = checkpoints.read_config(self._source, self.loading)
        visual = text.get("visual_config") or {}
        if not isinstance(visual, Mapping):
            raise DataError(f"the config.json of {self.model_id}: visual_config={visual!r:.80} should be an object")
        vision, abstractor = visual.get("visual_model"), visual.get("visual_abstractor")
        merge_config = checkpoints.merge_config
        config = MplugOwl2Config(
            text_config=merge_config(LlamaConfig, "text", checkpoints.LLAMA_7B, text, overrides=self.text),
            vision_config=merge_config(CLIPVisionConfig, "vision", VISION, vision, overrides=self.vision),
            abstractor_config=merge_config(
                MplugOwl2AbstractorConfig, "abstractor", abstractor, overrides=self.abstractor
            ),
        )
        with checkpoints.translate_size_errors(self.name):
            check_config(config)
        return config

    def _skeleton(self) -> PreTrainedModel:
        if self.random_init:
            return super()._skeleton()

        config = self._config()
        dtype = checkpoints.weight_dtype(checkpoints.read_config(self._source, self.loading), self.loading)
        return checkpoints.build_skeleton(MplugOwl2ForConditionalGeneration, config, dtype, self.name)

    def _tiny(self) -> tuple[PreTrainedModel, ImageTokenProcessor]:
        return tiny.build_from(build_tiny)

    def _make_encoder(self, model: PreTrainedModel, processor: ImageTokenProcessor) -> Callable[..., Encoded]:
        return ImageTokenEncoder(processor, self.prompt, follow_up=self.follow_up)

    def fingerprint(self) -> dict[str, Any]:
        """See ``Adapter.fingerprint``."""
        sizes = {"text": self.text, "vision": self.vision, "abstractor": self.abstractor}
        return super().fingerprint() | {name: dict(chosen or {}) for name, chosen in sizes.items()}


def build_tiny() -> tuple[PreTrainedModel, ImageTokenProcessor]:
    """Build a tiny model: 4 x 4 patches, read by 5 queries."""
    from transformers import CLIPVisionConfig, LlamaConfig

    tokenizer = tiny.llama_tokenizer()
    width = SIZES["hidden_size"]
    abstractor = MplugOwl2AbstractorConfig(
        num_learnable_queries=5, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, hidden_size=width,
        encoder_hidden_size=width, grid_size=4,
    )  # fmt: skip
    config = MplugOwl2Config(
        text_config=LlamaConfig(**text_sizes(tokenizer)),
        vision_config=CLIPVisionConfig(**SIZES, image_size=56, patch_size=14, layer_norm_eps=1e-6),
        abstractor_config=abstractor,
    )
    check_config(config)
    processor = make_processor(tokenizer, config, CLIP_MEAN, CLIP_STD)
    return MplugOwl2ForConditionalGeneration(config), processor


def _abstractor_config(config: MplugOwl2Config) -> MplugOwl2AbstractorConfig:
    return cast("MplugOwl2AbstractorConfig", config.abstractor_config)  # transformers has converted a dict by now


def check_config(config: MplugOwl2Config) -> None:
    """Check that the sizes of the parts fit together; raise ConfigError otherwise."""
    vision, abstractor = config.vision_config, _abstractor_config(config)
    grid, heads = vision.image_size // vision.patch_size, abstractor.num_attention_heads
    if abstractor.grid_size != grid:
        raise ConfigError(
            f"model.abstractor.grid_size={abstractor.grid_size} should be {grid}: an image of {vision.image_size} "
            f"pixels in patches of {vision.patch_size}"
        )
    if abstractor.encoder_hidden_size != vision.hidden_size or abstractor.hidden_size != vision.hidden_size:
        raise ConfigError(
            f"model.abstractor: hidden_size={abstractor.hidden_size} and encoder_hidden_size="
            f"{abstractor.encoder_hidden_size} should be the vision tower's {vision.hidden_size}"
        )
    if abstractor.hidden_size % heads or abstractor.hidden_size % 4:
        raise ConfigError(
            f"model.abstractor.hidden_size={abstractor.hidden_size} should be a multiple of 4 and of its {heads} heads"
        )


def make_processor(
    tokenizer: LlamaTokenizer, config: MplugOwl2Config, mean: tuple[float, ...], std: tuple[float, ...]
) -> ImageTokenProcessor:
    """Build the processor with the authors' preprocessing: square of the longer side, tower's size, normalise.

    Gives the placeholder its id, also in ``config``.
    """
    images = PixelProcessor((stretch_to_square, partial(squash, size=config.vision_config.image_size)), mean, std)
    config.image_token_index = add_placeholder(tokenizer, PLACEHOLDER, config.text_config.vocab_size)
    tokens = _abstractor_config(config).num_learnable_queries + 1
    return ImageTokenProcessor(tokenizer, images, PLACEHOLDER, config.image_token_index, tokens)


def model_weights(weights: Weights, heads: int) -> Weights:
    """Rename the authors' weights to the model's names.

    Args:
        weights: of the authors' files.
        heads: number of heads of the vision tower, whose queries, keys and values are fused head by head.

    Raises:
        DataError: a fused weight cannot be split.
    """
    renamed: Weights = {}
    for name, weight in weights.items():
        if "rotary_emb" in name or name.endswith((".q_pos_embed", ".k_pos_embed")):
            continue  # fixed tables, which the model computes
        if name.startswith("model.vision_model."):
            renamed |= _tower_weights(name, weight, heads)
        elif name.startswith(("model.embed_tokens.", "model.layers.", "model.norm.")):
            renamed[name.replace("model.", "model.language_model.", 1)] = weight
        else:
            renamed[name] = weight
    return renamed


def _tower_weights(name: str, weight: Weight, heads: int) -> Weights:
    """Rename one weight of the tower to CLIP's names; split fused queries, keys and values."""
    tensor = weight.tensor
    if name.endswith("embeddings.cls_token"):
        return {name.replace("cls_token", "class_embedding"): Weight(tensor.flatten(), weight.file, weight.key)}
    if name.endswith("embeddings.position_embedding"):
        return {f"{name}.weight": Weight(tensor.flatten(0, -2), weight.file, weight.key)}
    if ".query_key_value." in name:
        if tensor.shape[0] % (3 * heads):
            raise DataError(
                f"{weight.file}: {weight.key} has {tensor.shape[0]} rows, which are not query, key and value of "
                f"{heads} heads; see model.vision.num_attention_heads"
            )
        parts = tensor.unflatten(0, (heads, 3, -1)).unbind(1)
        return {
            name.replace("query_key_value", f"{letter}_proj"): Weight(part.flatten(0, 1), weight.file, weight.key)
            for letter, part in zip("qkv", parts, strict=True)
        }
    for authors_name, clip_name in _TOWER_NAMES.items():
        name = name.replace(authors_name, clip_name)
    return {name: weight}
