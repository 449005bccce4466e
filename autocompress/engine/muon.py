"""An optimizer whose steps turn all directions of a weight matrix alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the Newton-Schulz iteration: they bring singular values near 1 in few rounds, not exactly to it (Jordan 2024)."""
ROUNDS = 5


def orthogonal(matrices: Tensor) -> Tensor:
    """About U V^T of each matrix U S V^T (..., rows, columns): singular values become 0.7 to 1.2, tiny ones less.

    The quintic Newton-Schulz iteration of Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon). Zeros stay.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x: Tensor = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def _gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


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
            alike: dict[tuple[int, ...], list[Tensor]] = {}  # matrices of a shape are turned together
            for p in group["params"]:
                if p.grad is None or not p.numel():
                    continue
                if p.ndim < 2:
                    p.sub_(group["lr"] * self._ahead(p, _gradient(p) + group["weight_decay"] * p, group["momentum"]))
                else:
                    alike.setdefault((p.shape[0], p[0].numel()), []).append(p)
            for shape, weights in alike.items():
                ahead = [self._ahead(p, _gradient(p), group["momentum"]).reshape(shape) for p in weights]
                for p, turned in zip(weights, orthogonal(torch.stack(ahead)), strict=True):
                    size = p.square().mean().sqrt() * max(shape) ** 0.5  # the latter makes `turned` about 1 large
                    p.sub_(group["lr"] * size * turned.reshape(p.shape))

    def _ahead(self, p: Tensor, gradient: Tensor, momentum: float) -> Tensor:
        """The momentum of `p` after `gradient`, looked at one step ahead."""
        if "momentum_buffer" not in self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        known: Tensor = self.state[p]["momentum_buffer"].mul_(momentum).add_(gradient)
        return gradient + momentum * known
