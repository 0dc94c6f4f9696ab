"""Process prompts and images of families whose authors split the text at the image placeholder.

Those families have no processor in transformers. Each chunk of text is tokenised by itself (the first after the
beginning-of-sequence token), and the image tokens are inserted between the chunks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image as PIL
from PIL.Image import Image
from torch import Tensor, nn

from stethoscope.adapters.authors.checkpoints import find_file, read_config
from stethoscope.adapters.load_settings import Loading
from stethoscope.adapters.loading import is_folder, silenced, translate_loading_errors
from stethoscope.adapters.prompts import (
    IMAGE,
    QUESTION,
    Turns,
    around_question,
    check_placeholders,
    translate_image_errors,
)
from stethoscope.adapters.question_encoder import CLIP_MEAN
from stethoscope.core.errors import CapabilityError, ConfigError, DataError
from stethoscope.core.images import rgb
from stethoscope.tracing.token_spans import Grids
from stethoscope.tracing.trace import Encoded, Spans

if TYPE_CHECKING:
    from transformers import LlamaTokenizer, PreTrainedModel, PreTrainedTokenizerBase

_MOST_UNUSED = 2**16  # ids of a language model that its tokenizer has no token for


@dataclass(frozen=True)
class Tokens:
    """Hold the tokens of a prompt.

    Attributes:
        ids: token ids, image tokens among them.
        offsets: (start, end) characters of the prompt for each id; empty for the beginning-of-sequence token.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]


@dataclass(frozen=True)
class ImageTokenProcessor:
    """Compute the inputs of a forward pass from an image and a text, like a processor of transformers.

    Attributes:
        tokenizer: one that returns offsets.
        image_processor: returns tensors for ``images=``, ``pixel_values`` among them.
        placeholder: text that stands for the image.
        image_token_id: id of an image token, which no text is tokenised to.
        image_tokens: number of tokens per image.
    """

    tokenizer: PreTrainedTokenizerBase
    image_processor: Callable[..., dict[str, Tensor]]
    placeholder: str
    image_token_id: int
    image_tokens: int

    def __call__(
        self, images: Image, text: str, return_tensors: str = "pt", add_special_tokens: bool = True
    ) -> dict[str, Tensor]:
        """Compute ``input_ids`` and ``attention_mask`` (1, length) int64, and the image's tensors."""
        ids = torch.tensor([self.tokens(text, add_special_tokens).ids])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.image_processor(images=images)}

    def tokens(self, text: str, begin: bool = True) -> Tokens:
        """Tokenise a prompt, image tokens included.

        Special tokens in the text are one token each, and the text after one is tokenised as at the start of a
        sentence. The authors' code does the same with SentencePiece; transformers 5 does not.

        Args:
            text: prompt with image placeholders.
            begin: whether the beginning-of-sequence token comes first.
        """
        bos_id = self.tokenizer.bos_token_id if begin else None
        ids, offsets = ([], []) if bos_id is None else ([bos_id], [(0, 0)])
        position = 0
        for index, chunk in enumerate(text.split(self.placeholder)):
            if index:
                end = position + len(self.placeholder)
                ids += [self.image_token_id] * self.image_tokens
                offsets += [(position, end)] * self.image_tokens
                position = end
            for piece in self._special_pattern.split(chunk):
                if piece in self._special_ids:
                    ids.append(self._special_ids[piece])
                    offsets.append((position, position + len(piece)))
                elif piece:
                    space = self._leading_space if piece.startswith(" ") else ""
                    encoding = self.tokenizer(space + piece, add_special_tokens=False, return_offsets_mapping=True)
                    ids += encoding["input_ids"]
                    for start, end in encoding["offset_mapping"]:  # the added space counts as the first character
                        start, end = max(start - len(space), 0), max(end - len(space), len(space))
                        offsets.append((position + start, position + end))
                position += len(piece)
        return Tokens(ids, offsets)

    @cached_property
    def _leading_space(self) -> str:
        """Return the space that SentencePiece puts before a text; transformers 5 omits it before another space."""
        without_space, with_space = (
            self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", " a")
        )
        return " " if without_space == with_space else ""

    @cached_property
    def _special_ids(self) -> dict[str, int]:
        """Map beginning and end of a sequence and the unknown token to ids; the placeholder is none of them."""
        tokenizer = self.tokenizer
        tokens = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token} - {None, self.placeholder}
        return {token: tokenizer.convert_tokens_to_ids(token) for token in tokens}

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        tokens = sorted(self._special_ids)
        return re.compile(f"({'|'.join(map(re.escape, tokens))})" if tokens else "(?!)")


