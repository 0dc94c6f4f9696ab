"""Hold what the decoding steps of one answer leave behind: the parts of a trace for the token of every step.

The forward pass of step k reads token k - 1 and predicts token k, so its last query is row k of a trace of the finished
answer. While a step runs only references are kept (its query, logits, residual stream). Maps are computed on request,
for all steps since the last request in one batch, from the keys of the newest step. Where this is impossible they are
computed at once: see ``stethoscope.streaming.step_recorder``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn

from stethoscope.core.errors import CaptureError
from stethoscope.core.types import Answer
from stethoscope.tracing.attention_recorder import segments, strongest
from stethoscope.tracing.logit_lens import Lens
from stethoscope.tracing.trace import SEGMENTS, HeadAttention, Spans, Trace

RESIDUAL_REQUIREMENTS = frozenset({"lens", "trajectory", "hidden"})
"""Parts of a trace that are read off the residual stream."""
STEP_REQUIREMENTS = RESIDUAL_REQUIREMENTS | {"attention", "heads"}
"""Parts of a trace that the rows of single steps can fill; every other one needs a pass or a prompt of its own."""

_PREVIOUS, _FIRST, _REST = (SEGMENTS.index(name) for name in ("previous", "first", "rest"))
_GROW = 512


@dataclass
class Keys:
    """Keys of an attention module for one answer.

    Attributes:
        plain: whether softmax(scaling q k) is the module's map.
        scaling: of the scores.
        batch: (B, key heads, k, d) keys of its newest call; empty before the first.
        row: of the answer in the batch.
        padding: number of keys on the left that are not the answer's.
    """

    plain: bool = False
    scaling: float = 1.0
    batch: Tensor = field(default_factory=lambda: torch.empty(0))
    row: int = 0
    padding: int = 0

    @property
    def newest(self) -> Tensor:
        """Return the (1, key heads, k, d) keys of the newest call."""
        if len(self.batch) == 1 and not self.padding:
            return self.batch
        return self.batch[self.row : self.row + 1, :, self.padding :]


@dataclass
class DeferredAttention:
    """A row of attention that is computed on request, from its query (1, H, 1, d)."""

    query: Tensor
    keys: Keys

    def row(self, seen: int) -> Tensor:
        """Compute the row over the first ``seen`` keys, (H, seen) float32."""
        scores = _scores(self.query, self.keys.newest[:, :, :seen]) * self.keys.scaling
        return scores.softmax(-1)[0, :, 0]


@dataclass
class Step:
    """What one decoding step leaves behind.

    Attributes:
        hidden: residual stream (1, 1, D) by layer.
        rows: attention rows (H, k) by role and layer.
        deferred: whether all rows are ``DeferredAttention``.
    """

    hidden: list[Tensor]
    rows: dict[str, list[Tensor | DeferredAttention]]
    deferred: bool

    def deferred_rows(self, role: str) -> list[DeferredAttention]:
        """Return the rows of a role of a step whose rows are all deferred."""
        return cast("list[DeferredAttention]", self.rows[role])  # ``deferred`` holds; a check costs time per token


@dataclass
class _Block:
    """Parts of a trace for a few consecutive steps, by name, (steps, ...) on the CPU."""

    first: int
    parts: dict[str, Any]

    def until(self, stop: int) -> _Block:
        """Return the block without its steps from ``stop`` on."""
        return _Block(self.first, {name: rows[: stop - self.first] for name, rows in self.parts.items()})


class RecordedSteps:
    """The decoding steps of one answer, as a ``StepRecorder`` records them.

    Args:
        lens: logit lens of the model; None where no part of ``requires`` reads the residual stream.
        spans: of the prompt.
        encoder: whether the language model has an encoder, which reads the prompt.
        requires: parts of ``STEP_REQUIREMENTS``.
        rewinds: whether ``rewind`` will be called, for which all steps are kept.
        imaged: whether the image tokens are recorded.

    Attributes:
        spans: of the prompt.
        encoder: as given.
        imaged: as given.
        image_embeds: (N, D) image tokens at the input of the language model; None before the first step, and where the
            model does not show them.
        roles: of the attention modules that are recorded.
        keys: by name of the attention module.
        logits: (V,) of every step so far, unprocessed.
        image: index of the image tokens in a row of attention.
        passes: forward passes so far, those of steps that were taken back included.
        decodes: whether residual streams are recorded.
        attends: whether attention is recorded.
    """

    def __init__(
        self,
        lens: Lens | None,
        spans: Spans,
        encoder: bool,
        requires: frozenset[str],
        rewinds: bool = False,
        imaged: bool = False,
    ) -> None:
        self._lens, self.spans, self.encoder, self.imaged = lens, spans, encoder, imaged
        self.image_embeds: Tensor | None = None
        self.decodes = not requires.isdisjoint(RESIDUAL_REQUIREMENTS)
        self.attends, self._by_head = not requires.isdisjoint({"attention", "heads"}), "heads" in requires
        self.roles = ("language", "cross") if encoder else ("language",)
        self._reads = self.roles[-1]
        self._begin = 1 if encoder else spans.length  # first position of the answer among the keys
        first, last = spans.image[0], spans.image[-1] + 1
        contiguous = last - first == len(spans.image)
        self.image = slice(first, last) if contiguous else torch.tensor(spans.image, dtype=torch.long)
        self._members: dict[tuple[str, torch.device], Tensor] = {}
        self.keys: dict[str, Keys] = {}
        self._waiting: list[Step] = []
        self._blocks: list[_Block] = []
        self._steps: list[Step] | None = [] if rewinds else None
        self.logits: list[Tensor] = []
        self.passes = 0

    @property
    def lens(self) -> Lens:
        """Logit lens of the model.

        Raises:
            CaptureError: the recorder was made without one.
        """
        if self._lens is None:
            raise CaptureError("this recorder has no logit lens, which reading the residual stream requires")
        return self._lens

    def key_count(self, step: int) -> int:
        """Return the number of keys that a step sees."""
        return self._begin + step

    def add(self, step: Step, logits: Tensor) -> None:
        """Add the newest step and the (V,) logits that it predicts."""
        self._waiting.append(step)
        if self._steps is not None:
            self._steps.append(step)
        self.logits.append(logits)
        self.passes += 1

    def trace(self, start: int, answer: Answer, requires: frozenset[str], consuming: bool = False) -> Trace:
        """Build the trace of consecutive tokens of the answer.

        Args:
            start: index of the first token; the steps of all must have been recorded.
            answer: these tokens.
            requires: parts to fill.
            consuming: whether the step that reads the last token is known too, for ``heads`` and ``hidden``.
        """
        stop = start + len(answer.token_ids)
        end = stop + consuming
        self._reduce(end)
        rows = self.logits[start:stop]
        parts: dict[str, Any] = {"logits": (rows[0][None] if len(rows) == 1 else torch.stack(rows)).float().cpu()}
        if "attention" in requires:
            parts |= {"mass": self._part("mass", start, stop), "image_attention": self._part("image", start, stop)}
        if not requires.isdisjoint({"lens", "trajectory"}):
            hidden = self._part("hidden", start, stop)
            ids = torch.tensor(answer.token_ids, device=hidden.device)
            parts |= self.lens.read_together(hidden, parts["logits"], ids, requires)
        if "hidden" in requires:
            parts["hidden"] = self.lens.probed(list(self._part("hidden", start, end).unbind(1)))
        if "heads" in requires:
            rows = self._part("response", start, end)
            response = torch.zeros(len(rows), max(stop - start, *map(len, rows)))
            for padded, row in zip(response, rows, strict=True):
                padded[: len(row)] = row
            stacked = {name: self._part(name, start, end) for name in ("mass", "image", "top", "peak")}
            parts["heads"] = HeadAttention(**stacked, response=response)
        return Trace(answer, self.spans, **parts)

    def _part(self, name: str, start: int, stop: int) -> Any:
        """Return one part, (stop - start, ...); a list of rows where they have different lengths."""
        pieces: list[Any] = []
        for block in reversed(self._blocks):
            if block.first < stop:
                pieces.append(block.parts[name][max(start - block.first, 0) : stop - block.first])
            if block.first <= start:
                break
        if isinstance(pieces[0], list):
            return [row for piece in reversed(pieces) for row in piece]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces[::-1])

    def next_batch(self, start: int, stop: int) -> list[Step]:
        """Return the unread steps from ``start`` on, before ``stop``, that are deferred like the first.

        None if the step of ``start`` has been read: by a trace of the token before it, which this step consumes.
        """
        first = start - (len(self.logits) - len(self._waiting))
        if first < 0:
            return []
        return list(next(groupby(self._waiting[first : stop - start + first], _is_deferred))[1])

    def unread(self, step: int) -> Step:
        """Return a step that has not been read."""
        return self._waiting[step - (len(self.logits) - len(self._waiting))]

    def discard(self, stop: int) -> None:
        """Release the unread steps before ``stop``."""
        del self._waiting[: max(stop - (len(self.logits) - len(self._waiting)), 0)]

    def rewind(self, read: int) -> None:
        """Go back to the steps of the first ``read`` tokens and the one that predicts the token after them, unread.

        Needs ``rewinds``.
        """
        steps, first = self._steps or [], len(self.logits) - len(self._waiting)
        del steps[read + 1 :], self.logits[read + 1 :]
        self._waiting = steps[min(first, read) :]  # with those before that were not needed yet
        self._blocks = [block.until(read) for block in self._blocks if block.first < read]

    def _reduce(self, stop: int) -> None:
        """Reduce the unread steps before ``stop`` to blocks; consecutive deferred steps share one."""
        first = len(self.logits) - len(self._waiting)
        for _, group in groupby(self._waiting[: max(stop - first, 0)], _is_deferred):
            steps: list[Step] = list(group)
            parts: dict[str, Any] = {}
            if self.decodes:
                device = steps[0].hidden[-1].device  # layers may be on several; norm and head are with the last
                hidden = torch.cat([layer.to(device) for step in steps for layer in step.hidden], 1)
                parts["hidden"] = hidden.view(len(steps), -1, hidden.shape[-1])
            if self.attends:
                parts |= self._attention_parts(steps, first)
            self._blocks.append(_Block(first, parts))
            first += len(steps)
        self.discard(first)

    def _attention_parts(self, steps: list[Step], first: int) -> dict[str, Any]:
        """Reduce the attention of steps as ``stethoscope.tracing.attention_recorder`` does."""
        masses: list[Tensor] = []
        parts: dict[str, Any] = {}
        for role in self.roles:
            weights = self._weights([step.rows[role] for step in steps], role, first)  # (L, H, T, k)
            masses.append(weights @ self.membership(role, weights.shape[-1], weights.device))
            if role == self._reads:
                image = weights[..., self.image]
                parts["image"] = image.mean(1).transpose(0, 1)
                if self._by_head:
                    parts["top"], parts["peak"] = strongest(image.permute(2, 0, 1, 3) / len(self.roles))
            if role == "language" and self._by_head:
                largest = weights[-1].amax(0)
                largest = (largest / largest.sum(-1, keepdim=True))[:, self._begin :].cpu()
                parts["response"] = [row[: first + index] for index, row in enumerate(largest)]
        parts["image"] = parts["image"].cpu() if len(masses) == 1 else parts["image"].cpu() / 2
        mass = masses[0] if len(masses) == 1 else (masses[0] + masses[1]) / 2
        parts["mass"] = mass.permute(2, 0, 1, 3).cpu()
        return parts

    def _weights(self, rows: list[list[Tensor | DeferredAttention]], role: str, first: int) -> Tensor:
        """Compute float32 (L, H, T, k) weights; keys that a sliding window has dropped have weight 0.

        Args:
            rows: by step and layer, as in ``Step``.
            role: of the attention modules.
            first: index of the first step.
        """
        length = self.spans.length if role == "cross" else self._begin + first + len(rows) - 1
        if all(isinstance(row, DeferredAttention) for row in rows[0]):  # so are those of the other steps
            return _batched_scores(cast("list[list[DeferredAttention]]", rows), length).softmax(-1)
        steps = []
        for index, step in enumerate(rows, first):
            seen = self.spans.length if role == "cross" else self._begin + index
            computed = [row.row(seen) if isinstance(row, DeferredAttention) else row[:, :seen] for row in step]
            pads = [(seen - row.shape[1], length - seen) for row in computed]
            padded = [nn.functional.pad(row, pad).float().cpu() for row, pad in zip(computed, pads, strict=True)]
            steps.append(torch.stack(padded))
        return torch.stack(steps, 2)

    def membership(self, role: str, length: int, device: torch.device) -> Tensor:
        """Return the membership of every key in ``SEGMENTS`` as 0 and 1, (length, 5) float32."""
        key = role, device
        if key not in self._members or len(self._members[key]) < length:
            self._members[key] = self._kinds(role, length + _GROW).to(device)
        return self._members[key][:length]

    def _kinds(self, role: str, length: int) -> Tensor:
        if not self.encoder:
            kinds = segments(self.spans, length)
        elif role == "cross":
            kinds = segments(self.spans, length)
            kinds[(kinds == _FIRST) | (kinds == _PREVIOUS)] = _REST
        else:
            kinds = torch.full((length,), _PREVIOUS)
            kinds[0] = _FIRST
        return nn.functional.one_hot(kinds, len(SEGMENTS)).float()


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """Multiply queries (1, H, T, d) by keys (1, key heads, k, d) of their groups: (1, H, T, k) float32."""
    if query.shape[1] == key.shape[1]:
        return (query @ key.transpose(2, 3)).float()
    grouped = query.reshape(1, key.shape[1], -1, query.shape[3])
    return (grouped @ key.transpose(2, 3)).float().view(*query.shape[:3], -1)


def _is_deferred(step: Step) -> bool:
    return step.deferred


def _batched_scores(rows: list[list[DeferredAttention]], length: int) -> Tensor:
    """Compute the (L, H, T, length) scores of T consecutive steps, -inf where a key comes after its step."""
    count, layers = len(rows), []
    for deferred in zip(*rows, strict=True):
        query, key = deferred[0].query, deferred[0].keys.newest
        if count > 1:
            query = torch.cat([row.query for row in deferred], 2)
        scores = _scores(query, key if key.shape[2] == length else key[:, :, :length])
        layers.append(scores.mul_(deferred[0].keys.scaling))
    scores = torch.cat([layer.to(layers[0].device) for layer in layers])
    if count > 1:
        after = torch.ones(count, count, dtype=torch.bool, device=scores.device).triu(1)
        scores[..., -count:].masked_fill_(after, -torch.inf)
    return scores
