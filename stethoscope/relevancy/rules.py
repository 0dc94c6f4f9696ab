"""Propagate relevancy by the rules of Chefer et al. 2021 (arXiv 2103.15679), equations 5-10.

First the rules on plain matrices, then in running form, one block of Abar at a time; ``backward_pass`` applies them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

RULES = ("eq10", "eq10_no_transpose", "plain")
"""Readings of equation 10 in published code; the first is the equation as printed."""

_STORED_BYTES = 2**27  # of the Abar of all layers, where they are stored

Layers = Mapping[int, Tensor]
"""Abar by layer."""

AddBlock = Callable[[int, Tensor], None]
"""Adds a block of rows of a layer's Abar, given its first row and (B, rows, columns). Entries in no block are zero."""


def identity_like(relevancy: Tensor) -> Tensor:
    """Return the identity with the size of the (square) last two dimensions."""
    return torch.eye(relevancy.shape[-1], dtype=relevancy.dtype, device=relevancy.device)


def accumulate(maps: list[Tensor], size: int) -> Tensor:
    """Apply equation 6 over layers: R_0 = I, R_l = R_{l-1} + Abar_l R_{l-1}.

    Args:
        maps: Abar of every layer, (n, n) float32, first layer first.
        size: n.

    >>> accumulate([torch.tensor([[0.0, 0.0], [0.5, 0.0]])] * 2, 2)
    tensor([[1., 0.],
            [1., 1.]])
    """
    relevancy = torch.eye(size)
    for abar in maps:
        relevancy = relevancy.to(abar) + abar @ relevancy.to(abar)
    return relevancy


def normalised(relevancy: Tensor) -> Tensor:
    """Apply equations 8 and 9: (R - I) / rowsum(R - I) + I. A row without mass keeps the identity.

    >>> normalised(torch.tensor([[1.0, 0.0], [0.5, 1.5]]))
    tensor([[1.0000, 0.0000],
            [0.5000, 1.5000]])
    """
    identity = identity_like(relevancy)
    mass = relevancy - identity
    total = mass.sum(-1, keepdim=True)
    return torch.where(total == 0, 0.0, mass / torch.where(total == 0, 1.0, total)) + identity


def cross_attention_update(rule: str, own: Tensor, abar: Tensor, other: Tensor) -> Tensor:
    """Compute the update of the relevancy to the other sequence by a cross-attention layer (equation 10).

    Args:
        rule: one of ``RULES``: norm(R)^T Abar norm(R_other), norm(R) Abar norm(R_other), or Abar R_other.
        own: norm(R) of the queries, (q, q).
        abar: the cross-attention's Abar, (q, k).
        other: R of the keys, (k, k), not normalised.

    Returns:
        (q, k).
    """
    if rule == "plain":
        return abar @ other
    return (own.T if rule == "eq10" else own) @ abar @ normalised(other)


