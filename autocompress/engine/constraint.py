"""What a weight stays true to while it trains: its mask, its grid or its sixteen bits, exactly as the file holds them.

The forward pass sees the stored weight bit for bit; the gradient is that of a weight that was never rounded. Trains
nothing, knows nothing about models.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from autocompress.engine.quantize import Grid
from autocompress.stored import round_to_half

MOST_OFFSET = 0.45
"""How far from its grid point, in steps of the grid, a weight may start to train: it still rounds to that point."""


@dataclass(frozen=True, eq=False)
class Constraint:
    """`mask` is False where a weight is pruned; `grid` holds the points below 16 bits; `half` says 16 bits.

    `coded` says that the file holds the grid's codes entropy coded.
    """

    mask: Tensor | None
    grid: Grid | None
    half: bool = False
    coded: bool = False

    def apply(self, weight: Tensor, scale: Tensor | None = None) -> Tensor:
        """The weight (out, ...) as it will be stored, with the grid's scale or with one (out,) that learns.

        With a fixed scale the gradient passes straight through rounding (1308.3432, section 4) and stops at pruned
        weights. A learning scale is seen as the file rounds it; both gradients are then those of LSQ.
        """
        if self.grid is not None and scale is not None:
            return _Learned.apply(weight, scale, self)  # type: ignore[no-any-return, no-untyped-call]
        return _Fixed.apply(weight, self)  # type: ignore[no-any-return, no-untyped-call]

    def stored(self, weight: Tensor) -> Tensor:
        """Values that the file gives back for `weight`."""
        if self.grid is not None:
            position = self.positions(weight, self.grid.scale)
            return (self.rows(self.grid.scale, weight) * self.steps(position)).to(weight.dtype)
        pruned = self.only_kept(weight.float())
        return (round_to_half(pruned) if self.half else pruned).to(weight.dtype)

    def toward(self, stored: Tensor, wanted: Tensor) -> Tensor:
        """A weight that is stored as `stored`, and as near to `wanted` as that allows: where training starts.

        From the grid points themselves hardly a code would change: in one epoch a weight moves by much less than half
        of a step of two bits. The remainder says which way it should go first.
        """
        if self.grid is None:
            return stored
        step = self.grid.scale.abs() * (2 if self.grid.bits == 1 else 1)  # one bit has no code between plus and minus
        most = self.rows(MOST_OFFSET * step, stored)
        offset = torch.minimum(torch.maximum(wanted.float() - stored, -most), most)
        return stored + self.only_kept(offset)

    def only_kept(self, values: Tensor) -> Tensor:
        """`values` (out, ...), zero where a weight is pruned."""
        return values if self._kept is None else values * self._kept

    def positions(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Unpruned weights in units of their row's scale; a scale of 0 has all of them at 0."""
        pruned = self.only_kept(weight.float())
        return pruned / self.rows(torch.where(scale == 0, torch.inf, scale), weight)

    def steps(self, position: Tensor) -> Tensor:
        """Codes, counted from the zero point, of weights at `position`."""
        low, high = self.limits
        if self.grid is not None and self.grid.bits == 1:  # which has no code for zero
            return self.only_kept(torch.where(position >= 0, 1.0, -1.0))
        return torch.round(position).clamp(self.rows(low, position), self.rows(high, position))

    def derivatives(self, position: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Of each stored weight, by itself and by its row's scale (LSQ, 1902.08153, equations 5 and 3).

        A weight beyond the outermost code moves only with the scale.
        """
        low, high = self.limits
        inside = (position >= self.rows(low, position)) & (position <= self.rows(high, position))
        by_scale = torch.where(inside, steps - position, steps)
        return inside if self.mask is None else inside & self.mask, by_scale

    def share(self, weight: Tensor) -> Tensor:
        """1 / sqrt(n q) (out,), which scales learn with (LSQ, section 2.2).

        For n unpruned weights in the row and codes up to q from zero.
        """
        low, high = self.limits
        count = float(weight[0].numel()) if self.mask is None else self.mask.flatten(1).sum(dim=1).clamp_min(1)
        return (count * torch.maximum(-low, high)).rsqrt()

    def on(self, device: torch.device) -> Constraint:
        """The same with its tensors on `device`."""
        grid = self.grid and replace(self.grid, scale=self.grid.scale.to(device), zero=self.grid.zero.to(device))
        return replace(self, mask=None if self.mask is None else self.mask.to(device), grid=grid)

    def rescaled(self, scale: Tensor) -> Constraint:
        """The same on the grid whose scale is `scale` (out,) as the file rounds it."""
        if self.grid is None:
            return self
        return replace(self, grid=replace(self.grid, scale=round_to_half(scale.detach().float())))

    @cached_property
    def limits(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest code (out,) of each row, counted from its zero point."""
        assert self.grid is not None
        if self.grid.bits == 1:
            return -torch.ones_like(self.grid.zero), torch.ones_like(self.grid.zero)
        return -self.grid.zero, 2**self.grid.bits - 1 - self.grid.zero

    @cached_property
    def _kept(self) -> Tensor | None:
        return None if self.mask is None else self.mask.float()

    @staticmethod
    def rows(values: Tensor, like: Tensor) -> Tensor:
        """`values` (out,) so that they meet the rows of `like` (out, ...)."""
        return values.reshape(-1, *[1] * (like.ndim - 1))


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
        rounded = round_to_half(scale)
        position = constraint.positions(weight, rounded)
        steps = constraint.steps(position)
        share = constraint.share(weight) * (rounded != 0)  # a row without a scale stays without
        ctx.save_for_backward(*constraint.derivatives(position, steps), share)
        return (constraint.rows(rounded, weight) * steps).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *arriving: Any) -> Any:
        by_weight, by_scale, share = ctx.saved_tensors
        return arriving[0] * by_weight, (arriving[0] * by_scale).flatten(1).sum(dim=1) * share, None
