"""What a weight becomes when some of it must go and the rest must lie on a grid, so that its outputs change least.

All of it works on the rows (out, d) of one weight and the matrix H of what those rows are multiplied with: the order in
which weights are pruned, the least-squares fit of those that stay, rounding with error feedback and coordinate descent
on the grid. `h` is (d, d), or (groups, d, d) when each group of successive rows has its own. Knows nothing about
models, layers or where H comes from; chooses no levels.

Memory: no array is larger than H in double precision (170 MB for d = 4608) or a few copies of the rows, but for the
row-wise inverses, which take `EXACT_BYTES` at most.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from autocompress.engine.quantize import Grid, grid_of
from autocompress.policy import LayerChoice
from autocompress.stored import round_to_half

REMOVED_PER_ROUND = 0.05
"""Share of the remaining weights that goes between two updates of the others."""
REMOVED_PER_SHARED_ROUND = ((5 * 10**8, 0.1), (2 * 10**9, 0.2), (2**63, 0.35))
"""The same with one inverse for all rows, by the most rows * d * d: a round takes longer the larger the layer."""
MOST_ZEROS = 0.97
EXACT_BYTES = 2**29
"""Layers whose row-wise inverses of H take more are pruned with one inverse that all rows share."""
REMOVAL_BYTES = 2**26
"""Columns of the inverses that are taken out at a time."""
BLOCK = 64
SWEEPS = 3
"""Sweeps of coordinate descent for layers of up to `STARTED_SIZE`, where they are cheap; larger ones get two."""
STARTS = (1.0, 0.8, 0.9, 1.1, 1.2)
"""Multiples of the best scale for plain rounding from which a row's grid is sought."""
STARTED_BITS = 4
STARTED_SIZE = 10**8
"""Most rows * d * d of a layer whose grids have several starts, and most bits: elsewhere they gain little."""
ITERATIONS = 50
"""Most steps of conjugate gradients in a fit."""
TOLERANCE = 5e-3
"""A fit that is rounded later ends when a step gains less than this share of the error that is left."""
FINE = 1e-4
"""The same for a fit that is the solution."""

Array = npt.NDArray[np.float32]


def times(rows: Tensor, h: Tensor) -> Tensor:
    """Rows (out, d) times their H."""
    return rows @ h if h.ndim == 2 else (rows.reshape(len(h), -1, rows.shape[1]) @ h).flatten(0, 1)


