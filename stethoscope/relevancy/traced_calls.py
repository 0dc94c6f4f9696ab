"""Describe an attention call that runs backward: settings, blocks of Abar, and what queries see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stethoscope.tracing.hooks import Site

BUDGET = 2**26
"""Default limit, in bytes, of attention maps and gradients of tokens at once; on a GPU the smallest default."""
_GPU_BUDGET, _GPU_SHARE = 2**31, 8  # the largest default on a GPU, and the part of its free memory that it may be


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
        receive: called with the call, its blocks and the gradients that these fill in, in every backward pass.
        ends: for every query, index + 1 of the last visible key (``visible_ends``).
        live: number of leading queries whose gradients reach all keys and values; None for all. Later queries pass
            gradients to their own key and value only (scope ``row``), or to none (cross-attention).
        prefix: keys and values before those of the first query, (B, key-value heads, prefix, d) each; None without any.
        skipped: number of keys of the prefix.
        prefix_gradients: of the prefix, filled in by a backward pass.
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
    prefix: tuple[Tensor, Tensor] | None = None
    skipped: int = 0
    prefix_gradients: tuple[PrefixGradient, PrefixGradient] | None = None
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


Receiver = Callable[[TracedCall, int, bool, Block], None]
"""Called with every block of a call: the call, the index of its layer within its role, whether the block is the call's
first, and the block, whose first row is counted in the sequence."""


def default_budget(device: torch.device) -> int:
    """Return the default budget in bytes: on a GPU an eighth of the memory that is free now, from 64 MiB to 2 GiB.

    Larger blocks are fewer: at the sizes of LLaVA-1.5-7B and 3,040 tokens a pass starts 86,600 kernels with 64 MiB and
    8,800 with 2 GiB. A processor does nothing faster with more.
    """
    if device.type != "cuda" or not torch.cuda.is_available():  # a layout of devices can be tried without them
        return BUDGET
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(max((torch.cuda.mem_get_info(device)[0] + unused) // _GPU_SHARE, BUDGET), _GPU_BUDGET)


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
