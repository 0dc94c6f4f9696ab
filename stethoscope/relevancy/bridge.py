"""Relevancy through a Q-Former: from its queries to vision tokens and to its own question tokens.

Source: Chefer et al. 2021 (arXiv 2103.15679), equations 6-10. Queries and question tokens are one sequence (s), vision
tokens the other (i).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stethoscope.relevancy.rules import across, normalised

Layers = Mapping[int, Tensor]


def through_queries(rule: str, own: Layers, crossing: Layers, tower: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    """R_si and R_ss of the query rows.

    Args:
        rule: one of ``rules.RULES``.
        own: Abar (s, s) of the self-attention by layer.
        crossing: Abar (queries, i) of the cross-attention, of the layers that have it.
        tower: R_ii of the vision tower, (i, i).
        queries: number of query tokens, the first of s.

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
            other[:queries] += across(rule, block, crossing[layer].to(like), tower.to(like))
    return other[:queries], same[:queries]