def query_relevancy(rule: str, own: Layers, crossing: Layers, tower: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    """Compute R_si and R_ss of the query rows of a Q-Former.

    Args:
        rule: one of ``rules.RULES``.
        own: Abar (s, s) of the self-attention by layer.
        crossing: Abar (queries, i) of the cross-attention, for the layers that have it.
        tower: R_ii of the vision tower, (i, i).
        queries: number of query tokens, which come first in s.

    Returns:
        (queries, i) and (queries, s), float32.
    """
    width = tower.shape[-1]
    like = next(iter(own.values()))
    same, other = torch.eye(like.shape[-1]).to(like), torch.zeros(like.shape[-1], width).to(like)
    for layer in sorted(own):
        abar = own[layer]
        same, other = same + abar @ same, other + abar @ other
        if layer in crossing:
            block = normalised(same)[:queries, :queries]
            other[:queries] += cross_attention_update(rule, block, crossing[layer].to(like), tower.to(like))
    return other[:queries], same[:queries]


def decoder_relevancy(
    rule: str, encoder: Tensor, own: Layers, crossing: Layers, rows: Sequence[int], every: bool
) -> tuple[Tensor, Tensor]:
    """Compute rows of R_dd - I and of R_de after every decoder layer, or only after the last.

    With the transposed reading of equation 10 later decoder rows would flow into earlier ones, so row k is computed
    from rows 0 to k only.

    Args:
        rule: one of ``rules.RULES``.
        encoder: R_ee of the encoder, (e, e).
        own: Abar (d, d) of the decoder's self-attention by layer.
        crossing: Abar (d, e) of its cross-attention by layer.
        rows: decoder rows, T of them.
        every: whether to return rows after every layer.

    Returns:
        (L or 1, T, d) and (L or 1, T, e), float32.
    """
    layers = sorted(own)
    width, size = encoder.shape[-1], own[layers[0]].shape[-1]
    encoder = encoder.to(own[layers[0]])
    decoder, source = [], []
    for row in rows:
        end = row + 1
        same, other = torch.eye(end).to(encoder), torch.zeros(end, width).to(encoder)
        after = []
        for layer in layers:
            abar = own[layer][:end, :end]
            same, other = same + abar @ same, other + abar @ other
            other = other + cross_attention_update(rule, normalised(same), crossing[layer][:end], encoder)
            mass = same[row].clone()
            mass[row] -= 1
            after.append((torch.nn.functional.pad(mass, (0, size - end)), other[row]))
        kept = after if every else after[-1:]
        decoder.append(torch.stack([mass for mass, _ in kept]))
        source.append(torch.stack([values for _, values in kept]))
    return torch.stack(decoder, 1), torch.stack(source, 1)


class QueryRelevancy:
    """Relevancy of the queries of an abstractor, propagated through its layers from the last to the first.

    >>> relevancy = QueryRelevancy(torch.tensor([[1.0, 0.0]]), vision=2)
    >>> abar = torch.tensor([[[0.0, 0.5, 0.25, 0.0], [0.0, 0.0, 0.0, 1.0]]])
    >>> relevancy.begin(abar)(0, abar)
    >>> relevancy.queries, relevancy.vision
    (tensor([[1.0000, 0.5000]]), tensor([[0.2500, 0.0000]]))

    Args:
        rows: (..., Q) relevancy of the queries.
        vision: number of vision tokens M.
        samples: number of samples, for rows of shape (samples, ..., Q).
    """

    def __init__(self, rows: Tensor, vision: int, samples: int = 1) -> None:
        self._count, self._shape = rows.shape[-1], rows.shape[:-1]
        self._values = torch.nn.functional.pad(rows, (0, vision)).view(samples, -1, rows.shape[-1] + vision)

    def begin(self, like: Tensor) -> AddBlock:
        """Begin a layer whose Abar (Q, Q + M) has the dtype and device of ``like``; return what adds its blocks."""
        self._values = self._values.to(like)
        before = self._values[..., : self._count].clone()

        def add(start: int, block: Tensor) -> None:
            _, rows, end = block.shape
            self._values[..., :end] += before[..., start : start + rows] @ block

        return add

    @property
    def queries(self) -> Tensor:
        """(..., Q) relevancy that stays with the queries."""
        return self._values[..., : self._count].reshape(*self._shape, -1)

    @property
    def vision(self) -> Tensor:
        """(..., M) relevancy that flows on to the vision tokens."""
        return self._values[..., self._count :].reshape(*self._shape, -1)


class LayerRelevancy:
    """Rows of R_l of the language model, after every layer l or only after the last, of B samples.

    Args:
        rows: (T,) positions of the rows, the same in all samples.
        length: length of the sequence.
        layers: number of layers.
        every: whether to keep the rows after every layer.
        samples: B.
    """

    def __init__(self, rows: Tensor, length: int, layers: int, every: bool, samples: int = 1) -> None:
        self._start = torch.nn.functional.one_hot(rows, length).float()
        self._values = self._start.repeat(samples, layers if every else 1, 1, 1)
        self._every = every
        self._stored: dict[int, tuple[int, Tensor]] = {}  # by layer, first row and last rows of Abar

    def store(self, layer: int, first: int, like: Tensor) -> AddBlock:
        """Store the rows of a layer's Abar from ``first`` on until the layer begins; return what adds its blocks."""
        rows = like.new_zeros(len(like), self._start.shape[-1] - first, self._start.shape[-1])
        self._stored[layer] = first, rows

        def add(start: int, block: Tensor) -> None:
            rows[:, start - first : start - first + block.shape[1], : block.shape[2]] = block

        return add

    def begin(self, layer: int, like: Tensor) -> AddBlock:
        """Begin a layer, which changes the rows after it and after later layers; return what adds its blocks.

        Layers begin from the last to the first. Those of which no block comes but stored rows may be left out.
        """
        for later in sorted((other for other in self._stored if other > layer), reverse=True):
            self.begin(later, self._stored[later][1])
        self._values = self._values.to(like)
        touched = (self._values[:, layer:] if self._every else self._values).flatten(1, 2)
        before = touched.clone()

        def add(start: int, block: Tensor) -> None:
            _, rows, end = block.shape
            touched[..., :end].baddbmm_(before[..., start : start + rows], block)

        if layer in self._stored:
            add(*self._stored.pop(layer))
        return add

    def mass(self) -> Tensor:
        """Return the rows of R_l - I, (B, L or 1, T, N)."""
        if self._stored:
            first = min(self._stored)
            self.begin(first, self._stored[first][1])
        return self._values - self._start.to(self._values)


class StoredRelevancy:
    """Rows of R_l after every layer as ``LayerRelevancy``, from the Abar of all layers once they are there.

    The whole R_l takes about N^3 / 3 products a layer, where T rows after each of L layers take T N^2 (L + 1) / 4, so
    that the cost does not grow with the length of the answer beyond that of attention.

    Args:
        rows: (T,) positions of the rows, the same in all samples.
        length: length N of the sequence.
        layers: number of layers.
        samples: B.
    """

    def __init__(self, rows: Tensor, length: int, layers: int, samples: int) -> None:
        self._rows, self._length, self._layers, self._samples = rows, length, layers, samples
        self._maps: dict[int, Tensor] = {}
        self._blocks: dict[int, list[tuple[int, int, int]]] = {}  # by layer first row, last row + 1, last column + 1
        self._mass: Tensor | None = None

    @staticmethod
    def pays(rows: int, length: int, layers: int, samples: int) -> bool:
        """Decide whether this takes less time than ``LayerRelevancy`` and not too much memory."""
        return 4 * length < 3 * rows * (layers + 1) and 4 * samples * layers * length**2 <= _STORED_BYTES

    def store(self, layer: int, first: int, like: Tensor) -> AddBlock:
        """Return what stores the blocks of a layer's rows from ``first`` on."""
        return self.begin(layer, like)

    def begin(self, layer: int, like: Tensor) -> AddBlock:
        """Return what stores the blocks of a layer."""
        if layer not in self._maps:
            self._maps[layer], self._blocks[layer] = like.new_zeros(len(like), self._length, self._length), []
        abar, blocks = self._maps[layer], self._blocks[layer]

        def add(start: int, block: Tensor) -> None:
            stop, end = start + block.shape[1], block.shape[2]
            abar[:, start:stop, :end] = block
            blocks.append((start, stop, end))

        return add

    def mass(self) -> Tensor:
        """Return the rows of R_l - I, (B, L, T, N), and release the maps."""
        if self._mass is None:
            like = next(iter(self._maps.values()))
            relevancy = identity_like(like).repeat(self._samples, 1, 1)
            causal = all(end <= stop for blocks in self._blocks.values() for _, stop, end in blocks)
            after = []
            for layer in range(self._layers):
                before = relevancy.clone()
                for start, stop, end in self._blocks.get(layer, ()):
                    columns = end if causal else self._length  # R has no columns after its rows
                    rows = self._maps[layer][:, start:stop, :end]
                    relevancy[:, start:stop, :columns].baddbmm_(rows, before[:, :end, :columns])
                after.append(relevancy[:, self._rows.to(like.device)])
            identity = torch.nn.functional.one_hot(self._rows, self._length).to(like)
            self._mass = torch.stack(after, 1) - identity
            self._maps.clear()
        return self._mass


class BlockRelevancy:
    """Rows times the R of a part of the model whose Abar is block-diagonal: one block per crop or window.

    Args:
        rows: (..., M) relevancy that flows into the part's tokens, block by block. The identity gives R itself. Where a
            sample has more than M rows, R is computed and they are multiplied by it at the end, which costs less.
        samples: number of samples, for rows of shape (samples, ..., M); blocks come one sample after another.
    """

    def __init__(self, rows: Tensor, samples: int = 1) -> None:
        self._shape, width = rows.shape, rows.shape[-1]
        self._values = rows.reshape(samples, -1, width)
        self._rows = self._values if self._values.shape[1] > width else None
        if self._rows is not None:
            self._values = torch.eye(width, dtype=rows.dtype, device=rows.device).expand(samples, -1, -1)
        self._values = self._values.clone()

    def begin(self, offset: int, size: int, like: Tensor) -> AddBlock:
        """Begin a layer on the diagonal blocks from column ``offset``, ``size`` columns each; return what adds to them.

        ``like`` is a block of the layer's Abar, (samples * diagonal blocks, rows, columns).
        """
        samples = len(self._values)
        blocks = len(like) // samples
        self._values = self._values.to(like)
        touched = self._values[..., offset : offset + blocks * size].unflatten(-1, (blocks, size))
        before = touched.clone()

        def add(start: int, block: Tensor) -> None:
            block = block.unflatten(0, (samples, -1))
            rows, end = block.shape[2:]
            touched[..., :end] += torch.einsum("skbr,sbrm->skbm", before[..., start : start + rows], block)

        return add

    @property
    def values(self) -> Tensor:
        """Rows after the layers applied so far, in the shape of the initial ones."""
        values = self._values if self._rows is None else self._rows.to(self._values) @ self._values
        return values.view(self._shape)


class Saliency:
    """|A * dz/dA| summed over heads in the rows that predict tokens, by layer.

    Args:
        rows: positions of the rows.
        length: length of the sequence.
        layers: number of layers.
        samples: B.
    """

    def __init__(self, rows: Iterable[int], length: int, layers: int, samples: int = 1) -> None:
        self._rows = list(rows)
        self.values = torch.zeros(samples, layers, len(self._rows), length)

    def receive(self, layer: int, start: int, saliency: Tensor) -> None:
        """Store the rows of a block (B, rows, columns), the first of which is ``start``."""
        stop = start + saliency.shape[1]
        indices = [index for index, row in enumerate(self._rows) if start <= row < stop]
        if indices:
            self.values = self.values.to(saliency)
            rows = [self._rows[index] - start for index in indices]
            self.values[:, layer, indices, : saliency.shape[-1]] = saliency[:, rows]
