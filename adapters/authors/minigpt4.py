"""Adapt MiniGPT-4, from a language model, a vision tower with its Q-Former, and the authors' projector file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from stethoscope.adapters import memory, tiny
from stethoscope.adapters.authors import checkpoints
from stethoscope.adapters.authors import minigpt4_model as modelling
from stethoscope.adapters.authors.checkpoints import Weights
from stethoscope.adapters.authors.processor import (
    ImageTokenEncoder,
    ImageTokenProcessor,
    PixelProcessor,
    add_placeholder,
    load_llama_tokenizer,
    squash,
)
from stethoscope.adapters.hf import HfAdapter
from stethoscope.adapters.loading import model_name
from stethoscope.adapters.tiny.tokenizers import SIZES, text_sizes
from stethoscope.core.errors import ConfigError, DataError, unknown
from stethoscope.tracing.trace import Encoded

if TYPE_CHECKING:
    from transformers import (
        Blip2Config,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        LlavaConfig,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

PLACEHOLDER = "<ImageHere>"
_SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    "Please answer my questions."
)
PROMPTS = {
    "vicuna": _SYSTEM + "###Human: <Img>" + PLACEHOLDER + "</Img> {question}###Assistant: ",
    "llama2": _SYSTEM + "<s>[INST] <Img>" + PLACEHOLDER + "</Img> {question} [/INST] ",
}
"""Prompts of the authors' demo by version."""
_FILES = {"vicuna": "prerained_minigpt4_7b.pth", "llama2": "the one for Llama 2"}


