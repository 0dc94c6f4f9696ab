"""Record the attention calls of one forward pass and hand their Abar to receivers on the way back.

The forward pass is SDPA, or eager attention where maps are so small that it costs nothing: the two differ by rounding,
which badly conditioned small models amplify.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stethoscope.core.errors import CaptureError, DataError
from stethoscope.relevancy.attention_backward import (
    BUDGET,
    Blocks,
    Grads,
    PrefixGradient,
    Receiver,
    TracedCall,
    attention_blocks,
)
from stethoscope.relevancy.checkpointing import LayerCheckpointer
from stethoscope.tracing.hooks import AttentionCall, AttentionRecorder, eager_attention, plain_attention, record
from stethoscope.tracing.model_parts import frozen

_GPU_BUDGET, _GPU_SHARE = 2**31, 8  # the largest default on a GPU, and the part of its free memory that it may be
_SMALL = 2**20  # entries of a map

KeysAndValues = tuple[Tensor, Tensor]
Seeds = tuple[PrefixGradient, PrefixGradient]
"""Gradients of keys and values from the passes behind them."""


class AttentionGradRecorder(AttentionRecorder):
    """Records the attention of one forward pass for any number of backward passes.

    Args:
        live: number of leading rows of the language model whose keys and values receive gradients; None for all.
        budget: bytes that maps may take at once in a backward pass; None for ``default_budget`` when that begins.
        keep_graphs: whether to keep the graph of every layer instead of running layers again.
        salient: first row of the language model whose saliency is needed, the first that predicts a token; None for
            none.
        prefixes: keys and values of the language model before those of the pass, by name of the attention module.
        observer: another recorder, whose ``on_weights`` gets the whole maps of its roles in the same pass.

    Attributes:
        layers: by role, the names of its attention modules in the order of their first calls.
        sizes: by name, the number of columns of all calls of a module (crops and windows one after another).
        checkpointer: the layer calls of the forward pass.
        seeds: by name, gradients of keys and values that ``backward`` adds to their own.
        prefix_gradients: by name, those that ``backward`` leaves at ``prefixes``.
    """

    def __init__(
        self,
        live: int | None,
        budget: int | None,
        keep_graphs: bool,
        salient: int | None,
        prefixes: Mapping[str, KeysAndValues] | None = None,
        observer: AttentionRecorder | None = None,
    ) -> None:
        self.layers: dict[str, list[str]] = {}
        self.sizes: dict[str, int] = {}
        self.checkpointer = LayerCheckpointer(keep_graphs, self.sizes)
        self.seeds: Mapping[str, Seeds] = {}
        self.prefix_gradients: dict[str, Seeds] = {}
        self._live, self._budget, self._keep_graphs, self._salient = live, budget, keep_graphs, salient
        self._prefixes, self._observer = prefixes or {}, observer
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
        observer = self._observer
        if observer is not None and (recomputing or site.role not in observer.roles):
            observer = None
        if torch.is_grad_enabled():
            queries, keys = query.shape[2], key.shape[2]
            causal = mask is None and _is_causal(module, queries, options)
            shared = causal if mask is None else id(mask), queries, keys  # most layers have the same mask
            if shared not in self._ends:
                self._ends[shared] = mask, visible_ends(module, queries, keys, mask, options)
            ends, live = self._ends[shared][1], self._live if site.role in ("language", "cross") else None
            call = TracedCall(site, module, mask, options, self._receive, ends, live, causal=causal, offset=offset)
            if site.role == "language":
                call.salient, call.prefix = self._salient, self._prefixes.get(site.name)
                call.skipped = 0 if call.prefix is None else call.prefix[0].shape[2]
            call.size, call.keys = query.shape[:2].numel() * sum(ends) * 4, keys
            call.keep_map, call.needs_map = self._keep_graphs, observer is not None
            if not (query.requires_grad or key.requires_grad or value.requires_grad):
                query = query.detach().requires_grad_()
                self.checkpointer.leaves.append(query)
            output = traced_attention(query, key, value, call)
            weights, call.weights = call.weights, None
        else:
            output, weights = _forward_attention(module, query, key, value, mask, options, observer is not None)
        if observer is not None and weights is not None:
            observer.on_weights(site, weights)
        if not recomputing:
            names = self.layers.setdefault(site.role, [])
            if site.name not in names:
                names.append(site.name)
            dtype = torch.promote_types(output.dtype, torch.float32)
            self._finite.append((site.name, torch.isfinite(output.detach().sum(dtype=dtype))))
        return output

    def finish(self) -> None:
        if not self.layers.get("language"):
            raise CaptureError(
                "no attention call of the language model was recorded: the model does not use transformers' "
                "attention interface"
            )
        self._check_finite("attention of {} gives values that are not finite")

    def backward(
        self, model: PreTrainedModel, logits: Sequence[Tensor], receivers: Sequence[Receiver], stop: int, last: bool
    ) -> None:
        """Back-propagate logits through the graph, handing every block of attention to the logit's receiver.

        Args:
            model: the model.
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
        with ExitStack() as stack:
            if not self._keep_graphs:  # layers run again
                stack.enter_context(frozen(model))
                stack.enter_context(record(model, self))
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
        """Pass the blocks of a call to the receiver of the current root."""
        name, names = call.site.name, self.layers[call.site.role]
        if call.site.role in ("language", "cross"):
            call.rows, call.narrow = (0, self._stop), name == names[-1] and not call.skipped
        shared = len(self._receivers) > 1 and not (self._keep_graphs or call.narrow)
        if shared and call.kept_blocks is None and call.size <= self._free_bytes:
            call.kept_blocks, self._free_bytes = {}, self._free_bytes - call.size
        call.budget, call.finite, call.seeds = self._block_budget, None, self.seeds.get(name, ())
        call.deliver(blocks, names.index(name), self._receivers[self.checkpointer.root_index])
        if call.finite is not None:
            self._finite.append((name, call.finite))
        if call.prefix_gradients is not None:
            self.prefix_gradients[name] = call.prefix_gradients


