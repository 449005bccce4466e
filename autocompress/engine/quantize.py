"""Affine weight quantisation: normalise to a grid, round, rescale. Chooses no widths.

One grid per output channel (dimension 0). Symmetric grids have the zero point 2^(bits-1), which is not stored, and
a scale whose sign puts the longer side of the grid where the largest weight is; asymmetric grids span the
channel's range including zero. Either way zero is exactly representable, so pruned weights stay zero. A grid of 1 bit
has the points -scale and +scale, and zero for pruned weights alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autocompress.policy import LayerChoice
from autocompress.stored import Full, Half, Quantised, Stored, half_exponent, round_to_byte, round_to_half

PART_SIZE = 2**22
"""Most weights whose grids are sought at once: temporary copies take several times as much memory."""
CLIPPING = tuple(1.0 - 0.04 * step for step in range(20))
"""Shares of the full range that are tried; the one with the least squared error wins (LAPQ-style clipping)."""


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """code = round(w / scale) + zero, in [0, 2^bits); with 1 bit sign(w / scale) + 1, where sign(0) is 1.

    `scale` (out,) float32, exact in the file's 16 bits; `zero` (out,) float32 holding integers.
    """

    scale: Tensor
    zero: Tensor
    bits: int
    symmetric: bool

    def _rows(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (weight.ndim - 1))
        return self.scale.reshape(shape).to(weight.device), self.zero.reshape(shape).to(weight.device)

    def encode(self, weight: Tensor) -> Tensor:
        """Codes, as floats, of the nearest grid points: same shape as `weight` (out, ...).

        With 1 bit there is none for zero: whoever prunes sets the code of pruned weights to the zero point.
        """
        scale, zero = self._rows(weight)
        if self.bits == 1:
            return 2.0 * (weight / _divisor(scale) >= 0)
        return (weight / _divisor(scale)).round_().add_(zero).clamp_(0, 2**self.bits - 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Weights of `codes`."""
        scale, zero = self._rows(codes)
        return scale * (codes - zero)


def grid_of(weight: Tensor, choice: LayerChoice, importance: Tensor | None = None) -> Grid:
    """The grid that `choice` means for `weight` (out, ...), which is pruned already; `importance` as for `fit_grid`."""
    if choice.entropy:
        return _equal_steps(weight, choice, importance)
    return fit_grid(weight, choice.width, symmetric=choice.symmetric, importance=importance)


def _equal_steps(weight: Tensor, choice: LayerChoice, importance: Tensor | None) -> Grid:
    """One step for all rows, in proportion to the root mean square of the weight.

    For entropy coded codes equal steps lose least at a given length (Gish and Pierce 1968, "Asymptotically efficient
    quantizing"), and nothing needs to be clipped: large codes are rare and rare codes cost little. A normal variable
    takes log2(size / step) + 2.05 bits then, and others less. Rows whose errors weigh differently, as those of a
    depthwise layer do, have steps whose errors weigh the same. A row whose largest weight is beyond a byte's codes has
    a coarser step.
    """
    rows = weight.detach().float().flatten(1)  # (out, n)
    weighs = torch.ones_like(rows[:, 0])
    if importance is not None and importance.ndim == 2:
        weighs = (importance.mean(dim=1) / importance.mean()).clamp_min(torch.finfo(rows.dtype).tiny)
    size = (rows.square().mean(dim=1) * weighs).double().mean().sqrt().float()
    reach = 2 ** (choice.width - 1)
    largest = torch.maximum(rows.amax(dim=1), -rows.amin(dim=1))
    scale = torch.maximum(size * 2.0 ** (2 - choice.bits) * weighs.rsqrt(), largest / (reach - 1))
    return Grid(round_to_half(scale), torch.full_like(scale, reach), choice.width, True)


def fit_grid(weight: Tensor, bits: int, *, symmetric: bool, importance: Tensor | None = None) -> Grid:
    """The grid per channel that loses least: candidates are clipped versions of the full range.

    `weight` (out, ...); pruned entries count as exact zeros on every grid. `importance` (inputs of a row,) weighs the
    squared errors; without it all count alike. With 1 bit the grid is symmetric, and what is exactly zero is pruned.
    """
    rows = weight.detach().float().flatten(1)  # (out, n)
    if bits == 1:
        return _binary(rows, torch.ones_like(rows[:1]) if importance is None else importance)
    unit = 2.0 ** -half_exponent(rows)  # so that squared errors neither overflow nor vanish
    weighs = None if importance is None else importance.expand(len(rows), -1)
    grids = [
        _clipped(part / unit, bits, symmetric=symmetric, importance=None if weighs is None else weighs[start:end])
        for start, end, part in parts(rows)
    ]
    scale, zero = (torch.cat(values) for values in zip(*grids, strict=True))
    return Grid(round_to_half(scale * unit), zero, bits, symmetric)


