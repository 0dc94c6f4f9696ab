"""A prompt around image and question, with measured spans; what one question or one image costs is paid once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stethoscope.core.cache import LRUCache
from stethoscope.core.errors import ConfigError, DataError, first_line
from stethoscope.core.images import rgb
from stethoscope.core.system import default_signals, describe_error
from stethoscope.tracing.token_spans import image_layout, image_positions, question_positions
from stethoscope.tracing.trace import Encoded, Spans

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, ProcessorMixin

_QUESTION, _IMAGE = "{question}", "{image}"
_NOT_INPUTS = ("offset_mapping", "text_replacement_offsets", "special_tokens_mask", "labels")
_IMAGE_BYTES = 32 * 2**20
"""Enough for the questions that follow each other about a picture: more would only make long runs grow."""
_TEXT_BYTES = 16 * 2**20


@dataclass(frozen=True)
class _Text:
    """What a question and an image's size determine: the inputs that hold no pixels, spans, the prompt."""

    inputs: dict[str, Tensor]
    spans: Spans
    prompt: str

    def size(self) -> int:
        """Bytes, about: tensors, and the positions of image and question as Python's numbers."""
        positions = len(self.spans.image) + len(self.spans.question)
        return sum(part.nbytes for part in self.inputs.values()) + 40 * positions + 2000


class PromptEncoder:
    """Encodes for one model and processor.

    Args:
        prompt: template with ``{question}`` and the image placeholder (or ``{image}``); None for the chat template.

    Attributes:
        template: the prompt as rendered, with the image placeholder and ``{question}``.

    Raises:
        ConfigError: no chat template can be used, or the prompt has a place for an image that has one already.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, prompt: str | None) -> None:
        self._config, self._processor, self._tokenizer = model.config, processor, processor.tokenizer
        self.image_token_id: int = model.config.image_token_id
        self._image_token = self._tokenizer.convert_ids_to_tokens(self.image_token_id)
        names = ("boi_token", "image_token") if model.config.model_type == "gemma3" else ("image_token",)
        self._placeholder = next((v for name in names if (v := getattr(processor, name, None))), self._image_token)
        self._placeholder = str(self._placeholder)  # Blip processors hold an AddedToken
        if prompt is None:
            template = _chat(processor, self._image_text(), self._placeholder)
        else:
            template = prompt.replace(_IMAGE, self._placeholder)
        if getattr(processor, "num_query_tokens", None) and self._placeholder in template:
            name = type(processor).__name__
            raise ConfigError(f"prompt {prompt!r}: {name} puts the image before the text by itself; leave {_IMAGE} out")
        self.template = template
        self._before, self._after = template.split(_QUESTION)
        bos = self._tokenizer.bos_token
        self._options = {"add_special_tokens": False} if bos and template.startswith(bos) else {}
        self._inserted = (0, len(bos)) if bos else (0,)
        self._texts = LRUCache(_TEXT_BYTES, _Text.size)
        self._images = LRUCache(_IMAGE_BYTES, lambda parts: sum(part.nbytes for part in parts.values()))
        self._image_names: frozenset[str] | None = None
        self._alone: dict[tuple[int, int], bool] = {}

    def _image_text(self) -> str:
        """The image placeholder, between the tokens that Qwen's models count images by."""
        names = (getattr(self._config, f"vision_{end}_token_id", None) for end in ("start", "end"))
        start, end = ("" if token is None else self._tokenizer.convert_ids_to_tokens(token) for token in names)
        return f"{start}{self._placeholder}{end}"

    def __call__(self, image: Image, question: str) -> Encoded:
        """See ``Adapter.encode``. The prompt's text depends on the image by nothing but its size."""
        image = rgb(image)
        name = (image.size, hashlib.sha256(image.tobytes()).digest())
        text, pixels = self._texts.get((question, image.size)), self._images.get(name)
        if text is None or (pixels is None and not self._alone.get(image.size)):
            text, pixels = self._measure(image, question, learn=text is not None)
            self._texts.put((question, image.size), text)
            self._images.put(name, pixels)
        elif pixels is None:
            pixels = self._images.put(name, self._pixels(image))
        return Encoded({**text.inputs, **pixels}, text.spans, text.prompt, question)

    def _pixels(self, image: Image) -> dict[str, Tensor]:
        processed = self._run(self._processor.image_processor, image, images=image)
        names = set(processed) if self._image_names is None else self._image_names
        return {name: value for name, value in processed.items() if name in names}

    def _measure(self, image: Image, question: str, learn: bool) -> tuple[_Text, dict[str, Tensor]]:
        if any(token and token in question for token in (self._image_token, self._placeholder)):
            raise DataError(f"the question holds the image placeholder: {question!r}")
        prompt = self._before + question + self._after
        asked = {"return_offsets_mapping": True, "return_text_replacement_offsets": True, **self._options}
        processed = dict(self._run(self._processor, image, images=image, text=prompt, **asked))
        offsets = processed["offset_mapping"][0].tolist()
        replacements = (processed.get("text_replacement_offsets") or [[]])[0]
        inputs = {key: value for key, value in processed.items() if key not in _NOT_INPUTS}
        if self._image_names is None or (learn and image.size not in self._alone):
            self._learn(image, inputs)
        ids = inputs["input_ids"][0].tolist()
        start = len(self._before)
        question_at = question_positions(
            ids, offsets, replacements, (start, start + len(question)), self.image_token_id,
            lambda some: self._decode(some).strip() == question.strip(), self._inserted,
        )  # fmt: skip
        image_at = image_positions(ids, self.image_token_id)
        if not image_at:
            raise ConfigError(f"the prompt {prompt!r} has no place for the image; put {_IMAGE} into it")
        grids, separators = image_layout(self._config, inputs, len(image_at))
        spans = Spans(len(ids), image_at, question_at, grids, tuple(image_at[index] for index in separators))
        pixels = {key: value for key, value in inputs.items() if key in self._image_names}
        return _Text({k: v for k, v in inputs.items() if k not in self._image_names}, spans, prompt), pixels

    def _learn(self, image: Image, inputs: dict[str, Tensor]) -> None:
        """Finds which inputs come from the image alone, and whether the image processor by itself gives the same.

        InternVL's does not where the whole processor cuts the image into tiles, which depends on its size.
        """
        alone = self._pixels(image)
        self._image_names = frozenset(name for name in alone if name in inputs)
        self._alone[image.size] = "pixel_values" in alone and all(
            torch.is_tensor(alone[name]) and torch.equal(alone[name], inputs[name]) for name in self._image_names
        )

    def _run(self, processor: Any, image: Image, **arguments: Any) -> Any:
        try:
            return processor(return_tensors="pt", **arguments)
        except (ValueError, ZeroDivisionError, ArithmeticError, IndexError) as error:
            width, height = image.size
            reason = first_line(error)
            raise DataError(f"the processor refuses an image of {width} x {height} pixels: {reason}") from error

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def check_prompt(prompt: str | None) -> None:
    """Raises ConfigError unless the template has one place for the question."""
    if prompt is not None and prompt.count(_QUESTION) != 1:
        raise ConfigError(
            f"prompt {prompt!r} must hold {_QUESTION} once, as in 'USER: {_IMAGE} {_QUESTION} ASSISTANT:'"
        )