class ImageTokenEncoder:
    """Encode prompts for one processor, see ``Adapter.encode``.

    Args:
        processor: of the model.
        prompt: template with ``{question}`` and the placeholder (or ``{image}``), each once.
        grids: (rows, columns) of the image tokens, as in ``Spans``; empty where they are no grid.
        follow_up: what comes behind an answer, with the next ``{question}``; None for one question alone.

    Attributes:
        template: the prompt with the placeholder and ``{question}``.
        turns: texts between the turns of a conversation; None where the prompt is for one question alone.

    Raises:
        ConfigError: the template does not hold image and question once each.
    """

    def __init__(
        self, processor: ImageTokenProcessor, prompt: str | None, grids: Grids = (), follow_up: str | None = None
    ) -> None:
        if prompt is None:
            raise ConfigError("model.prompt is missing; for example 'USER: <image>\\n{question} ASSISTANT:'")
        template = prompt.replace(IMAGE, processor.placeholder)
        for field in (processor.placeholder, QUESTION):
            if template.count(field) != 1:
                raise ConfigError(
                    f"prompt {prompt!r} must hold {field} once; it holds it {template.count(field)} times"
                )
        self.template = template
        self._before, self._after = template.split(QUESTION)
        self.turns = None if follow_up is None else Turns.from_follow_up(template, follow_up)
        self._processor, self._grids = processor, grids
        self.image_token_id = processor.image_token_id

    def __call__(self, image: Image, question: str, history: tuple[tuple[str, str], ...] = ()) -> Encoded:
        """See ``Adapter.encode``.

        Raises:
            DataError: a text holds the placeholder, or the image cannot be preprocessed.
        """
        processor = self._processor
        check_placeholders([processor.placeholder], question, history)
        before, after = around_question(self._before, self._after, self.turns, history)
        text = before + question + after
        tokens = processor.tokens(text)
        in_image = tuple(index for index, token in enumerate(tokens.ids) if token == processor.image_token_id)
        start, end = len(before), len(before) + len(question)
        in_question = tuple(
            index for index, (left, right) in enumerate(tokens.offsets) if left < end and right > start and right > left
        )
        with translate_image_errors(image):
            pixels = processor.image_processor(images=image)
        ids = torch.tensor([tokens.ids])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
        spans = Spans(len(tokens.ids), in_image, in_question, self._grids)
        return Encoded(inputs, spans, text, question, history=history)


def add_placeholder(tokenizer: Any, placeholder: str, vocab_size: int) -> int:
    """Give the placeholder an id beyond the vocabulary, so that no text and no answer holds it by chance.

    Args:
        tokenizer: is changed.
        placeholder: text of the new token.
        vocab_size: of the language model; may be larger than the tokenizer's.

    Returns:
        The id.

    Raises:
        DataError: the vocabulary is so much larger than the tokenizer's that one of them is wrong.
    """
    from transformers import AddedToken

    if vocab_size - len(tokenizer) > _MOST_UNUSED:
        raise DataError(f"vocab_size={vocab_size:,} of the language model; its tokenizer has {len(tokenizer):,} tokens")
    names = [f"<unused{index}>" for index in range(len(tokenizer), vocab_size)]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in (*names, placeholder)], True)
    return tokenizer.convert_tokens_to_ids(placeholder)


CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of CLIP's training pixels (Radford et al. 2021) in red, green and blue; white is 1."""

Step = Callable[[Image], Image]


def squash(image: Image, size: int) -> Image:
    """Resize to a square of ``size`` pixels, bicubic, without keeping the aspect ratio.

    >>> squash(PIL.new("RGB", (40, 20)), 8).size
    (8, 8)
    """
    return image.resize((size, size), PIL.Resampling.BICUBIC)