class _KeysReached(Exception):
    """Ends the last layer of a prompt's pass at its keys and values."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys_and_values = keys, values


class PromptGradRecorder(AttentionGradRecorder):
    """Records the pass over prompts, which ends at the keys and values of the last layer.

    Args:
        budget: see ``AttentionGradRecorder``.
        keep_graphs: see ``AttentionGradRecorder``.

    Attributes:
        keys_and_values: by name of the attention module, detached; empty when no pass needs them any more.
    """

    def __init__(self, budget: int | None, keep_graphs: bool) -> None:
        super().__init__(None, budget, keep_graphs, salient=None)
        self.keys_and_values: dict[str, KeysAndValues] = {}
        self._ends_at_keys = False

    def _attend(self, attention_call: AttentionCall) -> Tensor:
        site, key, value = attention_call.site, attention_call.key, attention_call.value
        if site.role == "language" and site.name not in self.keys_and_values and self._offsets is None:
            self.keys_and_values[site.name] = key.detach(), value.detach()
            if self._ends_at_keys:
                self.layers.setdefault(site.role, []).append(site.name)
                raise _KeysReached(key, value)
        return super()._attend(attention_call)

    def run_to_keys(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> KeysAndValues:
        """Run the last layer up to its keys and values."""
        self._ends_at_keys = True
        try:
            function(*arguments, **options)
        except _KeysReached as reached:
            return reached.keys_and_values
        raise DataError("the last layer of the language model has no attention")


def traced_attention(query: Tensor, key: Tensor, value: Tensor, call: TracedCall) -> Tensor:
    """Compute attention whose backward passes hand Abar to ``call.receive``.

    Args:
        query: (B, heads, q, d).
        key: (B, key-value heads, k, d).
        value: (B, key-value heads, k, d).
        call: the call and the receiver of its blocks.
    """
    return _TracedAttention.apply(query, key, value, call)


class _TracedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, call: TracedCall) -> Tensor:
        own = [part[:, :, call.skipped :].clone() if call.skipped else part for part in (key, value)]
        ctx.save_for_backward(query, *own)  # the prefix is stored once, not with every pass behind it
        ctx.call = call
        output, weights = _forward_attention(call.module, query, key, value, call.mask, call.options, call.needs_map)
        exact = weights is not None and weights.dtype == torch.promote_types(query.dtype, torch.float32)
        if call.keep_map and exact and _is_small(query, key):
            call.map = weights
        call.weights = weights if call.needs_map else None
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        call, (query, key, value) = ctx.call, ctx.saved_tensors
        dtype = torch.promote_types(query.dtype, torch.float32)
        grads = tuple(
            torch.zeros(tensor.shape, dtype=dtype, device=tensor.device) if needed else None
            for tensor, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        )
        if call.prefix is not None:
            call.prefix_gradients = _empty_factors(query, call), _empty_factors(query, call)
            key, value = (torch.cat(parts, 2) for parts in zip(call.prefix, (key, value), strict=True))
        blocks = attention_blocks(call, query, key, value, gradient.transpose(1, 2), grads)
        call.receive(call, blocks, grads)
        call.prefix_gradients = None
        returned = [None if grad is None else grad.to(query.dtype) for grad in grads]
        for index in (1, 2) if call.skipped else ():
            own = returned[index]
            returned[index] = None if own is None else torch.nn.functional.pad(own, (0, 0, call.skipped, 0))
        return *returned, None


def _empty_factors(query: Tensor, call: TracedCall) -> PrefixGradient:
    """Return zeros for the gradient that the live queries of a call leave at its prefix."""
    live = query.shape[2] if call.live is None else call.live
    dtype = torch.promote_types(query.dtype, torch.float32)
    sizes = call.skipped, query.shape[3]
    return PrefixGradient(*(torch.zeros(*query.shape[:2], live, n, dtype=dtype, device=query.device) for n in sizes))


def _forward_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
    needs_map: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute the output (B, q, heads, d) of a call, and its map where that is small or needed."""
    eager = needs_map or _is_small(query, key)
    return (eager_attention if eager else plain_attention)(module, query, key, value, mask, **options)


