"""The noised image of VCD (Leng et al., "Visual Contrastive Decoding", arXiv 2311.16922)."""

from __future__ import annotations

import torch
from torch import Tensor

STEPS, STEP = 1000, 500
"""Steps of the diffusion schedule, and the one that the published scripts noise to."""


def noised(pixels: Tensor, step: int = STEP, seed: int = 0) -> Tensor:
    """Pixels after ``step`` steps of forward diffusion: sqrt(a) x + sqrt(1 - a) e, a = product of (1 - beta).

    The betas are sigmoid(linspace(-6, 6, 1000)) * (5e-3 - 1e-5) + 1e-5. The noise e is the same for every image of one
    shape, so that a trace can be repeated.

    Args:
        pixels: normalised pixel values of any shape.
        step: index of the step, 0 to 999. ``seed``: of the noise.

    Returns:
        The same shape and dtype.
    """
    betas = torch.linspace(-6, 6, STEPS, dtype=torch.float64).sigmoid() * (5e-3 - 1e-5) + 1e-5
    kept = float((1 - betas).cumprod(0)[step])
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed)).to(pixels)
    return kept**0.5 * pixels + (1 - kept) ** 0.5 * noise
