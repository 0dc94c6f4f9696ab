"""Attention whose backward pass gives A * dz/dA away in blocks of rows, and keeps no map.

With A the map after softmax and z the logit, the output of attention is O = A V, so dz/dA = (dz/dO) V^T. The map is
computed again in the backward pass from queries and keys, a block of rows at a time, up to the last column that the
mask lets the block see; nothing of size layers x heads x N x N ever exists, and a block fits a processor's cache. The
forward pass is SDPA, or eager attention where maps are so small that it costs nothing: the two differ by rounding,
which badly conditioned small models blow up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stethoscope.tracing.hooks import Site, eager_attention, plain_attention

BUDGET = 2**26
"""Bytes that attention maps and gradients of tokens may take at once, unless a call says otherwise."""
_SMALL = 2**20  # entries of a map
_CACHE = 2**20  # bytes of a block of rows that stays in a processor's cache
_COPIES = 5  # blocks in float32 that exist at once on a device where the budget is the only limit
_OWN_EAGER = ("softcap", "s_aux", "position_bias")  # what only a model file's own eager attention can express

Blocks = Iterator[tuple[int, Tensor]]
"""First row and A * dz/dA (B, heads, rows, columns) of a block, in float32 or better. Rows in no block and columns
behind a block's last are zero. A block is valid until the next is asked for, and all have to be taken."""


@dataclass(eq=False)
class Call:
    """One call of an attention module.

    Attributes:
        site: the module's place.
        module, mask, options: what the model file passed on.
        receive: takes the call and its blocks, every time a backward pass comes through.
        ends: for every query, how many keys it can see at most, counted up to the last (``visible_ends``).
        live: number of leading queries whose keys and values pass gradients on. None for all. The queries behind
            them pass gradients to their own key and value only (scope ``row``), or to none (cross-attention).
        budget: bytes that maps may take while a backward pass is in this call.
        offset: first column of this call when a layer is called once per window.
        size: bytes of the call's maps as far as queries see.
        keys: number of keys.
        rows: first and last + 1 of the queries that gradients come to; all by default.
        narrow: gradients come to a few rows among them alone, so that it is worth looking.
        maps: blocks of the map by rows, kept when several backward passes come through; None to keep none.
        keep: keep the whole map of the forward pass, if it makes one in float32 or better.
        whole: this map, (B, heads, q, k).
        sound: whether all gradients are finite, a tensor so that no device waits for it.
    """

    site: Site
    module: nn.Module
    mask: Tensor | None
    options: dict[str, Any]
    receive: Callable[[Call, Blocks], None]
    ends: list[int]
    live: int | None = None
    budget: int = BUDGET
    offset: int = 0
    size: int = 0
    keys: int = 0
    rows: tuple[int, int] | None = None
    narrow: bool = False
    maps: dict[tuple[int, int], Tensor] | None = None
    keep: bool = False
    whole: Tensor | None = None
    sound: Tensor | None = None


def forward_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Output (B, q, heads, d) of a call, and its map where that is small."""
    small = query.shape[:3].numel() * key.shape[2] <= _SMALL
    return (eager_attention if small else plain_attention)(module, query, key, value, mask, **options)


def traced_attention(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
    """The same; every backward pass through it tells ``call.receive`` its A * dz/dA.

    Args:
        query: (B, heads, q, d). ``key``, ``value``: (B, key-value heads, k, d).
    """
    return _TracedAttention.apply(query, key, value, call)


def is_causal(module: nn.Module, queries: int, options: dict[str, Any]) -> bool:
    """Whether a call without a mask is causal, by transformers' rule."""
    flag = options.get("is_causal")
    return queries > 1 and bool(getattr(module, "is_causal", True) if flag is None else flag)


def visible_ends(module: nn.Module, queries: int, keys: int, mask: Tensor | None, options: dict[str, Any]) -> list[int]:
    """For every query, one more than the last key that it sees in any sample and head.

    A query that sees none attends to all keys alike in eager attention, so that it counts as seeing the last.
    """
    if mask is None:
        causal = is_causal(module, queries, options)
        return [min(row + 1, keys) if causal else keys for row in range(queries)]
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    seen = seen[..., :keys].flip(-1)
    ends = torch.where(seen.any(-1), keys - seen.to(torch.uint8).argmax(-1), keys)
    return ends.amax((0, 1)).expand(queries).tolist()


