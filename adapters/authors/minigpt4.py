"""MiniGPT-4: put together from a language model, a vision tower with its Q-Former, and the authors' projector file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.adapters import memory, tiny
from stethoscope.adapters.authors import checkpoints
from stethoscope.adapters.authors import minigpt4_model as parts
from stethoscope.adapters.authors.checkpoints import Report, Weights
from stethoscope.adapters.authors.processor import (
    ImageTokenEncoder,
    ImageTokenProcessor,
    PixelProcessor,
    add_placeholder,
    squash,
)
from stethoscope.adapters.hf import HfAdapter
from stethoscope.adapters.loading import is_folder, translate_loading_errors
from stethoscope.core.errors import ConfigError, DataError, unknown
from stethoscope.tracing.trace import Encoded

if TYPE_CHECKING:
    from PIL.Image import Image
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
"""By version; those of the authors' demo."""
_FILES = {"vicuna": "prerained_minigpt4_7b.pth", "llama2": "the one for Llama 2"}


class MiniGpt4Adapter(HfAdapter):
    """MiniGPT-4 from its authors' files.

    The parts are read in the order vision, qformer, llm, projector; what a later file holds too counts.

    Args:
        version: ``vicuna`` (Vicuna v0, Q-Former, 32 image tokens) or ``llama2`` (Llama 2, no Q-Former, 64).
        llm: folder or hub id of the language model and its tokenizer; ``revision`` is its.
        vision: the vision tower: a hub id, folder or file in transformers' BLIP-2 names, or ``eva_vit_g.pth``.
        qformer: Q-Former, queries and the norm behind the tower: the same, or ``blip2_pretrained_flant5xxl.pth``; None
            where ``vision`` holds them. Not read for Llama 2.
        projector: the authors' checkpoint (``.pth``), with ``llama_proj`` and whatever else was trained.
        vision_layers: layers of the tower that are used; the published file has one more.
        vision_heads, qformer_heads: attention heads, which no file tells.
        prompt: the model's own prompt; that of ``version`` by default.
        settings: as for ``HfAdapter``.

    Attributes:
        report: how files and model fitted, once loaded.

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
        if version not in PROMPTS:
            raise ConfigError(unknown("version of MiniGPT-4", str(version), PROMPTS))
        if model_id is not None:
            raise ConfigError(f"model_id={model_id}: MiniGPT-4 has no one source; set llm, vision, qformer, projector")
        if settings.get("random_init") is None:
            if projector is None:
                raise ConfigError(
                    f"model.projector is missing; give the path of the authors' .pth file ({_FILES[version]}), which "
                    f"they publish for download by hand (Vision-CAIR/MiniGPT-4 on GitHub)"
                )
            for key, value in (("llm", llm), ("vision", vision)):
                if value is None:
                    raise ConfigError(f"model.{key} is missing; give a folder or a hub id (owner/name)")
        self.version, self.report = version, Report(0, (), ())
        self.sources = {"llm": llm, "vision": vision, "qformer": qformer, "projector": projector}
        self.vision_layers, self.vision_heads, self.qformer_heads = vision_layers, vision_heads, qformer_heads
        settings["name"] = settings.get("name") or f"minigpt4-{version}"
        super().__init__(llm, prompt=prompt or PROMPTS[version], **settings)

    def _load(self) -> tuple[PreTrainedModel, ImageTokenProcessor]:
        what = f"MiniGPT-4 ({self.version})"
        text = self._text()  # what is small comes first: a fault of it costs no download of the large files
        tokenizer = checkpoints.load_llama_tokenizer(self.sources["llm"], self.loading)
        trained = parts.named(self._read("projector"), self.vision_layers)
        if "language_projection.weight" not in trained:
            first = next(iter(trained.values()))
            raise DataError(f"{first.file} holds no llama_proj.weight; it begins with {first.key}")
        weights, words = self._seen(), self._read("llm", ("model.", "lm_head."))
        weights |= parts.named({f"language_model.{key}": word for key, word in words.items()}, self.vision_layers)
        weights |= trained
        image_token_id = add_placeholder(tokenizer, PLACEHOLDER, text.vocab_size)
        cls, config = parts.configured(*self._sizes(weights), text, image_token_id)
        if self.version == "llama2":
            weights = parts.for_llama2(weights)
        model, self.report = checkpoints.build(cls, config, weights, self.loading, what)
        checkpoints.warn_of_strays(what, self.report)
        return model, make_processor(config, tokenizer)

    def _text(self) -> PreTrainedConfig:
        """The language model's configuration."""
        from transformers import AutoConfig

        llm = self.sources["llm"]
        folder = is_folder(llm)
        with translate_loading_errors(llm):
            source = str(Path(llm).expanduser()) if folder else llm
            text = AutoConfig.from_pretrained(source, **self.loading.hub_kwargs(folder))
        if text.model_type != "llama":
            raise ConfigError(f"llm={llm} is a {text.model_type} model; MiniGPT-4 has a llama")
        return text

    def _sizes(self, weights: Weights | None) -> tuple[Blip2VisionConfig, tuple[Blip2QFormerConfig, int] | None]:
        """Of the tower and the Q-Former, by their weights or, without them, as published."""
        bridge = None
        if self.version == "vicuna":
            bridge = parts.qformer_config(weights, self.qformer_heads, self._label(self._queries))
        return parts.vision_config(weights, self.vision_layers, self.vision_heads, self._label("vision")), bridge

    def _skeleton(self) -> PreTrainedModel:
        if self.random_init:
            return super()._skeleton()
        here = Path(self.sources["vision"]).expanduser().exists()  # else it would be downloaded for its sizes
        text = self._text()
        cls, config = parts.configured(*self._sizes(self._seen() if here else None), text, text.vocab_size)
        with memory.on_meta_device():
            return cls._from_config(config, dtype=memory.dtype_of(text, self.loading))

    def _seen(self) -> Weights:
        """Weights of all between image and language model, under the names of ``MiniGpt4Vicuna``."""
        weights = parts.named(self._read("vision", parts.NEEDED), self.vision_layers)
        if self.version == "llama2":
            return parts.with_plain_norm(weights, self._label("vision"))
        wanted = (*parts.QUERIES, *parts.NORM)
        return weights | parts.named(self._read(self._queries, wanted), self.vision_layers)

    @property
    def _queries(self) -> str:
        """The source that holds the Q-Former."""
        return "qformer" if self.sources["qformer"] else "vision"

    def _label(self, part: str) -> str:
        return f"{part}={self.sources[part]}"

    def _read(self, part: str, only: tuple[str, ...] = ()) -> Weights:
        loading = self.loading if part == "llm" else replace(self.loading, revision=None)
        return checkpoints.read(self.sources[part], loading, only, part)

    def _tiny(self) -> tuple[PreTrainedModel, ImageTokenProcessor]:
        return tiny.build(f"minigpt4-{self.version}")

    def _make_encoder(self, model: PreTrainedModel, processor: ImageTokenProcessor) -> Callable[[Image, str], Encoded]:
        return ImageTokenEncoder(processor, self.prompt, _grids(self.version, model.config.vision_config))

    def fingerprint(self) -> dict[str, Any]:
        """See ``Adapter.fingerprint``; the digest is that of all files together."""
        if self._digest is None and not self.random_init:
            self.setup()
            self._digest = checkpoints.digest(self.report.files)
        names = {key: value and Path(value).name for key, value in self.sources.items()}
        heads = {"vision_layers": self.vision_layers, "vision_heads": self.vision_heads}
        heads |= {"qformer_heads": self.qformer_heads} if self.version == "vicuna" else {}
        return super().fingerprint() | {"version": self.version, "sources": names, **heads}


def make_processor(config: Blip2Config | LlavaConfig, tokenizer: PreTrainedTokenizerBase) -> ImageTokenProcessor:
    """The authors' preprocessing, and the prompt's chunks.

    Args:
        config: of the whole model.
        tokenizer: knows the placeholder.
    """
    queries = getattr(config, "num_query_tokens", None)
    tokens = config.image_seq_length if queries is None else queries
    pixels = PixelProcessor((partial(squash, size=config.vision_config.image_size),))
    return ImageTokenProcessor(tokenizer, pixels, PLACEHOLDER, config.image_token_id, tokens)


def _grids(version: str, vision: Blip2VisionConfig) -> tuple[tuple[int, int], ...]:
    """Queries are no grid; merged patches are one unless a token reaches from one row into the next."""
    side = vision.image_size // vision.patch_size
    return ((side, side // parts.MERGED),) if version == "llama2" and side % parts.MERGED == 0 else ()
