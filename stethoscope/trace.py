"""What one teacher-forced pass over prompt and answer leaves behind, already reduced to what features read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stethoscope.records import Answer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from stethoscope.relevancy import Relevancy

SEGMENTS = ("image", "question", "previous", "first", "rest")
"""Parts of the sequence that a row's attention is split over: image tokens, question tokens, earlier answer tokens,
the first token of the sequence (the usual attention sink; unless it is an image or question token), everything else.
They are disjoint and cover the row, so the masses of one row add up to 1. In an encoder-decoder model ``first`` is the
decoder's start token, and the row is half cross-attention to the prompt, half self-attention to the answer
(``stethoscope.rows`` has the details)."""

FORWARD_NEEDS = ("attention", "lens", "blank")
"""What a trace can hold beyond the logits for the price of forward passes: attention rows and the logit lens cost none
on top of the traced one, the blank image costs one."""
NEEDS = (*FORWARD_NEEDS, "relevancy")
"""All that a trace can hold beyond the logits; relevancy costs a forward and a backward pass."""


@dataclass(frozen=True)
class Spans:
    """Where things sit in the sequence that the language model reads. Measured from the processor's output.

    Attributes:
        length: number of prompt tokens P; answer token k is predicted at position P - 1 + k. The prompt of an
            encoder-decoder model is what its encoder reads; there answer token k is predicted at position k of the
            decoder's own sequence, which begins with a start token.
        image: sorted positions of the image tokens, N of them.
        question: sorted positions of the tokens of the user's question.
        grids: (rows, columns) of every tile of image tokens, in order; empty where there is no grid. The image tokens
            fill them one after another, row by row, those of ``separators`` left out.
        separators: positions of image tokens that stand for no part of the picture, such as the newline that
            LLaVA-NeXT puts behind each row; a subset of ``image``.
    """

    length: int
    image: tuple[int, ...]
    question: tuple[int, ...]
    grids: tuple[tuple[int, int], ...] = ()
    separators: tuple[int, ...] = ()


@dataclass(frozen=True)
class Encoded:
    """One prompt, ready for the model.

    Attributes:
        inputs: keyword arguments of the model's forward pass, batch dimension 1, no padding.
        spans: token positions.
        text: the prompt as text, before image placeholders are expanded.
        question: the user's question as it stands in ``text``.
    """

    inputs: Mapping[str, Tensor]
    spans: Spans
    text: str
    question: str


@dataclass(frozen=True)
class Trace:
    """T answer tokens, L language layers, H heads, N image tokens, V words. All tensors float32 on the CPU.

    Attributes:
        answer: the answer that was traced.
        spans: token positions of its prompt.
        logits: (T, V), the row that predicts each token.
        mass: (T, L, H, 5) attention mass of the predicting row on each of ``SEGMENTS``; rows sum to 1.
        image_attention: (T, L, N) attention of the predicting row to each image token, mean over heads.
        lens_logprob: (T, L) log-probability of the token when the residual stream after each layer is decoded by the
            final norm and the head; the last layer is the model's own output.
        lens_rank: (T, L) rank of the token in that distribution, 0 for the most probable.
        blank_logits: (T, V), the same rows when the image is replaced by a blank one (the processor's mean colour).
        relevancy: of every token after every layer, in scope ``row``.
    """

    answer: Answer
    spans: Spans
    logits: Tensor
    mass: Tensor | None = None
    image_attention: Tensor | None = None
    lens_logprob: Tensor | None = None
    lens_rank: Tensor | None = None
    blank_logits: Tensor | None = None
    relevancy: Relevancy | None = None
