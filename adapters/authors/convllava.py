"""Adapt ConvLLaVA (Ge et al. 2024, arXiv 2405.15738) from the authors' files: one token for every 64 x 64 pixels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, ConvNextModel, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModel, LlavaMultiModalProjector, LlavaPreTrainedModel

from stethoscope.adapters import tiny
from stethoscope.adapters.authors import checkpoints
from stethoscope.adapters.authors.checkpoints import Weight, Weights
from stethoscope.adapters.authors.processor import (
    CLIP_STD,
    ImageTokenEncoder,
    ImageTokenProcessor,
    PixelProcessor,
    accept_image_tokens,
    add_placeholder,
    load_llama_tokenizer,
    read_mean_and_std,
    squash,
)
from stethoscope.adapters.hf import HfAdapter
from stethoscope.adapters.loading import model_name
from stethoscope.adapters.prompts import SYSTEMS
from stethoscope.adapters.question_encoder import CLIP_MEAN, pad_to_square
from stethoscope.adapters.tiny.tokenizers import text_sizes
from stethoscope.core.errors import CapabilityError, ConfigError

if TYPE_CHECKING:
    from transformers import ConvNextConfig, LlamaConfig, LlamaTokenizer, PreTrainedModel

    from stethoscope.adapters.load_settings import Loading
    from stethoscope.tracing.trace import Encoded

PLACEHOLDER = "<image>"
_TURN = "USER: <image>\n{question} ASSISTANT:"
PROMPTS = {"v1": f"{SYSTEMS['vicuna_v1']} {_TURN}", "llava_v1": f"{SYSTEMS['llava_v1']} {_TURN}"}
"""The authors' templates by name: ``v1`` of training and evaluation, ``llava_v1`` of their demo."""


