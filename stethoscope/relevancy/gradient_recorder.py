"""Record the attention calls of one forward pass and hand their Abar to receivers on the way back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stethoscope.core.errors import CaptureError
from stethoscope.core.types import required
from stethoscope.relevancy.attention_backward import forward_attention, traced_attention
from stethoscope.relevancy.checkpointing import LayerCheckpointer
from stethoscope.relevancy.traced_calls import (
    Blocks,
    Grads,
    Receiver,
    TracedCall,
    default_budget,
    is_causal,
    visible_ends,
)
from stethoscope.tracing.hooks import AttentionCall, AttentionRecorder, Site


class AttentionGradRecorder(AttentionRecorder):
    """Records the attention of one forward pass for any number of backward passes.

    Args:
        live: number of leading rows of the language model whose keys and values receive gradients; None for all.
        budget: bytes that maps may take at once in a backward pass; None for ``default_budget`` when that begins.
        keep_graphs: whether to keep the graph of every layer instead of running layers again.
        salient: first row of the language model whose saliency is needed, the first that predicts a token; None for
            none.
        observer: another recorder, whose ``on_weights`` gets the whole maps of its roles in the same pass.

    Attributes:
        layers: by role, the names of its attention modules in the order of their first calls.
        sizes: by name, the number of columns of all calls of a module (crops and windows one after another).
        checkpointer: the layer calls of the forward pass.
    """

    def __init__(
        self,
        live: int | None,
        budget: int | None,
        keep_graphs: bool,
        salient: int | None,
        observer: AttentionRecorder | None = None,
    ) -> None:
        self.layers: dict[str, list[str]] = {}
        self.sizes: dict[str, int] = {}
        self.checkpointer = LayerCheckpointer(keep_graphs, self.sizes)
        self._live, self._budget, self._keep_graphs, self._salient = live, budget, keep_graphs, salient
        self._observer = observer
        self._finite: list[tuple[str, Tensor]] = []
        self._ends: dict[tuple[Any, ...], tuple[Tensor | None, list[int]]] = {}
        self._receivers: Sequence[Receiver] = ()
        self._stop = self._free_bytes = self._block_budget = 0
        self._offsets: dict[str, int] | None = None  # sizes so far in a layer that runs again

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        if self.checkpointer.inside:
            return self._attend(call), None
        return self.checkpointer.run(self._attend, call), None  # an attention module outside all layers is a layer

    def _attend(self, attention_call: AttentionCall) -> Tensor:
        site, module, query, key, value, mask, options = attention_call
        recomputing = self._offsets is not None
        sizes = self.sizes if self._offsets is None else self._offsets
        offset = sizes.get(site.name, 0)
        sizes[site.name] = offset + key.shape[0] * key.shape[2]
        observed = self._observer is not None and site.role in self._observer.roles and not recomputing
        if torch.is_grad_enabled():
            ends = self._visible_ends(module, query, key, mask, options)
            live = self._live if site.role in ("language", "cross") else None
            keys, size = key.shape[2], query.shape[:2].numel() * sum(ends) * 4
            call = TracedCall(site, module, mask, options, self._receive, ends, live, offset=offset)
            if site.role == "language":
                call.salient, call.prefix = self._salient, self._prefix(site)
                call.skipped = 0 if call.prefix is None else call.prefix[0].shape[2]
            call.size, call.keys, call.keep_map, call.needs_map = size, keys, self._keep_graphs, observed
            if not (query.requires_grad or key.requires_grad or value.requires_grad):
                query = query.detach().requires_grad_()
                self.checkpointer.leaves.append(query)
            output = traced_attention(query, key, value, call)
            weights, call.weights = call.weights, None
        else:
            output, weights = forward_attention(module, query, key, value, mask, options, observed)
        if observed:
            required(self._observer).on_weights(site, required(weights))
        if not recomputing:
            names = self.layers.setdefault(site.role, [])
            if site.name not in names:
                names.append(site.name)
            dtype = torch.promote_types(output.dtype, torch.float32)
            self._finite.append((site.name, torch.isfinite(output.detach().sum(dtype=dtype))))
        return output

    def _prefix(self, site: Site) -> tuple[Tensor, Tensor] | None:
        """Return keys and values of the language model that come before those of a pass."""
        return None

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
        """Back-propagate logits through the graph, handing every block of attention to the logit's receiver.

        Args:
            logits: scalars.
            receivers: one for each logit.
            stop: first row of the language model that no logit depends on.
            last: whether the graph is no longer needed afterwards.

        Raises:
            CaptureError: a gradient is not finite.
        """
        self._receivers, self._stop = receivers, stop
        self._block_budget = default_budget(logits[0].device) if self._budget is None else self._budget
        self._finite.clear()
        try:
            self.checkpointer.backward(logits, self._restore_sizes, last)
        finally:
            self._receivers, self._offsets = (), None
        self._check_finite("the gradient of the attention of {} holds values that are not finite")

    def _check_finite(self, message: str) -> None:
        for name, finite in self._finite:
            if not finite:
                raise CaptureError(message.format(name))
        self._finite.clear()

    def _restore_sizes(self, sizes: dict[str, int]) -> None:
        self._offsets, self._free_bytes = dict(sizes), self._block_budget // 2

    def _receive(self, call: TracedCall, blocks: Blocks, grads: Grads) -> None:
        """Hand the blocks of a call to the receiver of the current root, each as soon as it is computed."""
        names = self.layers[call.site.role]
        if call.site.role in ("language", "cross"):
            call.rows, call.narrow = (0, self._stop), call.site.name == names[-1] and not call.skipped
        shared = len(self._receivers) > 1 and not (self._keep_graphs or call.narrow)
        if shared and call.kept_blocks is None and call.size <= self._free_bytes:
            call.kept_blocks, self._free_bytes = {}, self._free_bytes - call.size
        call.budget, call.finite = self._block_budget, None
        receive, layer = self._receivers[self.checkpointer.root_index], names.index(call.site.name)
        for index, block in enumerate(blocks):
            receive(call, layer, index == 0, block._replace(start=call.skipped + block.start))
        if call.finite is not None:
            self._finite.append((call.site.name, call.finite))