def parts(rows: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Rows (out, n) of a large weight some at a time, with where they start and end; all at once of any other."""
    step = max(1, PART_SIZE // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        yield start, start + step, rows[start : start + step]


def _clipped(rows: Tensor, bits: int, *, symmetric: bool, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale (out,) and zero (out,) of least squared error; `importance` (out, n)."""
    best_error = torch.full((len(rows),), float("inf"), device=rows.device)
    best_scale, best_zero = torch.ones_like(best_error), torch.zeros_like(best_error)
    for share in CLIPPING if bits < 8 else CLIPPING[:5]:
        grid = _symmetric(rows, bits, share) if symmetric else _asymmetric(rows, bits, share)
        error = (grid.decode(grid.encode(rows)) - rows).square()
        error = (error if importance is None else error * importance).sum(dim=1)
        wins = error < best_error
        best_error = torch.where(wins, error, best_error)
        best_scale = torch.where(wins, grid.scale, best_scale)
        best_zero = torch.where(wins, grid.zero, best_zero)
    return best_scale, best_zero


def _binary(rows: Tensor, importance: Tensor) -> Grid:
    """The scale of least squared error is the mean magnitude (XNOR-Net, 1603.05279, equation 6)."""
    share = importance * (rows != 0)  # (out, n)
    share = share / share.sum(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    scale = (rows.abs() * share).sum(dim=1)
    return Grid(round_to_half(scale), torch.ones_like(scale), 1, True)


def _symmetric(rows: Tensor, bits: int, share: float) -> Grid:
    half = 2 ** (bits - 1)
    low, high = rows.amin(dim=1).clamp(max=0), rows.amax(dim=1).clamp(min=0)
    # codes reach -half on one side and half - 1 on the other: the longer side takes the larger weight
    scale = torch.where(-low >= high, 1.0, -1.0) * torch.maximum(-low / half, high / half)
    other = torch.minimum(-low, high) / max(1, half - 1)
    scale = torch.sign(scale) * torch.maximum(scale.abs(), other) * share
    return Grid(scale, torch.full_like(scale, half), bits, True)


def _asymmetric(rows: Tensor, bits: int, share: float) -> Grid:
    low, high = rows.amin(dim=1).clamp(max=0) * share, rows.amax(dim=1).clamp(min=0) * share
    scale = (high - low) / (2**bits - 1)
    return Grid(scale, torch.round(-low / _divisor(scale)).clamp(0, 2**bits - 1), bits, False)


def _divisor(scale: Tensor) -> Tensor:
    """A channel whose scale is 0 (all zeros, or too small beside the others for 16 bits) has only the code of zero."""
    return torch.where(scale == 0, torch.full_like(scale, float("inf")), scale)


def quantise(weight: Tensor, choice: LayerChoice, mask: Tensor | None, grid: Grid | None = None) -> Stored:
    """`weight` (out, ...) as the file holds it: pruned by `mask`, then on `grid` or the best grid of `choice`.

    At 32 bits without a mask that is the very memory of `weight`, which nobody may write to.
    A weight without elements, as removed layers have, needs no grid.
    """
    if not weight.numel():
        return Full(weight.detach().float().clone())
    weight = weight.detach().float() if mask is None else weight.detach().float() * mask
    if choice.bits == 32:
        return Full(weight, mask)
    if choice.bits == 16:
        return Half(round_to_half(weight), mask)
    narrow = grid is None and choice.entropy
    grid = grid or grid_of(weight, choice)
    codes = grid.encode(weight).to(torch.uint8)
    zero = grid.zero.to(torch.uint8)
    if mask is not None:
        codes = torch.where(mask, codes, zero.reshape(-1, *[1] * (codes.ndim - 1)))
    found = Quantised(codes, grid.scale, zero, grid.bits, grid.symmetric, mask)
    return (found.narrowed() if narrow else found).with_length()


def rescale(stored: Stored, factor: Tensor) -> Stored:
    """Each row multiplied by `factor` (out,): a grid absorbs it in its scale, so the codes stay."""
    if isinstance(stored, Quantised):
        rounded = round_to_byte if stored.scale_bits == 8 else round_to_half
        return replace(stored, scale=rounded(stored.scale * factor))
    values = stored.dense() * factor.reshape(-1, *[1] * (stored.values.ndim - 1))
    if isinstance(stored, Half):
        return Half(round_to_half(values), stored.mask)
    if isinstance(stored, Full):
        return Full(values, stored.mask)
    raise TypeError("integer buffers are not rescaled")
