"""Encode prompts of an image and a question with measured spans, caching what depends on one of them alone."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stethoscope.core.cache import LRUCache
from stethoscope.core.errors import ConfigError, DataError, first_line
from stethoscope.core.system import default_signals, describe_error
from stethoscope.tracing.token_spans import image_layout, image_positions, question_positions
from stethoscope.tracing.trace import Encoded, Spans

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, ProcessorMixin

SYSTEMS = {
    f"{name}_v1": f"A chat between a curious {person} and an artificial intelligence assistant. The assistant gives "
    f"helpful, detailed, and polite answers to the {person}'s questions."
    for name, person in (("vicuna", "user"), ("llava", "human"))
}
"""System texts by the names of LLaVA's authors: ``vicuna_v1`` of training and evaluation, ``llava_v1`` of the demo."""

QUESTION, IMAGE = "{question}", "{image}"
"""What stands for the question and for the image in prompts, and for the question in phrases."""
_ANSWER = "{answer}"
_NOT_INPUTS = ("offset_mapping", "text_replacement_offsets", "special_tokens_mask", "labels")
_IMAGE_BYTES = 32 * 2**20
"""Enough for consecutive questions about the same image; more would only make long runs grow."""
_TEXT_BYTES = 16 * 2**20


@dataclass(frozen=True)
class _TextInputs:
    """Inputs that depend on the question and the image's size alone, with spans and the prompt."""

    inputs: dict[str, Tensor]
    spans: Spans
    prompt: str

    def size(self) -> int:
        """Estimate the bytes of the tensors, and of the positions of image and question as Python's numbers."""
        positions = len(self.spans.image) + len(self.spans.question)
        return sum(part.nbytes for part in self.inputs.values()) + 40 * positions + 2000


@dataclass(frozen=True)
class Turns:
    """The texts between the turns of a conversation.

    Attributes:
        joint: between the first question and its answer.
        middle: between an answer and the next question.
        later_joint: between a later question and its answer.
        end: behind the last question, which is a later one.
    """

    joint: str
    middle: str
    later_joint: str
    end: str

    @classmethod
    def from_follow_up(cls, template: str, follow_up: str) -> Turns:
        """Read them from a prompt and from what follows an answer, both with ``{question}``.

        >>> Turns.from_follow_up("USER: {question} ASSISTANT:", "</s>USER: {question} ASSISTANT:")
        Turns(joint=' ASSISTANT: ', middle='</s>USER: ', later_joint=' ASSISTANT: ', end=' ASSISTANT:')
        """
        joint, (middle, end) = template.split(QUESTION)[1], follow_up.split(QUESTION)
        spaced = (part if not part or part[-1].isspace() else part + " " for part in (joint, end))
        return cls(next(spaced), middle, next(spaced), end)

    def before_question(self, before: str, history: Sequence[tuple[str, str]]) -> str:
        """Write a prompt up to its last question.

        Args:
            before: the prompt up to its first question.
            history: at least one question with its answer.

        >>> Turns(" A: ", " Q: ", " A: ", " A:").before_question("Q: ", [("a?", "Yes."), ("b?", "No.")])
        'Q: a? A: Yes. Q: b? A: No. Q: '
        """
        text, joint = before, self.joint
        for question, answer in history:
            text += question + joint + answer.strip() + self.middle
            joint = self.later_joint
        return text


