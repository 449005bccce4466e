"""An optimizer whose steps turn all directions of a weight matrix alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the Newton-Schulz iteration: they bring singular values near 1 in few rounds, not exactly to it (Jordan 2024)."""
ROUNDS = 5


def orthogonal(matrix: Tensor) -> Tensor:
    """About U V^T of `matrix` = U S V^T (rows, columns): its singular values become 0.7 to 1.2, tiny ones less.

    The quintic Newton-Schulz iteration of Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon). Zeros stay.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix.T if tall else matrix
    x = x / x.norm().clamp_min(torch.finfo(x.dtype).tiny)
    for _ in range(ROUNDS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised for everything with two or more dimensions (a filter is a row).

    Such a step moves each weight by about `lr` times the root mean square of its tensor, in the manner of LARS
    (1708.03888), so that a grid with few points is crossed at the same pace in every layer. `torch.optim.Muon` is the
    same for matrices alone, with steps of an absolute size. All other tensors are moved as SGD does it.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 0.0, momentum: float = 0.9, weight_decay: float = 0.0
    ) -> None:
        """`weight_decay` is for tensors with fewer than two dimensions: elsewhere the size of steps follows the size of
        the weight, and decay would shrink both."""
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # losses are the caller's
        """One step along the gradients that are there."""
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.numel():
                    self._move(p, p.grad, **{key: group[key] for key in ("lr", "momentum", "weight_decay")})

    def _move(self, p: Tensor, gradient: Tensor, *, lr: float, momentum: float, weight_decay: float) -> None:
        if p.ndim < 2:
            gradient = gradient + weight_decay * p
        if "momentum_buffer" not in self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        known = self.state[p]["momentum_buffer"].mul_(momentum).add_(gradient)
        ahead = gradient + momentum * known
        if p.ndim >= 2:
            matrix = ahead.flatten(1)
            size = p.square().mean().sqrt() * max(matrix.shape) ** 0.5  # of an orthogonal matrix's entries the inverse
            ahead = size * orthogonal(matrix).reshape_as(p)
        p.sub_(lr * ahead)
