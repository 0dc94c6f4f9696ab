"""Record hidden states of image, question and answer tokens, reduced layer by layer while the model runs.

h_0 is the input of the first layer, h_l that of layer l + 1, h_L the output of the final norm: the ``hidden_states`` of
transformers. Only a few layers are stored whole (``trace.KEPT_LAYERS``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stethoscope.core.errors import CaptureError
from stethoscope.core.types import required
from stethoscope.tracing.hooks import take_rows
from stethoscope.tracing.logit_lens import Lens
from stethoscope.tracing.trace import KEPT_LAYERS, TEMPERATURE, HiddenStates, Spans, of_depth

PATCH_SHARE = 0.05
"""Share of the image tokens whose cosines are averaged (CGC, arXiv 2604.04863)."""
SINK_DIMENSIONS, SINK_THRESHOLD = 2, 20.0
"""Attention sinks (Kang et al., ICLR 2025): number of dimensions, and threshold after RMS normalisation."""
CHUNK = 256
"""Number of image tokens decoded at a time."""


@dataclass
class _Reduced:
    """Reductions of G samples with equally many image and question tokens, by layer."""

    top: list[Tensor] = field(default_factory=list)
    peak: list[Tensor] = field(default_factory=list)
    sinks: list[Tensor] = field(default_factory=list)
    lens: list[Tensor] = field(default_factory=list)
    kept: dict[str, dict[int, Tensor]] = field(default_factory=lambda: {name: {} for name in KEPT_LAYERS})
    prefix: Tensor | None = None
    image_probability: Tensor | None = None
    instruction_probability: Tensor | None = None


class HiddenStateRecorder:
    """Records the residual stream of one forward pass of a decoder-only model.

    Args:
        lens: holds layers, norm and head.
        rows: (B, T + 1) positions in the sequence that predict the T answer tokens, and the position that consumes the
            last.
        answers: token ids of every answer.
        spans: spans of every prompt.
        states: whether to record ``Trace.states``.
        image_lens: whether to record ``Trace.image_lens``.
        prompt: hidden states h_0 to h_L of the tokens before the first query of the pass, (B, prefix, D) each; empty
            where the pass holds the whole prompts.
    """

    def __init__(
        self,
        lens: Lens,
        rows: Tensor,
        answers: Sequence[Sequence[int]],
        spans: Sequence[Spans],
        states: bool = True,
        image_lens: bool = False,
        prompt: Sequence[Tensor] = (),
    ) -> None:
        self._prompt = prompt
        self._lens, self._states, self._image_lens = lens, states, image_lens
        self._counts = [len(ids) for ids in answers]
        most = max(self._counts)
        self._ids = torch.tensor([[*ids, *[0] * (most - len(ids))] for ids in answers], dtype=torch.long)
        self._image = [torch.tensor(span.image, dtype=torch.long) for span in spans]
        self._question = [torch.tensor(span.question or (span.length - 1,)) for span in spans]
        self._ends = torch.tensor([[span.length - 1] for span in spans])
        alike = len({len(tokens) for tokens in self._image}) == len({len(tokens) for tokens in self._question}) == 1
        self._parts = [slice(0, len(spans))] if alike else [slice(index, index + 1) for index in range(len(spans))]
        self._positions = [
            (torch.stack(self._image[part]), torch.stack(self._question[part]), rows[part]) for part in self._parts
        ]
        self._depth = len(lens.layers)
        self._layers = {
            name: {of_depth(layer, self._depth) for layer in layers} for name, layers in KEPT_LAYERS.items()
        }
        self._reduced = [_Reduced() for _ in self._parts]
        self._next = 0

    @contextmanager
    def listen(self) -> Iterator[HiddenStateRecorder]:
        """Record every layer and the final norm within the block."""

        def enters(module: nn.Module, arguments: tuple, options: dict[str, Any]) -> None:
            self._take(arguments[0] if arguments else options["hidden_states"])

        def leaves(module: nn.Module, arguments: tuple, output: Tensor) -> None:
            if self._next == self._depth:  # not when the logit lens calls the norm afterwards
                self._take(output)

        handles = [layer.register_forward_pre_hook(enters, with_kwargs=True) for layer in self._lens.layers]
        handles.append(self._lens.norm.register_forward_hook(leaves))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
        if self._next != self._depth + 1:
            raise CaptureError(f"{self._next} hidden states were seen in a model of {self._depth} layers")

    def _take(self, hidden: Tensor) -> None:
        layer, self._next = self._next, self._next + 1
        hidden = hidden.detach()
        if self._prompt:
            hidden = torch.cat([self._prompt[layer], hidden], 1)
        for part, positions, reduced in zip(self._parts, self._positions, self._reduced, strict=True):
            own = hidden[part]
            image, question, token = (take_rows(own, chosen.to(own.device)) for chosen in positions)
            ids = self._ids[part].to(own.device)
            if self._states:
                self._reduce(reduced, layer, image.float(), token.float(), own[:, 0].float())
                end = take_rows(own, self._ends[part].to(own.device))[:, 0]
                whole = {"token": token, "image": image, "instruction": question, "prompt_end": end}
                for name, states in whole.items():
                    if layer in self._layers[name]:
                        reduced.kept[name][layer] = states.float().cpu()
                if layer == 0:
                    reduced.prefix = torch.cat([question, token[:, 1:]], 1).float().cpu()
                if layer in self._layers["instruction"]:
                    reduced.instruction_probability = self._decode(question, ids, TEMPERATURE).cpu()
            if self._image_lens or (self._states and layer == self._depth):
                probability = self._decode(image, ids)
                reduced.lens.append(torch.stack([probability.amax(-1), probability.sum(-1)], -1).cpu())
                reduced.image_probability = probability.cpu()

    def _reduce(self, reduced: _Reduced, layer: int, image: Tensor, token: Tensor, first: Tensor) -> None:
        if layer > 0:
            cosines = nn.functional.normalize(token, dim=-1) @ nn.functional.normalize(image, dim=-1).mT
            top = cosines.topk(max(1, round(PATCH_SHARE * image.shape[1])), dim=-1).values
            reduced.top.append(top.mean(-1).cpu())
            reduced.peak.append(top[..., 0].cpu())
        if layer < self._depth:
            reduced.sinks.append(sinks(image, first).cpu())

    def _decode(self, hidden: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
        """Return the (G, T, N) probability of the tokens at states (G, N, D), decoded by the head alone."""
        parts = []
        owners = ids.repeat_interleave(hidden.shape[1], 0)
        for chunk, own in zip(hidden.flatten(0, 1).split(CHUNK), owners.split(CHUNK), strict=True):
            logits = self._lens.head(chunk).float()
            logprobs = (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)  # faster than logsumexp
            parts.append(logprobs.gather(-1, own.to(logprobs.device)).exp())
        return torch.cat(parts).view(*hidden.shape[:2], -1).mT

    def states(self) -> list[HiddenStates]:
        """Return the recorded states per sample."""
        recorded = []
        for index, (reduced, row) in enumerate(self._samples()):
            count, question = self._counts[index], len(self._question[index])
            kept = {name: {layer: part[row] for layer, part in parts.items()} for name, parts in reduced.kept.items()}
            kept["token"] = {layer: part[: count + 1] for layer, part in kept["token"].items()}
            recorded.append(
                HiddenStates(
                    patch_top=torch.stack([part[row] for part in reduced.top], -1)[: count + 1],
                    patch_peak=torch.stack([part[row] for part in reduced.peak], -1)[: count + 1],
                    sinks=torch.stack([part[row] for part in reduced.sinks]),
                    prefix=required(reduced.prefix)[row, : question + count],
                    image_probability=required(reduced.image_probability)[row, :count],
                    instruction_probability=required(reduced.instruction_probability)[row, :count],
                    **kept,
                )
            )
        return recorded

    def image_lens(self) -> list[Tensor]:
        """Return per sample (T, L + 1, 2) the largest and summed probability of the token over image tokens."""
        samples = zip(self._samples(), self._counts, strict=True)
        return [torch.stack([part[row, :count] for part in reduced.lens], 1) for (reduced, row), count in samples]

    def _samples(self) -> Iterator[tuple[_Reduced, int]]:
        """Iterate over samples: the reductions that each is in, and its index there."""
        for part, reduced in zip(self._parts, self._reduced, strict=True):
            yield from ((reduced, row) for row in range(part.stop - part.start))


def sinks(image: Tensor, first: Tensor) -> Tensor:
    """Choose the image tokens that are attention sinks (Kang et al., "See What You Are Told", ICLR 2025).

    A token is one if a sink dimension of its RMS-normalised state is above 20. The dimensions are published for two
    models only (two each, for Llama 2 of 7B and 13B); they are the massive ones of the first token, so here they are
    read off it: the two that are largest in the first token's state. No normalised value can be above sqrt(D), so
    where D is below 4096 the threshold is the same share of that, 20 / 64.

    Args:
        image: (..., N, D) states of image tokens that enter a layer.
        first: (..., D) state of the sequence's first token.

    Returns:
        (..., N) bool.
    """
    size = image.shape[-1]
    normalised = [part.abs() / part.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12) for part in (image, first)]
    dimensions = normalised[1].topk(SINK_DIMENSIONS).indices[..., None, :].expand(*image.shape[:-1], -1)
    return normalised[0].gather(-1, dimensions).amax(-1) > min(SINK_THRESHOLD, SINK_THRESHOLD / 64 * math.sqrt(size))
