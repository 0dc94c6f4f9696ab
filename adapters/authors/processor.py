"""Prompts that are tokenised in chunks around the image, as the authors of several families do.

Those families have no processor in transformers. Their text is split at the image placeholder, every chunk is
tokenised by itself (the first after the beginning-of-sequence token) and the image tokens go between.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image as PIL
from PIL.Image import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from stethoscope.core.errors import ConfigError, DataError, first_line
from stethoscope.core.images import rgb
from stethoscope.tracing.token_spans import Grids
from stethoscope.tracing.trace import Encoded, Spans

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
class ImageTokenProcessor:
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


class ImageTokenEncoder:
    """Encodes for one processor: see ``Adapter.encode``.

    Args:
        prompt: template with ``{question}`` and the placeholder (or ``{image}``), each once.
        grids: (rows, columns) of the image tokens, as in ``Spans``; empty where they are no grid.

    Attributes:
        template: the prompt with the placeholder and ``{question}``.

    Raises:
        ConfigError: the template has not one place for the image and one for the question.
    """

    def __init__(self, processor: ImageTokenProcessor, prompt: str, grids: Grids = ()) -> None:
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


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels that CLIP was trained on (Radford et al. 2021), in red, green and blue, white being 1."""

Step = Callable[[Image], Image]


def squash(image: Image, size: int) -> Image:
    """A square of ``size`` pixels, bicubic; the proportions are lost.

    >>> squash(PIL.new("RGB", (40, 20)), 8).size
    (8, 8)
    """
    return image.resize((size, size), PIL.Resampling.BICUBIC)


def squash_to_longest(image: Image) -> Image:
    """A square as wide as the image's longer side.

    >>> squash_to_longest(PIL.new("RGB", (40, 20))).size
    (40, 40)
    """
    return squash(image, max(image.size))


def pad_to_square(image: Image, mean: Sequence[float] = CLIP_MEAN) -> Image:
    """The image in the middle of a square of one colour.

    Args:
        mean: colour in [0, 1], rounded down to whole levels as the authors of LLaVA do.

    >>> pad_to_square(PIL.new("RGB", (4, 2), "white")).getpixel((0, 0))
    (122, 116, 104)
    """
    width, height = image.size
    side = max(width, height)
    square = PIL.new("RGB", (side, side), tuple(int(part * 255) for part in mean))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def shortest_edge(image: Image, size: int) -> Image:
    """The image with its shorter side at ``size`` pixels, bicubic; the longer side is rounded down.

    >>> shortest_edge(PIL.new("RGB", (41, 20)), 10).size
    (20, 10)
    """
    width, height = image.size
    longer = int(size * max(width, height) / min(width, height))
    return image.resize((size, longer) if width <= height else (longer, size), PIL.Resampling.BICUBIC)


def centre_crop(image: Image, size: int) -> Image:
    """The middle ``size`` x ``size`` pixels of an image that is at least as large.

    >>> centre_crop(PIL.new("RGB", (41, 20)), 10).size
    (10, 10)
    """
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def normalised(image: Image, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """Pixels as the model reads them: (3, height, width) float32, (level / 255 - mean) / std of each colour."""
    levels = np.asarray(image, dtype=np.float32) / np.float32(255)
    values = (levels - np.asarray(mean, dtype=np.float32)) / np.asarray(std, dtype=np.float32)
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


@dataclass(frozen=True)
class PixelProcessor:
    """Stands where transformers has an image processor: called with ``images``, it gives ``pixel_values``.

    Attributes:
        steps: what is done to the RGB image, one after another.
        mean, std: of the normalisation at the end.
    """

    steps: tuple[Step, ...]
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __call__(self, images: Image, return_tensors: str = "pt") -> dict[str, Tensor]:
        """``pixel_values`` (1, 3, height, width) float32 of one image."""
        image = rgb(images)
        for step in self.steps:
            image = step(image)
        return {"pixel_values": normalised(image, self.mean, self.std)[None]}


class WordEmbedding(nn.Embedding):
    """Takes ids behind those of its words too: image tokens, whose embeddings the model puts in afterwards.

    So a model gets an id for image tokens while embedding and head keep the size that the checkpoint has, its
    probabilities stay what they were, and it can never say an image token.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) of ids (...) int64; those behind the last word give the last word's."""
        return super().forward(input.clamp(max=self.num_embeddings - 1))


def make_room(model: PreTrainedModel) -> None:
    """Lets a model that was just made embed image tokens. Call it at the end of ``__init__``."""
    words = model.get_input_embeddings()
    model.set_input_embeddings(WordEmbedding(words.num_embeddings, words.embedding_dim, words.padding_idx))
