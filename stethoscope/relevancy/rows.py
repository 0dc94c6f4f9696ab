"""Rows of relevancy carried through the layers from the last to the first, in the order of a backward pass.

Row i of R_l = (I + Abar_l) ... (I + Abar_1) is e_i (I + Abar_l) ... (I + Abar_1): only vectors are multiplied, layer by
layer as the backward pass gives Abar away (Chefer et al. 2021, equation 6, read from the left).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

Abar = Iterable[tuple[int, Tensor]]
"""Abar in blocks of rows: the first row and (B, rows, columns) of each. What no block holds is zero."""


class LayerRows:
    """Rows of R_l of the language model, after every layer l or after the last alone, of B samples.

    Args:
        rows: (T,) positions of the rows, the same in all samples. ``length``: size of the sequence.
        layers: number of layers. ``every``: after every layer.
        samples: B.
    """

    def __init__(self, rows: Tensor, length: int, layers: int, every: bool, samples: int = 1) -> None:
        self._start = torch.nn.functional.one_hot(rows, length).float()
        self._values = self._start.repeat(samples, layers if every else 1, 1, 1)
        self._every = every

    def receive(self, layer: int, abar: Abar) -> None:
        """Takes Abar of a layer; rows after earlier layers do not see it."""
        before = None
        for start, block in abar:
            if before is None:
                self._values = self._values.to(block)
                touched = self._values[:, layer:] if self._every else self._values
                before = touched.flatten(1, 2).clone()
            _, rows, end = block.shape
            touched[..., :end] += (before[..., start : start + rows] @ block).view(*touched.shape[:3], end)

    def mass(self) -> Tensor:
        """(B, L or 1, T, N): the rows of R_l - I."""
        return self._values - self._start.to(self._values)


class BlockRows:
    """Rows times the R of a part of the model whose Abar may come in blocks along the diagonal: crops or windows.

    Args:
        rows: (..., M) what flows into the part's tokens, blocks one after another. The identity gives R itself.
        samples: of several samples (samples, ..., M), whose blocks come one sample after another.
    """

    def __init__(self, rows: Tensor, samples: int = 1) -> None:
        self._shape = rows.shape
        self._values = rows.clone().view(samples, -1, rows.shape[-1])

    def receive(self, offset: int, size: int, abar: Abar) -> None:
        """Takes Abar of the diagonal's blocks that begin at column ``offset``, ``size`` columns each."""
        samples, before = len(self._values), None
        for start, block in abar:
            block = block.unflatten(0, (samples, -1))
            _, blocks, rows, end = block.shape
            if before is None:
                self._values = self._values.to(block)
                touched = self._values[..., offset : offset + blocks * size].unflatten(-1, (blocks, size))
                before = touched.clone()
            touched[..., :end] += torch.einsum("skbr,sbrm->skbm", before[..., start : start + rows], block)

    @property
    def values(self) -> Tensor:
        """The rows so far, in the shape in which they began."""
        return self._values.view(self._shape)


class Saliency:
    """|A * dz/dA| summed over heads in the rows that predict tokens, by layer.

    Args:
        rows: positions of the rows. ``length``: size of the sequence. ``layers``: number of layers.
        samples: B.
    """

    def __init__(self, rows: Iterable[int], length: int, layers: int, samples: int = 1) -> None:
        self._rows = list(rows)
        self.values = torch.zeros(samples, layers, len(self._rows), length)

    def receive(self, layer: int, start: int, product: Tensor) -> None:
        """Takes a block of A * dz/dA (B, heads, rows, columns)."""
        stop = start + product.shape[2]
        here = [index for index, row in enumerate(self._rows) if start <= row < stop]
        if here:
            self.values = self.values.to(product)
            some = product[:, :, [self._rows[index] - start for index in here]].abs().sum(1)
            self.values[:, layer, here, : product.shape[-1]] = some


def whole(abar: Abar, rows: int, columns: int) -> Tensor:
    """(rows, columns): Abar put together, B = 1."""
    found = torch.zeros(rows, columns)
    for start, block in abar:
        found = found.to(block)
        found[start : start + block.shape[1], : block.shape[2]] = block[0]
    return found