class PromptEncoder:
    """Encode prompts for one model and processor.

    Args:
        model: whose configuration describes the image tokens.
        processor: of the model.
        prompt: template with ``{question}`` and the image placeholder (or ``{image}``); None for the chat template.
        system: text of the system turn, written by the chat template; empty for none. A ``prompt`` holds its own.
        follow_up: what comes behind an answer to ``prompt``, with the next ``{question}`` in it; None for one question
            alone. A chat template writes its own.

    Attributes:
        template: the prompt as rendered, with the image placeholder and ``{question}``.

    Raises:
        ConfigError: no chat template can be used, or the processor inserts the image itself and so does the prompt.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        prompt: str | None,
        system: str = "",
        follow_up: str | None = None,
    ) -> None:
        self._prompt, self._system, self._follow_up = prompt, system, follow_up
        self._config, self._processor, self._tokenizer = model.config, processor, processor.tokenizer
        self.image_token_id: int = model.config.image_token_id
        self._image_token = self._tokenizer.convert_ids_to_tokens(self.image_token_id)
        names = ("boi_token", "image_token") if model.config.model_type == "gemma3" else ("image_token",)
        placeholders = [token for name in names if (token := getattr(processor, name, None))]
        self._placeholder = str(placeholders[0] if placeholders else self._image_token)  # BLIP's is an AddedToken
        if prompt is None:
            template = _chat_prompt(processor, self._image_text(), self._placeholder, system)
        else:
            template = prompt.replace(IMAGE, self._placeholder)
        if getattr(processor, "num_query_tokens", None) and self._placeholder in template:
            name = type(processor).__name__
            raise ConfigError(f"prompt {prompt!r}: {name} puts the image before the text by itself; leave {IMAGE} out")
        self.template = template
        self._before, self._after = template.split(QUESTION)
        bos = self._tokenizer.bos_token
        self._options = {"add_special_tokens": False} if bos and template.startswith(bos) else {}
        self._inserted = (0, len(bos)) if bos else (0,)
        self._texts = LRUCache(_TEXT_BYTES, _TextInputs.size)
        self._images = LRUCache(_IMAGE_BYTES, lambda parts: sum(part.nbytes for part in parts.values()))
        self._image_inputs: frozenset[str] | None = None  # names of the inputs that depend on the image alone
        self._is_separable: dict[tuple[int, int], bool] = {}  # by image size, see ``_learn_image_inputs``

    def _image_text(self) -> str:
        """Return the image placeholder, between the tokens by which Qwen's models count images."""
        names = (getattr(self._config, f"vision_{end}_token_id", None) for end in ("start", "end"))
        start, end = ("" if token is None else self._tokenizer.convert_ids_to_tokens(token) for token in names)
        return f"{start}{self._placeholder}{end}"

    @cached_property
    def turns(self) -> Turns | None:
        """The texts between the turns of a conversation; None where the prompt is for one question alone."""
        if self._prompt is None:
            return _chat_turns(self._processor, self._image_text(), self._before, self._system)
        return None if self._follow_up is None else Turns.from_follow_up(self.template, self._follow_up)

    def __call__(self, image: Image, question: str, history: tuple[tuple[str, str], ...] = ()) -> Encoded:
        """See ``Adapter.encode``, for an RGB image. The prompt's text depends on it through its size alone."""
        image_key, text_key = (image.size, hashlib.sha256(image.tobytes()).digest()), (question, history, image.size)
        text, pixels = self._texts.get(text_key), self._images.get(image_key)
        if text is None or (pixels is None and not self._is_separable.get(image.size)):
            text, pixels = self._encode_prompt(image, question, history, learn=text is not None)
            self._texts.put(text_key, text)
            self._images.put(image_key, pixels)
        elif pixels is None:
            pixels = self._images.put(image_key, self._encode_image(image))
        return Encoded({**text.inputs, **pixels}, text.spans, text.prompt, question, history=history)

    def _encode_image(self, image: Image) -> dict[str, Tensor]:
        processed = self._process(self._processor.image_processor, image, images=image)
        names = set(processed) if self._image_inputs is None else self._image_inputs
        return {name: value for name, value in processed.items() if name in names}

    def _encode_prompt(
        self, image: Image, question: str, history: tuple[tuple[str, str], ...], learn: bool
    ) -> tuple[_TextInputs, dict[str, Tensor]]:
        """Run the whole processor; return the inputs of the text and those of the image."""
        check_placeholders((self._image_token, self._placeholder), question, history)
        before, after = around_question(self._before, self._after, self.turns if history else None, history)
        prompt = before + question + after
        options = {"return_offsets_mapping": True, "return_text_replacement_offsets": True, **self._options}
        try:
            processed = dict(self._process(self._processor, image, images=image, text=prompt, **options))
        except DataError as error:
            count = self.template.count(self._placeholder)
            if self._prompt is None or count == 1:
                raise
            raise ConfigError(f"prompt {self._prompt!r} should hold {IMAGE} once; it holds it {count} times") from error
        offsets = processed["offset_mapping"][0].tolist()
        replacements = (processed.get("text_replacement_offsets") or [[]])[0]
        inputs = {key: value for key, value in processed.items() if key not in _NOT_INPUTS}
        names = self._image_inputs
        if names is None or (learn and image.size not in self._is_separable):
            names = self._learn_image_inputs(image, inputs)
        ids = inputs["input_ids"][0].tolist()
        start, decode = len(before), self._tokenizer.decode
        in_question = question_positions(
            ids, offsets, replacements, (start, start + len(question)), self.image_token_id,
            lambda tokens: decode(tokens, clean_up_tokenization_spaces=False).strip() == question.strip(),
            self._inserted,
        )  # fmt: skip
        in_image = image_positions(ids, self.image_token_id)
        if not in_image:
            raise ConfigError(f"the prompt {prompt!r} has no place for the image; put {IMAGE} into it")
        grids, separators = image_layout(self._config, inputs, len(in_image))
        spans = Spans(len(ids), in_image, in_question, grids, tuple(in_image[index] for index in separators))
        pixels = {name: value for name, value in inputs.items() if name in names}
        text = {name: value for name, value in inputs.items() if name not in pixels}
        return _TextInputs(text, spans, prompt), pixels

    def _learn_image_inputs(self, image: Image, inputs: dict[str, Tensor]) -> frozenset[str]:
        """Record which inputs depend on the image alone, and whether the image processor by itself gives the same.

        InternVL's does not where the whole processor cuts the image into tiles, which depends on its size.
        """
        pixels = self._encode_image(image)
        names = frozenset(name for name in pixels if name in inputs)
        self._is_separable[image.size] = "pixel_values" in pixels and all(
            torch.is_tensor(pixels[name]) and torch.equal(pixels[name], inputs[name]) for name in names
        )
        self._image_inputs = names
        return names

    def _process(self, processor: Any, image: Image, **arguments: Any) -> Any:
        with translate_image_errors(image):
            return processor(return_tensors="pt", **arguments)


