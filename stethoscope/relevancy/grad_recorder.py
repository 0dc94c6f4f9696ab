"""Hears every attention call of one forward pass, so that backward passes through it give their Abar away."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stethoscope.core.errors import CaptureError
from stethoscope.relevancy.attention_backward import (
    Blocks,
    Call,
    forward_attention,
    is_causal,
    traced_attention,
    visible_ends,
)
from stethoscope.relevancy.checkpointing import Tape
from stethoscope.tracing.hooks import AttentionCall, AttentionRecorder, Site, modules_of

Receiver = Callable[[Call, int, Blocks], None]


class Maps(AttentionRecorder):
    """One forward pass whose attention can be asked for its Abar, any number of times.

    Args:
        live: number of leading rows of the language model whose keys and values pass gradients on; None for all.
        budget: bytes that maps may take at once in a backward pass.
        keep: keep the graph of every layer.

    Attributes:
        layers: by role, the names of its attention modules in the order of their first calls.
        sizes: by name, how many columns all calls of a module have together (crops and windows one after another).
        tape: the forward pass.
    """

    def __init__(self, live: int | None, budget: int, keep: bool) -> None:
        self.layers: dict[str, list[str]] = {}
        self.sizes: dict[str, int] = {}
        self.tape = Tape(keep, mark=lambda: dict(self.sizes))
        self._live, self._budget, self._keep = live, budget, keep
        self._finite: list[tuple[str, Tensor]] = []
        self._ends: dict[tuple[Any, ...], tuple[Tensor | None, list[int]]] = {}
        self._receivers: Sequence[Receiver] = ()
        self._root = self._stop = self._room = 0
        self._offsets: dict[str, int] | None = None  # of layers that run again

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        return self.tape.run(self._attend, *call), None

    def _attend(
        self,
        site: Site,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        again = self._offsets is not None
        sizes = self._offsets if again else self.sizes
        offset = sizes.get(site.name, 0)
        sizes[site.name] = offset + key.shape[0] * key.shape[2]
        if torch.is_grad_enabled():
            ends = self._visible(module, query, key, mask, options)
            live = self._live if site.role in ("language", "cross") else None
            keys, size = key.shape[2], query.shape[:2].numel() * sum(ends) * 4
            call = Call(site, module, mask, options, self._receive, ends, live, self._budget, offset, size, keys)
            call.keep = self._keep
            if not (query.requires_grad or key.requires_grad or value.requires_grad):
                query = query.detach().requires_grad_()
                self.tape.leaves.append(query)
            output = traced_attention(query, key, value, call)
        else:
            output, _ = forward_attention(module, query, key, value, mask, options)
        if not again:
            names = self.layers.setdefault(site.role, [])
            if site.name not in names:
                names.append(site.name)
            wide = torch.promote_types(output.dtype, torch.float32)
            self._finite.append((site.name, torch.isfinite(output.detach().sum(dtype=wide))))
        return output

    def _visible(
        self, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> list[int]:
        """``visible_ends``, once for every mask: layers share them."""
        queries, keys = query.shape[2], key.shape[2]
        of = id(mask) if mask is not None else is_causal(module, queries, options)
        if (of, queries, keys) not in self._ends:
            self._ends[of, queries, keys] = mask, visible_ends(module, queries, keys, mask, options)
        return self._ends[of, queries, keys][1]

    def finish(self) -> None:
        if not self.layers.get("language"):
            raise CaptureError("no attention of a language-model layer was seen; the model does not call the interface")
        for name, finite in self._finite:
            if not finite:
                raise CaptureError(f"attention of {name} gives values that are not finite")
        self._finite.clear()

    def backward(self, logits: Sequence[Tensor], receivers: Sequence[Receiver], stop: int, last: bool) -> None:
        """Sends gradients of logits through the graph; a receiver gets every call, its layer and its blocks.

        Args:
            logits: scalars. ``receivers``: one for each.
            stop: first row of the language model that no logit depends on.
            last: the graph is not needed again.

        Raises:
            CaptureError: a gradient is not finite.
        """
        self._receivers, self._stop, heard = receivers, stop, self._finite
        heard.clear()
        try:
            self.tape.backward(logits, self._choose, self._restart, last)
        finally:
            self._receivers, self._offsets = (), None
        for name, finite in heard:
            if not finite:
                raise CaptureError(f"the gradient of the attention of {name} holds values that are not finite")
        heard.clear()

    def _choose(self, root: int) -> None:
        self._root = root

    def _restart(self, sizes: dict[str, int]) -> None:
        """A layer is about to run again."""
        self._offsets, self._room = dict(sizes), self._budget // 2

    def _receive(self, call: Call, blocks: Blocks) -> None:
        """Blocks are computed as they are taken, so that there is time to say which."""
        names = self.layers[call.site.role]
        if call.site.role in ("language", "cross"):
            call.rows, call.narrow = (0, self._stop), call.site.name == names[-1]
        several = len(self._receivers) > 1 and not (self._keep or call.narrow)
        if several and call.maps is None and call.size <= self._room:
            call.maps, self._room = {}, self._room - call.size
        call.sound = None
        self._receivers[self._root](call, names.index(call.site.name), blocks)
        if call.sound is not None:
            self._finite.append((call.site.name, call.sound))


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and frozen parameters for the length of a block; then everything is as it was."""
    modules = modules_of(model)
    training = [module for module in modules if module.training]
    trainable = [p for module in modules for p in module._parameters.values() if p is not None and p.requires_grad]
    try:
        for module in training:
            module.training = False
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)