def check_chat_template(processor: ProcessorMixin) -> None:
    """Check that the chat template renders a picture and a question, as lists or as text; needs no weights.

    Raises:
        ConfigError: there is none, or it cannot.
    """
    _renderings(processor, f"{getattr(processor, 'image_token', _IMAGE)}\n{_QUESTION}")


def _chat(processor: ProcessorMixin, image: str, placeholder: str) -> str:
    """Render the chat template as a prompt template.

    Args:
        image: text that stands for the picture, for templates that take no lists.
        placeholder: of the image within it.

    Raises:
        ConfigError: there is no chat template, or none of its renderings holds the question once.
    """
    renderings = _renderings(processor, f"{image}\n{_QUESTION}")
    usable = [text for text in renderings if text.count(_QUESTION) == 1]
    if not usable:
        raise ConfigError(
            f"the chat template of {type(processor).__name__} writes the question {renderings[0].count(_QUESTION)} "
            f"times as it is, not once; set model.prompt, with {_QUESTION} in it"
        )
    return next((text for text in usable if placeholder in text), usable[0])


def _renderings(processor: ProcessorMixin, text: str) -> list[str]:
    """Renderings of a picture and a question: as a list of parts, and for templates that join strings, as ``text``."""
    if not getattr(processor, "chat_template", None):
        raise ConfigError(f"{type(processor).__name__} has no chat template; set prompt, with {_QUESTION} in it")
    renderings, errors = [], []
    for content in ([{"type": "image"}, {"type": "text", "text": _QUESTION}], text):
        try:
            with default_signals():  # a template may loop in a C function, which no handler interrupts
                turn = {"role": "user", "content": content}
                renderings.append(str(processor.apply_chat_template([turn], add_generation_prompt=True)))
        except Exception as error:  # a template may raise anything
            errors.append(error)
    if not renderings:
        raise ConfigError(
            f"the chat template of {type(processor).__name__} cannot take a picture and a question "
            f"({describe_error(errors[0])}); set model.prompt, with {_QUESTION} in it"
        ) from errors[0]
    return renderings
