"""Muon for the hidden matrices and AdamW for everything else, in float32.

Muon (Jordan et al. 2024) needs about a third fewer steps here. ``torch.optim.Muon`` orthogonalises in bfloat16,
which is slow on processors without native support; this one stays in float32 and handles all matrices of one shape
in one batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

SLOW = 1 / 3
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class MuonWithAdam:
    """Optimiser with one learning rate for both halves.

    Args:
        parameters: All parameters; square-ish hidden matrices go to Muon, embeddings, heads, norms and biases to AdamW.
        slow: Those of them that learn at a third of the rate.
        weight_decay: Decoupled decay of the Muon matrices.
        momentum: Momentum of Muon (Nesterov).
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        slow: Iterable[nn.Parameter] = (),
        weight_decay: float = 0.05,
        momentum: float = 0.95,
    ) -> None:
        unique = list({id(p): p for p in parameters}.values())
        self._matrices = [p for p in unique if p.ndim == 2 and min(p.shape) >= 96 and max(p.shape) < 500]
        chosen = {id(p) for p in self._matrices}
        self._slow = {id(p) for p in slow}
        rest = [p for p in unique if id(p) not in chosen]
        groups = [[p for p in rest if id(p) not in self._slow], [p for p in rest if id(p) in self._slow]]
        self._velocity = [torch.zeros_like(p) for p in self._matrices]
        self._adam = torch.optim.AdamW(
            [{"params": group} for group in groups], lr=0.0, weight_decay=0.01, betas=(0.9, 0.98)
        )
        self._weight_decay, self._momentum = weight_decay, momentum
        self._groups: dict[tuple[int, ...], list[int]] = {}
        for i, matrix in enumerate(self._matrices):
            self._groups.setdefault(tuple(sorted(matrix.shape)), []).append(i)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update all parameters from their gradients and clear these."""
        for group, factor in zip(self._adam.param_groups, (1.0, SLOW), strict=True):
            group["lr"] = learning_rate * factor
        self._adam.step()
        for members in self._groups.values():
            self._step_matrices(members, learning_rate)
        self._adam.zero_grad()
        for matrix in self._matrices:
            matrix.grad = None

    def _step_matrices(self, members: list[int], learning_rate: float) -> None:
        updates, owners = [], []
        for i in members:
            matrix = self._matrices[i]
            if matrix.grad is None:
                continue
            velocity = self._velocity[i].lerp_(matrix.grad, 1 - self._momentum)
            update = matrix.grad.lerp(velocity, self._momentum)
            updates.append(update if update.shape[0] <= update.shape[1] else update.T)
            owners.append(matrix)
        if not updates:
            return
        stack = orthogonalise(torch.stack(updates))
        scale = 0.2 * max(stack.shape[1:]) ** 0.5  # the root mean square of an AdamW update
        for matrix, update in zip(owners, stack, strict=True):
            rate = learning_rate * (SLOW if id(matrix) in self._slow else 1.0)
            matrix.mul_(1 - rate * self._weight_decay)
            matrix.add_(update if update.shape == matrix.shape else update.T, alpha=-rate * scale)

    def state_dict(self) -> dict[str, Any]:
        return {"adam": self._adam.state_dict(), "velocity": self._velocity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._adam.load_state_dict(state["adam"])
        for mine, stored in zip(self._velocity, state["velocity"], strict=True):
            mine.copy_(stored)


def orthogonalise(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Bring the singular values of wide matrices near 1 by a quintic Newton-Schulz iteration.

    Args:
        matrices: (n, rows, columns) with rows <= columns.
        iterations: Number of iterations.
    """
    a, b, c = _NEWTON_SCHULZ
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x
