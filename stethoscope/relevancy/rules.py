"""The rules of relevancy as pure functions of matrices. Source: Chefer et al. 2021 (arXiv 2103.15679), eqs 5-10."""

from __future__ import annotations

import torch
from torch import Tensor

RULES = ("eq10", "eq10_no_transpose", "plain")
"""Readings of equation 10 that the field's code has; the first is the equation as printed."""


def identity_like(relevancy: Tensor) -> Tensor:
    """The identity of the size of the (square) last two dimensions."""
    return torch.eye(relevancy.shape[-1], dtype=relevancy.dtype, device=relevancy.device)


def chain(maps: list[Tensor], size: int) -> Tensor:
    """Equation 6 over layers: R_0 = I, R_l = R_{l-1} + Abar_l R_{l-1}.

    Args:
        maps: Abar of every layer, (n, n) float32, first layer first.
        size: n.

    >>> chain([torch.tensor([[0.0, 0.0], [0.5, 0.0]])] * 2, 2)
    tensor([[1., 0.],
            [1., 1.]])
    """
    relevancy = torch.eye(size)
    for abar in maps:
        relevancy = relevancy.to(abar) + abar @ relevancy.to(abar)
    return relevancy


def normalised(relevancy: Tensor) -> Tensor:
    """Equations 8 and 9: (R - I) / rowsum(R - I) + I. A row without mass keeps the identity.

    >>> normalised(torch.tensor([[1.0, 0.0], [0.5, 1.5]]))
    tensor([[1.0000, 0.0000],
            [0.5000, 1.5000]])
    """
    identity = identity_like(relevancy)
    mass = relevancy - identity
    total = mass.sum(-1, keepdim=True)
    return torch.where(total == 0, 0.0, mass / torch.where(total == 0, 1.0, total)) + identity


def across(rule: str, own: Tensor, abar: Tensor, other: Tensor) -> Tensor:
    """What a cross-attention layer adds to the relevancy of the other sequence (equation 10).

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
