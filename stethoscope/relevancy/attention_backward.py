"""Record the attention of a forward pass, and yield Abar of every call in blocks of rows when it runs backward.

With A the map after softmax and z the logit, the output of attention is O = A V, so dz/dA = (dz/dO) V^T, and Abar is
the mean over heads of relu(A * dz/dA). The map is recomputed in the backward pass from queries and keys, one block of
rows at a time, up to the last column that the mask makes visible to the block. Matrix products of few rows are slow, so
a block has ``_ROWS`` rows or more; where all of its heads would not fit a processor's cache, they take turns. No tensor
of size layers x heads x N x N exists. The forward pass is SDPA, or eager attention where maps are so small that it
costs nothing: the two differ by rounding, which badly conditioned small models amplify.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stethoscope.core.errors import CaptureError
from stethoscope.core.types import required
from stethoscope.relevancy.checkpointing import LayerCheckpointer
from stethoscope.tracing.hooks import AttentionCall, AttentionRecorder, Site, eager_attention, plain_attention

BUDGET = 2**26
"""Default limit, in bytes, of attention maps and gradients of tokens at once; on a GPU the smallest default."""
_GPU_BUDGET, _GPU_SHARE = 2**31, 8  # the largest default on a GPU, and the part of its free memory that it may be
_SMALL = 2**20  # entries of a map
_CACHE = 2**20  # bytes of maps that fit a processor's cache
_ROWS = 64  # of a block at least, even where one head of them does not fit the cache
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


Blocks = Iterator[Block]
"""All blocks of a call; all must be consumed."""
Grads = tuple[Tensor | None, ...]
"""Gradients of query, key and value in float32 or better; None where none is needed."""


def default_budget(device: torch.device) -> int:
    """Return the default budget in bytes: on a GPU an eighth of the memory that is free now, from 64 MiB to 2 GiB.

    Larger blocks are fewer: at the sizes of LLaVA-1.5-7B and 3,040 tokens a pass starts 86,600 kernels with 64 MiB and
    8,800 with 2 GiB. A processor does nothing faster with more.
    """
    if device.type != "cuda" or not torch.cuda.is_available():  # a layout of devices can be tried without them
        return BUDGET
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(max((torch.cuda.mem_get_info(device)[0] + unused) // _GPU_SHARE, BUDGET), _GPU_BUDGET)


@dataclass(eq=False)
class TracedCall:
    """One call of an attention module.

    Attributes:
        site: name, role and layer of the module.
        module: the attention module.
        mask: attention mask in SDPA's form.
        options: further arguments of the model file.
        receive: called with the call, its blocks and the gradients that these fill in, in every backward pass.
        ends: for every query, index + 1 of the last visible key (``visible_ends``).
        live: number of leading queries whose gradients reach all keys and values; None for all. Later queries pass
            gradients to their own key and value only (scope ``row``), or to none (cross-attention).
        skipped: number of keys before that of the first query.
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
    receive: Callable[[TracedCall, Blocks, Grads], None]
    ends: list[int]
    live: int | None = None
    skipped: int = 0
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


def is_causal(module: nn.Module, queries: int, options: dict[str, Any]) -> bool:
    """Decide whether a call without a mask is causal, by the rule of transformers."""
    flag = options.get("is_causal")
    return queries > 1 and bool(getattr(module, "is_causal", True) if flag is None else flag)


def visible_ends(module: nn.Module, queries: int, keys: int, mask: Tensor | None, options: dict[str, Any]) -> list[int]:
    """Return, for every query, index + 1 of the last key that it sees in any sample and head.

    A query that sees no key attends to all keys equally in eager attention, so all are counted.
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
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, call: TracedCall) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.call = call
        output, weights = forward_attention(call.module, query, key, value, call.mask, call.options, call.needs_map)
        exact = weights is not None and weights.dtype == _float32_or_better(query)
        if call.keep_map and exact and _is_small(query, key):
            call.map = weights
        call.weights = weights if call.needs_map else None
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        grads = tuple(
            torch.zeros(tensor.shape, dtype=_float32_or_better(tensor), device=tensor.device)
            if needed or ctx.call.skipped
            else None
            for tensor, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        )
        blocks = attention_blocks(ctx.call, query, key, value, gradient.transpose(1, 2), grads)
        ctx.call.receive(ctx.call, blocks, grads)
        triples = zip(grads, ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        return *(None if grad is None or not needed else grad.to(part.dtype) for grad, part, needed in triples), None


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
        grads: gradients of query, key and value; None where none is needed.
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
        grads: zeros of the shapes of query, key and value, to be filled in; None where no gradient is needed. In
            float32 or better, because blocks add up in those of key and value.
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
    to_query, to_key, to_value = part.grads
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
    if to_key is not None:
        _add_key_gradient(call, to_key, scores, queries, start, stop, scaling)
    if to_value is not None:
        _add_key_gradient(call, to_value, weights, gradients, start, stop, 1.0)


def _add_key_gradient(
    call: TracedCall, target: Tensor, maps: Tensor, vectors: Tensor, start: int, stop: int, factor: float
) -> None:
    """Add the gradient of a block of queries to keys or values: maps^T vectors.

    Queries that are not live send it to their own key only.

    Args:
        call: the call.
        target: (b, groups, k, d), added to in place.
        maps: (b, groups, h / groups * rows, end).
        vectors: (b, groups, h / groups * rows, d).
        start: first row.
        stop: last row + 1.
        factor: multiplies the gradient.
    """
    if call.live is None or start < call.live:
        target[:, :, : maps.shape[-1]].add_(maps.transpose(-1, -2) @ vectors, alpha=factor)
    elif call.site.role == "language":
        split, keys = (maps.shape[0], maps.shape[1], -1, stop - start), slice(call.skipped + start, call.skipped + stop)
        own = maps.reshape(*split, maps.shape[-1])[..., keys].diagonal(dim1=-2, dim2=-1)
        target[:, :, keys].add_((own[..., None] * vectors.reshape(*split, vectors.shape[-1])).sum(2), alpha=factor)


# --- all calls of one forward pass ------------------------------------------------------------------------------------

Receiver = Callable[[TracedCall, int, bool, Block], None]
"""Called with every block of a call: the call, the index of its layer within its role, whether the block is the call's
first, and the block, whose first row is counted in the sequence."""


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
                call.salient, call.skipped = self._salient, keys - query.shape[2]
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
