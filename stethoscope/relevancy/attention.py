"""Attention whose backward pass gives Abar away, layer by layer, and keeps no map.

With A the map after softmax and z the logit, the output of attention is O = A V, so dz/dA = (dz/dO) V^T. The map is
computed again in the backward pass from queries and keys, by the model file's own eager attention, a few heads at a
time; nothing of size layers x heads x N x N ever exists. The forward pass is SDPA, or eager attention too where maps
are so small that it costs nothing: the two differ by rounding, which badly conditioned small models blow up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stethoscope.capture import Site, eager_attention, plain_attention

_SMALL = 2**20  # entries of a map
_COPIES = 5  # maps in float32 that exist at once while a group of heads is worked on


@dataclass
class Call:
    """One call of an attention module.

    Attributes:
        site: the module's place.
        module, mask, options: what the model file passed on.
        receive: takes the call and its Abar (B, q, k) float32, every time a backward pass comes through.
        live: number of leading queries whose keys and values pass gradients on. None for all. The queries behind
            them pass gradients to their own key and value only (scope ``row``), or to none (cross-attention).
        budget: bytes that maps may take while a backward pass is in this call.
        offset: first column of this call when a layer is called once per window.
        finite: whether the output is finite, a tensor so that no device waits for it.
    """

    site: Site
    module: nn.Module
    mask: Tensor | None
    options: dict[str, Any]
    receive: Callable[[Call, Tensor], None]
    live: int | None = None
    budget: int = 2**29
    offset: int = 0
    finite: Tensor | None = field(default=None, repr=False)


def traced_attention(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
    """Attention (B, q, heads, d) of a call; every backward pass through it tells ``call.receive`` its Abar.

    Args:
        query: (B, heads, q, d). ``key``, ``value``: (B, key-value heads, k, d).
    """
    return _TracedAttention.apply(query, key, value, call)


class _TracedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
        if query.shape[:3].numel() * key.shape[2] > _SMALL:
            output = plain_attention(call.module, query, key, value, call.mask, **call.options)[0]
        else:
            output = eager_attention(call.module, query, key, value, call.mask, **call.options)[0]
        call.finite = torch.isfinite(output).all()
        ctx.save_for_backward(query, key, value)
        ctx.call = call
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        call, gradient = ctx.call, gradient.transpose(1, 2)
        total, parts = 0, []
        for some, own in _shares(call, query, key):
            heard, grads = _heads(call, query, key, value, gradient[:, some], some, own, ctx.needs_input_grad)
            total = total + heard
            parts.append(grads)
        call.receive(call, total / query.shape[1])
        return *(None if part[0] is None else torch.cat(part, 1) for part in zip(*parts, strict=True)), None


def _shares(call: Call, query: Tensor, key: Tensor) -> Iterator[tuple[slice, slice]]:
    """Heads, and their key-value heads, that are worked on at once within the budget."""
    groups = query.shape[1] // key.shape[1]
    one = query.shape[0] * groups * query.shape[2] * key.shape[2] * 4 * _COPIES
    step = max(1, call.budget // one)
    for start in range(0, key.shape[1], step):
        yield slice(start * groups, (start + step) * groups), slice(start, start + step)


def _eager(call: Call, query: Tensor, key: Tensor, value: Tensor, some: slice, own: slice) -> tuple[Tensor, Tensor]:
    """Output (B, q, h, d) and map (B, h, q, k) of some heads; position bias and mask may differ from head to head."""
    options, mask = dict(call.options), call.mask
    if options.get("position_bias") is not None:
        options["position_bias"] = options["position_bias"][:, some]
    if mask is not None and mask.shape[1] > 1:
        mask = mask[:, some]
    return eager_attention(call.module, query[:, some], key[:, own], value[:, own], mask, **options)


def _heads(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gradient: Tensor,
    some: slice,
    own: slice,
    needs: tuple[bool, ...],
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Abar summed over some heads (B, q, k), and the gradients of their queries, keys and values."""
    weights = _eager(call, query, key, value[..., :1], some, own)[1]  # its output is not needed
    query, key, value = query[:, some], key[:, own], value[:, own]
    groups = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (gradient @ values.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32))
    scores.mul_(weights)  # A dz/dA
    heard = scores.clamp(min=0).sum(1)  # equation 5, before the mean
    scores.addcmul_(scores.sum(-1, keepdim=True), weights.to(scores.dtype), value=-1)  # softmax
    scaling = call.options.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap = call.options.get("softcap")
    if softcap is not None:
        scores.mul_(1 - ((query @ keys.transpose(-1, -2)).to(scores.dtype) * (scaling / softcap)).tanh().square())
    scores = scores.mul_(scaling).to(query.dtype)
    return heard, (
        scores @ keys if needs[0] else None,
        _to_keys(call, scores, query, key.shape[1]) if needs[1] else None,
        _to_keys(call, weights, gradient, key.shape[1]) if needs[2] else None,
    )


def _to_keys(call: Call, maps: Tensor, vectors: Tensor, groups: int) -> Tensor:
    """What queries send back to keys: maps^T vectors, for the queries that may, summed over the heads of a group.

    Args:
        maps: (B, h, q, k). ``vectors``: (B, h, q, d).
        groups: number of key-value heads.

    Returns:
        (B, groups, k, d).
    """
    live = maps.shape[2] if call.live is None else call.live
    sent = maps[:, :, :live].transpose(-1, -2) @ vectors[:, :, :live]
    if live < maps.shape[2] and call.site.role == "language":
        own = maps.diagonal(dim1=-2, dim2=-1)[..., live:, None]
        sent[:, :, live:] += own * vectors[:, :, live:]
    return sent.unflatten(1, (groups, -1)).sum(2)
