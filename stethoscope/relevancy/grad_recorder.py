"""Record every attention call of a forward pass and, on backward, yield A * dz/dA per layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stethoscope.core.errors import CaptureError
from stethoscope.relevancy.attention_backward import (
    Blocks,
    TracedCall,
    forward_attention,
    is_causal,
    traced_attention,
    visible_ends,
)
from stethoscope.relevancy.checkpointing import LayerCheckpointer
from stethoscope.tracing.hooks import AttentionCall, AttentionRecorder, Site, modules_of

Receiver = Callable[[TracedCall, int, Blocks], None]
"""Called with an attention call, the index of its layer within its role, and the blocks of A * dz/dA."""


class AttentionGradRecorder(AttentionRecorder):
    """Records the attention of one forward pass for any number of backward passes.

    Args:
        live: number of leading rows of the language model whose keys and values receive gradients; None for all.
        budget: bytes that maps may take at once in a backward pass.
        keep_graphs: whether to keep the graph of every layer instead of running layers again.

    Attributes:
        layers: by role, the names of its attention modules in the order of their first calls.
        sizes: by name, the number of columns of all calls of a module (crops and windows one after another).
        checkpointer: the layer calls of the forward pass.
    """

    def __init__(self, live: int | None, budget: int, keep_graphs: bool) -> None:
        self.layers: dict[str, list[str]] = {}
        self.sizes: dict[str, int] = {}
        self.checkpointer = LayerCheckpointer(keep_graphs, get_state=lambda: dict(self.sizes))
        self._live, self._budget, self._keep_graphs = live, budget, keep_graphs
        self._finite: list[tuple[str, Tensor]] = []
        self._ends: dict[tuple[Any, ...], tuple[Tensor | None, list[int]]] = {}
        self._receivers: Sequence[Receiver] = ()
        self._root_index = self._stop = self._free_bytes = 0
        self._offsets: dict[str, int] | None = None  # sizes so far in a layer that runs again

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        return self.checkpointer.run(self._attend, *call), None

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
        recomputing = self._offsets is not None
        sizes = self.sizes if self._offsets is None else self._offsets
        offset = sizes.get(site.name, 0)
        sizes[site.name] = offset + key.shape[0] * key.shape[2]
        if torch.is_grad_enabled():
            ends = self._visible_ends(module, query, key, mask, options)
            live = self._live if site.role in ("language", "cross") else None
            keys, size = key.shape[2], query.shape[:2].numel() * sum(ends) * 4
            call = TracedCall(site, module, mask, options, self._receive, ends, live, self._budget, offset, size, keys)
            call.keep_map = self._keep_graphs
            if not (query.requires_grad or key.requires_grad or value.requires_grad):
                query = query.detach().requires_grad_()
                self.checkpointer.leaves.append(query)
            output = traced_attention(query, key, value, call)
        else:
            output, _ = forward_attention(module, query, key, value, mask, options)
        if not recomputing:
            names = self.layers.setdefault(site.role, [])
            if site.name not in names:
                names.append(site.name)
            dtype = torch.promote_types(output.dtype, torch.float32)
            self._finite.append((site.name, torch.isfinite(output.detach().sum(dtype=dtype))))
        return output

    def _visible_ends(
        self, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> list[int]:
        """Compute ``visible_ends`` once for every mask, because layers share masks."""
        queries, keys = query.shape[2], key.shape[2]
        mask_key = id(mask) if mask is not None else is_causal(module, queries, options)
        if (mask_key, queries, keys) not in self._ends:
            self._ends[mask_key, queries, keys] = mask, visible_ends(module, queries, keys, mask, options)
        return self._ends[mask_key, queries, keys][1]

    def finish(self) -> None:
        if not self.layers.get("language"):
            raise CaptureError(
                "no attention call of the language model was recorded: the model does not use transformers' "
                "attention interface"
            )
        self._check_finite("attention of {} gives values that are not finite")

    def backward(self, logits: Sequence[Tensor], receivers: Sequence[Receiver], stop: int, last: bool) -> None:
        """Back-propagate logits through the graph, handing every attention call to the logit's receiver.

        Args:
            logits: scalars.
            receivers: one for each logit.
            stop: first row of the language model that no logit depends on.
            last: whether the graph is no longer needed afterwards.

        Raises:
            CaptureError: a gradient is not finite.
        """
        self._receivers, self._stop = receivers, stop
        self._finite.clear()
        try:
            self.checkpointer.backward(logits, self._select_root, self._restore_state, last)
        finally:
            self._receivers, self._offsets = (), None
        self._check_finite("the gradient of the attention of {} holds values that are not finite")

    def _check_finite(self, message: str) -> None:
        for name, finite in self._finite:
            if not finite:
                raise CaptureError(message.format(name))
        self._finite.clear()

    def _select_root(self, root_index: int) -> None:
        self._root_index = root_index

    def _restore_state(self, sizes: dict[str, int]) -> None:
        self._offsets, self._free_bytes = dict(sizes), self._budget // 2

    def _receive(self, call: TracedCall, blocks: Blocks) -> None:
        """Hand a call to the receiver of the current root; blocks are computed as the receiver iterates."""
        names = self.layers[call.site.role]
        if call.site.role in ("language", "cross"):
            call.rows, call.narrow = (0, self._stop), call.site.name == names[-1]
        shared = len(self._receivers) > 1 and not (self._keep_graphs or call.narrow)
        if shared and call.kept_blocks is None and call.size <= self._free_bytes:
            call.kept_blocks, self._free_bytes = {}, self._free_bytes - call.size
        call.finite = None
        self._receivers[self._root_index](call, names.index(call.site.name), blocks)
        if call.finite is not None:
            self._finite.append((call.site.name, call.finite))


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode with frozen parameters within the block, then restore it."""
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
