"""Prompts that are tokenised in chunks around the image, as the authors of several families do.

Those families have no processor in transformers. Their text is split at the image placeholder, every chunk is
tokenised by itself (the first after the beginning-of-sequence token) and the image tokens go between.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stethoscope.core.errors import ConfigError, DataError, first_line
from stethoscope.trace import Encoded, Spans
from stethoscope.tracing.spans import Grids

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase

_QUESTION, _IMAGE = "{question}", "{image}"


@dataclass(frozen=True)
class Tokens:
    """A prompt as ids.

    Attributes:
        ids: token ids, image tokens among them.
        offsets: the characters (start, end) of the prompt that each id stands for; empty for the beginning-of-sequence
            token.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]


@dataclass(frozen=True)
class ChunkProcessor:
    """Stands where transformers has a processor; called like one, it gives the inputs of a forward pass.

    Attributes:
        tokenizer: with offsets.
        image_processor: called with ``images=`` it gives tensors, ``pixel_values`` among them.
        placeholder: where the image is in the text.
        image_token_id: id of an image token, one that no text gives.
        image_tokens: how many of them an image takes.
    """

    tokenizer: PreTrainedTokenizerBase
    image_processor: Callable[..., dict[str, Tensor]]
    placeholder: str
    image_token_id: int
    image_tokens: int

    def __call__(
        self, images: Image, text: str, return_tensors: str = "pt", add_special_tokens: bool = True
    ) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` (1, length) int64, and the image's tensors."""
        ids = torch.tensor([self.tokens(text, add_special_tokens).ids])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.image_processor(images=images)}

    def tokens(self, text: str, begin: bool = True) -> Tokens:
        """The ids of a prompt. Special tokens in it stand for themselves, and the text behind one is tokenised as at
        the start of a sentence: SentencePiece's way, which the authors' code has and transformers 5 has not.

        Args:
            begin: whether the beginning-of-sequence token comes first.
        """
        start = self.tokenizer.bos_token_id if begin else None
        ids, offsets = ([], []) if start is None else ([start], [(0, 0)])
        at = 0
        for number, chunk in enumerate(text.split(self.placeholder)):
            if number:
                ids += [self.image_token_id] * self.image_tokens
                offsets += [(at, at + len(self.placeholder))] * self.image_tokens
                at += len(self.placeholder)
            for piece in self._special.split(chunk):
                if piece in self._ids:
                    ids.append(self._ids[piece])
                    offsets.append((at, at + len(piece)))
                elif piece:
                    lead = self._lead if piece.startswith(" ") else ""
                    part = self.tokenizer(lead + piece, add_special_tokens=False, return_offsets_mapping=True)
                    ids += part["input_ids"]
                    for left, right in part["offset_mapping"]:  # the led space stands for the first character
                        offsets.append((at + max(left - len(lead), 0), at + max(right - len(lead), len(lead))))
                at += len(piece)
        return Tokens(ids, offsets)

    @cached_property
    def _lead(self) -> str:
        """SentencePiece puts a space before every text; transformers 5 leaves that out where there is one."""
        bare, led = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", " a"))
        return " " if bare == led else ""

    @cached_property
    def _ids(self) -> dict[str, int]:
        """Beginning and end of a sequence and the unknown token; the placeholder is none of them."""
        tokenizer = self.tokenizer
        named = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token} - {None, self.placeholder}
        return {token: tokenizer.convert_tokens_to_ids(token) for token in named}

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return re.compile(f"({'|'.join(map(re.escape, sorted(self._ids)))})" if self._ids else "(?!)")


class ChunkEncoder:
    """Encodes for one processor: see ``Adapter.encode``.

    Args:
        prompt: template with ``{question}`` and the placeholder (or ``{image}``), each once.
        grids: (rows, columns) of the image tokens, as in ``Spans``; empty where they are no grid.

    Attributes:
        template: the prompt with the placeholder and ``{question}``.

    Raises:
        ConfigError: the template has not one place for the image and one for the question.
    """

    def __init__(self, processor: ChunkProcessor, prompt: str, grids: Grids = ()) -> None:
        if prompt is None:
            raise ConfigError("model.prompt is missing; for example 'USER: <image>\\n{question} ASSISTANT:'")
        template = prompt.replace(_IMAGE, processor.placeholder)
        for place in (processor.placeholder, _QUESTION):
            if template.count(place) != 1:
                raise ConfigError(
                    f"prompt {prompt!r} must hold {place} once; it holds it {template.count(place)} times"
                )
        self.template = template
        self._before, self._after = template.split(_QUESTION)
        self._processor, self._grids = processor, grids
        self.image_token_id = processor.image_token_id

    def __call__(self, image: Image, question: str) -> Encoded:
        """Raises DataError for a question that holds the placeholder and for an image that cannot be preprocessed."""
        processor = self._processor
        if processor.placeholder in question:
            raise DataError(f"the question holds the image placeholder {processor.placeholder}: {question!r}")
        text = self._before + question + self._after
        tokens = processor.tokens(text)
        image_at = tuple(at for at, token in enumerate(tokens.ids) if token == processor.image_token_id)
        start, end = len(self._before), len(self._before) + len(question)
        question_at = tuple(
            at for at, (left, right) in enumerate(tokens.offsets) if left < end and right > start and right > left
        )
        ids = torch.tensor([tokens.ids])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self._pixels(image)}
        return Encoded(inputs, Spans(len(tokens.ids), image_at, question_at, self._grids), text, question)

    def _pixels(self, image: Image) -> dict[str, Tensor]:
        try:
            return dict(self._processor.image_processor(images=image))
        except (ValueError, ZeroDivisionError, ArithmeticError, IndexError, OSError) as error:
            width, height = image.size
            reason = first_line(error)
            raise DataError(f"an image of {width} x {height} pixels cannot be preprocessed: {reason}") from error


def add_placeholder(tokenizer: Any, placeholder: str, words: int) -> int:
    """Gives the placeholder an id behind those of all words, so that no text and no answer holds it by chance.

    Args:
        tokenizer: is changed.
        words: number of words that the language model knows; may be more than the tokenizer's.

    Returns:
        The id.
    """
    from transformers import AddedToken

    names = [f"<unused{number}>" for number in range(len(tokenizer), words)]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in (*names, placeholder)], True)
    return tokenizer.convert_tokens_to_ids(placeholder)