def _is_small(query: Tensor, key: Tensor) -> bool:
    return query.shape[:3].numel() * key.shape[2] <= _SMALL


def default_budget(device: torch.device) -> int:
    """Return the default budget in bytes: on a GPU an eighth of the memory that is free now, from 64 MiB to 2 GiB.

    Larger blocks are fewer: at the sizes of LLaVA-1.5-7B and 3,040 tokens a pass starts 86,600 kernels with 64 MiB and
    8,800 with 2 GiB. A processor does nothing faster with more.
    """
    if device.type != "cuda" or not torch.cuda.is_available():  # a layout of devices can be tried without them
        return BUDGET
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(max((torch.cuda.mem_get_info(device)[0] + unused) // _GPU_SHARE, BUDGET), _GPU_BUDGET)


def _is_causal(module: nn.Module, queries: int, options: dict[str, Any]) -> bool:
    """Decide whether a call without a mask is causal, by the rule of transformers."""
    flag = options.get("is_causal")
    return queries > 1 and bool(getattr(module, "is_causal", True) if flag is None else flag)


def visible_ends(module: nn.Module, queries: int, keys: int, mask: Tensor | None, options: dict[str, Any]) -> list[int]:
    """Return, for every query, index + 1 of the last key that it sees in any sample and head.

    A query that sees no key attends to all keys equally in eager attention, so all are counted.
    """
    if mask is None:
        causal = _is_causal(module, queries, options)
        return [min(row + 1, keys) if causal else keys for row in range(queries)]
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    seen = seen[..., :keys].flip(-1)
    ends = torch.where(seen.any(-1), keys - seen.to(torch.uint8).argmax(-1), keys)
    return ends.amax((0, 1)).expand(queries).tolist()
