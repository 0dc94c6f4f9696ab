"""Compute attention whose backward pass yields Abar in blocks of rows.

With A the map after softmax and z the logit, the output of attention is O = A V, so dz/dA = (dz/dO) V^T, and Abar is
the mean over heads of relu(A * dz/dA). The map is recomputed in the backward pass from queries and keys, one block of
rows at a time, up to the last column that the mask makes visible to the block. Matrix products of few rows are slow, so
a block has ``_ROWS`` rows or more; where all of its heads would not fit a processor's cache, they take turns. No tensor
of size layers x heads x N x N exists. The forward pass is SDPA, or eager attention where maps are so small that it
costs nothing: the two differ by rounding, which badly conditioned small models amplify.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stethoscope.relevancy.traced_calls import Block, Blocks, Grads, PrefixGradient, TracedCall, is_causal
from stethoscope.tracing.hooks import eager_attention, plain_attention

_SMALL = 2**20  # entries of a map
_CACHE = 2**20  # bytes of maps that fit a processor's cache
_ROWS = 64  # of a block at least, even where one head of them does not fit the cache
_COPIES = 5  # blocks in float32 that exist at once on a device where the budget is the only limit
_EAGER_ONLY = ("softcap", "s_aux", "position_bias")  # options that only the eager attention of a model file supports


def forward_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
    needs_map: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute the output (B, q, heads, d) of a call, and its map where that is small or needed."""
    eager = needs_map or _is_small(query, key)
    return (eager_attention if eager else plain_attention)(module, query, key, value, mask, **options)