@contextmanager
def translate_image_errors(image: Image) -> Iterator[None]:
    """Turn what an image processor raises for an image that it cannot take into a DataError with the image's size."""
    try:
        yield
    except (ValueError, ArithmeticError, IndexError, OSError) as error:
        width, height = image.size
        reason = first_line(error)
        raise DataError(f"the processor refuses an image of {width} x {height} pixels: {reason}") from error


def check_placeholders(tokens: Sequence[str], question: str, history: Sequence[tuple[str, str]]) -> None:
    """Check that no text of a conversation stands for an image.

    Raises:
        DataError: the question, or an earlier one or its answer, holds one of the tokens.
    """
    names = [(f"the {part} of turn {number}", text) for number, turn in enumerate(history, 1)
             for part, text in zip(("question", "answer"), turn, strict=True)]  # fmt: skip
    for name, text in [*names, ("the question", question)]:
        if any(token and token in text for token in tokens):
            raise DataError(f"{name} holds the image placeholder: {text!r}")


def around_question(
    before: str, after: str, turns: Turns | None, history: Sequence[tuple[str, str]]
) -> tuple[str, str]:
    """Write what stands before the last question of a conversation, and behind it.

    Args:
        before: the prompt up to its first question.
        after: what stands behind it where it is the last one.
        turns: texts between turns; unused without a history.
        history: earlier questions with their answers.
    """
    if turns is None or not history:
        return before, after
    return turns.before_question(before, history), turns.end


def check_follow_up(prompt: str | None, follow_up: str | None) -> None:
    """Check that what follows an answer holds ``{question}`` once, and belongs to a prompt of one's own.

    Raises:
        ConfigError: it does not.
    """
    if follow_up is None:
        return
    if not isinstance(follow_up, str) or follow_up.count(QUESTION) != 1:
        raise ConfigError(
            f"model.follow_up={follow_up!r} must hold {QUESTION} once, as in '</s>USER: {QUESTION} ASSISTANT:'"
        )
    if prompt is None:
        raise ConfigError(
            f"model.follow_up={follow_up!r} follows an answer to model.prompt, which is not set: the chat template "
            "writes its own turns; leave model.follow_up at null"
        )


