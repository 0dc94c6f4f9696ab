"""Attention whose backward pass gives Abar away, layer by layer, and keeps no map.

With A the map after softmax and z the logit, the output of attention is O = A V, so dz/dA = (dz/dO) V^T. The map is
computed again in the backward pass from queries and keys, by the model file's own eager attention, a few heads at a
time; nothing of size layers x heads x N x N ever exists. The forward pass is SDPA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stethoscope.capture import Site, eager_attention, plain_attention

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
        output = plain_attention(call.module, query, key, value, call.mask, **call.options)[0]
        call.finite = torch.isfinite(output).all()
        ctx.save_for_backward(query, key, value)
        ctx.call = call
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        call, gradient = ctx.call, gradient.transpose(1, 2)
        batch, heads, queries, _ = query.shape
        groups = heads // key.shape[1]
        per_group = batch * groups * queries * key.shape[2] * 4 * _COPIES
        step = max(1, call.budget // per_group)
        total, parts = None, []
        for start in range(0, key.shape[1], step):
            some, own = slice(start * groups, (start + step) * groups), slice(start, start + step)
            heard, grads = _heads(call, query[:, some], key[:, own], value[:, own], gradient[:, some], some, ctx)
            total = heard if total is None else total + heard
            parts.append(grads)
        call.receive(call, total / heads)
        return *(None if part[0] is None else torch.cat(part, 1) for part in zip(*parts, strict=True)), None


def _heads(
    call: Call, query: Tensor, key: Tensor, value: Tensor, gradient: Tensor, heads: slice, ctx: Any
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Abar summed over some heads (B, q, k), and the gradients of their queries, keys and values."""
    options, mask = _of_heads(call, heads)
    weights = eager_attention(call.module, query, key, value[..., :1], mask, **options)[1]  # its output is not needed
    groups = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (gradient @ values.transpose(-1, -2)).float().mul_(weights)  # A dz/dA
    heard = scores.clamp(min=0).sum(1)  # equation 5, before the mean
    scores.sub_(scores.sum(-1, keepdim=True).mul(weights))  # softmax
    scaling = options.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if options.get("softcap") is not None:
        raw = (query @ keys.transpose(-1, -2)).float() * (scaling / options["softcap"])
        scores.mul_(1 - raw.tanh().square())
    scores = scores.mul_(scaling).to(query.dtype)
    needs_query, needs_key, needs_value, _ = ctx.needs_input_grad
    return heard, (
        scores @ keys if needs_query else None,
        _to_keys(call, scores, query, key.shape[1]) if needs_key else None,
        _to_keys(call, weights, gradient, key.shape[1]) if needs_value else None,
    )


def _of_heads(call: Call, heads: slice) -> tuple[dict[str, Any], Tensor | None]:
    """Options and mask of some heads, where they differ from head to head."""
    options, mask = dict(call.options), call.mask
    if options.get("position_bias") is not None:
        options["position_bias"] = options["position_bias"][:, heads]
    return options, mask if mask is None or mask.shape[1] == 1 else mask[:, heads]


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
