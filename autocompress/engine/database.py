"""Layer solutions against calibration statistics: found once, reused by every candidate.

For each layer one matrix H = sum of x x^T over what the layer sees. For each (zeros, bits) the weight that changes the
layer's outputs least: pruned in the order of saliency, re-fitted by least squares, rounded with error feedback, and
improved by coordinate descent on its grid. A solution is a function of weight, H and choice alone. Chooses no levels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.engine.prune import magnitude_mask
from autocompress.engine.quantize import Grid, fit_grid, quantise
from autocompress.graph import Graph, Layer
from autocompress.policy import LayerChoice
from autocompress.stored import Full, Half, Quantised, Stored, round_to_half
from autocompress.task import Batch, call, first_input, to_device

COLUMNS_PER_INPUT = 300
"""Output positions that are sampled for each row of H: many times its rank."""
DAMPING = 0.01
"""Share of the mean diagonal that is added to H (GPTQ, 2210.17323, section 3.3)."""
REMOVED_PER_ROUND = 0.1
"""Share of the remaining weights that goes between two updates of the others."""
MOST_ZEROS = 0.97
EXACT_BYTES = 2**30
"""Layers whose row-wise inverses of H take more are pruned with the one inverse that all rows share."""
BLOCK = 64
SWEEPS = 3
RELAXATIONS = 8
"""Sweeps of coordinate descent that stand for least squares where the exact systems are too large."""


# --- statistics -----------------------------------------------------------------------------------------


def patches(module: nn.Module, x: Tensor) -> Tensor:
    """What the rows of a weight are multiplied with, a column per output position: (groups, row length, columns)."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1]).T.unsqueeze(0)
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=_PADDING[module.padding_mode])
    kernel, stride, dilation = tuple(module.kernel_size), tuple(module.stride), tuple(module.dilation)
    if x.ndim == 3:  # one dimension is two with a height of one
        x, kernel, stride, dilation = x.unsqueeze(2), (1, *kernel), (1, *stride), (1, *dilation)
    columns = F.unfold(x, kernel, dilation=dilation, stride=stride)  # (n, channels * kernel, positions)
    return columns.transpose(0, 1).reshape(module.groups, columns.shape[1] // module.groups, -1)


_PADDING = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


def solvable(layer: Layer) -> bool:
    """Whether H says anything about this layer: an embedding's rows are independent, 3-D patches are not unfolded."""
    return layer.kind in ("conv1d", "conv2d", "linear")


def moments(model: nn.Module, graph: Graph, batches: Iterable[Batch], seed: int) -> dict[str, Tensor]:
    """H of every solvable layer that the model calls: (groups, d, d) float64, damped.

    A random sample of positions stands for all of them, scaled to their number.
    """
    found: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    handles = []
    batches = list(batches)

    def recorder(name: str) -> Any:
        def record(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            columns = patches(module, first_input(given, named).detach().float())
            total = columns.shape[2]
            limit = COLUMNS_PER_INPUT * columns.shape[1] // len(batches) + 1
            if total > limit:
                columns = columns[:, :, torch.randint(0, total, (limit,), generator=generator).to(columns.device)]
            product = (columns @ columns.transpose(1, 2)).double().cpu() * (total / columns.shape[2])
            found[name] = found[name] + product if name in found else product

        return record

    for layer in graph.layers:
        if solvable(layer):
            handles.append(
                model.get_submodule(layer.name).register_forward_pre_hook(recorder(layer.name), with_kwargs=True)
            )
    try:
        device = next(model.parameters()).device
        with torch.no_grad():
            for batch in batches:
                call(model, to_device(batch.inputs, device))
    finally:
        for handle in handles:
            handle.remove()
    return {name: _damped(value) for name, value in found.items()}


def _damped(h: Tensor) -> Tensor:
    diagonal = h.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(dim=1, keepdim=True).clamp_min(1e-12)
    return h + torch.diag_embed(torch.ones_like(diagonal) * mean * DAMPING)


# --- which weights go, and what the others become --------------------------------------------------------


def removal_order(weight: Tensor, h: Tensor) -> Tensor:
    """Ranks (out, d): 0 is the first weight to go. `h` (d, d).

    Rounds of the optimal brain surgeon (Hassibi and Stork 1993; rows as in Optimal Brain Compression, 2208.11580,
    section 4): the least w^2 / [H^-1]_pp of the whole layer go, and the rest of each row makes up for them.
    """
    rows, d = weight.shape
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    w = weight.double().clone()
    if not _exact(rows, d):
        return _ranks((w.square() / inverse.diagonal()).flatten()).reshape(rows, d)
    inverses = inverse.expand(rows, d, d).clone()
    alive = torch.ones(rows, d, dtype=torch.bool)
    ranks = torch.full((rows, d), rows * d, dtype=torch.long)
    removed, last = 0, int(rows * d * MOST_ZEROS)
    while removed < last:
        count = min(last - removed, int(REMOVED_PER_ROUND * (rows * d - removed)) + 1)
        saliency = w.square() / inverses.diagonal(dim1=1, dim2=2).clamp_min(1e-300)
        saliency = torch.where(alive, saliency, torch.inf)
        order = saliency.flatten().argsort(stable=True)[:count]
        ranks.view(-1)[order] = torch.arange(removed, removed + count)
        gone = torch.zeros(rows * d, dtype=torch.bool)
        gone[order] = True
        _remove(w, inverses, gone.reshape(rows, d))
        alive &= ~gone.reshape(rows, d)
        removed += count
    rest = alive.flatten().nonzero().flatten()
    ranks.view(-1)[rest] = removed + _ranks(w.square().flatten()[rest])
    return ranks


def _exact(rows: int, d: int) -> bool:
    return rows * d * d * 8 <= EXACT_BYTES


def _ranks(values: Tensor) -> Tensor:
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
    factor = torch.linalg.cholesky(block + torch.diag_embed((~real).double()))
    half = torch.linalg.solve_triangular(factor, columns.transpose(1, 2), upper=False)  # (rows, most, d)
    own = torch.linalg.solve_triangular(factor, (w.gather(1, index) * real).unsqueeze(-1), upper=False)
    w -= (half.transpose(1, 2) @ own).squeeze(-1)
    inverses.baddbmm_(half.transpose(1, 2), half, alpha=-1)
    w[gone] = 0.0


def least_squares(weight: Tensor, h: Tensor, mask: Tensor) -> Tensor:
    """The weight on `mask` whose outputs are nearest to those of `weight`, each row for itself (float64)."""
    on = mask.double()
    system = h * on[:, :, None] * on[:, None, :] + torch.diag_embed(1 - on)
    wanted = (weight.double() @ h) * on
    return torch.cholesky_solve(wanted.unsqueeze(-1), torch.linalg.cholesky(system)).squeeze(-1) * on


# --- rounding -------------------------------------------------------------------------------------------


def with_feedback(weight: Tensor, h: Tensor, mask: Tensor, grid: Grid | None) -> Tensor:
    """Weights (out, d) on `grid` and `mask`: columns settle one by one, the rest takes over each error.

    GPTQ, 2210.17323, algorithm 1, columns in falling order of H's diagonal; without a grid weights only go to zero
    (SparseGPT, 2301.00774, section 3).
    """
    order = h.diagonal().argsort(descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    w, on = weight.float()[:, order].clone(), mask[:, order]
    settled = torch.empty_like(w)
    for start in range(0, w.shape[1], BLOCK):
        stop = min(w.shape[1], start + BLOCK)
        errors = torch.empty(len(w), stop - start)
        for j in range(start, stop):
            value = w[:, j] if grid is None else grid.decode(grid.encode(w[:, j]))
            settled[:, j] = torch.where(on[:, j], value, 0.0)
            errors[:, j - start] = (w[:, j] - settled[:, j]) / upper[j, j]
            w[:, j + 1 : stop] -= errors[:, j - start, None] * upper[j, j + 1 : stop]
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    result = torch.empty_like(settled)
    result[:, order] = settled
    return result


def descend(codes: Tensor, weight: Tensor, h: Tensor, mask: Tensor, grid: Grid) -> Tensor:
    """One sweep of coordinate descent on the grid: each weight in turn becomes the best code given all others."""
    values = _sweep(grid.decode(codes), weight, h, mask, lambda column: grid.decode(grid.encode(column)))
    return torch.where(mask, grid.encode(values), grid.zero[:, None])


def _sweep(values: Tensor, weight: Tensor, h: Tensor, mask: Tensor, settle: Callable[[Tensor], Tensor]) -> Tensor:
    """Each column in turn goes where the H error of its row is least, then where `settle` lets it."""
    metric, diagonal = h.float(), h.diagonal().float()
    values = values.clone()
    slope = (values - weight.float()) @ metric
    for start in range(0, values.shape[1], BLOCK):
        stop = min(values.shape[1], start + BLOCK)
        inside = slope[:, start:stop].clone()
        moves = torch.empty(len(values), stop - start)
        for j in range(start, stop):
            best = settle(values[:, j] - inside[:, j - start] / diagonal[j])
            best = torch.where(mask[:, j], best, 0.0)
            moves[:, j - start] = best - values[:, j]
            values[:, j] = best
            inside += moves[:, j - start, None] * metric[j, start:stop]
        slope += moves @ metric[start:stop]
    return values


def refit_scale(codes: Tensor, weight: Tensor, h: Tensor, grid: Grid) -> Grid:
    """The grid whose scale per row fits `weight` best with these codes: <u, w>_H / <u, u>_H."""
    u = codes - grid.zero[:, None]
    along = u @ h.float()
    power = (along * u).sum(dim=1)
    fitted = (along * weight.float()).sum(dim=1) / power
    return replace(grid, scale=round_to_half(torch.where(power > 0, fitted, grid.scale)))


def solve(weight: Tensor, h: Tensor, mask: Tensor, choice: LayerChoice) -> tuple[Tensor, Grid | None]:
    """Codes and grid below 16 bits, else values and None, for one group's rows `weight` (out, d)."""
    if bool(mask.all()):
        fitted = weight.double()
    elif _exact(*weight.shape):
        fitted = least_squares(weight, h, mask)
    else:
        values = with_feedback(weight, h, mask, None)
        for _ in range(RELAXATIONS):
            values = _sweep(values, weight, h, mask, lambda column: column)
        fitted = values.double()
    if choice.bits >= 16:
        return fitted.float(), None
    importance = h.diagonal().float()
    grid = fit_grid(fitted.float(), choice.bits, symmetric=choice.scheme == "symmetric", importance=importance)
    codes = grid.encode(with_feedback(fitted, h, mask, grid))
    for _ in range(SWEEPS):
        grid = refit_scale(codes, weight, h, grid)
        codes = descend(codes, weight, h, mask, grid)
    return codes, grid


def _normalised(item: tuple[str, Tensor]) -> tuple[str, Tensor | None]:
    """H scaled to a mean diagonal of 1, which changes no solution; None, with a warning, where it is of no use."""
    name, h = item
    scaled = h / h.diagonal(dim1=1, dim2=2).mean()
    if bool(torch.isfinite(scaled).all()) and bool((torch.linalg.cholesky_ex(scaled).info == 0).all()):
        return name, scaled
    warnings.warn(f"layer {name} is rounded to nearest: what it sees in calibration is not usable", stacklevel=2)
    return name, None


class LayerDatabase:
    """Solutions of one model's layers, each found on first use."""

    def __init__(self, state: Mapping[str, Tensor], h: Mapping[str, Tensor]) -> None:
        """`h` as `moments` gives it; layers without a usable one are rounded to nearest."""
        self._state, self._h = state, {name: value for name, value in map(_normalised, h.items()) if value is not None}
        self._ranks: dict[str, Tensor] = {}

    def knows(self, layer: Layer) -> bool:
        """Whether there are statistics for this layer."""
        return layer.name in self._h

    def solve(self, layer: Layer, choice: LayerChoice) -> Stored:
        """The layer's weight under `choice`."""
        weight = self._state[layer.weight]
        if not self.knows(layer):
            return quantise(weight, choice, magnitude_mask(weight, choice.zeros(weight.numel())))
        rows = weight.flatten(1)
        mask = self._mask(layer, rows, choice.zeros(weight.numel()))
        size = len(rows) // layer.groups
        parts = [
            solve(rows[g * size : (g + 1) * size], self._h[layer.name][g], mask[g * size : (g + 1) * size], choice)
            for g in range(layer.groups)
        ]
        kept = None if bool(mask.all()) else mask.reshape(weight.shape)
        values = torch.cat([part for part, _ in parts]).reshape(weight.shape)
        grids = [grid for _, grid in parts if grid is not None]
        if not grids:
            return Half(round_to_half(values), kept) if choice.bits == 16 else Full(values, kept)
        scale = round_to_half(torch.cat([grid.scale for grid in grids]))
        zero = torch.cat([grid.zero for grid in grids]).to(torch.uint8)
        return Quantised(values.to(torch.uint8), scale, zero, choice.bits, grids[0].symmetric, kept).with_length()

    def _mask(self, layer: Layer, rows: Tensor, zeros: int) -> Tensor:
        if zeros == 0:
            return torch.ones_like(rows, dtype=torch.bool)
        if layer.name not in self._ranks:
            self._ranks[layer.name] = self._order(layer, rows)
        return self._ranks[layer.name] >= zeros

    def _order(self, layer: Layer, rows: Tensor) -> Tensor:
        h = self._h[layer.name]
        if layer.groups == 1:
            return removal_order(rows, h[0])
        inverse = torch.linalg.inv(h).diagonal(dim1=1, dim2=2)  # (groups, d)
        saliency = rows.double().square() / inverse.repeat_interleave(len(rows) // layer.groups, dim=0)
        return _ranks(saliency.flatten()).reshape(rows.shape)