def normalise(image: Image, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """Normalise pixels to (level / 255 - mean) / std per colour: (3, height, width) float32."""
    levels = np.asarray(image, dtype=np.float32) / np.float32(255)
    values = (levels - np.asarray(mean, dtype=np.float32)) / np.asarray(std, dtype=np.float32)
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


@dataclass(frozen=True)
class PixelProcessor:
    """Compute ``pixel_values`` from an image, like an image processor of transformers.

    Attributes:
        steps: applied to the RGB image in order.
        mean, std: of the normalisation at the end.
    """

    steps: tuple[Step, ...]
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __call__(self, images: Image, return_tensors: str = "pt") -> dict[str, Tensor]:
        """Compute ``pixel_values`` (1, 3, height, width) float32 of one image."""
        image = rgb(images)
        for step in self.steps:
            image = step(image)
        return {"pixel_values": normalise(image, self.mean, self.std)[None]}

    def to_dict(self) -> dict[str, Any]:
        """Return mean and standard deviation, for the fingerprint; the steps belong to the adapter."""
        return {"mean": self.mean, "std": self.std}


class ClampedEmbedding(nn.Embedding):
    """Embed ids beyond the vocabulary too: image tokens, whose embeddings the model replaces afterwards.

    So image tokens have an id while embedding and head keep the checkpoint's size: probabilities do not change, and
    the model cannot generate an image token.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Embed ids (...) int64 as (..., D); ids beyond the vocabulary get the last embedding."""
        return super().forward(input.clamp(max=self.num_embeddings - 1))


def accept_image_tokens(model: PreTrainedModel) -> None:
    """Let a new model embed image tokens (``ClampedEmbedding``); to be called at the end of ``__init__``."""
    embeddings = model.get_input_embeddings()
    model.set_input_embeddings(
        ClampedEmbedding(embeddings.num_embeddings, embeddings.embedding_dim, embeddings.padding_idx)
    )


def read_mean_and_std(source: str, loading: Loading) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Read mean and standard deviation of red, green and blue from ``preprocessor_config.json``, else take CLIP's.

    Raises:
        ConfigError, DataError: as ``read_config``; or they are not three numbers each, those of the deviation above 0.
    """
    settings = read_config(source, loading, "preprocessor_config.json")
    colours = []
    for name, default in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD)):
        given = settings.get(name)
        parts = default if given is None else given
        is_list = isinstance(parts, (list, tuple)) and len(parts) == 3
        if not is_list or not all(isinstance(part, (int, float)) and math.isfinite(part) for part in parts):
            raise DataError(
                f"the preprocessor_config.json of {source}: {name}={given!r:.80} should be three numbers such as "
                f"{list(default)}"
            )
        if name == "image_std" and min(parts) <= 0:  # pixels are divided by it
            raise DataError(f"the preprocessor_config.json of {source}: {name}={given!r:.80} should be above 0")
        colours.append(tuple(parts))
    return colours[0], colours[1]


def load_llama_tokenizer(source: str, loading: Loading) -> LlamaTokenizer:
    """Load Llama's tokenizer from ``tokenizer.json``, or from SentencePiece's ``tokenizer.model``.

    Without either file transformers would silently build a tokenizer of three tokens.

    Raises:
        ConfigError: there is neither.
        CapabilityError: only ``tokenizer.model`` is there, and sentencepiece, which reads it, is not installed.
        DataError: the file is damaged.
    """
    from transformers import AutoTokenizer, LlamaTokenizer

    if find_file(source, "tokenizer.json", loading) is None:
        if find_file(source, "tokenizer.model", loading) is None:
            raise ConfigError(f"{source} holds no tokenizer; it should hold tokenizer.json or tokenizer.model")
        if find_spec("sentencepiece") is None:
            raise CapabilityError(
                f"{source}: sentencepiece, which reads its tokenizer.model, is not installed; "
                "pip install 'lvlm-stethoscope[sentencepiece]'"
            )
    name = read_config(source, loading, "tokenizer_config.json").get("tokenizer_class")
    cls = LlamaTokenizer if name in (None, "LlamaTokenizer", "LlamaTokenizerFast") else AutoTokenizer
    folder = is_folder(source)
    with translate_loading_errors(source), silenced(folder):
        return cls.from_pretrained(str(Path(source).expanduser()), **loading.hub_kwargs(folder))
