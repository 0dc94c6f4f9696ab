"""One row for every decoding step of a ``generate`` call: what a trace holds of the token that the step writes.

The forward pass of step k reads token k - 1 and predicts token k, so its last query is row k of a trace of the finished
answer. It is heard while the model generates with its cache; no other pass is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stethoscope.capture import Listener, Site, eager_attention, eager_rows, plain_attention, record
from stethoscope.errors import CaptureError
from stethoscope.lens import Lens
from stethoscope.records import Answer
from stethoscope.rows import segments, strongest
from stethoscope.trace import SEGMENTS, Heads, Spans, Trace

STEP_NEEDS = frozenset({"attention", "lens", "trajectory", "heads"})
"""Parts of a trace that the rows of single steps can fill; every other one needs a pass or a prompt of its own."""

_PREVIOUS, _FIRST, _REST = (SEGMENTS.index(name) for name in ("previous", "first", "rest"))
_GROW = 512


@dataclass
class Step:
    """What the forward pass of one step left behind: float32 on the CPU, as a row of ``Trace`` or ``Heads``.

    Attributes:
        logits: (V,), unprocessed.
        hidden: (L, D) the residual stream after each layer, in the model's dtype; None if not asked for.
        mass: (L, H, 5). ``image``: (L, N). ``top``: (L, H, 2). ``peak``: (L, H). See ``Heads``.
        response: (k,) attention of the last layer to the k earlier answer tokens, see ``Heads``.
    """

    logits: Tensor
    hidden: Tensor | None = None
    mass: Tensor | None = None
    image: Tensor | None = None
    top: Tensor | None = None
    peak: Tensor | None = None
    response: Tensor | None = None


class Steps(Listener):
    """Hears a ``generate`` call of one prompt, from ``start`` to ``stop``.

    Args:
        model: the model.
        lens: finds its layers; None where no part of ``needs`` reads the residual stream.
        spans: of the prompt.
        encoder: the language model has an encoder, which reads the prompt.
        needs: parts of ``STEP_NEEDS``.

    Attributes:
        done: the steps so far.
    """

    def __init__(
        self, model: PreTrainedModel, lens: Lens | None, spans: Spans, encoder: bool, needs: frozenset[str]
    ) -> None:
        self._model, self._lens, self._spans, self._encoder = model, lens, spans, encoder
        self._decodes = not needs.isdisjoint({"lens", "trajectory"})
        self._attends, self._by_head = not needs.isdisjoint({"attention", "heads"}), "heads" in needs
        self._maps: dict[str, list[Tensor]] = {"language": [], "cross": []} if encoder else {"language": []}
        self._reads = "cross" if encoder else "language"
        self._start = 1 if encoder else spans.length  # of the answer, in the sequence that the rows' keys are of
        self._image = torch.tensor(spans.image, dtype=torch.long)
        self._members: dict[str, Tensor] = {}
        self._hidden: list[Tensor] = []
        self._open: ExitStack | None = None
        self._fresh = False
        self.done: list[Step] = []

    def start(self) -> None:
        """Puts the hooks on the model; to be called in the thread that generates."""
        self._open = ExitStack()
        try:
            if self._attends:
                self._open.enter_context(record(self._model, self))
            if self._decodes:
                for layer in self._lens.layers:
                    self._hook(layer, self._after_layer)
            self._hook(self._model.get_output_embeddings(), self._after_head)
            for module in self._model.modules():
                if isinstance(module, PreTrainedModel):
                    self._hook(module, self._after_model)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Takes the hooks off again; does nothing where there are none."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def _hook(self, module: nn.Module, hook: Callable) -> None:
        self._open.callback(module.register_forward_hook(hook).remove)

    def wants(self, site: Site) -> bool:
        return site.role in self._maps

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
        output, _ = plain_attention(module, query, key, value, mask, **kwargs)  # the very ids of a plain call
        if len(query) > 1:
            raise CaptureError(f"{len(query)} prompts are written at once; warnings are for one prompt at a time")
        if query.shape[2] == 1:
            weights = eager_attention(module, query, key, value, mask, **kwargs)[1][0]
        else:
            last = torch.tensor([[query.shape[2] - 1]])
            weights = eager_rows(module, last, query, key, value, mask, **kwargs)[0]
        self._maps[site.role].append(weights[:, -1].detach())
        return output, None

    def _after_layer(self, module: nn.Module, arguments: tuple, output: Tensor | tuple) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        self._hidden.append(hidden[0, -1].detach())

    def _after_head(self, module: nn.Module, arguments: tuple, output: Tensor) -> None:
        self._fresh = True

    def _after_model(self, module: nn.Module, arguments: tuple, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if logits is None:
            return
        row = logits[0, -1].detach().float().cpu()
        if not self._fresh:  # a model around the one that was heard a moment ago
            self.done[-1].logits = row
            return
        self._fresh = False
        step = Step(row, **self._reduced())
        if self._decodes:
            step.hidden, self._hidden = torch.stack(self._hidden), []
        self.done.append(step)

    def _reduced(self) -> dict[str, Tensor]:
        """The maps of one step, reduced as ``stethoscope.rows`` does it, and forgotten."""
        if not self._attends:
            return {}
        masses, found = [], {}
        for role, maps in self._maps.items():
            if not maps:
                raise CaptureError(f"no {role} attention was heard; open the stream in the thread that generates")
            weights = self._joined(maps, role)  # (L, H, k)
            maps.clear()
            masses.append(weights @ self._membership(role, weights.shape[-1]))
            if role == self._reads:
                image = weights[..., self._image] / len(self._maps)
                found["image"] = image.mean(1)
                if self._by_head:
                    found["top"], found["peak"] = strongest(image)
            if role == "language" and self._by_head:
                most = weights[-1].amax(0)
                found["response"] = (most / most.sum())[self._start :]
        found["mass"] = sum(masses) / len(masses)
        return found

    def _joined(self, maps: list[Tensor], role: str) -> Tensor:
        """Float32 (L, H, k); keys that a sliding window has dropped have no weight, places not yet filled are left."""
        length = self._spans.length if role == "cross" else self._start + len(self.done)
        if all(one.shape[-1] == length for one in maps):
            return torch.stack(maps).float().cpu()
        even = [nn.functional.pad(one[:, :length], (max(length - one.shape[-1], 0), 0)) for one in maps]
        return torch.stack([one.float().cpu() for one in even])

    def _membership(self, role: str, length: int) -> Tensor:
        """(length, 5) which segment every key belongs to, as 0 and 1."""
        if role not in self._members or len(self._members[role]) < length:
            self._members[role] = self._kinds(role, length + _GROW)
        return self._members[role][:length]

    def _kinds(self, role: str, length: int) -> Tensor:
        if not self._encoder:
            kinds = segments(self._spans, length)
        elif role == "cross":
            kinds = segments(self._spans, length)
            kinds[(kinds == _FIRST) | (kinds == _PREVIOUS)] = _REST
        else:
            kinds = torch.full((length,), _PREVIOUS)
            kinds[0] = _FIRST
        return nn.functional.one_hot(kinds, len(SEGMENTS)).float()


def trace_of(steps: Sequence[Step], answer: Answer, spans: Spans, needs: frozenset[str], lens: Lens | None) -> Trace:
    """The trace of T consecutive tokens of an answer.

    Args:
        steps: T, or T + 1 with the one that consumes the last token, which parts of ``Heads`` need.
        answer: these tokens.
        needs: parts to fill.
    """
    count = len(answer.token_ids)
    own = steps[:count]
    parts: dict[str, Any] = {"logits": torch.stack([step.logits for step in own])}
    if "attention" in needs:
        parts["mass"] = torch.stack([step.mass for step in own])
        parts["image_attention"] = torch.stack([step.image for step in own])
    if not needs.isdisjoint({"lens", "trajectory"}):
        parts |= _decoded(own, answer, needs, lens)
    if "heads" in needs:
        response = torch.zeros(len(steps), max(count, *(len(step.response) for step in steps)))
        for row, step in zip(response, steps, strict=True):
            row[: len(step.response)] = step.response
        names = ("mass", "image", "top", "peak")
        stacked = {name: torch.stack([getattr(step, name) for step in steps]) for name in names}
        parts["heads"] = Heads(**stacked, response=response)
    return Trace(answer, spans, **parts)


def _decoded(own: Sequence[Step], answer: Answer, needs: frozenset[str], lens: Lens) -> dict[str, Tensor]:
    """What the logit lens says; all layers of a token are decoded together."""
    found: dict[str, list[Tensor]] = {}
    for step, token in zip(own, answer.token_ids, strict=True):
        layers = len(step.hidden) - 1
        heard = [step.hidden[None, :-1], step.hidden[None, -1:]]
        logits = step.logits.to(step.hidden.device).expand(1, layers, -1)
        if "lens" in needs:
            pairs = lens.read(heard, logits, torch.full((1, layers), token))
            for name, values in zip(("lens_logprob", "lens_rank"), pairs, strict=True):  # layers, and the model's own
                found.setdefault(name, []).append(torch.cat([values[0, :, 0], values[0, :1, 1]]))
        if "trajectory" in needs:
            found.setdefault("trajectory", []).append(lens.divergence(heard, logits)[0, :, 0])
    return {name: torch.stack(values) for name, values in found.items()}
