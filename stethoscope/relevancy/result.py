"""Hold the relevancy of an answer, and read the positions of its tokens off the inputs of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stethoscope.core.errors import CapabilityError, DataError
from stethoscope.core.text import counted
from stethoscope.tracing.attention_recorder import logits_to_keep

LEAST = 1e-9  # relevancy of which a logarithm is taken: below the resolution of float32


@dataclass(frozen=True)
class Relevancy:
    """Relevancy of T answer tokens after L layers (1 for the final layer only).

    Tensors are on the CPU, float32 (float64 for a float64 model). A decoder-only model has ``llm``; an encoder-decoder
    model has ``decoder`` and ``encoder`` instead.

    Attributes:
        tokens: indices of the answer tokens, from 0.
        first: row that predicts answer token 0; answer token j itself is at position ``first + 1 + j``.
        image_positions: positions of the image tokens in the prompt, N of them.
        question_positions: positions of the question's tokens in the prompt; empty where unknown.
        llm: (T, L, S) over prompt and answer; exactly zero after the predicting row.
        decoder: (T, L, D) over the decoder's own sequence.
        encoder: (T, L, E) over the encoder's sequence, which is the prompt.
        vision: (T, L, M) over all tokens of the vision tower with class tokens, tiles one after another, in the order
            of ``pixel_values``.
        tiles: (T, L, tiles, rows, columns) the patches of ``vision``; None where they form no grid.
        saliency: (T, L, S) or (T, L, D), along ``llm`` or ``decoder``: |A * dz/dA| of the token's own logit z, summed
            over heads, in the row that predicts it of every layer's own attention map (or the last layer's); no
            recursion. On earlier answer tokens it drops before hallucinations (LVLMs-Saliency, arXiv 2601.20279,
            which takes all rows of a layer and divides by the map's norm). The same in both scopes.
        query_text: (T, L, Q) over the tokens that a Q-Former reads beside its queries (InstructBLIP).
    """

    tokens: tuple[int, ...]
    first: int
    image_positions: tuple[int, ...]
    question_positions: tuple[int, ...] = ()
    llm: Tensor | None = None
    decoder: Tensor | None = None
    encoder: Tensor | None = None
    vision: Tensor | None = None
    tiles: Tensor | None = None
    query_text: Tensor | None = None
    saliency: Tensor | None = None

    def __repr__(self) -> str:
        return f"Relevancy({counted(len(self.tokens), 'answer token')}, {len(self.image_positions)} image tokens)"

    @property
    def patches(self) -> Tensor | None:
        """(T, L, rows, columns) where there is one grid; None for images that are cut into several tiles."""
        return self.tiles[:, :, 0] if self.tiles is not None and self.tiles.shape[2] == 1 else None

    @cached_property
    def image(self) -> Tensor:
        """(T, L, N) over the image tokens of the language model."""
        return self._sequence[..., list(self.image_positions)]

    @cached_property
    def question(self) -> Tensor:
        """(T, L, Q) over the question's tokens."""
        return self._sequence[..., list(self.question_positions)]

    @property
    def answer(self) -> Tensor:
        """(T, L, A) over the answer's tokens; zero for a token itself and those after it."""
        return self._sequence[..., self._answer_start :]

    @property
    def rest(self) -> Tensor:
        """(T, L, rest) over everything else: the first token, the template, a decoder's start token."""
        used = torch.zeros(self._sequence.shape[-1], dtype=torch.bool)
        used[[*self.image_positions, *self.question_positions]] = True
        used[self._answer_start :] = True
        return self._sequence[..., ~used]

    @cached_property
    def total(self) -> Tensor:
        """(T, L) sum of the row: of image, question, answer and rest."""
        return self._sequence.sum(-1)

    @cached_property
    def shares(self) -> dict[str, np.ndarray]:
        """(T, L) shares of the row, in [0, 1]: on ``image``, ``question``, earlier ``answer`` and ``rest``."""
        total = self.total.numpy().clip(min=1e-12)
        return {name: getattr(self, name).sum(-1).numpy() / total for name in ("image", "question", "answer", "rest")}

    @cached_property
    def contributions(self) -> dict[str, np.ndarray]:
        """(T, L) visual contribution log(R_image / R_text), by ``sum``, ``max`` and ``mean`` over tokens.

        Text is the question and the earlier answer. Above 0, the image is more relevant. The features
        ``visual_contribution_*`` are its last layer.
        """
        image = self.image.double().numpy()
        text = np.concatenate([self.question.double().numpy(), self.answer.double().numpy()], -1)
        before = self.question.shape[-1] + np.array(self.tokens)
        pairs = {
            "sum": (image.sum(-1), text.sum(-1)),
            "max": (image.max(-1), text.max(-1)),
            "mean": (image.mean(-1), text.sum(-1) / np.maximum(before, 1)[:, None]),
        }
        return {
            name: np.log(of_image.clip(min=LEAST) / of_text.clip(min=LEAST))
            for name, (of_image, of_text) in pairs.items()
        }

    @cached_property
    def _sequence(self) -> Tensor:
        """(T, L, S) over the prompt's sequence, followed by the decoder's where it has its own."""
        if self.llm is not None:
            return self.llm
        if self.encoder is None or self.decoder is None:
            raise DataError("this relevancy has neither `llm` nor both `encoder` and `decoder`")
        return torch.cat([self.encoder, self.decoder], -1)

    def require_saliency(self) -> Tensor:
        """Return ``saliency``, or raise ``CapabilityError`` where it was not computed.

        Raises:
            CapabilityError: this relevancy holds no saliency.
        """
        if self.saliency is None:
            raise CapabilityError("this relevancy holds no 'saliency', which a feature requires")
        return self.saliency

    @property
    def _answer_start(self) -> int:
        return self.first + 1 + (0 if self.encoder is None else self.encoder.shape[-1])


@dataclass(frozen=True)
class Layout:
    """Positions in the sequences of one sample, or of B samples that share them.

    Attributes:
        answer: (B, A) int64 ids of the answers, padded with zeros.
        counts: number of tokens of every answer, A at most.
        first: row that predicts answer token 0; token k is predicted by row ``first + k``.
        length: length of the sequence of these rows (the decoder's, for an encoder-decoder model).
        image: (N,) positions of the image tokens in ``input_ids``.
        encoder_decoder: the language model has an encoder, which reads ``input_ids``.
    """

    answer: Tensor
    counts: tuple[int, ...]
    first: int
    length: int
    image: Tensor
    encoder_decoder: bool


def read_layout(model: PreTrainedModel, inputs: Mapping[str, Tensor], answer_ids: Sequence[int]) -> Layout:
    """Read the positions of one sample off its inputs.

    Raises:
        DataError: the inputs do not hold the answer or the image tokens.
        CapabilityError: the inputs hold several samples, or a video.
    """
    ids = inputs.get("input_ids")
    if ids is None or ids.shape[0] != 1:
        shape = None if ids is None else tuple(ids.shape)
        raise CapabilityError(f"relevancy takes one sample at a time with input_ids (1, length); got {shape}")
    if "pixel_values_videos" in inputs:
        raise CapabilityError("relevancy of videos is not supported; give an image")
    answer = torch.as_tensor(answer_ids, dtype=torch.long).reshape(-1).cpu()
    if not len(answer):
        raise DataError("the answer has no tokens; relevancy needs at least one")
    ids = ids[0].cpu()
    encodes = model.config.is_encoder_decoder or model.config.get_text_config().is_encoder_decoder
    if encodes:
        decoder = inputs.get("decoder_input_ids")
        if decoder is None:
            raise DataError("an encoder-decoder model needs decoder_input_ids: its start token and the answer")
        decoder = decoder[0].cpu()
        first, length = 0, len(decoder)
        ends_with_answer = length >= len(answer) and torch.equal(decoder[1 : len(answer)], answer[:-1])
    else:
        length = len(ids)
        first = length - len(answer) - 1
        ends_with_answer = first >= 0 and torch.equal(ids[first + 1 :], answer)
    if not ends_with_answer:
        raise DataError(f"the inputs do not end with the {len(answer)} tokens of the answer")
    image_id = getattr(model.config, "image_token_id", None)
    image = (ids[: len(ids) if encodes else first + 1] == image_id).nonzero()[:, 0] if image_id is not None else None
    if image is None or not len(image):
        raise DataError(f"the inputs hold no image token (id {image_id})")
    return Layout(answer[None], (len(answer),), first, length, image, bool(encodes))


def answer_logits(model: PreTrainedModel, inputs: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """Compute the logits (B, A) of the answers' tokens at their predicting rows; undefined for padding."""
    rows = range(layout.first, layout.first + layout.answer.shape[1])
    options = logits_to_keep(model, rows)
    logits = model(**inputs, **options, use_cache=False).logits
    kept = logits if options else logits[:, rows.start : rows.stop]
    return kept.gather(-1, layout.answer[..., None].to(logits.device))[..., 0]
