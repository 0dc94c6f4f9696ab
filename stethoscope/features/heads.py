"""Attention of single heads: one column per layer and head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stethoscope.features.catalogue import both_rows
from stethoscope.trace import SEGMENTS, Trace

if TYPE_CHECKING:
    from torch import Tensor


def rows_of(part: Tensor, trace: Trace, offset: int) -> Tensor:
    """(T, ...) of (T + 1, ...): the predicting rows (``offset`` 0) or the consuming ones (1)."""
    return part[offset : offset + len(trace.answer.token_ids)]


@both_rows("heads", high="grounded", needs=["heads"])
def head_image(trace: Trace, offset: int) -> Tensor:
    """Attention mass on the image tokens, by head (VAR, Jiang et al., arXiv 2411.16724: input of its classifier)."""
    return rows_of(trace.heads.mass, trace, offset)[..., SEGMENTS.index("image")]


@both_rows("heads", high="depends", needs=["heads"])
def top20_mean(trace: Trace, offset: int) -> Tensor:
    """Mean of the 20 largest attentions to image tokens, by head (HaloProbe, Zohrabi et al., arXiv 2604.06165)."""
    return rows_of(trace.heads.top, trace, offset)[..., 0]


@both_rows("heads", high="depends", needs=["heads"])
def top20_entropy(trace: Trace, offset: int) -> Tensor:
    """Entropy in nats of these 20, normalised to sum 1, by head (HaloProbe)."""
    return rows_of(trace.heads.top, trace, offset)[..., 1]


def _lookback(trace: Trace, offset: int, context: tuple[str, ...]) -> Tensor:
    """(T, L, H) mean attention to the context over itself plus the mean attention to the answer so far."""
    spans = {"image": trace.spans.image, "question": trace.spans.question}
    size = sum(len(spans[name]) for name in context)
    mass = rows_of(trace.heads.mass, trace, offset)
    there = sum(mass[..., SEGMENTS.index(name)] for name in context) / max(size, 1)
    before = mass.new_tensor([max(index + offset, 1) for index in range(len(mass))])
    here = mass[..., SEGMENTS.index("previous")] / before[:, None, None]
    if offset == 0:
        here[:1] = 0
    return there / (there + here).clamp(min=1e-12)


@both_rows("lookback", high="grounded", needs=["heads"])
def lookback_image(trace: Trace, offset: int) -> Tensor:
    """Lookback ratio to the image tokens, in [0, 1], by head (Lookback Lens, Chuang et al., EMNLP 2024).

    Mean attention to a context token over that plus the mean attention to an earlier answer token. Where there is none
    yet the ratio is 1. The paper's context is the whole prompt; here it is split into what a prompt with an image has.
    """
    return _lookback(trace, offset, ("image",))


@both_rows("lookback", high="grounded", needs=["heads"])
def lookback_question(trace: Trace, offset: int) -> Tensor:
    """Lookback ratio to the question tokens, in [0, 1], by head (Lookback Lens)."""
    return _lookback(trace, offset, ("question",))


@both_rows("lookback", high="grounded", needs=["heads"])
def lookback_context(trace: Trace, offset: int) -> Tensor:
    """Lookback ratio to image and question tokens together, in [0, 1], by head (Lookback Lens)."""
    return _lookback(trace, offset, ("image", "question"))
