"""ConvLLaVA (Ge et al. 2024, arXiv 2405.15738) from the authors' files: one token for every 64 x 64 pixels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import AutoModel, ConvNextModel, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModel, LlavaMultiModalProjector, LlavaPreTrainedModel

from stethoscope.adapters import memory
from stethoscope.adapters.authors import checkpoints
from stethoscope.adapters.authors.checkpoints import Weight, Weights
from stethoscope.adapters.authors.processor import (
    ImageTokenEncoder,
    ImageTokenProcessor,
    PixelProcessor,
    add_placeholder,
    make_room,
    pad_to_square,
    squash,
)
from stethoscope.adapters.hf import HfAdapter
from stethoscope.core.errors import CapabilityError, ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import ConvNextConfig, LlamaConfig, LlamaTokenizer, PreTrainedModel

    from stethoscope.adapters.loading import Loading
    from stethoscope.tracing.trace import Encoded

PLACEHOLDER = "<image>"
_TURN = "USER: <image>\n{question} ASSISTANT:"
PROMPTS = {
    "v1": "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    f"detailed, and polite answers to the user's questions. {_TURN}",
    "llava_v1": "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    f"helpful, detailed, and polite answers to the human's questions. {_TURN}",
}
"""The authors' templates by their names: ``v1`` in training and evaluation, ``llava_v1`` in their demo."""


class ConvLlavaAdapter(HfAdapter):
    """ConvLLaVA, put together from the language model with its projector and the vision tower.

    Args:
        model_id: folder or hub id of language model, projector and tokenizer.
        tower: folder or hub id of the vision tower; what the model's own ``config.json`` names by default.
        tower_revision: branch, tag or commit of a tower from the hub.
        resolution: side of the square that the tower sees, a multiple of 64; None for what the tower's
            ``preprocessor_config.json`` says.
        prompt: one of ``PROMPTS``, or a template with ``{question}`` and ``<image>``.
        text, vision: sizes that differ from the ``config.json`` of model and tower, by the names of ``LlamaConfig`` and
            ``ConvNextConfig``.
        settings: as for ``HfAdapter``.

    Attributes:
        report: how files and model fitted together, once loaded.

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
        self.report: checkpoints.Report | None = None

    def _load(self) -> tuple[PreTrainedModel, ImageTokenProcessor]:
        tower, beside, text, vision = self._parts()
        tokenizer = checkpoints.load_llama_tokenizer(self.model_id, self.loading)
        side = _side(checkpoints.read_config(tower, beside, "preprocessor_config.json"))
        if self.resolution is None:
            if side is None:
                raise ConfigError(
                    "model.resolution is missing and the tower's preprocessor_config.json says none; give 768, ..."
                )
            self.resolution = side
        elif side not in (None, self.resolution):
            warnings.warn(
                f"model.resolution={self.resolution}, but the preprocessor_config.json of model.tower={tower} says "
                f"{side}, which the tower has learnt; resolution=null takes that",
                stacklevel=2,
            )
        colours = checkpoints.mean_and_std(tower, beside)
        processor = make_processor(tokenizer, text, vision, self.resolution, *colours)
        weights = language_weights(checkpoints.read(self.model_id, self.loading, what="model.model_id"))
        weights |= tower_weights(checkpoints.read(tower, beside, what="model.tower"), vision)
        config = make_config(text, vision, processor.image_token_id)
        model, self.report = checkpoints.build(
            ConvLlavaForConditionalGeneration, config, weights, self.loading, self.name
        )
        checkpoints.warn_of_strays(self.name, self.report)
        return model, processor

    def _parts(self) -> tuple[str, Loading, LlamaConfig, ConvNextConfig]:
        """The tower's source and how it is loaded, the sizes of language model and tower."""
        from transformers import ConvNextConfig, LlamaConfig

        held = checkpoints.read_config(self.model_id, self.loading)
        tower = self.tower or held.get("mm_vision_tower")
        if not tower:
            raise ConfigError(f"model.tower is missing and the config.json of {self.model_id} names none")
        if held.get("mm_projector_type", "mlp2x_gelu") != "mlp2x_gelu":
            raise CapabilityError(f"{self.model_id}: projector {held['mm_projector_type']!r}; only mlp2x_gelu is known")
        beside = replace(self.loading, revision=self.tower_revision)
        text = checkpoints.sized(LlamaConfig, "text", checkpoints.LLAMA_7B, held, chosen=self.text)
        try:
            seeing = checkpoints.read_config(tower, beside)
        except ConfigError as error:
            named = "" if self.tower else f", which the config.json of {self.model_id} names"
            raise ConfigError(f"model.tower={tower}{named}: {error}") from error
        vision = checkpoints.sized(ConvNextConfig, "vision", seeing, chosen=self.vision)
        if not len(vision.depths) == len(vision.hidden_sizes) == vision.num_stages:
            raise ConfigError(
                f"model.vision: depths={list(vision.depths)} and hidden_sizes={list(vision.hidden_sizes)} should each "
                f"have num_stages={vision.num_stages} numbers"
            )
        return tower, beside, text, vision

    def _skeleton(self) -> PreTrainedModel:
        if self.random_init:
            return super()._skeleton()
        _, _, text, vision = self._parts()
        dtype = checkpoints.dtype_of(checkpoints.read_config(self.model_id, self.loading), self.loading)
        with memory.on_meta_device():
            return ConvLlavaForConditionalGeneration._from_config(
                make_config(text, vision, text.vocab_size), dtype=dtype
            )

    def _make_encoder(self, model: PreTrainedModel, processor: ImageTokenProcessor) -> Callable[[Image, str], Encoded]:
        side = round(processor.image_tokens**0.5)
        return ImageTokenEncoder(processor, self.prompt, ((side, side),))

    def fingerprint(self) -> dict[str, Any]:
        """See ``Adapter.fingerprint``; the digest is that of all files together."""
        self.setup()
        if self._digest is None and self.report is not None:
            self._digest = checkpoints.digest(self.report.files)
        sizes = {"text": dict(self.text or {}), "vision": dict(self.vision or {}), "resolution": self.resolution}
        return super().fingerprint() | {"tower": self.tower and Path(self.tower).name, **sizes}