def diagonal_of(h: Tensor, rows: int) -> Tensor:
    """The diagonal of each row's H: (d,) if all share it, else (rows, d)."""
    found = h.diagonal(dim1=-2, dim2=-1)
    return found if h.ndim == 2 else found.repeat_interleave(rows // len(h), dim=0)


# --- which weights go -----------------------------------------------------------------------------------


def removal_order(weight: Tensor, h: Tensor) -> Tensor:
    """Ranks (out, d): 0 is the first weight to go.

    Rounds of the optimal brain surgeon (Hassibi and Stork 1993; rows as in Optimal Brain Compression, 2208.11580,
    section 4): the least w^2 / [H^-1]_pp of the whole layer go, and the rest of each row makes up for them.
    """
    if 4 * weight.numel() * weight.shape[1] <= EXACT_BYTES:
        try:
            return _rounds(weight.shape, _Exact(weight, h))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            pass  # the inverses lost their precision on the way
    return _rounds(weight.shape, _Shared(weight, h))


def _rounds(shape: torch.Size, state: _Exact | _Shared) -> Tensor:
    """Ranks of a weight of this shape: every round takes a share of what is left."""
    alive = torch.ones(shape, dtype=torch.bool)
    ranks = torch.full(shape, shape.numel(), dtype=torch.long)
    removed, last = 0, int(shape.numel() * MOST_ZEROS)
    while removed < last:
        count = min(last - removed, int(state.share * (shape.numel() - removed)) + 1)
        saliency = torch.where(alive, state.saliency(alive), torch.inf)
        order = saliency.flatten().argsort(stable=True)[:count]
        ranks.view(-1)[order] = torch.arange(removed, removed + count)
        gone = torch.zeros(shape.numel(), dtype=torch.bool)
        gone[order] = True
        alive &= ~gone.reshape(shape)
        state.remove(gone.reshape(shape), alive)
        removed += count
    rest = alive.flatten().nonzero().flatten()
    ranks.view(-1)[rest] = removed + ranked(state.saliency(alive).flatten()[rest])
    return ranks


class _Exact:
    """Each row with the inverse of its own kept block of H."""

    def __init__(self, weight: Tensor, h: Tensor) -> None:
        self.w, self.share = weight.float().clone(), REMOVED_PER_ROUND
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(h.double())).float()
        groups = inverse if h.ndim == 3 else inverse.unsqueeze(0)
        self.inverses = groups.repeat_interleave(len(weight) // len(groups), dim=0)  # (out, d, d)

    def saliency(self, _alive: Tensor) -> Tensor:
        return self.w.square() / self.inverses.diagonal(dim1=1, dim2=2).clamp_min(1e-30)

    def remove(self, gone: Tensor, _alive: Tensor) -> None:
        """As many rows at a time as their columns of the inverses allow: a round may empty a whole row."""
        most = max(1, int(gone.sum(dim=1).max()))
        size = max(1, REMOVAL_BYTES // (4 * most * gone.shape[1]))
        for start in range(0, len(gone), size):
            rows = slice(start, start + size)
            if bool(gone[rows].any()):
                _remove(self.w[rows], self.inverses[rows], gone[rows])


class _Shared:
    """One inverse for all rows of a group, of H as a row sees it on average.

    A row keeps input j with the share k_j of all rows. As under dropout, the mean of H over such rows, rescaled, is
    H + diag((1 - k_j) / k_j H_jj) (Wager et al., 1307.1493, section 2); its inverse stands for each row's own.
    """

    def __init__(self, weight: Tensor, h: Tensor) -> None:
        self.h = h.float() if h.ndim == 3 else h.float().unsqueeze(0)
        self.dense = weight.float()
        size = weight.numel() * weight.shape[1]
        self.share = next(share for most, share in REMOVED_PER_SHARED_ROUND if size <= most)
        self.w = self.dense

    def saliency(self, alive: Tensor) -> Tensor:
        size = len(alive) // len(self.h)
        kept = alive.float().reshape(len(self.h), size, -1).mean(dim=1).clamp_min(1 / (2 * size))  # (groups, d)
        seen = self.h + torch.diag_embed((1 - kept) / kept * self.h.diagonal(dim1=1, dim2=2))
        inverse: Tensor = torch.cholesky_inverse(torch.linalg.cholesky(seen))
        variance = inverse.diagonal(dim1=1, dim2=2) * kept
        return self.w.square() / variance.repeat_interleave(size, dim=0)

    def remove(self, _gone: Tensor, alive: Tensor) -> None:
        self.w = least_squares(self.dense, self.h, alive, start=self.w)


def ranked(values: Tensor) -> Tensor:
    """Place of each value in ascending order."""
    ranks = torch.empty(values.numel(), dtype=torch.long)
    ranks[values.argsort(stable=True)] = torch.arange(values.numel())
    return ranks


def _remove(w: Tensor, inverses: Tensor, gone: Tensor) -> None:
    """Zero the weights that are `gone` and let each row's others follow; in place, all rows at once.

    w -= G S^-1 w_P and H^-1 -= G S^-1 G^T with G the columns P of H^-1 and S its block (P, P). Rows lose different
    numbers of weights; shorter ones are filled up with an identity block that changes nothing.
    """
    rows, d = w.shape
    counts = gone.sum(dim=1)
    most = int(counts.max())
    index = gone.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]  # (rows, most)
    real = torch.arange(most) < counts[:, None]
    columns = inverses.gather(2, index[:, None, :].expand(rows, d, most)) * real[:, None, :]
    block = columns.gather(1, index[:, :, None].expand(rows, most, most)) * real[:, :, None]
    factor = torch.linalg.cholesky(block + torch.diag_embed((~real).to(w.dtype)))
    half = torch.linalg.solve_triangular(factor, columns.transpose(1, 2), upper=False)  # (rows, most, d)
    own = torch.linalg.solve_triangular(factor, (w.gather(1, index) * real).unsqueeze(-1), upper=False)
    w -= (half.transpose(1, 2) @ own).squeeze(-1)
    inverses.baddbmm_(half.transpose(1, 2), half, alpha=-1)
    w[gone] = 0.0


# --- what the others become -----------------------------------------------------------------------------


def least_squares(
    weight: Tensor, h: Tensor, mask: Tensor, *, start: Tensor | None = None, tolerance: float = TOLERANCE
) -> Tensor:
    """The weight on `mask` whose outputs are nearest to those of `weight`, each row for itself; in H's precision.

    Conjugate gradients on all rows at once, preconditioned by H's diagonal (Saad 2003, algorithm 9.1), from `start`.
    """
    w, on = weight.to(h.dtype), mask.to(h.dtype)
    weighs = on / diagonal_of(h, len(w))  # (out, d)
    found = (w if start is None else start.to(h.dtype)) * on
    slope = times(w - found, h)
    left = float(((w - found) * slope).sum())
    step = slope * weighs
    power = (slope * step).sum(dim=1, keepdim=True)
    for _ in range(ITERATIONS):
        along = times(step, h)
        length = _ratio(power, (along * step).sum(dim=1, keepdim=True))
        gained = float((length * power).sum())
        left -= gained
        found += length * step
        slope -= length * along
        if gained <= tolerance * abs(left):
            break
        before, power = power, (slope.square() * weighs).sum(dim=1, keepdim=True)
        step = slope * weighs + _ratio(power, before) * step
    return found


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b for values of 0 or more, and 0 where b is 0: rows that have arrived stay."""
    return torch.where(b > 0, a / b, 0.0)


# --- rounding -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Factor:
    """H factorised for error feedback: columns settle in `order`, (d,) or (groups, d); `lower`, shaped as H, is in it.

    H = U D U^T with U unit upper triangular, and `lower` is U^T without its diagonal: with the errors e_i of the
    columns before j, column j loses least at w_j - sum of lower_ji e_i if later columns can follow freely.
    """

    order: Tensor
    lower: Tensor


def factorise(h: Tensor) -> Factor:
    """Columns in falling order of H's diagonal, as GPTQ settles them. Raises if H is not positive definite."""
    order = h.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    ordered = h.gather(-2, order.unsqueeze(-1).expand_as(h)).gather(-1, order.unsqueeze(-2).expand_as(h))
    ordered = ordered.flip(-2, -1).double()
    upper = torch.linalg.cholesky(ordered)
    del ordered  # as large as what is to come
    upper = upper.flip(-2, -1)
    upper /= upper.diagonal(dim1=-2, dim2=-1).clone().unsqueeze(-2)
    return Factor(order, upper.transpose(-2, -1).tril(-1).float().contiguous())


def with_feedback(weight: Tensor, factor: Factor, mask: Tensor, grid: Grid) -> Tensor:
    """Codes (out, d) on `grid` and `mask`: columns settle one by one, the rest takes over each error.

    GPTQ, 2210.17323, algorithm 1, in the form that needs no inverse (Babai's nearest plane).
    """
    order = factor.order.reshape(-1, 1, weight.shape[1])  # (groups, 1, d)
    order = order.expand(-1, len(weight) // len(order), -1).flatten(0, 1)  # (out, d)
    found = _Lattice(weight.gather(1, order), mask.gather(1, order), grid)
    found.sweep(factor.lower)
    return torch.empty_like(weight, dtype=torch.float32).scatter_(1, order, found.codes())


def descend(codes: Tensor, weight: Tensor, h: Tensor, mask: Tensor, grid: Grid) -> Tensor:
    """One sweep of coordinate descent on the grid: each weight in turn becomes the best code given all others."""
    found = _Lattice(weight, mask, grid, codes)
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    found.sweep((h / diagonal.unsqueeze(-1) - torch.diag_embed(torch.ones_like(diagonal))).float())
    return found.codes()


class _Lattice:
    """Integers u = code - zero, and the weights in the same unit; columns first, in numpy, whose calls cost less."""

    def __init__(self, weight: Tensor, mask: Tensor, grid: Grid, codes: Tensor | None = None) -> None:
        zero = grid.zero[:, None]
        scale = torch.where(grid.scale == 0, torch.inf, grid.scale)[:, None]
        top = zero if grid.bits == 1 else 2**grid.bits - 1 - zero  # one bit is a sign: u is -1 or 1
        self._grid = grid
        self._target = _columns(weight.float() / scale)  # (d, out)
        self._u = self._target if codes is None else _columns(codes - zero)
        self._low, self._high = _columns(-zero * mask), _columns(top * mask)

    def codes(self) -> Tensor:
        return torch.from_numpy(self._u.T.copy()) + self._grid.zero[:, None]

    def sweep(self, coupling: Tensor) -> None:
        """Column j goes next to target_j - sum over i of coupling_ji (u_i - target_i), one after the other."""
        gap = self._u - self._target
        by_row: Array = coupling.numpy()
        if coupling.ndim == 3:  # (d, d, out)
            by_row = coupling.repeat_interleave(gap.shape[1] // len(coupling), dim=0).permute(1, 2, 0).numpy()
        for start in range(0, len(gap), BLOCK):
            block = slice(start, min(len(gap), start + BLOCK))
            among = np.ascontiguousarray(by_row[block, block])
            free = self._target[block] - _product(by_row[block], gap) + _product(among, gap[block])
            self._settle(free, among, gap[block], block)
        self._u = np.rint(self._target + gap)

    def _settle(self, free: Array, among: Array, gap: Array, block: slice) -> None:
        """`gap` of one block, in place; `free` is where its columns would go if the block had no errors."""
        rows = zip(free, among, gap, self._target[block], self._low[block], self._high[block], strict=True)
        for best, coupling, own, target, low, high in rows:
            best -= coupling @ gap if coupling.ndim == 1 else np.einsum("ir,ir->r", coupling, gap)
            if self._grid.bits == 1:
                np.copysign(1.0, best, out=best)
            else:
                np.rint(best, out=best)
            np.maximum(best, low, out=best)
            np.minimum(best, high, out=best)
            np.subtract(best, target, out=own)


def _product(coupling: Array, gap: Array) -> Array:
    """(j, out) from a coupling (j, i) of all rows, or (j, i, out) of each row, and (i, out)."""
    return coupling @ gap if coupling.ndim == 2 else np.einsum("jir,ir->jr", coupling, gap)


def _columns(rows: Tensor) -> Array:
    return np.ascontiguousarray(rows.float().numpy().T)


def refit_scale(codes: Tensor, weight: Tensor, h: Tensor | None, grid: Grid) -> Grid:
    """The grid whose scale per row fits `weight` best with these codes: <u, w>_H / <u, u>_H; without H, as if 1."""
    u = codes - grid.zero[:, None]
    along = u if h is None else times(u, h.float())
    power = (along * u).sum(dim=1)
    fitted = (along * weight.float()).sum(dim=1) / power
    return replace(grid, scale=round_to_half(torch.where(power > 0, fitted, grid.scale)))


def solve(
    weight: Tensor, h: Tensor, mask: Tensor, choice: LayerChoice, factor: Factor | None = None
) -> tuple[Tensor, Grid | None]:
    """Codes and grid below 16 bits, else values and None, for the rows `weight` (out, d).

    `factor` is H's, if it was factorised before.
    """
    h = h.float()
    whole, final = bool(mask.all()), choice.bits >= 16
    fitted = weight.float() if whole else least_squares(weight, h, mask, tolerance=FINE if final else TOLERANCE)
    if final:
        return fitted, None
    grid = grid_of(fitted, choice, diagonal_of(h, len(weight)))
    many = not choice.entropy and choice.bits <= STARTED_BITS and weight.numel() * weight.shape[1] <= STARTED_SIZE
    starts = torch.tensor(STARTS if many else (1.0,))

    def each(rows: Tensor) -> Tensor:
        return rows.repeat_interleave(len(starts), dim=0)

    grid = replace(grid, scale=(grid.scale[:, None] * starts).flatten(), zero=each(grid.zero))
    codes = with_feedback(each(fitted), factor or factorise(h), each(mask), grid)
    codes, grid = _improved(codes, each(weight), h, each(mask), grid, 1)
    codes, grid = _best(codes, each(weight), h, grid, len(starts))
    small = weight.numel() * weight.shape[1] <= STARTED_SIZE
    return _improved(codes, weight, h, mask, grid, SWEEPS - 1 if small else 1)


def _improved(codes: Tensor, weight: Tensor, h: Tensor, mask: Tensor, grid: Grid, sweeps: int) -> tuple[Tensor, Grid]:
    """Scales and codes in turn, each the best for the other; scales last."""
    grid = refit_scale(codes, weight, h, grid)
    for _ in range(sweeps):
        codes = descend(codes, weight, h, mask, grid)
        grid = refit_scale(codes, weight, h, grid)
    return codes, grid


def _best(codes: Tensor, weight: Tensor, h: Tensor, grid: Grid, starts: int) -> tuple[Tensor, Grid]:
    """Each row's best of its `starts` successive solutions."""
    gap = grid.decode(codes) - weight.float()
    error = (times(gap, h) * gap).sum(dim=1).reshape(-1, starts)
    best = error.argmin(dim=1) + starts * torch.arange(len(error))
    return codes[best], replace(grid, scale=grid.scale[best], zero=grid.zero[best])
