"""Encode pictures and questions as one model takes them: a phrase for what is asked, a picture brought to a square."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from PIL import Image as Images

from stethoscope.adapters.picture_settings import SQUARES, make_square, mean_colour
from stethoscope.core.errors import CapabilityError, ConfigError, DataError, unknown
from stethoscope.core.system import model_faults
from stethoscope.core.text import counted
from stethoscope.core.types import Picture, load_picture
from stethoscope.tracing.trace import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

ASKS = ("question", "description")
"""What a task can ask for."""

QUESTION = "{question}"
"""What stands for the question in prompts and phrases."""


class QuestionEncoder:
    """Encode pictures and questions for one loaded model.

    Args:
        name: of the model, for messages.
        model: whose configuration says how long a prompt may be.
        processor: of the model.
        encoder: builds a prompt around a picture, a question and, where there are any, earlier questions and answers.
        phrases: by what is asked for, the text that stands in place of the question, see ``check_phrases``.
        square: how pictures are brought to a square, one of ``SQUARES``.

    Attributes:
        square: as given.
        template: the prompt as rendered, with ``{question}``; None where the encoder does not say.

    Raises:
        ConfigError: there is no such way to a square, or the prompt lacks the image placeholder.
        CapabilityError: the processor has no colour to pad with, or refuses a picture.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        encoder: Callable[..., Encoded],
        phrases: Mapping[str, str],
        square: str,
    ) -> None:
        self._name, self._processor, self._phrases = name, processor, phrases
        self.encoder, self.template = encoder, getattr(encoder, "template", None)
        self._context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.square = self._checked(square)
        try:  # a broken processor is detected before the first sample
            encoder(Images.new("RGB", (336, 336), "grey"), "Is there a dog in the image?")
        except DataError as error:
            raise CapabilityError(f"the processor of {name} does not work: {error}") from error

    def with_square(self, square: str) -> QuestionEncoder:
        """Return the same encoder with another way to bring pictures to a square; errors are those of the class."""
        other = copy(self)
        other.square = self._checked(square)
        return other

    def _checked(self, square: str) -> str:
        if square not in SQUARES:
            raise ConfigError(unknown("way to make a picture square", square, SQUARES))
        if square == "pad":
            mean_colour(self._processor, self._name)
        return square

    @property
    def has_turns(self) -> bool:
        """Whether the prompt has room for earlier questions and answers."""
        return getattr(self.encoder, "turns", None) is not None

    def __call__(self, asks: str, image: Picture, question: str, turns: tuple[tuple[str, str], ...] = ()) -> Encoded:
        """Encode the phrase for what is asked for, with the picture as a square where that is set.

        Args:
            asks: one of ``ASKS``.
            image: that is asked about.
            question: the text.
            turns: earlier questions and their answers, for a prompt that ``has_turns``.

        Raises:
            DataError: see ``HfAdapter.encode``.
        """
        image = load_picture(image)
        phrase, earlier_phrase = (self._phrases.get(key, QUESTION) for key in (asks, "question"))
        earlier = tuple((earlier_phrase.replace(QUESTION, old), answer) for old, answer in turns)
        with model_faults(f"the processor of {self._name} fails on this picture and question"):
            picture = make_square(image, self.square, self._processor, self._name)
            encoded = self.encoder(picture, phrase.replace(QUESTION, question), *([earlier] if turns else []))
            encoded = replace(encoded, question=question, asks=asks, history=turns)
        if self._context and encoded.spans.length >= self._context:
            begin = f", with {counted(len(turns), 'earlier turn')}" if turns else ""
            raise DataError(
                f"the prompt has {encoded.spans.length:,} tokens, image tokens included{begin}; {self._name} reads "
                f"fewer than {self._context:,}"
            )
        return encoded


def check_phrases(phrases: Any) -> dict[str, str]:
    """Return the phrases by what a task asks for; raise ConfigError for an unknown key or one without a question."""
    if phrases is None:
        return {}
    if not isinstance(phrases, Mapping) or not all(isinstance(phrase, str) for phrase in phrases.values()):
        raise ConfigError(
            f"model.phrases={phrases!r} should be texts by what is asked for, as "
            f"{{question: 'answer en {QUESTION}', description: caption en}}"
        )
    for asks, phrase in phrases.items():
        if asks not in ASKS:
            raise ConfigError(unknown("key of model.phrases", str(asks), ASKS))
        if phrase.count(QUESTION) > 1 or (asks == "question" and QUESTION not in phrase) or not phrase.strip():
            raise ConfigError(f"model.phrases.{asks}={phrase!r} should hold {QUESTION} once")
    return dict(phrases)