def make_config(text: LlamaConfig, vision: ConvNextConfig, image_token_id: int) -> ConvLlavaConfig:
    """The configuration of the whole model."""

    vision.hidden_size = vision.hidden_sizes[-1]  # what LLaVA's projector asks for
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
    """The authors' preprocessing: padded to a square with the mean colour, resized, normalised.

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
    """Language model and projector under the model's names. A tower among them is not the one that the authors use."""

    def rule(name: str) -> str | None:
        if name.startswith("model.vision_tower.") or "rotary_emb" in name:
            return None
        for number, linear in (("0", "linear_1"), ("2", "linear_2")):
            name = name.replace(f"model.mm_projector.{number}.", f"model.multi_modal_projector.{linear}.")
        for part in ("embed_tokens", "layers", "norm"):
            if name.startswith(f"model.{part}."):
                return name.replace("model.", "model.language_model.", 1)
        return name

    return checkpoints.renamed(weights, rule)


def tower_weights(weights: Weights, vision: ConvNextConfig) -> Weights:
    """The tower under the model's names. Its last norm, which nothing reads, is not in the authors' files."""
    import torch

    named = checkpoints.renamed(weights, lambda name: f"model.vision_tower.{name.removeprefix('convnext.')}")
    file, width = next(iter(weights.values())).file, vision.hidden_sizes[-1]
    for key, value in (("layernorm.weight", torch.ones(width)), ("layernorm.bias", torch.zeros(width))):
        named.setdefault(f"model.vision_tower.{key}", Weight(value, file, key))
    return named


def _side(settings: Mapping[str, Any]) -> int | None:
    """Read the side of the image off ``preprocessor_config.json``, in any of its forms; None if it says none."""
    for name in ("crop_size", "size"):
        size = settings.get(name)
        size = next(iter(size.values()), None) if isinstance(size, Mapping) else size
        if isinstance(size, int):
            return size
    return None


class ConvLlavaConfig(LlavaConfig):
    """A LLaVA configuration with a ``ConvNextConfig``, to which ``hidden_size``, the width of the last stage, is added.

    The authors' files call themselves ``llava``, which transformers takes for a LLaVA with a CLIP tower.
    """

    model_type = "convllava"


class ConvTower(ConvNextModel):
    """ConvNeXt beside a language model under any attention implementation: it has no attention to implement."""

    def get_correct_attn_implementation(self, *requested: Any, **options: Any) -> str:
        """The one that transformers lets every class have."""
        return "eager"


class ConvLlavaModel(LlavaModel):
    """ConvLLaVA without its head."""

    config_class = ConvLlavaConfig

    def __init__(self, config: ConvLlavaConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = ConvTower._from_config(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """As ``pooler_output`` (rows * columns, D) per image; as ``last_hidden_state`` (B, D', rows, columns)."""
        features = self.vision_tower(pixel_values).last_hidden_state
        tokens = self.multi_modal_projector(features.flatten(2).transpose(1, 2))
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=list(tokens))


class ConvLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """ConvLLaVA."""

    config_class = ConvLlavaConfig

    def __init__(self, config: ConvLlavaConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = ConvLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        make_room(self)
        self.post_init()
