"""Relevancy through a visual abstractor, whose queries attend to themselves and to vision tokens under one softmax.

A layer's map has one row per query and the columns [queries ; vision tokens], as in mPLUG-Owl2 (Ye et al. 2023, arXiv
2311.04257). So queries and vision tokens are one sequence, of which a layer changes the queries alone: equation 6 of
Chefer et al. 2021 (arXiv 2103.15679) holds for it as it is, with zeros in the rows of the vision tokens,

    R_qq += Abar_qq R_qq,    R_qi += Abar_qq R_qi + Abar_qi R_ii,

where R_ii, the vision tower's, is where the recursion starts. This is self-attention; equation 10, which normalises two
maps because each has a softmax of its own, does not apply. Read from the left, only vectors are multiplied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stethoscope.relevancy.rows import Abar


class QueryRows:
    """Rows that flow into queries, carried through the abstractor's layers from the last to the first.

    >>> rows = QueryRows(torch.tensor([[1.0, 0.0]]), vision=2)
    >>> rows.receive([(0, torch.tensor([[[0.0, 0.5, 0.25, 0.0], [0.0, 0.0, 0.0, 1.0]]]))])
    >>> rows.queries, rows.vision
    (tensor([[1.0000, 0.5000]]), tensor([[0.2500, 0.0000]]))

    Args:
        rows: (..., Q) relevancy of the queries.
        vision: number of vision tokens M.
        samples: of several samples (samples, ..., Q).
    """

    def __init__(self, rows: Tensor, vision: int, samples: int = 1) -> None:
        self._count, self._shape = rows.shape[-1], rows.shape[:-1]
        self._values = torch.nn.functional.pad(rows, (0, vision)).view(samples, -1, rows.shape[-1] + vision)

    def receive(self, abar: Abar) -> None:
        """Takes Abar (Q, Q + M) of a layer in blocks, of every sample."""
        before = None
        for start, block in abar:
            if before is None:
                self._values = self._values.to(block)
                before = self._values[..., : self._count].clone()
            _, rows, end = block.shape
            self._values[..., :end] += before[..., start : start + rows] @ block

    @property
    def queries(self) -> Tensor:
        """(..., Q) what is left to the queries themselves."""
        return self._values[..., : self._count].reshape(*self._shape, -1)

    @property
    def vision(self) -> Tensor:
        """(..., M) what flows on into the vision tokens."""
        return self._values[..., self._count :].reshape(*self._shape, -1)
