"""Compute Abar and the gradients of one attention call, in blocks of rows.

With A the map after softmax and z the logit, the output of attention is O = A V, so dz/dA = (dz/dO) V^T, and Abar is
the mean over heads of relu(A * dz/dA). The map is recomputed in the backward pass from queries and keys, one block of
rows at a time, up to the last column that the mask makes visible to the block. Matrix products of few rows are slow, so
a block has ``_ROWS`` rows or more; where all of its heads would not fit a processor's cache, they take turns. No tensor
of size layers x heads x N x N exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stethoscope.tracing.hooks import eager_attention
from stethoscope.tracing.model_parts import Site

BUDGET = 2**26
"""Default limit, in bytes, of attention maps and gradients of tokens at once; on a GPU the smallest default."""
_GPU_BUDGET, _GPU_SHARE = 2**31, 8  # the largest default on a GPU, and the part of its free memory that it may be
_CACHE = 2**21  # bytes of maps that fit a processor's cache
_ROWS = 64  # of a block at least, even where one head of them does not fit the cache
_LONG, _LONG_ROWS = 512, 0.1  # keys from which causal blocks have so few rows, by key: less of them is masked
_COPIES = 5  # blocks in float32 that exist at once on a device where the budget is the only limit
_EAGER_ONLY = ("softcap", "s_aux", "position_bias")  # options that only the eager attention of a model file supports


class Block(NamedTuple):
    """Rows of Abar of one call, in float32 or better. Rows in no block and columns after its last are zero.

    Attributes:
        start: first row.
        abar: (B, rows, columns) mean over heads of relu(A * dz/dA).
        saliency: (B, last rows, columns) sum over heads of |A * dz/dA| of those rows that come from
            ``TracedCall.salient`` on; None where the block has none.
    """

    start: int
    abar: Tensor
    saliency: Tensor | None


class PrefixGradient(NamedTuple):
    """Gradient of keys or values before a call's own, as the factors that its live queries leave.

    The gradient of a key is the sum over queries and heads of weight times vector; it takes d times the memory.

    Attributes:
        weights: (B, heads, live queries, prefix), float32 or better.
        vectors: (B, heads, live queries, d), float32 or better.
    """

    weights: Tensor
    vectors: Tensor

    def add_to(self, gradient: Tensor) -> None:
        """Add the gradient to that of the same keys or values, (B, key-value heads, prefix, d), in place."""
        weights, vectors = self._grouped(gradient.shape[1])
        gradient.flatten(0, 1).baddbmm_(weights.flatten(0, 1).transpose(1, 2), vectors.flatten(0, 1))

    def product(self, prefix: Tensor) -> Tensor:
        """Multiply keys or values (B, key-value heads, prefix, d) by their gradient and sum up: a scalar."""
        weights, vectors = self._grouped(prefix.shape[1])
        return (vectors @ prefix.to(vectors.dtype).transpose(-1, -2)).mul(weights).sum()

    def _grouped(self, groups: int) -> list[Tensor]:
        """Return the factors with the queries of all heads that share a key in one dimension."""
        return [part.unflatten(1, (groups, -1)).flatten(2, 3) for part in self]


Blocks = Iterator[Block]
"""All blocks of a call; all must be consumed."""
Grads = tuple[Tensor | None, ...]
"""Gradients of query, key and value in float32 or better; None where none is needed."""


@dataclass(eq=False)
class TracedCall:
    """One call of an attention module.

    Attributes:
        site: name, role and layer of the module.
        module: the attention module.
        mask: attention mask in SDPA's form.
        options: further arguments of the model file.
        receive: called with the call and its blocks in every backward pass.
        ends: for every query, index + 1 of the last visible key.
        live: number of leading queries whose gradients reach all keys and values; None for all. Later queries pass
            gradients to their own key and value only (scope ``row``), or to none (cross-attention).
        prefix: keys and values before those of the first query, (B, key-value heads, prefix, d) each; None without any.
        skipped: number of keys of the prefix.
        prefix_gradients: of the prefix, filled in by a backward pass.
        seeds: gradients of the call's own keys and values from passes behind it; empty without any.
        causal: whether queries of a call without a mask see no later keys.
        salient: first query whose saliency is needed; None for none.
        budget: bytes that maps may take in the backward pass of this call.
        offset: first column of this call when a layer is called once per window.
        size: bytes of the visible part of the call's maps.
        keys: number of keys.
        rows: first and last + 1 of the queries that receive gradients; all by default.
        narrow: whether only a few of these rows have gradients, so that it pays to search for them.
        kept_blocks: the map by first row, sample and head of what is computed at once, kept for several backward
            passes; None to keep none.
        keep_map: whether to keep a small map of the forward pass, if that computes one in float32 or better.
        map: this map, (B, heads, q, k).
        needs_map: whether the forward pass is to compute the map.
        weights: the map then, in the model's dtype, for whoever needs it.
        finite: bool scalar, whether all gradients are finite; a tensor, so that no device has to synchronise.
    """

    site: Site
    module: nn.Module
    mask: Tensor | None
    options: dict[str, Any]
    receive: Callable[[TracedCall, Blocks], None]
    ends: list[int]
    live: int | None = None
    prefix: tuple[Tensor, Tensor] | None = None
    skipped: int = 0
    prefix_gradients: tuple[PrefixGradient, PrefixGradient] | None = None
    seeds: Sequence[PrefixGradient] = ()
    causal: bool = False
    salient: int | None = None
    budget: int = BUDGET
    offset: int = 0
    size: int = 0
    keys: int = 0
    rows: tuple[int, int] | None = None
    narrow: bool = False
    kept_blocks: dict[tuple[int, int, int], Tensor] | None = None
    keep_map: bool = False
    map: Tensor | None = None
    needs_map: bool = False
    weights: Tensor | None = None
    finite: Tensor | None = None

    def deliver(self, blocks: Blocks, layer: int, receive: Receiver) -> None:
        """Pass all blocks to a receiver, each as soon as it is computed."""
        for index, block in enumerate(blocks):
            receive(self, layer, index == 0, block._replace(start=self.skipped + block.start))


Receiver = Callable[[TracedCall, int, bool, Block], None]
"""Called with every block of a call: the call, the index of its layer within its role, whether the block is the call's
first, and the block, whose first row is counted in the sequence."""


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
    key, value = (part if part.stride(2) == part.shape[3] else part.contiguous() for part in (key, value))
    parts = _split(call, query, key, value, gradient, grads, samples, heads)
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
            abar[part.samples].add_(_sum_heads(by_head.clamp(min=0)))
            if saliency is not None:
                saliency[part.samples].add_(_sum_heads(by_head[:, :, salient - start :].abs()))
            _add_gradients(call, part, scaling, weights, gradients, product, start, stop)
        yield Block(start, abar.div_(query.shape[1]), saliency)
    for grad, seed in zip(grads[1:], call.seeds, strict=False):
        if grad is not None:
            seed.add_to(grad)


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
    if call.causal and query.device.type == "cpu" and row > _LONG:
        most = min(most, samples * heads * row * max(_ROWS, round(_LONG_ROWS * row)))
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
    """Yield first and last + 1 of the rows that are processed at once, one block at least."""
    first, last = call.rows or (0, gradient.shape[2])
    if call.narrow:
        used = gradient[:, :, first:last].ne(0).any(-1).flatten(0, 1).any(0).nonzero()[:, 0].tolist() or [0]
        first, last = first + used[0], first + used[-1] + 1
    for start in range(first, last, step):
        yield start, min(start + step, last)


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
    end = scores.shape[-1]
    if mask is None:
        if call.causal:
            seen = torch.ones(stop - start, end - start, dtype=torch.bool, device=scores.device).tril_()
            scores[..., start:].clamp_(max=_largest_scores(seen, scores.dtype))
    elif mask.dtype == torch.bool:
        scores.clamp_(max=_largest_scores(_mask_rows(mask, start, stop, end), scores.dtype))
    else:
        scores.add_(_mask_rows(mask, start, stop, end)).clamp_(min=torch.finfo(scores.dtype).min)


def _largest_scores(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the lowest number where no key is seen, else infinity: clamping takes a sixth of the time of filling."""
    lowest = torch.full(seen.shape, torch.finfo(dtype).min, dtype=dtype, device=seen.device)
    return lowest.masked_fill_(seen, torch.inf)


