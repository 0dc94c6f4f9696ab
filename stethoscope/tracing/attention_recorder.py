"""Record the attention rows that predict answer tokens, reduced layer by layer while the model runs.

A decoder-only model spends one distribution over prompt and answer in every layer and head. The decoder of an
encoder-decoder model spends two in every layer: self-attention over its start token and the earlier answer tokens,
cross-attention over the prompt that the encoder has read. Both are put into one row with weight 1/2 each, so that a row
still covers everything that the token could be written from and adds up to 1: ``image``, ``question`` and ``rest`` are
half the cross-attention, ``previous`` and ``first`` (the start token, the usual sink) half the self-attention. The
heads of the two are different ones; head h of the row is head h of both. So no share of the prompt is above 1/2, and
masses are to be compared within a model, not across the two kinds. The encoder's own attention is not in the row: it is
the same for all tokens. Relevancy reads image, question and answer off the same two sequences (and adds them up without
weights); the start token, ``first`` here, is among its ``rest``.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stethoscope.core.errors import CaptureError
from stethoscope.tracing.hooks import AttentionRecorder
from stethoscope.tracing.model_parts import Site
from stethoscope.tracing.trace import SEGMENTS, HeadAttention, Spans, largest

TOP = 20
"""Number of image attentions per head that HaloProbe reads (Zohrabi et al., arXiv 2604.06165, appendix B)."""

_IMAGE, _QUESTION, _PREVIOUS, _FIRST, _REST = range(len(SEGMENTS))


def segments(spans: Spans, length: int, first: int = 0) -> Tensor:
    """Assign every position to one of ``SEGMENTS``.

    Args:
        spans: spans of the prompt.
        length: length of the sequence.
        first: position of the prompt's first token, after padding on the left.

    >>> segments(Spans(length=6, image=(1, 2), question=(4,)), 8).tolist()
    [3, 0, 0, 4, 1, 4, 2, 2]

    Returns:
        (length,) int64, indices into ``SEGMENTS``.
    """
    kind = np.full(length, _REST)  # NumPy takes a list of positions in a fifth of the time
    kind[first] = _FIRST
    kind[spans.length :] = _PREVIOUS
    kind[list(spans.question)] = _QUESTION
    kind[list(spans.image)] = _IMAGE
    return torch.from_numpy(kind)


def logits_to_keep(model: PreTrainedModel, rows: Sequence[int]) -> dict[str, list[int]]:
    """Build the argument that makes the head run on some rows alone.

    The rows are numbers, no tensor: with a model on several devices accelerate moves every tensor argument to the first
    of them, where the head's states are not.

    Args:
        model: the model.
        rows: positions in the sequence of the logits.

    Returns:
        Keyword arguments of ``forward``; empty where the model has no such argument and gives logits of all rows.
    """
    supported = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": list(rows)} if supported else {}


class RowAttentionRecorder(AttentionRecorder):
    """Records attention mass by segment and attention to image tokens, of chosen rows, in every language-model layer.

    SDPA computes the output of the layer as usual, and only the chosen rows of the map are computed in addition, so no
    tensor of size N x N exists. In a pass without other rows, eager attention computes both. One forward pass per
    instance.

    Args:
        rows: (B, T) positions of the rows among the queries; all of them where T is the number of queries. A sample
            with fewer rows repeats its last one, and the values of the repeated rows are undefined.
        spans: B spans of the prompts, in positions of the (right-padded) batch.
        length: length of the sequence that the prompts are in.
        decoder: length of the decoder's own sequence, which the rows are in, of an encoder-decoder model.
        firsts: positions of the prompts' first tokens; 0 unless they are padded on the left.
        skipped: number of keys before the first query.
        requires: ``peaks``, ``own`` or both, to record them too.
    """

    def __init__(
        self,
        rows: Tensor,
        spans: Sequence[Spans],
        length: int,
        decoder: int | None = None,
        firsts: Sequence[int] | None = None,
        skipped: int = 0,
        requires: Collection[str] = (),
    ) -> None:
        self.rows = rows
        pairs = list(zip(spans, firsts or [0] * len(spans), strict=True))
        by_span = {pair: segments(pair[0], length, pair[1]) for pair in set(pairs)}
        kinds = {"language": torch.stack([by_span[pair] for pair in pairs])}
        self._prompt_role = "language" if decoder is None else "cross"  # whose keys are the prompt's tokens
        if decoder is not None:
            prompt = kinds["language"]
            prompt[(prompt == _FIRST) | (prompt == _PREVIOUS)] = _REST
            answer = torch.tensor([_FIRST] + [_PREVIOUS] * (decoder - 1)).expand(len(spans), -1)
            kinds = {"language": answer, "cross": prompt}
        every = torch.arange(len(SEGMENTS))[:, None]
        self._members = {role: (kind[:, None] == every).float() for role, kind in kinds.items()}  # (B, 5, S)
        self._counts = [len(span.image) for span in spans]
        most = max(self._counts)
        self._image = torch.tensor([list(span.image) + [0] * (most - len(span.image)) for span in spans]).long()
        self.roles = tuple(kinds)
        self._mass: dict[str, dict[str, Tensor]] = {role: {} for role in kinds}  # by role and name of the module
        self._to_image: list[Tensor] = []
        self._shares: list[Tensor] = []  # of each role the (L, B, heads, T, 5) mass of all layers
        self._requires, self._own_keys = requires, rows + skipped
        self._own: list[Tensor] = []
        self._peaks: dict[str, list[Tensor]] = {role: [] for role in kinds}  # sums over image and other keys
        # of every sample, how many keys a row sees more than its own position says
        self._further = [(0 if decoder is None else span.length) - first for span, first in pairs]

    def on_weights(self, site: Site, weights: Tensor) -> None:
        """Reduce the rows (B, heads, T, S) of one layer."""
        if site.name in self._mass[site.role]:
            raise CaptureError(f"{site.name} was called twice in one recording")
        weights = weights.detach().float()
        members = self._members[site.role].to(weights.device)
        by_segment = members @ weights.flatten(1, 2).transpose(1, 2)  # faster than weights @ members
        self._mass[site.role][site.name] = by_segment.transpose(1, 2).unflatten(1, weights.shape[1:3])
        if site.role == self._prompt_role:
            columns = self._image.to(weights.device)[:, None].expand(-1, weights.shape[2], -1)
            self._to_image.append(weights.mean(1).gather(-1, columns))
        if "peaks" in self._requires:
            largest = weights.amax(1)  # (B, T, S)
            members = self._members[site.role][:, _IMAGE].to(weights.device)
            image = (largest * members[:, None]).sum(-1)
            self._peaks[site.role].append(torch.stack([image, largest.sum(-1) - image], -1).cpu())
        if "own" in self._requires and site.role == "language":
            keys = self._own_keys.to(weights.device)[:, None, :, None].expand(-1, weights.shape[1], -1, -1)
            self._own.append(weights.gather(-1, keys)[..., 0].transpose(1, 2).cpu())

    def finish(self) -> None:
        counts = [len(masses) for masses in self._mass.values()]
        if not counts[0]:
            raise CaptureError("no attention of a language-model layer was seen; the model does not call the interface")
        if len(set(counts)) != 1:
            raise CaptureError(f"{counts[0]} layers of self-attention were seen and {counts[1]} of cross-attention")
        self._shares = [torch.stack([mass.cpu() for mass in masses.values()]) for masses in self._mass.values()]
        if all(torch.isfinite(shares).all() for shares in self._shares):
            return
        for masses in zip(*(part.items() for part in self._mass.values()), strict=True):
            for name, mass in masses:  # in the order of the layers, so the first to fail is named
                if not torch.isfinite(mass).all():
                    raise CaptureError(f"attention of {name} holds values that are not finite")

    def mass(self) -> Tensor:
        """Return the (B, T, L, H, 5) attention mass on ``SEGMENTS``, float32 on the CPU; rows sum to 1."""
        own, *cross = self._shares
        shares = (own + cross[0]) / 2 if cross else own
        return shares.permute(1, 3, 0, 2, 4)

    def image(self) -> list[Tensor]:
        """Return per sample the (T, L, N) attention to each image token, mean over heads, float32 on the CPU."""
        stacked = torch.stack([image.cpu() for image in self._to_image], 2) / len(self._mass)
        return [rows[..., :count] for rows, count in zip(stacked, self._counts, strict=True)]

    def peaks(self) -> Tensor:
        """Return the (B, T, L, 2) ``Trace.peaks``, float32 on the CPU."""
        roles = [torch.stack(sums, 2) for sums in self._peaks.values()]
        seen = self._own_keys + 1 + torch.tensor(self._further)[:, None]  # number of keys
        images = torch.tensor(self._counts)[:, None].expand_as(seen)
        counts = torch.stack([images, seen - images], -1)
        return torch.stack(roles).sum(0) / len(roles) / counts[:, :, None].clamp(min=1)

    def own(self) -> Tensor:
        """Return the (B, T, L, H) attention of the rows to their own positions, float32 on the CPU."""
        return torch.stack(self._own, 2)


class HeadAttentionRecorder(RowAttentionRecorder):
    """Records in addition the statistics of single heads that published detectors read.

    Args:
        rows: (B, T + 1) positions that predict the T answer tokens, and the position that consumes the last.
        counts: number of answer tokens of every sample.
        spans: see ``RowAttentionRecorder``.
        length: see ``RowAttentionRecorder``.
        decoder: see ``RowAttentionRecorder``.
        firsts: see ``RowAttentionRecorder``.
        skipped: see ``RowAttentionRecorder``.
        requires: see ``RowAttentionRecorder``.
    """

    def __init__(
        self,
        rows: Tensor,
        counts: Sequence[int],
        spans: Sequence[Spans],
        length: int,
        decoder: int | None = None,
        firsts: Sequence[int] | None = None,
        skipped: int = 0,
        requires: Collection[str] = (),
    ) -> None:
        super().__init__(rows, spans, length, decoder, firsts, skipped, requires)
        self._tokens = list(counts)
        starts = [span.length if decoder is None else 1 for span in spans]
        self._answers = [slice(start, start + count) for start, count in zip(starts, counts, strict=True)]
        alike = len({len(span.image) for span in spans}) == 1  # then all samples are reduced at once
        self._parts = [slice(None)] if alike else [slice(index, index + 1) for index in range(len(spans))]
        self._by_head: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self._parts]
        self._response: list[Tensor] = []

    def on_weights(self, site: Site, weights: Tensor) -> None:
        super().on_weights(site, weights)
        weights = weights.detach().float()
        if site.role == self._prompt_role:
            for part, reduced in zip(self._parts, self._by_head, strict=True):
                columns = self._image[part, : self._counts[part][0]].to(weights.device)
                index = columns[:, None, None].expand(-1, *weights.shape[1:3], -1)
                image = weights[part].gather(-1, index) / len(self._mass)
                reduced.append(strongest(image.transpose(1, 2)))
        if site.role == "language":
            most = weights.amax(1)
            most = most / most.sum(-1, keepdim=True)
            self._response = [
                rows[: count + 1, answer].cpu()
                for rows, count, answer in zip(most, self._tokens, self._answers, strict=True)
            ]

    def heads(self) -> list[HeadAttention]:
        """Return the recorded attention per sample."""
        reduced = [[torch.stack(layers, 2) for layers in zip(*part, strict=True)] for part in self._by_head]
        top, peak = (torch.cat(parts) for parts in zip(*reduced, strict=True))
        rows = zip(self.mass(), self.image(), top, peak, self._tokens, self._response, strict=True)
        return [
            HeadAttention(mass[: count + 1], image[: count + 1], strong[: count + 1], highest[: count + 1], response)
            for mass, image, strong, highest, count, response in rows
        ]


class ImageSimilarityRecorder(AttentionRecorder):
    """Records how much the attention of chosen rows to the image resembles that of one other row.

    Args:
        rows: (B, T + 1) positions of the rows among the queries, the row that they are compared with last.
        spans: B spans of the prompts, in positions of the batch.
        role: of the modules whose keys are the prompt's tokens, ``language`` or ``cross``.
    """

    def __init__(self, rows: Tensor, spans: Sequence[Spans], role: str) -> None:
        self.rows, self.roles, self._spans = rows, (role,), spans
        self._products = torch.zeros(*rows.shape)
        self._norms = torch.zeros(*rows.shape)

    def on_weights(self, site: Site, weights: Tensor) -> None:
        """Add the products of the rows (B, heads, T + 1, S) of one layer."""
        image = torch.zeros(len(self._spans), weights.shape[-1])
        for index, span in enumerate(self._spans):
            image[index, list(span.image)] = 1.0
        seen = weights.detach().float() * image.to(weights.device)[:, None, None]
        self._products += (seen * seen[:, :, -1:]).sum((1, 3)).cpu()
        self._norms += seen.square().sum((1, 3)).cpu()

    def finish(self) -> None:
        if not self._norms.isfinite().all():
            raise CaptureError("attention of the continuation holds values that are not finite")
        if not self._norms.any():
            raise CaptureError("no attention to the image was seen; the model does not call the interface")

    def similarities(self) -> Tensor:
        """Return the (B, T) cosines in [0, 1] to the last row, over image tokens, layers and heads; float32, CPU."""
        norms = self._norms.sqrt()
        return self._products[:, :-1] / (norms[:, :-1] * norms[:, -1:]).clamp(min=1e-30)


def strongest(image: Tensor) -> tuple[Tensor, Tensor]:
    """Reduce (..., N) attentions to (..., 2) mean and entropy of the ``TOP`` largest, and (...) the maximum; CPU."""
    top = largest(image, TOP)
    share = top / top.sum(-1, keepdim=True).clamp(min=1e-12)
    entropy = -(share * share.clamp(min=1e-12).log()).sum(-1)
    return torch.stack([top.mean(-1), entropy], -1).cpu(), top[..., 0].cpu()