def check_prompt(prompt: str | None) -> None:
    """Check that a prompt template holds ``{question}`` once; raise ConfigError otherwise."""
    if prompt is not None and (not isinstance(prompt, str) or prompt.count(QUESTION) != 1):
        raise ConfigError(f"prompt {prompt!r} must hold {QUESTION} once, as in 'USER: {IMAGE} {QUESTION} ASSISTANT:'")


def check_chat_template(processor: ProcessorMixin) -> None:
    """Check that the chat template renders an image and a question, as a list of parts or as text.

    Raises:
        ConfigError: there is no chat template, or it cannot render them.
    """
    _renderings(processor, f"{getattr(processor, 'image_token', IMAGE)}\n{QUESTION}")


def _chat_prompt(processor: ProcessorMixin, image: str, placeholder: str, system: str = "") -> str:
    """Render the chat template as a prompt template.

    Args:
        processor: with the chat template.
        image: text that stands for the image, for templates that take no lists.
        placeholder: of the image within it.
        system: text of the system turn, empty for none.

    Raises:
        ConfigError: there is no chat template, none of its renderings holds the question once, or all leave the system
            text out.
    """
    renderings = _renderings(processor, f"{image}\n{QUESTION}", system)
    if system and not any(system in text for text in renderings):
        raise ConfigError(
            f"the chat template of {type(processor).__name__} leaves model.system={system!r} out; write it into "
            "model.prompt"
        )
    renderings = [text for text in renderings if system in text]
    usable = [text for text in renderings if text.count(QUESTION) == 1]
    if not usable:
        raise ConfigError(
            f"the chat template of {type(processor).__name__} writes the question {renderings[0].count(QUESTION)} "
            f"times as it is, not once; set model.prompt, with {QUESTION} in it"
        )
    return next((text for text in usable if placeholder in text), usable[0])


def _chat_turns(processor: ProcessorMixin, image: str, before: str, system: str) -> Turns | None:
    """Read the texts between turns from a chat template that is asked for three turns.

    Args:
        processor: with the chat template.
        image: text that stands for the image, for templates that take no lists.
        before: the prompt of one question, up to it.
        system: text of the system turn, empty for none.

    Returns:
        None where the template drops turns, moves the image, or writes turns differently by their number.
    """
    fields = [QUESTION, _ANSWER, QUESTION, _ANSWER, QUESTION]
    for text in _renderings(processor, f"{image}\n{QUESTION}", system, earlier=2):
        if re.findall(r"\{question\}|\{answer\}", text) != fields:
            continue
        first, joint, middle, later_joint, later_middle, end = re.split(r"\{question\}|\{answer\}", text)
        if first == before and middle == later_middle:
            return Turns(joint, middle, later_joint, end)
    return None


def _renderings(processor: ProcessorMixin, text: str, system: str = "", earlier: int = 0) -> list[str]:
    """Render an image and a question as a list of parts and, for templates that join strings, as ``text``.

    A system text that is not empty comes first, as a turn of its own in the same form. With ``earlier`` turns, the
    image and a question are the first of them, and every question but the last has an answer.
    """
    if not getattr(processor, "chat_template", None):
        raise ConfigError(f"{type(processor).__name__} has no chat template; set prompt, with {QUESTION} in it")
    renderings, errors = [], []
    forms: list[tuple[Any, Callable[[str], Any]]] = [
        ([{"type": "image"}, {"type": "text", "text": QUESTION}], lambda words: [{"type": "text", "text": words}]),
        (text, lambda words: words),
    ]
    for content, form in forms:
        turns = [{"role": "system", "content": form(system)}] if system else []
        turns.append({"role": "user", "content": content})
        for _ in range(earlier):
            turns.append({"role": "assistant", "content": form(_ANSWER)})
            turns.append({"role": "user", "content": form(QUESTION)})
        try:
            with default_signals():  # a template may loop in a C function, which no handler interrupts
                renderings.append(str(processor.apply_chat_template(turns, add_generation_prompt=True)))
        except Exception as error:  # a template may raise anything
            errors.append(error)
    if not renderings:
        raise ConfigError(
            f"the chat template of {type(processor).__name__} cannot take a picture and a question "
            f"({describe_error(errors[0])}); set model.prompt, with {QUESTION} in it"
        ) from errors[0]
    return renderings
