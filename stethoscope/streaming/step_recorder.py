"""One row for every decoding step of a ``generate`` call: what a trace holds of the token that the step writes.

The forward pass of step k reads token k - 1 and predicts token k, so its last query is row k of a trace of the finished
answer. It is heard while the model generates with its cache; no other pass is made. While a step runs only references
are kept (its query, logits, residual stream); maps are made when rows are asked for, for all steps since the last time
in one go, from the keys that the newest step has seen. What cannot be made so is made at once: the prompt's row, calls
with a mask or a position bias, keys that a window has dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from stethoscope.core.errors import CaptureError
from stethoscope.core.types import Answer
from stethoscope.tracing.attention_recorder import segments, strongest
from stethoscope.tracing.hooks import (
    AttentionCall,
    AttentionRecorder,
    Recording,
    Site,
    capturing,
    modules_of,
    selected,
    sites,
)
from stethoscope.tracing.logit_lens import Lens
from stethoscope.tracing.trace import SEGMENTS, HeadAttention, Spans, Trace

STEP_NEEDS = frozenset({"attention", "lens", "trajectory", "heads"})
"""Parts of a trace that the rows of single steps can fill; every other one needs a pass or a prompt of its own."""

_PREVIOUS, _FIRST, _REST = (SEGMENTS.index(name) for name in ("previous", "first", "rest"))
_GROW = 512
_NOT_PLAIN = ("position_bias", "softcap", "s_aux")  # arguments that make more of attention than softmax(q k)
_NEAR, _NEAR_ROUNDED = 1e-5, 1e-2  # how far it may be from the model file's attention, in float32 and in other dtypes


@dataclass
class Keys:
    """Of one attention module: the keys (1, key heads, k, d) of its newest call, if the plain formula gives its map."""

    plain: bool = False
    scaling: float = 1.0
    newest: Tensor | None = None


@dataclass
class Later:
    """A row of attention that is still to be made, from its query (1, H, 1, d)."""

    query: Tensor
    keys: Keys

    def row(self, seen: int) -> Tensor:
        """(H, seen) float32."""
        scores = _scores(self.query, self.keys.newest[:, :, :seen]) * self.keys.scaling
        return scores.softmax(-1)[0, :, 0]


@dataclass
class Step:
    """What one step has left behind: its residual stream by layer (1, 1, D), its rows (H, k) by role and layer.

    Attributes:
        later: all of its rows are still to be made.
    """

    hidden: list[Tensor]
    rows: dict[str, list[Tensor | Later]]
    later: bool


@dataclass
class _Block:
    """Parts of a trace for a few consecutive steps, by name, (steps, ...) on the CPU."""

    first: int
    parts: dict[str, Any]


class Steps(AttentionRecorder):
    """Hears a ``generate`` call of one prompt, from ``start`` to ``stop``.

    Args:
        model: the model.
        lens: finds its layers; None where no part of ``needs`` reads the residual stream.
        spans: of the prompt.
        encoder: the language model has an encoder, which reads the prompt.
        needs: parts of ``STEP_NEEDS``.

    Attributes:
        logits: (V,) of every step so far, unprocessed.
        image: where the image tokens are in a row of attention, as an index.
    """

    def __init__(
        self, model: PreTrainedModel, lens: Lens | None, spans: Spans, encoder: bool, needs: frozenset[str]
    ) -> None:
        self._model, self.lens, self.spans, self._encoder = model, lens, spans, encoder
        self._decodes = not needs.isdisjoint({"lens", "trajectory"})
        self._attends, self._by_head = not needs.isdisjoint({"attention", "heads"}), "heads" in needs
        self._roles = ("language", "cross") if encoder else ("language",)
        self._reads = self._roles[-1]
        self._begin = 1 if encoder else spans.length  # of the answer, in the sequence that the rows' keys are of
        first, last = spans.image[0], spans.image[-1] + 1
        whole = last - first == len(spans.image)
        self.image = slice(first, last) if whole else torch.tensor(spans.image, dtype=torch.long)
        self._members: dict[tuple[str, torch.device], Tensor] = {}
        self._keys: dict[str, Keys] = {}
        self._rows: dict[str, list[Tensor | Later]] = {role: [] for role in self._roles}
        self._hidden: list[Tensor] = []
        self._fresh = self._on = False
        self._later = True  # all rows of the step so far are still to be made
        self._open: ExitStack | None = None
        self._waiting: list[Step] = []
        self._blocks: list[_Block] = []
        self.logits: list[Tensor] = []

    def start(self, always: bool = True) -> None:
        """Puts the hooks on the model; to be called in the thread that generates.

        Args:
            always: hear every pass until ``stop``; else only those within ``listening``.
        """
        self._open, self._on = ExitStack(), always
        try:
            if self._attends:
                self._open.enter_context(selected(self._model))
                self._recording = Recording(self, sites(self._model))
                if always:
                    self._open.enter_context(capturing(self._recording))
            if self._decodes:
                for layer in self.lens.layers:
                    self._hook(layer, self._after_layer)
            speaking = [m for m in modules_of(self._model) if isinstance(m, PreTrainedModel) and m.can_generate()]
            self._nested = len(speaking) > 1
            if self._nested:
                self._hook(self._model.get_output_embeddings(), self._after_head)
            for module in speaking:
                self._hook(module, self._after_model)
        except BaseException:
            self.stop()
            raise

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hears what the model does within the block."""
        self._on = True
        try:
            if self._attends:
                with capturing(self._recording):
                    yield
            else:
                yield
        finally:
            self._on = False

    def stop(self) -> None:
        """Takes the hooks off again; does nothing where there are none."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def _hook(self, module: nn.Module, hook: Callable) -> None:
        self._open.callback(module.register_forward_hook(hook).remove)

    def matches(self, site: Site) -> bool:
        return site.role in self._rows

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        site, query, key, value, mask, options = call.site, call.query, call.key, call.value, call.mask, call.options
        batch, heads, queries, _ = query.shape
        if batch > 1:
            raise CaptureError(f"{batch} prompts are written at once; warnings are for one prompt at a time")
        plain = queries == 1 and mask is None
        if plain:
            keys = self._keys.get(site.name) or self._tried(call)
            plain = keys.plain and key.shape[2] == self._begin + len(self.logits)  # else a window has dropped some
        if plain:
            keys.newest = key
            self._rows[site.role].append(Later(query, keys))
            if heads == key.shape[1] and not options.get("dropout"):  # what is left of transformers' function then
                output = scaled_dot_product_attention(query, key, value, scale=options.get("scaling"))
                return output.transpose(1, 2).contiguous(), None
            return call.sdpa()
        output, _ = call.sdpa()  # the very ids of a plain call
        self._later = False
        if queries > 1:
            last = torch.tensor([[queries - 1]])
            row = call.eager_rows(last)[0, :, 0]
        else:
            row = call.eager()[1][0, :, 0]
        self._rows[site.role].append(row)
        return output, None

    def _tried(self, call: AttentionCall) -> Keys:
        """Whether softmax(scaling q k) is the map, tried once for every module of an answer."""
        query, key, options = call.query, call.key, call.options
        keys = self._keys[call.site.name] = Keys()
        if not self._encoder and all(options.get(name) is None for name in _NOT_PLAIN):
            keys.scaling = query.shape[-1] ** -0.5 if options.get("scaling") is None else options["scaling"]
            own = call.eager()[1][0, :, 0].float()
            keys.newest = key
            near = _NEAR if query.dtype == torch.float32 else _NEAR_ROUNDED
            keys.plain = bool((Later(query, keys).row(key.shape[2]) - own).abs().max() < near)
        return keys

    def seen(self, step: int) -> int:
        """How many keys a step sees."""
        return self._begin + step

    def _after_layer(self, module: nn.Module, arguments: tuple, output: Tensor | tuple) -> None:
        if self._on:
            hidden = output[0] if isinstance(output, tuple) else output
            self._hidden.append(hidden if hidden.shape[1] == 1 else hidden[:, -1:])

    def _after_head(self, module: nn.Module, arguments: tuple, output: Tensor) -> None:
        self._fresh = True

    def _after_model(self, module: nn.Module, arguments: tuple, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if logits is None or not self._on:
            return
        row = logits[0, -1]
        if self._nested and not self._fresh:  # a model around the one that was heard a moment ago
            self.logits[-1] = row
            return
        self._fresh = False
        if self._attends and not all(self._rows.values()):
            role = next(role for role, rows in self._rows.items() if not rows)
            raise CaptureError(f"no {role} attention was heard; open the stream in the thread that generates")
        self._waiting.append(Step(self._hidden, self._rows, self._later))
        self.logits.append(row)
        self._later = True
        self._hidden, self._rows = [], {role: [] for role in self._roles}

    def trace(self, start: int, answer: Answer, needs: frozenset[str], consuming: bool = False) -> Trace:
        """The trace of consecutive tokens of the answer.

        Args:
            start: number of the first; the steps of all must have been heard.
            answer: these tokens.
            needs: parts to fill.
            consuming: the step that reads the last token is known too; parts of ``HeadAttention`` need it.
        """
        stop = start + len(answer.token_ids)
        end = stop + consuming
        self._reduce(end)
        rows = self.logits[start:stop]
        parts: dict[str, Any] = {"logits": (rows[0][None] if len(rows) == 1 else torch.stack(rows)).float().cpu()}
        if "attention" in needs:
            parts |= {"mass": self._part("mass", start, stop), "image_attention": self._part("image", start, stop)}
        if not needs.isdisjoint({"lens", "trajectory"}):
            hidden = self._part("hidden", start, stop)
            ids = torch.tensor(answer.token_ids, device=hidden.device)
            parts |= self.lens.read_together(hidden, parts["logits"], ids, needs)
        if "heads" in needs:
            rows = self._part("response", start, end)
            response = torch.zeros(len(rows), max(stop - start, *map(len, rows)))
            for whole, row in zip(response, rows, strict=True):
                whole[: len(row)] = row
            stacked = {name: self._part(name, start, end) for name in ("mass", "image", "top", "peak")}
            parts["heads"] = HeadAttention(**stacked, response=response)
        return Trace(answer, self.spans, **parts)

    def _part(self, name: str, start: int, stop: int) -> Any:
        """(stop - start, ...) of one part; a list of rows where they have different lengths."""
        found = []
        for block in reversed(self._blocks):
            if block.first < stop:
                found.append(block.parts[name][max(start - block.first, 0) : stop - block.first])
            if block.first <= start:
                break
        if isinstance(found[0], list):
            return [row for part in reversed(found) for row in part]
        return found[0] if len(found) == 1 else torch.cat(found[::-1])

    def alike(self, start: int, stop: int) -> list[Step]:
        """The steps from ``start`` on, up to ``stop``, that are all ``later``, or all are not. None has been read."""
        first = start - (len(self.logits) - len(self._waiting))
        return list(next(groupby(self._waiting[first : stop - start + first], _is_later))[1])

    def forget(self, stop: int) -> None:
        """Drops what waits of the steps up to ``stop``, which have been read."""
        del self._waiting[: stop - (len(self.logits) - len(self._waiting))]

    def _reduce(self, stop: int) -> None:
        """Makes blocks of the steps up to ``stop`` that wait: one of those in a row that are all ``later``."""
        first = len(self.logits) - len(self._waiting)
        for _, some in groupby(self._waiting[: max(stop - first, 0)], _is_later):
            steps, parts = list(some), {}
            if self._decodes:
                device = steps[0].hidden[-1].device  # layers may be on several; norm and head are with the last
                hidden = torch.cat([layer.to(device) for step in steps for layer in step.hidden], 1)
                parts["hidden"] = hidden.view(len(steps), -1, hidden.shape[-1])
            if self._attends:
                parts |= self._maps(steps, first)
            self._blocks.append(_Block(first, parts))
            first += len(steps)
        self.forget(first)

    def _maps(self, steps: list[Step], first: int) -> dict[str, Any]:
        """Attention of some steps, reduced as ``stethoscope.tracing.attention_recorder`` does it."""
        masses, found = [], {}
        for role in self._roles:
            weights = self._weights([step.rows[role] for step in steps], role, first)  # (L, H, T, k)
            masses.append(weights @ self.membership(role, weights.shape[-1], weights.device))
            if role == self._reads:
                image = weights[..., self.image]
                found["image"] = image.mean(1).transpose(0, 1)
                if self._by_head:
                    found["top"], found["peak"] = strongest(image.permute(2, 0, 1, 3) / len(self._roles))
            if role == "language" and self._by_head:
                most = weights[-1].amax(0)
                most = (most / most.sum(-1, keepdim=True))[:, self._begin :].cpu()
                found["response"] = [row[: first + number] for number, row in enumerate(most)]
        found["image"] = found["image"].cpu() if len(masses) == 1 else found["image"].cpu() / 2
        found["mass"] = (masses[0] if len(masses) == 1 else sum(masses) / 2).permute(2, 0, 1, 3).cpu()
        return found

    def _weights(self, rows: list[list[Tensor]], role: str, first: int) -> Tensor:
        """Float32 (L, H, T, k); keys that a sliding window has dropped have no weight, places not yet filled are left.

        Args:
            rows: by step and layer, as in ``Step``. ``first``: number of the first step.
        """
        length = self.spans.length if role == "cross" else self._begin + first + len(rows) - 1
        if isinstance(rows[0][0], Later) and all(isinstance(row, Later) for row in rows[0]):
            return _together(rows, length).softmax(-1)
        steps = []
        for number, step in enumerate(rows, first):
            seen = self.spans.length if role == "cross" else self._begin + number
            made = [row.row(seen) if isinstance(row, Later) else row[:, :seen] for row in step]
            pads = [(seen - row.shape[1], length - seen) for row in made]
            steps.append(torch.stack([nn.functional.pad(*one).float().cpu() for one in zip(made, pads, strict=True)]))
        return torch.stack(steps, 2)

    def membership(self, role: str, length: int, device: torch.device) -> Tensor:
        """Tell which of ``SEGMENTS`` every key of a row belongs to, as 0 and 1, (length, 5) float32."""
        key = role, device
        if key not in self._members or len(self._members[key]) < length:
            self._members[key] = self._kinds(role, length + _GROW).to(device)
        return self._members[key][:length]

    def _kinds(self, role: str, length: int) -> Tensor:
        if not self._encoder:
            kinds = segments(self.spans, length)
        elif role == "cross":
            kinds = segments(self.spans, length)
            kinds[(kinds == _FIRST) | (kinds == _PREVIOUS)] = _REST
        else:
            kinds = torch.full((length,), _PREVIOUS)
            kinds[0] = _FIRST
        return nn.functional.one_hot(kinds, len(SEGMENTS)).float()


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """(1, H, T, k) products of queries (1, H, T, d) with the keys (1, key heads, k, d) of their groups, float32."""
    if query.shape[1] == key.shape[1]:
        return (query @ key.transpose(2, 3)).float()
    grouped = query.reshape(1, key.shape[1], -1, query.shape[3])
    return (grouped @ key.transpose(2, 3)).float().view(*query.shape[:3], -1)


def _is_later(step: Step) -> bool:
    return step.later


def _together(rows: list[list[Later]], length: int) -> Tensor:
    """(L, H, T, length) scores of the rows of T steps in a row, -inf where a key comes after its step."""
    count, layers = len(rows), []
    for later in zip(*rows, strict=True):
        query, key = later[0].query, later[0].keys.newest
        if count > 1:
            query = torch.cat([one.query for one in later], 2)
        scores = _scores(query, key if key.shape[2] == length else key[:, :, :length])
        layers.append(scores.mul_(later[0].keys.scaling))
    scores = torch.cat([layer.to(layers[0].device) for layer in layers])
    if count > 1:
        after = torch.ones(count, count, dtype=torch.bool, device=scores.device).triu(1)
        scores[..., -count:].masked_fill_(after, -torch.inf)
    return scores