def _is_small(query: Tensor, key: Tensor) -> bool:
    return query.shape[:3].numel() * key.shape[2] <= _SMALL


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
        output, weights = forward_attention(call.module, query, key, value, call.mask, call.options, call.needs_map)
        exact = weights is not None and weights.dtype == _float32_or_better(query)
        if call.keep_map and exact and _is_small(query, key):
            call.map = weights
        call.weights = weights if call.needs_map else None
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        call, (query, key, value) = ctx.call, ctx.saved_tensors
        grads = tuple(
            torch.zeros(tensor.shape, dtype=_float32_or_better(tensor), device=tensor.device) if needed else None
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
    return PrefixGradient(
        *(
            torch.zeros(*query.shape[:2], live, size, dtype=_float32_or_better(query), device=query.device)
            for size in (call.skipped, query.shape[3])
        )
    )


def _float32_or_better(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


class _Part(NamedTuple):
    """Views of the samples and heads of a call that are computed at once.

    Attributes:
        samples: of the call.
        heads: of the call.
        query: (b, h, q, d).
        key: (b, key-value heads, k, d).
        value: (b, key-value heads, k, d).
        gradient: (b, h, q, d) of the output.
        grads: gradients of query, key and value, without those of the prefix; None where none is needed.
        mask: of the call, for these samples and heads.
    """

    samples: slice
    heads: slice
    query: Tensor
    key: Tensor
    value: Tensor
    gradient: Tensor
    grads: Grads
    mask: Tensor | None


def attention_blocks(
    call: TracedCall, query: Tensor, key: Tensor, value: Tensor, gradient: Tensor, grads: Grads
) -> Blocks:
    """Run the backward pass of one call: yield Abar block by block and fill in the gradients.

    A fused kernel could replace this function: it would take the same arguments and multiply rows by Abar without
    writing a block to memory. None exists, because no GPU was available to test one; on a GPU these are ordinary
    operations on blocks as large as the budget allows.

    Args:
        call: the call.
        query: (B, heads, q, d).
        key: (B, key-value heads, k, d).
        value: (B, key-value heads, k, d).
        gradient: (B, heads, q, d) of the output.
        grads: zeros of the shapes of query, key and value without the prefix, to be filled in; None where no gradient
            is needed. In float32 or better, because blocks add up in those of key and value.
    """
    scaling = call.options.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows, samples, heads = _block_shape(call, query, key)
    parts = _split(call, query, key.contiguous(), value.contiguous(), gradient, grads, samples, heads)
    for start, stop in _row_blocks(call, gradient, rows):
        end = max(call.ends[start:stop])
        abar = torch.zeros(len(query), stop - start, end, dtype=_float32_or_better(query), device=query.device)
        salient = stop if call.salient is None else max(call.salient, start)
        saliency = torch.zeros_like(abar[:, salient - start :]) if salient < stop else None
        for part in parts:
            weights = _block_weights(call, part, scaling, start, stop, end)
            gradients = _group_heads(part.gradient[:, :, start:stop], part.key.shape[1])
            product = (gradients @ part.value[:, :, :end].transpose(-1, -2)).to(weights.dtype).mul_(weights)
            by_head = product.view(*part.query.shape[:2], stop - start, end)
            abar[part.samples] += _sum_heads(by_head.clamp(min=0))
            if saliency is not None:
                saliency[part.samples] += _sum_heads(by_head[:, :, salient - start :].abs())
            _add_gradients(call, part, scaling, weights, gradients, product, start, stop)
        yield Block(start, abar.div_(query.shape[1]), saliency)


def _block_shape(call: TracedCall, query: Tensor, key: Tensor) -> tuple[int, int, int]:
    """Choose the rows of a block and how many samples and heads are computed at once.

    The heads are all, or a part that divides or is divided by the heads that share a key.
    """
    samples, heads, _, _ = query.shape
    budget, row = call.budget // _COPIES // 4, key.shape[2]  # in numbers, as the cache below
    most = min(budget, _CACHE // 4) if query.device.type == "cpu" else budget
    if samples * heads * _ROWS * row > most and not any(call.options.get(name) is not None for name in _EAGER_ONLY):
        samples = max(1, most // (heads * _ROWS * row))
        if samples == 1:
            shared = heads // key.shape[1]
            divisors = [size for size in range(1, heads + 1) if heads % size == 0]
            sizes = [size for size in divisors if size % shared == 0 or shared % size == 0]
            heads = max(size for size in sizes if size == 1 or size * _ROWS * row <= most)
    least = min(_ROWS, budget // (samples * heads * row))
    return max(1, least, most // (samples * heads * row)), samples, heads


def _split(
    call: TracedCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gradient: Tensor,
    grads: Grads,
    samples: int,
    heads: int,
) -> list[_Part]:
    """Split a call into parts of so many samples and heads."""
    shared, parts = query.shape[1] // key.shape[1], []
    for sample in range(0, len(query), samples):
        for head in range(0, query.shape[1], heads):
            own = slice(sample, sample + samples), slice(head, head + heads)
            keys = own[0], slice(head // shared, (head + heads - 1) // shared + 1)
            views = (
                None if grad is None else grad[index] for grad, index in zip(grads, (own, keys, keys), strict=True)
            )
            mask = call.mask
            if mask is not None:
                mask = mask[own[0] if len(mask) > 1 else slice(None), own[1] if mask.shape[1] > 1 else slice(None)]
            parts.append(_Part(*own, query[own], key[keys], value[keys], gradient[own], tuple(views), mask))
    return parts


def _sum_heads(values: Tensor) -> Tensor:
    return values[:, 0] if values.shape[1] == 1 else values.sum(1)


def _row_blocks(call: TracedCall, gradient: Tensor, step: int) -> Iterator[tuple[int, int]]:
    """Yield first and last + 1 of the rows that are processed at once, one block at least; live and later never mix."""
    first, last = call.rows or (0, gradient.shape[2])
    if call.narrow:
        used = gradient[:, :, first:last].ne(0).any(-1).flatten(0, 1).any(0).nonzero()[:, 0].tolist() or [0]
        first, last = first + used[0], first + used[-1] + 1
    border = last if call.live is None else min(max(call.live, first), last)
    for low, high in ((first, border), (border, last)):
        for start in range(low, high, step):
            yield start, min(start + step, high)


def _group_heads(vectors: Tensor, groups: int) -> Tensor:
    """Reshape (b, h, r, d) to (b, groups, h / groups * r, d), stacking the heads of a group."""
    return vectors.reshape(vectors.shape[0], groups, -1, vectors.shape[-1])


def _block_weights(call: TracedCall, part: _Part, scaling: float, start: int, stop: int, end: int) -> Tensor:
    """Compute a block of the map, (b, groups, h / groups * rows, end), float32 or better."""
    groups = part.key.shape[1]
    if call.map is not None:
        return _group_heads(call.map[part.samples, part.heads, start:stop, :end], groups)
    block_key = start, part.samples.start, part.heads.start
    if call.kept_blocks is not None and block_key in call.kept_blocks:
        return call.kept_blocks[block_key]
    queries, keys = part.query[:, :, start:stop], part.key[:, :, :end]
    if any(call.options.get(name) is not None for name in _EAGER_ONLY):
        weights = _eager_weights(call, part, queries, keys, start, stop)
    else:
        scores = (_group_heads(queries, groups) * scaling) @ keys.transpose(-1, -2)
        _mask_scores(call, part.mask, scores.view(*queries.shape[:3], end), start, stop)
        weights = scores.softmax(-1, dtype=_float32_or_better(scores))
    if call.kept_blocks is not None:
        call.kept_blocks[block_key] = weights
    return weights


def _mask_scores(call: TracedCall, mask: Tensor | None, scores: Tensor, start: int, stop: int) -> None:
    """Mask (b, h, rows, columns) scores with the lowest number; rows without keys stay uniform."""
    low, end = torch.finfo(scores.dtype).min, scores.shape[-1]
    if mask is None:
        if is_causal(call.module, len(call.ends), call.options):
            later = torch.ones(stop - start, end - start, dtype=torch.bool, device=scores.device).triu_(1)
            scores[..., start:].masked_fill_(later, low)
    elif mask.dtype == torch.bool:
        scores.masked_fill_(~_mask_rows(mask, start, stop, end), low)
    else:
        scores.add_(_mask_rows(mask, start, stop, end)).clamp_(min=low)


def _eager_weights(call: TracedCall, part: _Part, query: Tensor, key: Tensor, start: int, stop: int) -> Tensor:
    """Compute a block of the map as ``_block_weights``, by the model file's eager attention, of all heads."""
    options, mask, end = dict(call.options), part.mask, key.shape[2]
    if options.get("position_bias") is not None:
        options["position_bias"] = _mask_rows(options["position_bias"], start, stop, end)
    if mask is not None:
        mask = _mask_rows(mask, start, stop, end)
    elif is_causal(call.module, len(call.ends), call.options):
        columns = torch.arange(end, device=query.device)
        mask = (columns <= torch.arange(start, stop, device=query.device)[:, None])[None, None]
    else:
        options["is_causal"] = False
    value = part.value[:, :, :end, :1]  # the output is not needed
    weights = eager_attention(call.module, query, key, value, mask, **options)[1]
    weights = weights.to(_float32_or_better(weights))
    return weights.reshape(weights.shape[0], key.shape[1], -1, end)


def _mask_rows(tensor: Tensor, start: int, stop: int, end: int) -> Tensor:
    """Select rows and columns of a mask or bias (B or 1, heads or 1, q or 1, k)."""
    return (tensor[:, :, start:stop] if tensor.shape[2] > 1 else tensor)[..., :end]


def _add_gradients(
    call: TracedCall,
    part: _Part,
    scaling: float,
    weights: Tensor,
    gradients: Tensor,
    product: Tensor,
    start: int,
    stop: int,
) -> None:
    """Add the gradients of a block of a part.

    Args:
        call: the call.
        part: whose ``grads`` are filled in.
        scaling: of the scores.
        weights: (b, groups, h / groups * rows, end) A.
        gradients: (b, groups, h / groups * rows, d) of the output.
        product: (b, groups, h / groups * rows, end) A * dz/dA, overwritten.
        start: first row.
        stop: last row + 1.
    """
    to_query = part.grads[0]
    queries, keys = _group_heads(part.query[:, :, start:stop], part.key.shape[1]), part.key[:, :, : product.shape[-1]]
    # the gradient of the softmax is A * (dA - sum(A * dA)); a finite sum shows that all values are finite
    total = product.sum(-1, keepdim=True)
    finite = torch.isfinite(total.sum())
    call.finite = finite if call.finite is None else call.finite & finite
    scores = product.addcmul_(total, weights, value=-1)
    softcap = call.options.get("softcap")
    if softcap is not None:
        raw = (queries @ keys.transpose(-1, -2)).to(scores.dtype)
        scores.mul_(1 - raw.mul_(scaling / softcap).tanh_().square_())
    scores, weights = scores.to(queries.dtype), weights.to(queries.dtype)
    if to_query is not None:
        to_query[:, :, start:stop] = (scores @ keys).mul_(scaling).view(*part.query.shape[:2], stop - start, -1)
    _add_key_gradient(call, part, 0, scores, queries, start, stop, scaling)
    _add_key_gradient(call, part, 1, weights, gradients, start, stop, 1.0)


def _add_key_gradient(
    call: TracedCall, part: _Part, index: int, maps: Tensor, vectors: Tensor, start: int, stop: int, factor: float
) -> None:
    """Add the gradient of a block of queries to keys or values: maps^T vectors.

    Queries that are not live send it to their own key only.

    Args:
        call: the call.
        part: whose ``grads`` are added to.
        index: 0 for keys, 1 for values.
        maps: (b, groups, h / groups * rows, end).
        vectors: (b, groups, h / groups * rows, d).
        start: first row.
        stop: last row + 1.
        factor: multiplies the gradient.
    """
    target, live = part.grads[1 + index], call.live is None or start < call.live
    by_head = *part.query.shape[:2], stop - start
    if live and call.prefix_gradients is not None:
        factors, rows = call.prefix_gradients[index], (part.samples, part.heads, slice(start, stop))
        factors.weights[rows] = maps.view(*by_head, -1)[..., : call.skipped].to(factors.weights.dtype)
        factors.vectors[rows] = vectors.reshape(*by_head, -1).to(factors.vectors.dtype).mul(factor)
    if target is None:
        return
    if live:
        maps = maps[..., call.skipped :]
        target[:, :, : maps.shape[-1]].add_(maps.transpose(-1, -2) @ vectors, alpha=factor)
    elif call.site.role == "language":
        split, keys = (maps.shape[0], maps.shape[1], -1, stop - start), slice(call.skipped + start, call.skipped + stop)
        own = maps.reshape(*split, maps.shape[-1])[..., keys].diagonal(dim1=-2, dim2=-1)
        gradient = (own[..., None] * vectors.reshape(*split, vectors.shape[-1])).sum(2)
        target[:, :, start:stop].add_(gradient, alpha=factor)
