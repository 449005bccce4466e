"""What a weight stays true to while it trains: its mask, its grid or its sixteen bits, exactly as the file holds them.

The forward pass sees the stored weight bit for bit; the gradient is that of a weight that was never rounded. Trains
nothing, knows nothing about models.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from autocompress.engine.quantize import Grid
from autocompress.stored import round_to_half


@dataclass(frozen=True, eq=False)
class Constraint:
    """`mask` is False where a weight is pruned; `grid` holds the points below 16 bits; `half` says 16 bits."""

    mask: Tensor | None
    grid: Grid | None
    half: bool = False

    def apply(self, weight: Tensor, scale: Tensor | None = None) -> Tensor:
        """The weight (out, ...) as it will be stored, with the grid's scale or with one (out,) that learns.

        With a fixed scale the gradient passes straight through rounding (1308.3432, section 4) and stops at pruned
        weights. A learning scale is seen as the file rounds it; both gradients are then those of `learned_gradients`.
        """
        if self.grid is not None and scale is not None:
            return _Learned.apply(weight, scale, self)  # type: ignore[no-any-return, no-untyped-call]
        return _Fixed.apply(weight, self)  # type: ignore[no-any-return, no-untyped-call]

    def stored(self, weight: Tensor) -> Tensor:
        """Values that the file gives back for `weight`."""
        pruned = weight.float() if self.mask is None else weight.float() * self.mask
        if self.grid is not None:
            codes = self.grid.encode(pruned)
            if self.mask is not None and self.grid.bits == 1:  # which has no code for zero
                codes = torch.where(self.mask, codes, 1.0)
            pruned = self.grid.decode(codes)
        elif self.half:
            pruned = round_to_half(pruned)
        return pruned.to(weight.dtype)

    def on(self, device: torch.device) -> Constraint:
        """The same with its tensors on `device`."""
        grid = self.grid and replace(self.grid, scale=self.grid.scale.to(device), zero=self.grid.zero.to(device))
        return replace(self, mask=None if self.mask is None else self.mask.to(device), grid=grid)

    def rescaled(self, scale: Tensor) -> Constraint:
        """The same on the grid whose scale is `scale` (out,) as the file rounds it."""
        if self.grid is None:
            return self
        return replace(self, grid=replace(self.grid, scale=round_to_half(scale.detach().float())))


def learned_gradients(weight: Tensor, constraint: Constraint) -> tuple[Tensor, Tensor]:
    """Derivatives of each stored weight (out, ...) by itself and by its row's scale (LSQ, 1902.08153, eq. 5 and 3).

    A weight beyond the outermost code moves only with the scale. The second is divided by sqrt(n q) (section 2.2), for
    n unpruned weights in the row and codes up to q from zero. A scale of 0 has no grid, and stays.
    """
    grid, mask = constraint.grid, constraint.mask
    assert grid is not None
    scale, zero = (v.reshape(-1, *[1] * (weight.ndim - 1)) for v in (grid.scale, grid.zero))
    kept = torch.ones_like(weight) if mask is None else mask.to(weight.dtype)
    low, high = (-1.0, 1.0) if grid.bits == 1 else (-zero, 2**grid.bits - 1 - zero)
    position = weight * kept / torch.where(scale == 0, torch.inf, scale)
    inside = kept * ((position >= low) & (position <= high))
    steps = (grid.encode(weight * kept) - zero) * kept
    count = kept.flatten(1).sum(dim=1).clamp_min(1)
    reach = torch.ones_like(grid.zero) if grid.bits == 1 else torch.maximum(grid.zero, 2**grid.bits - 1 - grid.zero)
    share = (grid.scale != 0) / (count * reach).sqrt()
    return inside, (steps - position * inside) * share.reshape(scale.shape)


class _Fixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, constraint: Constraint) -> Tensor:
        ctx.mask = constraint.mask
        return constraint.stored(weight)

    @staticmethod
    def backward(ctx: Any, *arriving: Any) -> Any:
        return arriving[0] if ctx.mask is None else arriving[0] * ctx.mask, None


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, constraint: Constraint) -> Tensor:
        rounded = constraint.rescaled(scale)
        ctx.save_for_backward(*learned_gradients(weight, rounded))
        return rounded.stored(weight)

    @staticmethod
    def backward(ctx: Any, *arriving: Any) -> Any:
        by_weight, by_scale = ctx.saved_tensors
        return arriving[0] * by_weight, (arriving[0] * by_scale).flatten(1).sum(dim=1), None
