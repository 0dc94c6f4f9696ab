"""Record one row per decoding step of a ``generate`` call: the parts of a trace for the token of that step.

Rows are recorded while the model generates with its cache, without another pass, and kept as ``RecordedSteps``. Maps
are computed at once only where they cannot be computed later: calls with a position bias or with a mask that hides more
than padding, and keys that a sliding window has dropped.

Deferring maps is a fast path: steps of tokens that are not scored cost little more than their references
(``scripts/bench/stream.py``). It was not measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from stethoscope.core.errors import CaptureError
from stethoscope.streaming.recorded_steps import DeferredAttention, Keys, RecordedSteps, Step
from stethoscope.tracing.hooks import (
    AttentionCall,
    AttentionRecorder,
    Recording,
    capturing,
    each_row,
    last_row,
    selected,
)
from stethoscope.tracing.model_parts import layers_of, modules_of, sites

_NOT_PLAIN = ("position_bias", "softcap", "s_aux")  # options that change the map from softmax(scaling q k)
_NEAR, _NEAR_ROUNDED = 1e-5, 1e-2  # tolerance against the model file's attention, in float32 and other dtypes
_checked: WeakKeyDictionary[nn.Module, tuple[tuple[float, torch.dtype], bool]] = WeakKeyDictionary()
"""Scaling and dtype of attention modules, and whether softmax(scaling q k) is their map."""


class StepRecorder(AttentionRecorder):
    """Records a ``generate`` call, from ``start`` to ``stop``.

    Args:
        model: the model.
        steps: of every prompt, in the order of the batch, with the same requirements. The masks of several prompts must
            hide nothing but later tokens and padding on the left.
    """

    def __init__(self, model: PreTrainedModel, steps: Sequence[RecordedSteps]) -> None:
        first = steps[0]
        self._model, self._steps, self._padded = model, list(steps), len(steps) > 1
        self.roles, self._attends = first.roles, first.attends
        self._lens = first.lens if first.decodes else None
        self._rows: dict[str, list[list[Tensor | DeferredAttention]]] = {role: [] for role in self.roles}  # by layer
        self._hidden: list[Tensor] = []  # (B, 1, D) by layer
        self._fresh = self._on = self._watched = False
        self._deferred = True  # all rows of the current step so far
        self._open = ExitStack()

    def start(self, always: bool = True) -> None:
        """Install the hooks on the model; call it in the thread that generates.

        Args:
            always: whether to record every pass until ``stop``, or only those within ``recording``.
        """
        self._on = always
        try:
            if self._attends:
                self._open.enter_context(selected(self._model))
                self._recording = Recording(self, sites(self._model))
                if always:
                    self._open.enter_context(capturing(self._recording))
            self.watch_prompt()
            if self._lens is not None:
                for layer in self._lens.layers:
                    self._hook(layer, self._after_layer)
            generative = [m for m in modules_of(self._model) if isinstance(m, PreTrainedModel) and m.can_generate()]
            self._nested = len(generative) > 1
            if self._nested:
                self._hook(self._model.get_output_embeddings(), self._after_head)
            for module in generative:
                self._hook(module, self._after_model)
        except BaseException:
            self.stop()
            raise

    def watch_prompt(self) -> None:
        """Install a hook on the first layer that reads image tokens, until the first step is recorded.

        Only where they are asked for, and once. ``start`` does it, which for an encoder can be too late: in a
        ``generate`` call of the user's own it has read the prompt when the streamer is first called.
        """
        first = self._steps[0]
        layers = layers_of(self._model, "encoder" if first.encoder else "language") if first.imaged else []
        if layers and not self._watched:
            self._watched = True
            self._open.callback(layers[0].register_forward_pre_hook(self._before_layers, with_kwargs=True).remove)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the passes of the model within the block."""
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
        """Remove the hooks; does nothing where there are none."""
        self._open.close()
        self._watched = False

    def select(self, rows: Sequence[int]) -> None:
        """Go on with some prompts of the batch only, in this order."""
        self._steps = [self._steps[row] for row in rows]

    def _hook(self, module: nn.Module, hook: Callable[..., None]) -> None:
        self._open.callback(module.register_forward_hook(hook).remove)

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Record the last query of one call and compute its output (B, q, heads, d), as a model without a recorder.

        Raises:
            CaptureError: there are more prompts in the batch than are recorded.
        """
        if len(call.query) != len(self._steps):
            raise CaptureError(
                f"{len(call.query)} prompts are generated at once; warnings support one prompt at a time"
            )
        query, key, mask, options = call.query, call.key, call.mask, call.options
        rows: list[Tensor | DeferredAttention] | None = None
        if mask is None or self._padded:  # the last query, the only one that is read, attends to all keys of its answer
            rows = self._defer(call, last_row(query))
        if rows is None:
            self._deferred = False
            output, _ = call.sdpa()  # the same tokens as without a recorder
            weights = _last_rows(call)
            padding = [self._padding(steps, key) for steps in self._steps]
            self._rows[call.site.role].append([row[:, count:] for row, count in zip(weights, padding, strict=True)])
            return output, None
        self._rows[call.site.role].append(rows)
        if mask is None and query.shape[2] == 1 and query.shape[1] == key.shape[1] and not options.get("dropout"):
            # all that transformers' function does here
            output = scaled_dot_product_attention(query, key, call.value, scale=options.get("scaling"))
            return output.transpose(1, 2).contiguous(), None
        return call.sdpa()

    def _defer(self, call: AttentionCall, last: Tensor) -> list[Tensor | DeferredAttention] | None:
        """Return the row of every answer, to be computed on request; None where it must be computed at once.

        Args:
            call: of the attention module.
            last: (B, H, 1, d) queries.
        """
        name, length = call.site.name, call.key.shape[2]
        rows: list[Tensor | DeferredAttention] = []
        for index, (steps, query) in enumerate(zip(self._steps, each_row(last), strict=True)):
            seen = steps.key_count(len(steps.logits))
            if not self._padded and length != seen:  # a window has dropped some
                return None
            keys = steps.keys.get(name)
            if keys is None:
                keys = steps.keys[name] = self._check_formula(call)
            if not keys.plain:
                return None
            keys.batch, keys.row, keys.padding = call.key, index, length - seen
            rows.append(DeferredAttention(query, keys))
        return rows

    def _padding(self, steps: RecordedSteps, key: Tensor) -> int:
        """Count the keys on the left that are padding; 0 for a single prompt, some of which a window may drop."""
        return key.shape[2] - steps.key_count(len(steps.logits)) if self._padded else 0

    def _check_formula(self, call: AttentionCall) -> Keys:
        """Decide whether softmax(scaling q k) is the map, checked at the first call of a module."""
        query, key, options, keys = call.query, call.key, call.options, Keys()
        if "cross" in self.roles or any(options.get(name) is not None for name in _NOT_PLAIN):
            return keys
        keys.scaling = query.shape[-1] ** -0.5 if options.get("scaling") is None else options["scaling"]
        formula = keys.scaling, query.dtype
        if _checked.get(call.module, (None, False))[0] != formula:
            keys.batch, keys.padding = key, self._padding(self._steps[0], key)
            row = DeferredAttention(query[:1, :, -1:], keys).row(key.shape[2] - keys.padding)
            tolerance = _NEAR if query.dtype == torch.float32 else _NEAR_ROUNDED
            difference = row - _last_rows(call)[0, :, keys.padding :].float()
            _checked[call.module] = formula, bool(difference.abs().max() < tolerance)
        keys.plain = _checked[call.module][1]
        return keys

    def _before_layers(self, module: nn.Module, arguments: tuple, options: dict[str, Any]) -> None:
        """Keep the image tokens of a pass over the prompts; the last one before the first step is theirs."""
        if self._steps[0].logits:
            return
        states: Tensor = arguments[0] if arguments else options["hidden_states"]
        for steps, row in zip(self._steps, states, strict=False):
            padding = len(row) - steps.spans.length
            if padding >= 0:
                start = 0 if steps.encoder else padding
                steps.image_embeds = row[[start + position for position in steps.spans.image]].detach()

    def _after_layer(self, module: nn.Module, arguments: tuple, output: Tensor | tuple) -> None:
        if self._on:
            hidden = output[0] if isinstance(output, tuple) else output
            self._hidden.append(last_row(hidden))

    def _after_head(self, module: nn.Module, arguments: tuple, output: Tensor) -> None:
        self._fresh = True

    def _after_model(self, module: nn.Module, arguments: tuple, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if logits is None or not self._on:
            return
        if self._nested and not self._fresh:  # a wrapper of the model that was just recorded
            for steps, row in zip(self._steps, logits[:, -1], strict=True):
                steps.logits[-1] = row
            return
        self._fresh = False
        if self._attends and not all(self._rows.values()):
            role = next(role for role, rows in self._rows.items() if not rows)
            raise CaptureError(f"no {role} attention was recorded; open the stream in the thread that generates")
        hidden = list(zip(*map(each_row, self._hidden), strict=True)) or [()] * len(self._steps)
        for index, (steps, streams, row) in enumerate(zip(self._steps, hidden, each_row(logits), strict=True)):
            rows = {role: [layer[index] for layer in layers] for role, layers in self._rows.items()}
            steps.add(Step(list(streams), rows, self._deferred), row[0, -1])
        self._deferred = True
        self._hidden, self._rows = [], {role: [] for role in self.roles}


def _last_rows(call: AttentionCall) -> Tensor:
    """Compute the rows (B, H, k) of the last query as the model file does."""
    batch, _, queries, _ = call.query.shape
    if queries == 1:
        return call.eager()[1][:, :, 0]
    return call.eager_rows(torch.full((batch, 1), queries - 1))[:, :, 0]
