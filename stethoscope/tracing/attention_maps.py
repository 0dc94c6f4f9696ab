"""Record the raw attention of answer tokens by layer and head: to every image token, and to all tokens in the mean.

Raw attention is the map after softmax, as the model multiplies it with the values; no gradient weighs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stethoscope.core.errors import CapabilityError, CaptureError, ConfigError
from stethoscope.tracing.hooks import AttentionRecorder
from stethoscope.tracing.model_parts import Site
from stethoscope.tracing.trace import Spans

HEAD_BYTES = 2**28
"""Bytes of the maps of single heads that are held for one answer: those of 113 tokens of LLaVA-1.5-7B."""


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """Raw attention of T answer tokens in L layers with H heads, to N image tokens. Float32 on the CPU, in [0, 1].

    The row of a token is the one that predicts it. A row sums to 1 over all tokens that it sees. In an encoder-decoder
    model image and question are those of the cross-attention, whose rows sum to 1 over the prompt; earlier answer
    tokens are those of the decoder's self-attention, whose rows sum to 1 over its own sequence.

    Attributes:
        tokens: indices of the K answer tokens whose single heads are held, ascending.
        heads: (K, L, H, N) attention of these tokens.
        mean: (T, L, N) mean over heads, of all tokens.
        largest: (T, L, N) largest of all heads.
        image_mass: (T, L, H) sum over the image tokens.
        matrix: (T, 1 + Q + T + 1) mean over all layers and heads: to the image tokens together, to every token of the
            question, to every answer token (zero for the token itself and later ones), to everything else together; of
            an encoder-decoder model this is everything else in the prompt, and one more column has the start token.
        crosses: whether the attention to image and question is cross-attention.
    """

    tokens: tuple[int, ...]
    heads: Tensor
    mean: Tensor
    largest: Tensor
    image_mass: Tensor
    matrix: Tensor
    crosses: bool = False

    def __repr__(self) -> str:
        count, layers, heads = self.image_mass.shape
        return f"AttentionMaps({count} tokens, {layers} layers, {heads} heads, {self.mean.shape[-1]} image tokens)"

    def to_image(self, token: int, layer: int | None = None, head: int | Literal["mean", "largest"] = "mean") -> Tensor:
        """Return the (N,) attention of one answer token to every image token.

        Args:
            token: index in the answer.
            layer: of the language model; None for the mean over layers.
            head: index; ``mean`` over the heads of a layer, or the ``largest`` of them for every image token.

        Raises:
            ConfigError: there is no such token, layer or head.
            CapabilityError: the single heads of this token are not held.
        """
        count, layers, heads = self.image_mass.shape
        limits = {"token": (token, count), "layer": (0 if layer is None else layer, layers)}
        if isinstance(head, int):
            limits["head"] = head, heads
        elif head not in ("mean", "largest"):
            raise ConfigError(f"head={head!r} should be a number from 0 to {heads - 1}, mean or largest")
        for name, (index, limit) in limits.items():
            if not -limit <= index < limit:
                raise ConfigError(f"{name}={index} should be from 0 to {limit - 1}")
        if not isinstance(head, int):
            values = (self.mean if head == "mean" else self.largest)[token]
        elif token % count in self.tokens:
            values = self.heads[self.tokens.index(token % count), :, head]
        else:
            raise CapabilityError(
                f"single heads of token {token} are not held, only those of {len(self.tokens)} of {count} tokens "
                f"({HEAD_BYTES // 2**20} MiB); use head='mean' or 'largest'"
            )
        return values.mean(0) if layer is None else values[layer]


class AttentionMapRecorder(AttentionRecorder):
    """Records ``AttentionMaps`` in one pass over prompt and whole answer, of one sample without padding.

    Args:
        first: position of the row that predicts the first answer token, in the sequence of the rows.
        count: number of answer tokens T.
        layers: number of layers L of the language model (of its decoder).
        spans: of the prompt.
        encodes: whether the language model is an encoder-decoder one.
        order: indices of answer tokens whose single heads are held, as many of the first as fit.
        limit: bytes that single heads may take.
    """

    def __init__(
        self,
        first: int,
        count: int,
        layers: int,
        spans: Spans,
        encodes: bool = False,
        order: Sequence[int] = (),
        limit: int = HEAD_BYTES,
    ) -> None:
        self.rows = torch.arange(first, first + count)[None]
        self.roles = ("language", "cross") if encodes else ("language",)
        self._spans, self._prompt_role = spans, self.roles[-1]
        self._limit, self._layers = limit, layers
        start = 1 if encodes else spans.length
        self._answer = slice(start, start + count)
        self._order = list(dict.fromkeys(order))
        self._tokens: list[int] = []
        self._by_layer: list[tuple[Tensor, ...]] = []
        self._sums: dict[str, Tensor] = {}  # by role, of the means over heads
        self._seen = dict.fromkeys(self.roles, 0)  # layers

    def on_weights(self, site: Site, weights: Tensor) -> None:
        """Reduce the rows (1, heads, T, S) of one layer."""
        rows = weights[0].detach().float()
        mean = rows.mean(0).cpu()
        self._sums[site.role] = self._sums[site.role] + mean if site.role in self._sums else mean
        self._seen[site.role] += 1
        if site.role != self._prompt_role:
            return
        image = rows[..., list(self._spans.image)]
        if not self._by_layer:
            bytes_per_token = self._layers * image[:, 0].numel() * image.element_size()
            self._tokens = sorted(self._order[: self._limit // bytes_per_token])
        parts = image[:, self._tokens], image.mean(0), image.amax(0), image.sum(-1)
        self._by_layer.append(tuple(part.cpu() for part in parts))

    def finish(self) -> None:
        if set(self._seen.values()) != {self._layers}:
            raise CaptureError(f"raw attention of {self._layers} layers was expected, and seen in {self._seen}")
        if not all(total.isfinite().all() for total in self._sums.values()):
            raise CaptureError("raw attention holds values that are not finite")

    def maps(self) -> AttentionMaps:
        """Return what was recorded."""
        heads, mean, largest, mass = (torch.stack(layers) for layers in zip(*self._by_layer, strict=True))
        return AttentionMaps(
            tuple(self._tokens),
            heads.permute(2, 0, 1, 3),
            mean.transpose(0, 1),
            largest.transpose(0, 1),
            mass.permute(2, 0, 1),
            self._matrix(),
            self._prompt_role == "cross",
        )

    def _matrix(self) -> Tensor:
        means = {role: total / self._layers for role, total in self._sums.items()}
        prompt, own = means[self._prompt_role], means["language"]
        image = prompt[:, list(self._spans.image)].sum(-1, keepdim=True)
        question = prompt[:, list(self._spans.question)]
        answer = torch.zeros(len(own), len(own))
        seen = own[:, self._answer]  # a decoder may not have read the last token
        answer[:, : seen.shape[1]] = seen
        rest = prompt.sum(-1, keepdim=True) - image - question.sum(-1, keepdim=True)
        if own is prompt:
            rest = rest - answer.sum(-1, keepdim=True)
        start = [] if own is prompt else [own[:, :1]]
        return torch.cat([image, question, answer, rest.clamp(min=0), *start], -1)