class ConvLlavaAdapter(HfAdapter):
    """Adapt ConvLLaVA from the language model with its projector, and the vision tower.

    Args:
        model_id: folder or hub id of language model, projector and tokenizer.
        tower: folder or hub id of the vision tower; what the model's own ``config.json`` names by default.
        tower_revision: branch, tag or commit of a tower from the hub.
        resolution: side of the tower's square input in pixels, a multiple of 64; None for that in the tower's
            ``preprocessor_config.json``.
        prompt: one of ``PROMPTS``, or a template with ``{question}`` and ``<image>``.
        text, vision: sizes that differ from the ``config.json`` of model and tower, by the names of ``LlamaConfig`` and
            ``ConvNextConfig``.
        settings: as for ``HfAdapter``.

    Raises:
        ConfigError: a setting is wrong.
    """

    def __init__(
        self,
        model_id: str | None = None,
        *,
        tower: str | None = None,
        tower_revision: str | None = None,
        resolution: int | None = None,
        prompt: str | None = "v1",
        text: Mapping[str, Any] | None = None,
        vision: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        prompt = prompt or "v1"
        super().__init__(model_id, prompt=PROMPTS.get(prompt, prompt), **{"family": "convllava", **settings})
        self.tower, self.tower_revision, self.resolution = tower, tower_revision, resolution
        self.text, self.vision = text, vision

    def _load(self) -> tuple[PreTrainedModel, ImageTokenProcessor]:
        tower, tower_loading, text, vision = self._parts()
        tokenizer = load_llama_tokenizer(self._source, self.loading)
        side = _image_side(checkpoints.read_config(tower, tower_loading, "preprocessor_config.json"))
        if self.resolution is None:
            if side is None:
                raise ConfigError(
                    "model.resolution is missing and the tower's preprocessor_config.json says none; give 768, ..."
                )
            self.resolution = side
        elif side not in (None, self.resolution):
            warnings.warn(
                f"model.resolution={self.resolution}, but the preprocessor_config.json of model.tower={tower} says "
                f"{side}, with which the tower was trained; resolution=null takes that",
                stacklevel=2,
            )
        processor = make_processor(tokenizer, text, vision, self.resolution, *read_mean_and_std(tower, tower_loading))
        weights = language_weights(checkpoints.read_weights(self._source, self.loading, setting="model.model_id"))
        read = checkpoints.read_weights(tower, tower_loading, setting="model.tower")
        with checkpoints.translate_size_errors(self.name):
            weights |= tower_weights(read, vision)
        config = make_config(text, vision, processor.image_token_id)
        model, self.report = checkpoints.build_model(
            ConvLlavaForConditionalGeneration, config, weights, self.loading, self.name
        )
        return model, processor

    def _parts(self) -> tuple[str, Loading, LlamaConfig, ConvNextConfig]:
        """Return the tower's source and loading settings, and the configurations of language model and tower."""
        from transformers import ConvNextConfig, LlamaConfig

        config = checkpoints.read_config(self._source, self.loading)
        tower = self.tower or config.get("mm_vision_tower")
        if not tower or not isinstance(tower, str):
            raise ConfigError(f"model.tower is missing and the config.json of {self.model_id} names none")
        projector = config.get("mm_projector_type", "mlp2x_gelu")
        if projector != "mlp2x_gelu":
            raise CapabilityError(f"{self.model_id}: projector {projector!r}; only mlp2x_gelu is known")
        tower_loading = replace(self.loading, revision=self.tower_revision)
        text = checkpoints.merge_config(LlamaConfig, "text", checkpoints.LLAMA_7B, config, overrides=self.text)
        try:
            tower_config = checkpoints.read_config(tower, tower_loading)
        except ConfigError as error:
            origin = "" if self.tower else f", which the config.json of {self.model_id} names"
            raise ConfigError(f"model.tower={tower}{origin}: {error}") from error
        vision = checkpoints.merge_config(ConvNextConfig, "vision", tower_config, overrides=self.vision)
        if not len(vision.depths) == len(vision.hidden_sizes) == vision.num_stages:
            raise ConfigError(
                f"model.vision: depths={list(vision.depths)} and hidden_sizes={list(vision.hidden_sizes)} should each "
                f"have num_stages={vision.num_stages} numbers"
            )
        return tower, tower_loading, text, vision

    def _skeleton(self) -> PreTrainedModel:
        if self.random_init:
            return super()._skeleton()
        _, _, text, vision = self._parts()
        dtype = checkpoints.weight_dtype(checkpoints.read_config(self._source, self.loading), self.loading)
        config = make_config(text, vision, text.vocab_size)
        return checkpoints.build_skeleton(ConvLlavaForConditionalGeneration, config, dtype, self.name)

    def _tiny(self) -> tuple[PreTrainedModel, ImageTokenProcessor]:
        return tiny.build_from(build_tiny)

    def _make_encoder(self, model: PreTrainedModel, processor: ImageTokenProcessor) -> Callable[..., Encoded]:
        side = round(processor.image_tokens**0.5)
        return ImageTokenEncoder(processor, self.prompt, ((side, side),), self.follow_up)

    def fingerprint(self) -> dict[str, Any]:
        """See ``Adapter.fingerprint``."""
        facts = super().fingerprint()  # loads the model, which knows the resolution
        sizes = {"text": dict(self.text or {}), "vision": dict(self.vision or {}), "resolution": self.resolution}
        return facts | {"tower": self.tower and model_name(self.tower), **sizes}


def build_tiny() -> tuple[PreTrainedModel, ImageTokenProcessor]:
    """Build a tiny model: an image of 192 x 192 pixels as 3 x 3 tokens."""
    from transformers import ConvNextConfig, LlamaConfig

    tokenizer = tiny.llama_tokenizer()
    text = LlamaConfig(**text_sizes(tokenizer))
    vision = ConvNextConfig(
        hidden_sizes=[4, 8, 12, 16, 24], depths=[1, 1, 2, 1, 1], num_stages=5, layer_scale_init_value=0.05
    )
    processor = make_processor(tokenizer, text, vision, 192, CLIP_MEAN, CLIP_STD)
    return ConvLlavaForConditionalGeneration(make_config(text, vision, processor.image_token_id)), processor


def make_config(text: LlamaConfig, vision: ConvNextConfig, image_token_id: int) -> ConvLlavaConfig:
    """Build the configuration of the whole model; sets ``vision.hidden_size``, which LLaVA's projector reads."""
    vision.hidden_size = vision.hidden_sizes[-1]
    return ConvLlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=image_token_id,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )


def make_processor(
    tokenizer: LlamaTokenizer,
    text: LlamaConfig,
    vision: ConvNextConfig,
    resolution: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> ImageTokenProcessor:
    """Build the processor with the authors' preprocessing: pad to a square with the mean colour, resize, normalise.

    Raises:
        ConfigError: the resolution is no multiple of the side of a token.
    """
    side = vision.patch_size * 2 ** (len(vision.depths) - 1)
    if resolution < side or resolution % side:
        raise ConfigError(f"model.resolution={resolution} should be a multiple of {side}, the side of an image token")
    images = PixelProcessor((partial(pad_to_square, mean=mean), partial(squash, size=resolution)), mean, std)
    image_token_id = add_placeholder(tokenizer, PLACEHOLDER, text.vocab_size)
    return ImageTokenProcessor(tokenizer, images, PLACEHOLDER, image_token_id, (resolution // side) ** 2)


def language_weights(weights: Weights) -> Weights:
    """Rename language model and projector to the model's names; drop a tower, which the authors do not use."""

    def rule(name: str) -> str | None:
        if name.startswith("model.vision_tower.") or "rotary_emb" in name:
            return None
        for index, linear in (("0", "linear_1"), ("2", "linear_2")):
            name = name.replace(f"model.mm_projector.{index}.", f"model.multi_modal_projector.{linear}.")
        for part in ("embed_tokens", "layers", "norm"):
            if name.startswith(f"model.{part}."):
                return name.replace("model.", "model.language_model.", 1)
        return name

    return checkpoints.rename_weights(weights, rule)


def tower_weights(weights: Weights, vision: ConvNextConfig) -> Weights:
    """Rename the tower to the model's names; add the last norm, which is unused and missing in the authors' files."""
    renamed = checkpoints.rename_weights(weights, lambda name: f"model.vision_tower.{name.removeprefix('convnext.')}")
    file, width = next(iter(weights.values())).file, vision.hidden_sizes[-1]
    for key, value in (("layernorm.weight", torch.ones(width)), ("layernorm.bias", torch.zeros(width))):
        renamed.setdefault(f"model.vision_tower.{key}", Weight(value, file, key))
    return renamed


def _image_side(settings: Mapping[str, Any]) -> int | None:
    """Read the side of the image from ``preprocessor_config.json`` in any of its forms; None if it has none."""
    for name in ("crop_size", "size"):
        size = settings.get(name)
        size = next(iter(size.values()), None) if isinstance(size, Mapping) else size
        if isinstance(size, int):
            return size
    return None


class ConvLlavaConfig(LlavaConfig):
    """Configure a LLaVA with a ConvNeXt tower.

    ``vision_config`` has ``hidden_size`` added, the width of the last stage. The authors' files have the type
    ``llava``, which transformers takes for a LLaVA with a CLIP tower.
    """

    model_type = "convllava"


class ConvTower(ConvNextModel):
    """Allow a ConvNeXt, which has no attention, under every attention implementation of the whole model."""

    def get_correct_attn_implementation(self, *requested: Any, **options: Any) -> str:
        """Return the implementation that transformers allows for every class."""
        return "eager"


class ConvLlavaModel(LlavaModel):
    """Implement ConvLLaVA without its head."""

    config_class = ConvLlavaConfig

    def __init__(self, config: ConvLlavaConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = ConvTower._from_config(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Compute image tokens.

        Returns:
            ``pooler_output``: (rows * columns, D) per image; ``last_hidden_state``: (B, D', rows, columns).
        """
        features = self.vision_tower(pixel_values).last_hidden_state
        tokens = self.multi_modal_projector(features.flatten(2).transpose(1, 2))
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=list(tokens))


class ConvLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """Implement ConvLLaVA with its head."""

    config_class = ConvLlavaConfig

    def __init__(self, config: ConvLlavaConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = ConvLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        accept_image_tokens(self)
        self.post_init()