def _eager_weights(call: TracedCall, part: _Part, query: Tensor, key: Tensor, start: int, stop: int) -> Tensor:
    """Compute a block of the map as ``_block_weights``, by the model file's eager attention, of all heads."""
    options, mask, end = dict(call.options), part.mask, key.shape[2]
    if options.get("position_bias") is not None:
        options["position_bias"] = _mask_rows(options["position_bias"], start, stop, end)
    if mask is not None:
        mask = _mask_rows(mask, start, stop, end)
    elif call.causal:
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
    border = stop if call.live is None else min(max(call.live, start), stop)
    if start < border < stop:
        maps, vectors = maps.unflatten(2, (-1, stop - start)), vectors.unflatten(2, (-1, stop - start))
        for low, high in ((start, border), (border, stop)):
            own_maps = maps[..., low - start : high - start, :].flatten(2, 3)
            own_vectors = vectors[..., low - start : high - start, :].flatten(2, 3)
            _add_key_gradient(call, part, index, own_maps, own_vectors, low, high, factor)
        return
    target, live = part.grads[1 + index], start < border
    by_head = *part.query.shape[:2], stop - start
    if live and call.prefix_gradients is not None:
        factors, rows = call.prefix_gradients[index], (part.samples, part.heads, slice(start, stop))
        factors.weights[rows] = maps.view(*by_head, -1)[..., : call.skipped].to(factors.weights.dtype)
        factors.vectors[rows] = vectors.reshape(*by_head, -1).to(factors.vectors.dtype).mul(factor)
    if target is None:
        return
    if live:
        maps = maps[..., call.skipped :]
        sums, maps = target[:, :, : maps.shape[-1]], maps.transpose(-1, -2)
        if sums.dtype != maps.dtype:
            sums.add_(maps @ vectors, alpha=factor)
            return
        sums.view(-1, *sums.shape[2:]).baddbmm_(maps.flatten(0, 1), vectors.flatten(0, 1), alpha=factor)
    elif call.site.role == "language":
        split, keys = (maps.shape[0], maps.shape[1], -1, stop - start), slice(call.skipped + start, call.skipped + stop)
        own = maps.reshape(*split, maps.shape[-1])[..., keys].diagonal(dim1=-2, dim2=-1)
        gradient = (own[..., None] * vectors.reshape(*split, vectors.shape[-1])).sum(2)
        target[:, :, start:stop].add_(gradient, alpha=factor)


def _float32_or_better(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def default_budget(device: torch.device) -> int:
    """Return the default budget in bytes: on a GPU an eighth of the memory that is free now, from 64 MiB to 2 GiB.

    Larger blocks are fewer: at the sizes of LLaVA-1.5-7B and 3,040 tokens a pass starts 86,600 kernels with 64 MiB and
    8,800 with 2 GiB. A processor does nothing faster with more.
    """
    if device.type != "cuda" or not torch.cuda.is_available():  # a layout of devices can be tried without them
        return BUDGET
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(max((torch.cuda.mem_get_info(device)[0] + unused) // _GPU_SHARE, BUDGET), _GPU_BUDGET)
