"""Rows of relevancy carried through the layers from the last to the first, in the order of a backward pass.

Row i of R_l = (I + Abar_l) ... (I + Abar_1) is e_i (I + Abar_l) ... (I + Abar_1): only vectors are multiplied, layer by
layer as the backward pass gives Abar away (Chefer et al. 2021, equation 6, read from the left).
"""

from __future__ import annotations

import torch
from torch import Tensor


class LayerRows:
    """Rows of R_l of the language model, after every layer l or after the last alone.

    Args:
        rows: (T,) positions of the rows. ``length``: size of the sequence.
        layers: number of layers. ``every``: after every layer.
    """

    def __init__(self, rows: Tensor, length: int, layers: int, every: bool) -> None:
        self._start = torch.nn.functional.one_hot(rows, length).float()
        self._values = self._start.repeat(layers if every else 1, 1, 1)
        self._every = every

    def receive(self, layer: int, abar: Tensor) -> None:
        """Takes Abar (1, N, N) of a layer; rows after earlier layers do not see it."""
        self._values = self._values.to(abar)
        touched = self._values[layer:] if self._every else self._values
        touched += touched @ abar[0]

    def mass(self) -> Tensor:
        """(L or 1, T, N): the rows of R_l - I."""
        return self._values - self._start.to(self._values)


class BlockRows:
    """Rows times R_v of the vision tower, whose Abar comes in blocks: crops or windows.

    Args:
        rows: (..., M) what flows into the tower's tokens, blocks one after another.
    """

    def __init__(self, rows: Tensor) -> None:
        self.values = rows.clone()

    def receive(self, offset: int, abar: Tensor) -> None:
        """Takes Abar (B, n, n) of the blocks that begin at column ``offset``."""
        blocks, size, _ = abar.shape
        touched = self.values[..., offset : offset + blocks * size].unflatten(-1, (blocks, size))
        touched += torch.einsum("...bn,bnm->...bm", touched, abar.to(touched))