class _TracedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.call = call
        output, weights = forward_attention(call.module, query, key, value, call.mask, call.options)
        if call.keep and weights is not None and weights.dtype == torch.promote_types(query.dtype, torch.float32):
            call.whole = weights
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        grads = tuple(
            torch.zeros_like(tensor, memory_format=torch.contiguous_format) if needed else None
            for tensor, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        )
        ctx.call.receive(ctx.call, attention_blocks(ctx.call, query, key, value, gradient.transpose(1, 2), grads))
        return *grads, None


def attention_blocks(
    call: Call, query: Tensor, key: Tensor, value: Tensor, gradient: Tensor, grads: tuple[Tensor | None, ...]
) -> Blocks:
    """The backward pass of one call: gives A * dz/dA away block by block and fills in the gradients.

    This is the place of a fused kernel: one that takes the arguments of this function and hands a receiver what it
    makes of the blocks (rows times Abar), without writing any of them to memory. None has been written, because no
    GPU was at hand to test one on; on a GPU these are ordinary operations on blocks as large as the budget allows.

    Args:
        query: (B, heads, q, d). ``key``, ``value``: (B, key-value heads, k, d).
        gradient: (B, heads, q, d) of the output.
        grads: of query, key and value, zeros to be filled in; None where none is needed.
    """
    scaling = call.options.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    key, value, kv = key.contiguous(), value.contiguous(), key.shape[1]
    to_query, to_key, to_value = grads
    for start, stop in _row_blocks(call, query, key, gradient):
        end = max(call.ends[start:stop])
        weights = _weights(call, query, key, value, scaling, start, stop, end)
        some, sent = _grouped(query[:, :, start:stop], kv), _grouped(gradient[:, :, start:stop], kv)
        keys = key[:, :, :end]
        product = (sent @ value[:, :, :end].transpose(-1, -2)).to(weights.dtype).mul_(weights)
        yield start, product.view(product.shape[0], -1, stop - start, end)
        # the softmax passes on A * (dA - sum(A * dA)); the sum also tells whether all is finite
        total = product.sum(-1, keepdim=True)
        finite = torch.isfinite(total.sum())
        call.sound = finite if call.sound is None else call.sound & finite
        scores = product.addcmul_(total, weights, value=-1)
        softcap = call.options.get("softcap")
        if softcap is not None:
            raw = (some @ keys.transpose(-1, -2)).to(scores.dtype)
            scores.mul_(1 - raw.mul_(scaling / softcap).tanh_().square_())
        scores, weights = scores.to(query.dtype), weights.to(query.dtype)
        if to_query is not None:
            to_query[:, :, start:stop] = (scores @ keys).mul_(scaling).view(*query.shape[:2], stop - start, -1)
        if to_key is not None:
            _send(call, to_key, scores, some, start, stop, scaling)
        if to_value is not None:
            _send(call, to_value, weights, sent, start, stop, 1.0)


