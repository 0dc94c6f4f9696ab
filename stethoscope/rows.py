"""The rows of attention that predict answer tokens, reduced layer by layer while the model runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stethoscope.capture import Listener, Site, eager_rows, plain_attention
from stethoscope.errors import CaptureError
from stethoscope.trace import SEGMENTS, Spans


def segments(spans: Spans, length: int) -> Tensor:
    """Which of ``SEGMENTS`` every position belongs to.

    >>> segments(Spans(length=6, image=(1, 2), question=(4,)), 8).tolist()
    [3, 0, 0, 4, 1, 4, 2, 2]

    Returns:
        (length,) int64, indices into ``SEGMENTS``.
    """
    image, question, previous, first, rest = range(len(SEGMENTS))
    kind = torch.full((length,), rest)
    kind[0] = first
    kind[spans.length :] = previous
    kind[list(spans.question)] = question
    kind[list(spans.image)] = image
    return kind


class AttentionRows(Listener):
    """Attention mass by segment and attention to image tokens, of chosen rows, in every language-model layer.

    The output of the layer comes from SDPA as always; only the chosen rows of the map are computed beside it, so
    nothing of size N x N is made. One forward pass per instance.

    Args:
        rows: (B, T) positions of the rows.
        spans: B spans of the prompts, in positions of the (right-padded) batch.
        length: length of the sequence.
    """

    def __init__(self, rows: Tensor, spans: Sequence[Spans], length: int) -> None:
        self._rows = rows
        kinds = torch.stack([segments(span, length) for span in spans])
        self._members = nn.functional.one_hot(kinds, len(SEGMENTS)).float()  # (B, S, 5)
        self._counts = [len(span.image) for span in spans]
        most = max(self._counts)
        self._image = torch.tensor([list(span.image) + [0] * (most - len(span.image)) for span in spans]).long()
        self._heard: dict[str, tuple[Tensor, Tensor]] = {}

    def wants(self, site: Site) -> bool:
        return site.role == "language"

    def attend(
        self,
        site: Site,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if site.name in self._heard:
            raise CaptureError(f"{site.name} was called twice in one recording")
        output, _ = plain_attention(module, query, key, value, mask, **kwargs)
        self.hear(site, eager_rows(module, self._rows, query, key, value, mask, **kwargs))
        return output, None

    def hear(self, site: Site, weights: Tensor) -> None:
        """Reduces the rows (B, heads, T, S) of one layer."""
        weights = weights.detach().float()
        members, columns = self._members.to(weights.device), self._image.to(weights.device)
        columns = columns[:, None].expand(-1, weights.shape[2], -1)
        self._heard[site.name] = (weights @ members[:, None], weights.mean(1).gather(-1, columns))

    def finish(self) -> None:
        if not self._heard:
            raise CaptureError("no attention of a language-model layer was seen; the model does not call the interface")
        for name, (mass, _) in self._heard.items():  # in the order of the layers, so the first to fail is named
            if not torch.isfinite(mass).all():
                raise CaptureError(f"attention of {name} holds values that are not finite")

    def mass(self) -> Tensor:
        """(B, T, L, H, 5) float32 on the CPU; rows sum to 1."""
        return torch.stack([mass.cpu() for mass, _ in self._heard.values()]).permute(1, 3, 0, 2, 4)

    def image(self) -> list[Tensor]:
        """Per sample (T, L, N) float32 on the CPU: attention to each image token, mean over heads."""
        stacked = torch.stack([image.cpu() for _, image in self._heard.values()]).permute(1, 2, 0, 3)
        return [rows[..., :count] for rows, count in zip(stacked, self._counts, strict=True)]
