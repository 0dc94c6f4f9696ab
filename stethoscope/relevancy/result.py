"""What relevancy gives back: rows over the sequence, over vision tokens and over patches, and their parts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Relevancy:
    """Relevancy of T answer tokens after L layers (1 for the final layer only). Tensors on the CPU, float32
    (float64 of a float64 model).

    A decoder-only model has ``llm``; an encoder-decoder model has ``decoder`` and ``encoder`` instead.

    Attributes:
        tokens: which answer tokens, numbered from 0.
        first: row that predicts answer token 0; answer token j itself stands at position ``first + 1 + j``.
        image_at: positions of the image tokens in the prompt, N of them.
        question_at: positions of the question's tokens in the prompt; empty where it is not known.
        llm: (T, L, S) over prompt and answer; exactly zero behind the predicting row.
        decoder: (T, L, D) over the decoder's own sequence.
        encoder: (T, L, E) over the encoder's sequence, in which the prompt is.
        vision: (T, L, M) over all tokens of the vision tower with class tokens, tiles one after another, in the order
            of ``pixel_values``.
        tiles: (T, L, tiles, rows, columns) the patches of ``vision``; None where they are no grid.
        saliency: (T, L, S) or (T, L, D), along ``llm`` or ``decoder``: |A * dz/dA| of the token's own logit z, summed
            over heads, in the row that predicts it of every layer's own attention map (or the last layer's); no
            recursion. On earlier answer tokens it drops before hallucinations (LVLMs-Saliency, arXiv 2601.20279,
            which takes all rows of a layer and divides by the map's norm). The same in both scopes.
        seen: (N, D) the image tokens as they enter the first layer of the language model (of its encoder).
        query_text: (T, L, Q) over the tokens that a Q-Former reads beside its queries (InstructBLIP).
    """

    tokens: tuple[int, ...]
    first: int
    image_at: tuple[int, ...]
    question_at: tuple[int, ...] = ()
    llm: Tensor | None = None
    decoder: Tensor | None = None
    encoder: Tensor | None = None
    vision: Tensor | None = None
    tiles: Tensor | None = None
    seen: Tensor | None = None
    query_text: Tensor | None = None
    saliency: Tensor | None = None

    @property
    def patches(self) -> Tensor | None:
        """(T, L, rows, columns) where there is one grid; images cut into several tiles have ``tiles``."""
        return self.tiles[:, :, 0] if self.tiles is not None and self.tiles.shape[2] == 1 else None

    @cached_property
    def image(self) -> Tensor:
        """(T, L, N) over the image tokens of the language model."""
        return self._whole[..., list(self.image_at)]

    @cached_property
    def question(self) -> Tensor:
        """(T, L, Q) over the question's tokens."""
        return self._whole[..., list(self.question_at)]

    @property
    def answer(self) -> Tensor:
        """(T, L, A) over the answer's tokens; zero for a token itself and those after it."""
        return self._whole[..., self._answer_at :]

    @property
    def rest(self) -> Tensor:
        """(T, L, rest) over everything else: the first token, the template, a decoder's start token."""
        used = torch.zeros(self._whole.shape[-1], dtype=torch.bool)
        used[[*self.image_at, *self.question_at]] = True
        used[self._answer_at :] = True
        return self._whole[..., ~used]

    @cached_property
    def total(self) -> Tensor:
        """(T, L) the sum of the whole row: of image, question, answer and rest."""
        return self._whole.sum(-1)

    @cached_property
    def _whole(self) -> Tensor:
        """The prompt's sequence and then the decoder's, where that is another one."""
        return self.llm if self.llm is not None else torch.cat([self.encoder, self.decoder], -1)

    @property
    def _answer_at(self) -> int:
        return self.first + 1 + (0 if self.encoder is None else self.encoder.shape[-1])