def _row_blocks(call: Call, query: Tensor, key: Tensor, gradient: Tensor) -> Iterator[tuple[int, int]]:
    """First and last + 1 of the rows that are worked on at once; live rows and those behind them never mix."""
    first, last = call.rows or (0, query.shape[2])
    if call.narrow:
        some = gradient[:, :, first:last].ne(0).any(-1).flatten(0, 1).any(0).nonzero()[:, 0].tolist() or [0, -1]
        first, last = first + some[0], first + some[-1] + 1
    room = min(call.budget // _COPIES, _CACHE if query.device.type == "cpu" else call.budget)
    step = max(1, room // (query.shape[:2].numel() * key.shape[2] * 4))
    border = last if call.live is None else min(max(call.live, first), last)
    for low, high in ((first, border), (border, last)):
        for start in range(low, high, step):
            yield start, min(start + step, high)


def _grouped(vectors: Tensor, groups: int) -> Tensor:
    """(B, heads, r, d) as (B, groups, heads / groups * r, d): the heads of a group under one another."""
    return vectors.reshape(vectors.shape[0], groups, -1, vectors.shape[-1])


def _weights(
    call: Call, query: Tensor, key: Tensor, value: Tensor, scaling: float, start: int, stop: int, end: int
) -> Tensor:
    """A block of the map, (B, groups, heads / groups * rows, end), float32 or better."""
    if call.whole is not None:
        return _grouped(call.whole[:, :, start:stop, :end], key.shape[1])
    if call.maps is not None and (start, stop) in call.maps:
        return call.maps[start, stop]
    some, keys = query[:, :, start:stop], key[:, :, :end]
    if any(call.options.get(name) is not None for name in _OWN_EAGER):
        weights = _own_eager(call, some, keys, value[:, :, :end], start, stop)
    else:
        scores = (_grouped(some, key.shape[1]) * scaling) @ keys.transpose(-1, -2)
        _mask_scores(call, scores.view(*some.shape[:3], end), start, stop)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    if call.maps is not None:
        call.maps[start, stop] = weights
    return weights


def _mask_scores(call: Call, scores: Tensor, start: int, stop: int) -> None:
    """Masks (B, heads, rows, columns) in place; with the lowest number, so that a row that sees nothing is even."""
    low, end = torch.finfo(scores.dtype).min, scores.shape[-1]
    if call.mask is None:
        if is_causal(call.module, len(call.ends), call.options):
            later = torch.ones(stop - start, end - start, dtype=torch.bool, device=scores.device).triu_(1)
            scores[..., start:].masked_fill_(later, low)
    elif call.mask.dtype == torch.bool:
        scores.masked_fill_(~_rows(call.mask, start, stop, end), low)
    else:
        scores.add_(_rows(call.mask, start, stop, end)).clamp_(min=low)


def _own_eager(call: Call, query: Tensor, key: Tensor, value: Tensor, start: int, stop: int) -> Tensor:
    """The same rows by the model file's own eager attention, as (B, groups, heads / groups * rows, end)."""
    options, mask, end = dict(call.options), call.mask, key.shape[2]
    if options.get("position_bias") is not None:
        options["position_bias"] = _rows(options["position_bias"], start, stop, end)
    if mask is not None:
        mask = _rows(mask, start, stop, end)
    elif is_causal(call.module, len(call.ends), call.options):
        columns = torch.arange(end, device=query.device)
        mask = (columns <= torch.arange(start, stop, device=query.device)[:, None])[None, None]
    else:
        options["is_causal"] = False
    weights = eager_attention(call.module, query, key, value[..., :1], mask, **options)[1]  # its output is not needed
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    return weights.reshape(weights.shape[0], key.shape[1], -1, end)


def _rows(tensor: Tensor, start: int, stop: int, end: int) -> Tensor:
    """A block of a mask or bias (B or 1, heads or 1, q or 1, k)."""
    return (tensor[:, :, start:stop] if tensor.shape[2] > 1 else tensor)[..., :end]


def _send(call: Call, sink: Tensor, maps: Tensor, vectors: Tensor, start: int, stop: int, factor: float) -> None:
    """What a block of queries sends back to keys: maps^T vectors, or to their own key alone where they are not live.

    Args:
        sink: (B, groups, k, d), added to in place.
        maps: (B, groups, heads / groups * rows, end). ``vectors``: the same rows of (..., d).
    """
    if call.live is None or start < call.live:
        sink[:, :, : maps.shape[-1]].add_(maps.transpose(-1, -2) @ vectors, alpha=factor)
    elif call.site.role == "language":
        split = (maps.shape[0], maps.shape[1], -1, stop - start)
        own = maps.reshape(*split, maps.shape[-1])[..., start:stop].diagonal(dim1=-2, dim2=-1)
        sink[:, :, start:stop].add_((own[..., None] * vectors.reshape(*split, vectors.shape[-1])).sum(2), alpha=factor)
