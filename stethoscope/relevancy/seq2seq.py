"""Relevancy in an encoder-decoder language model. Source: Chefer et al. 2021 (arXiv 2103.15679), equations 6-10."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stethoscope.relevancy.rules import across, normalised

Layers = Mapping[int, Tensor]


def decoder_rows(
    rule: str, encoder: Tensor, own: Layers, crossing: Layers, rows: Sequence[int], every: bool
) -> tuple[Tensor, Tensor]:
    """Rows of R_dd - I and of R_de after every decoder layer, or after the last alone.

    With the transposed reading of equation 10 later decoder rows would flow into earlier ones, so row k is computed
    on rows 0 to k alone.

    Args:
        rule: one of ``rules.RULES``.
        encoder: R_ee of the encoder, (e, e). ``own``: Abar (d, d) of the decoder's self-attention by layer.
            ``crossing``: (d, e) of its cross-attention.
        rows: decoder rows, T of them.
        every: after every layer.

    Returns:
        (L or 1, T, d) and (L or 1, T, e), float32.
    """
    layers = sorted(own)
    width, size = encoder.shape[-1], own[layers[0]].shape[-1]
    read = encoder.to(own[layers[0]])
    decoder, source = [], []
    for row in rows:
        end = row + 1
        same, other = torch.eye(end).to(read), torch.zeros(end, width).to(read)
        after = []
        for layer in layers:
            abar = own[layer][:end, :end]
            same, other = same + abar @ same, other + abar @ other
            other = other + across(rule, normalised(same), crossing[layer][:end], read)
            mass = same[row].clone()
            mass[row] -= 1
            after.append((torch.nn.functional.pad(mass, (0, size - end)), other[row]))
        kept = after if every else after[-1:]
        decoder.append(torch.stack([one for one, _ in kept]))
        source.append(torch.stack([one for _, one in kept]))
    return torch.stack(decoder, 1), torch.stack(source, 1)
