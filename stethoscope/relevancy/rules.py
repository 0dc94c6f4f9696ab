"""Propagate relevancy by the rules of Chefer et al. 2021 (arXiv 2103.15679), equations 6-10, on plain matrices.

``backward_pass`` has equation 6 in running form, one block of Abar at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

RULES = ("eq10", "eq10_no_transpose", "plain")
"""Readings of equation 10 in published code; the first is the equation as printed."""

Layers = Mapping[int, Tensor]
"""Abar by layer."""


def identity_like(relevancy: Tensor) -> Tensor:
    """Return the identity with the size of the (square) last two dimensions."""
    return torch.eye(relevancy.shape[-1], dtype=relevancy.dtype, device=relevancy.device)


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
