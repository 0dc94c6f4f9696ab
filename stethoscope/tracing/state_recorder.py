"""Hidden states of image, question and answer tokens, reduced layer by layer while the model runs.

h_0 is what enters the first layer, h_l what enters layer l + 1, h_L what the final norm gives: the ``hidden_states`` of
transformers. Only a few layers are kept whole (``trace.KEPT_LAYERS``).
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
from stethoscope.tracing.logit_lens import Lens
from stethoscope.tracing.trace import KEPT_LAYERS, TEMPERATURE, HiddenStates, Spans, of_depth

PATCH_SHARE = 0.05
"""Share of the image tokens whose cosines are averaged (CGC, arXiv 2604.04863)."""
SINK_DIMENSIONS, SINK_THRESHOLD = 2, 20.0
"""Of attention sinks (Kang et al., ICLR 2025): so many dimensions, and how large one is after RMS normalisation."""
CHUNK = 256
"""Image tokens that are decoded at a time."""


@dataclass
class _Heard:
    """Of one sample, by layer."""

    top: list[Tensor] = field(default_factory=list)
    peak: list[Tensor] = field(default_factory=list)
    sinks: list[Tensor] = field(default_factory=list)
    lens: list[Tensor] = field(default_factory=list)
    kept: dict[str, dict[int, Tensor]] = field(default_factory=lambda: {name: {} for name in KEPT_LAYERS})
    prefix: Tensor | None = None
    image_probability: Tensor | None = None
    instruction_probability: Tensor | None = None


class HiddenStateRecorder:
    """Listens to the residual stream of one forward pass of a decoder-only model.

    Args:
        lens: finds layers, norm and head.
        rows: (B, T + 1) positions that predict the T answer tokens, and the one that reads the last.
        answers: token ids of every answer.
        spans: of every prompt.
        states, image_lens: which of the two parts of a trace to make.
    """

    def __init__(
        self,
        lens: Lens,
        rows: Tensor,
        answers: Sequence[Sequence[int]],
        spans: Sequence[Spans],
        states: bool = True,
        image_lens: bool = False,
    ) -> None:
        self._lens, self._states, self._image_lens = lens, states, image_lens
        self._rows = [row[: len(ids) + 1] for row, ids in zip(rows, answers, strict=True)]
        self._ids = [torch.tensor(list(ids), dtype=torch.long) for ids in answers]
        self._image = [torch.tensor(span.image, dtype=torch.long) for span in spans]
        self._question = [torch.tensor(span.question or (span.length - 1,)) for span in spans]
        self._ends = [span.length - 1 for span in spans]
        self._depth = len(lens.layers)
        self._layers = {
            name: {of_depth(layer, self._depth) for layer in layers} for name, layers in KEPT_LAYERS.items()
        }
        self._heard = [_Heard() for _ in spans]
        self._next = 0

    @contextmanager
    def listen(self) -> Iterator[HiddenStateRecorder]:
        """Hooks every layer and the final norm; the hooks are then removed."""

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
        for index, heard in enumerate(self._heard):
            at = [part[index].to(hidden.device) for part in (self._image, self._question, self._rows)]
            image, question, token = (hidden[index, positions] for positions in at)
            ids = self._ids[index].to(hidden.device)
            if self._states:
                self._reduce(heard, layer, image.float(), token.float(), hidden[index, 0].float())
                whole = {"token": token, "image": image, "instruction": question}
                whole["prompt_end"] = hidden[index, self._ends[index]]
                for name, states in whole.items():
                    if layer in self._layers[name]:
                        heard.kept[name][layer] = states.float().cpu()
                if layer == 0:
                    heard.prefix = torch.cat([question, token[1:]]).float().cpu()
                if layer in self._layers["instruction"]:
                    heard.instruction_probability = self._decode(question, ids, TEMPERATURE).cpu()
            if self._image_lens or (self._states and layer == self._depth):
                probability = self._decode(image, ids)
                heard.lens.append(torch.stack([probability.amax(-1), probability.sum(-1)], -1).cpu())
                heard.image_probability = probability.cpu()

    def _reduce(self, heard: _Heard, layer: int, image: Tensor, token: Tensor, first: Tensor) -> None:
        if layer > 0:
            cosines = nn.functional.normalize(token, dim=-1) @ nn.functional.normalize(image, dim=-1).T
            top = cosines.topk(max(1, round(PATCH_SHARE * len(image))), dim=-1).values
            heard.top.append(top.mean(-1).cpu())
            heard.peak.append(top[:, 0].cpu())
        if layer < self._depth:
            heard.sinks.append(sinks(image, first).cpu())

    def _decode(self, hidden: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
        """(T, N) probability of the tokens at states (N, D), decoded by the head alone."""
        parts = []
        for chunk in hidden.split(CHUNK):
            logits = self._lens.head(chunk).float() / temperature
            parts.append((logits[:, ids.to(logits.device)] - logits.logsumexp(-1, keepdim=True)).exp())
        return torch.cat(parts).T

    def states(self) -> list[HiddenStates]:
        """Per sample, what was heard."""
        return [
            HiddenStates(
                patch_top=torch.stack(heard.top, -1),
                patch_peak=torch.stack(heard.peak, -1),
                sinks=torch.stack(heard.sinks),
                prefix=heard.prefix,
                image_probability=heard.image_probability,
                instruction_probability=heard.instruction_probability,
                **heard.kept,
            )
            for heard in self._heard
        ]

    def image_lens(self) -> list[Tensor]:
        """Per sample (T, L + 1, 2): largest and summed probability of the token over image tokens."""
        return [torch.stack(heard.lens, 1) for heard in self._heard]


def sinks(image: Tensor, first: Tensor) -> Tensor:
    """Which image tokens are attention sinks (Kang et al., "See What You Are Told", ICLR 2025).

    A token is one if a sink dimension of its RMS-normalised state is above 20. The dimensions are published for two
    models only (two each, for Llama 2 of 7B and 13B); they are the massive ones of the first token, so here they are
    read off it: the two that are largest in the first token's state. No normalised value can be above sqrt(D), so
    where D is below 4096 the threshold is the same share of that, 20 / 64.

    Args:
        image: (N, D) states of image tokens that enter a layer. ``first``: (D,) that of the sequence's first token.

    Returns:
        (N,) bool.
    """
    size = image.shape[-1]
    normalised = [part.abs() / part.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12) for part in (image, first)]
    dimensions = normalised[1].topk(SINK_DIMENSIONS).indices
    return normalised[0][:, dimensions].amax(-1) > min(SINK_THRESHOLD, SINK_THRESHOLD / 64 * math.sqrt(size))