class MiniGpt4Adapter(HfAdapter):
    """Adapt MiniGPT-4 from its authors' files.

    The parts are read in the order vision, qformer, llm, projector; weights of later files override earlier ones.

    Args:
        version: ``vicuna`` (Vicuna v0, Q-Former, 32 image tokens) or ``llama2`` (Llama 2, no Q-Former, 64).
        llm: folder or hub id of the language model and its tokenizer, to which ``revision`` applies.
        vision: the vision tower: a hub id, folder or file in transformers' BLIP-2 names, or ``eva_vit_g.pth``.
        qformer: source of Q-Former, queries and the norm behind the tower: as for ``vision``, or
            ``blip2_pretrained_flant5xxl.pth``; None where ``vision`` holds them. Not used with Llama 2.
        projector: the authors' checkpoint (``.pth``), with ``llama_proj`` and all other trained weights.
        vision_layers: number of tower layers to use; the published file has one more.
        vision_heads, qformer_heads: numbers of attention heads, which no file holds.
        prompt: the model's own prompt; that of ``version`` by default.
        settings: as for ``HfAdapter``.

    Raises:
        ConfigError: a setting is wrong, or a part is not given.
    """

    stop = ("###",)

    def __init__(
        self,
        *,
        version: str = "vicuna",
        llm: str | None = None,
        vision: str | None = "Salesforce/blip2-flan-t5-xxl",
        qformer: str | None = None,
        projector: str | None = None,
        vision_layers: int = 39,
        vision_heads: int = 16,
        qformer_heads: int = 12,
        prompt: str | None = None,
        model_id: str | None = None,
        **settings: Any,
    ) -> None:
        if str(version) not in PROMPTS:
            raise ConfigError(unknown("version of MiniGPT-4", str(version), PROMPTS))
        if model_id is not None:
            raise ConfigError(f"model_id={model_id}: MiniGPT-4 has four sources; set llm, vision, qformer, projector")
        if settings.get("random_init") is None:
            if projector is None:
                raise ConfigError(
                    f"model.projector is missing; give the path of the authors' .pth file ({_FILES[version]}), which "
                    f"they publish for download by hand (Vision-CAIR/MiniGPT-4 on GitHub)"
                )
            for key, value in (("llm", llm), ("vision", vision)):
                if value is None:
                    raise ConfigError(f"model.{key} is missing; give a folder or a hub id (owner/name)")
        self.version = version
        self.sources = {"llm": llm, "vision": vision, "qformer": qformer, "projector": projector}
        for key, value in self.sources.items():
            if not isinstance(value, (str, type(None))):
                raise ConfigError(f"model.{key}={value!r} should be a path or a hub id (owner/name)")
        counts = {"vision_layers": vision_layers, "vision_heads": vision_heads, "qformer_heads": qformer_heads}
        for key, count in counts.items():
            if type(count) is not int or count < 1:
                raise ConfigError(f"model.{key}={count!r} should be a number, at least 1")
        self.vision_layers, self.vision_heads, self.qformer_heads = vision_layers, vision_heads, qformer_heads
        settings["name"] = settings.get("name") or f"minigpt4-{version}"
        super().__init__(llm, prompt=prompt or PROMPTS[version], **settings)

    def _load(self) -> tuple[PreTrainedModel, ImageTokenProcessor]:
        text = self._text_config()  # small files come first, so that an error in them saves downloading large ones
        tokenizer = load_llama_tokenizer(self._source, self.loading)
        trained = self._read("projector")
        if "language_projection.weight" not in trained:
            first = next(iter(trained.values()))
            raise DataError(f"{first.file} holds no llama_proj.weight; it begins with {first.key}")
        weights = self._vision_weights() | self._read("llm", ("model.", "lm_head."), "language_model.") | trained
        image_token_id = add_placeholder(tokenizer, PLACEHOLDER, text.vocab_size)
        with checkpoints.translate_size_errors(self.name):
            cls, config = modelling.build_config(*self._part_configs(weights), text, image_token_id)
        if self.version == "llama2":
            weights = modelling.llama2_weights(weights)
        name = f"MiniGPT-4 ({self.version})"
        model, self.report = checkpoints.build_model(cls, config, weights, self.loading, name)
        return model, make_processor(config, tokenizer)

    def _text_config(self) -> PreTrainedConfig:
        """Read the language model's configuration."""
        text = memory.read_config(self._source, self.loading)
        if text.model_type != "llama":
            raise ConfigError(f"llm={self._source} is a {text.model_type} model; MiniGPT-4 has a llama")
        return text

    def _part_configs(self, weights: Weights | None) -> tuple[Blip2VisionConfig, tuple[Blip2QFormerConfig, int] | None]:
        """Build the configurations of tower and Q-Former from their weights or, without weights, as published."""
        qformer, sources = None, {part: f"{part}={source}" for part, source in self.sources.items()}
        if self.version == "vicuna":
            qformer = modelling.qformer_config(weights, self.qformer_heads, sources[self._qformer_source])
        vision = modelling.vision_config(weights, self.vision_layers, self.vision_heads, sources["vision"])
        return vision, qformer

    def _skeleton(self) -> PreTrainedModel:
        if self.random_init:
            return super()._skeleton()
        is_local = Path(self._source_of("vision")).expanduser().exists()  # else it would be downloaded for its sizes
        text = self._text_config()
        weights = self._vision_weights() if is_local else None
        with checkpoints.translate_size_errors(self.name):
            cls, config = modelling.build_config(*self._part_configs(weights), text, text.vocab_size)
        return checkpoints.build_skeleton(cls, config, memory.dtype_of(text, self.loading), self.name)

    def _vision_weights(self) -> Weights:
        """Read the weights of tower and Q-Former, under the names of ``MiniGpt4Vicuna``."""
        weights = self._read("vision", modelling.TOWER_PREFIXES)
        if self.version == "llama2":
            return modelling.add_identity_norm(weights, f"vision={self.sources['vision']}")
        prefixes = (*modelling.QFORMER_PREFIXES, *modelling.NORM_PREFIXES)
        return weights | self._read(self._qformer_source, prefixes)

    def _source_of(self, part: str) -> str:
        return cast("str", self.sources[part])  # the constructor refuses None for the parts that are read

    @property
    def _qformer_source(self) -> str:
        """Name the source that holds the Q-Former."""
        return "qformer" if self.sources["qformer"] else "vision"

    def _read(self, part: str, prefixes: tuple[str, ...] = (), parent: str = "") -> Weights:
        """Read the weights of a part as those of the module ``parent``, under the names of ``MiniGpt4Vicuna``."""
        loading = self.loading if part == "llm" else replace(self.loading, revision=None)
        weights = checkpoints.read_weights(self._source_of(part), loading, prefixes, part)
        return modelling.vicuna_weights(
            {f"{parent}{key}": weight for key, weight in weights.items()}, self.vision_layers
        )

    def _tiny(self) -> tuple[PreTrainedModel, ImageTokenProcessor]:
        return tiny.build_from(partial(build_tiny, self.version))

    def _make_encoder(self, model: PreTrainedModel, processor: ImageTokenProcessor) -> Callable[..., Encoded]:
        vision, merged = model.config.vision_config, modelling.MERGED_PATCHES
        side = vision.image_size // vision.patch_size
        # queries have no grid, and merged patches only if no token spans two rows
        grids = ((side, side // merged),) if self.version == "llama2" and side % merged == 0 else ()
        return ImageTokenEncoder(processor, self.prompt, grids, self.follow_up)

    def fingerprint(self) -> dict[str, Any]:
        """See ``Adapter.fingerprint``."""
        names = {key: value and model_name(value) for key, value in self.sources.items()}
        heads = {"vision_layers": self.vision_layers, "vision_heads": self.vision_heads}
        heads |= {"qformer_heads": self.qformer_heads} if self.version == "vicuna" else {}
        return super().fingerprint() | {"version": self.version, "sources": names, **heads}


def build_tiny(version: str) -> tuple[PreTrainedModel, ImageTokenProcessor]:
    """Build a tiny model with Vicuna and a Q-Former of six queries, or with Llama 2 and without one."""
    from transformers import Blip2QFormerConfig, Blip2VisionConfig, LlamaConfig

    tokenizer = tiny.llama_tokenizer()
    text = LlamaConfig(**text_sizes(tokenizer, num_key_value_heads=SIZES["num_attention_heads"]))
    image_token_id = add_placeholder(tokenizer, PLACEHOLDER, text.vocab_size)
    size, qformer = 112, None
    if version == "vicuna":
        size, qformer = 56, (Blip2QFormerConfig(**{**SIZES, "num_hidden_layers": 4}), 6)
    vision = Blip2VisionConfig(**SIZES, image_size=size, patch_size=14)
    cls, config = modelling.build_config(vision, qformer, text, image_token_id)
    return cls(config), make_processor(config, tokenizer)


def make_processor(config: Blip2Config | LlavaConfig, tokenizer: PreTrainedTokenizerBase) -> ImageTokenProcessor:
    """Build the processor with the authors' preprocessing.

    Args:
        config: of the whole model.
        tokenizer: with the placeholder as a token.
    """
    queries = getattr(config, "num_query_tokens", None)
    tokens = config.image_seq_length if queries is None else queries
    pixels = PixelProcessor((partial(squash, size=config.vision_config.image_size),))
    return ImageTokenProcessor(tokenizer, pixels, PLACEHOLDER, config.image_token_id, tokens)
