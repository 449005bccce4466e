"""The multiple-choice knapsack: one level for every layer, least summed loss within a budget.

Kellerer, Pferschy, Pisinger, Knapsack Problems (2004), chapter 11: dominance and the linear relaxation (11.2), dynamic
programming (11.5). SPDY (2201.13096) uses the same program for the sparsity of layers. Losses may be negative and need
not be convex. Knows costs and losses only: nothing about policies, layers' names or tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import le

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MOST_COST = 2**40
"""Largest cost of one level; sums over 8,191 layers stay exact in float64."""
TABLE_ENTRIES = 2**24
"""Most entries (8 bytes each) of a table, if the caller names no number of cells."""
TABLE_STEPS = 2**28
"""Most additions to fill a table, if the caller names no number of cells."""
SHORTLIST = 32
"""Upgrades and downgrades that a swap looks at: those of least reduced loss, the core of chapter 11."""
SWAPS = 8
"""Most swaps after a fill; each is the best of the shortlist."""
NEAR = 1e-4
"""A gap to the linear relaxation, as a share of what the budget wins, at which `greedy` is good enough."""


@dataclass(frozen=True, slots=True, eq=False)
class Menu:
    """What one layer may choose from: `costs` (levels,) in bytes, and the predicted `losses` (levels,)."""

    costs: Ints
    losses: Floats

    def __post_init__(self) -> None:
        """Raises `ValueError` for another shape, a loss that is not finite, or a cost outside [0, `MOST_COST`]."""
        if self.costs.ndim != 1 or self.costs.shape != self.losses.shape or not self.costs.size:
            raise ValueError(f"{self.costs.shape} costs and {self.losses.shape} losses: give one of each per level")
        if self.costs.dtype != np.int64 or self.losses.dtype != np.float64:
            raise ValueError(f"{self.costs.dtype} costs, {self.losses.dtype} losses: give int64 bytes, float64 losses")
        if self.costs.min() < 0 or self.costs.max() > MOST_COST:
            raise ValueError(f"costs {self.costs.min()} to {self.costs.max()}: give bytes from 0 to {MOST_COST}")
        if not np.isfinite(self.losses).all():
            raise ValueError("a loss is not finite: leave such levels out of the menu")


@dataclass(frozen=True, slots=True)
class Solution:
    """A level for every layer, as indices into the menus, with the true sum of bytes and the sum of losses."""

    levels: tuple[int, ...]
    cost: int
    loss: float


@dataclass(frozen=True, slots=True, eq=False)
class Instance:
    """Menus as arrays, padded with levels of infinite loss that nothing chooses.

    `costs` (constraints, layers, levels): bytes, then milliseconds if there are two; `losses` (layers, levels).
    """

    costs: Floats
    losses: Floats

    def with_losses(self, losses: Floats) -> Instance:
        """The same costs with other losses (layers, levels); what is padding stays so, whatever it holds there."""
        if losses.shape != self.losses.shape:
            raise ValueError(f"losses have shape {losses.shape}, the instance has {self.losses.shape}: pad to that")
        padded = np.where(np.isinf(self.losses), np.inf, losses)
        if np.isfinite(padded).sum() != np.isfinite(self.losses).sum():
            raise ValueError("a loss is not finite: give every level of the menus a finite loss")
        return replace(self, losses=padded)


def prepare(menus: Sequence[Menu], times: Sequence[ArrayLike] | None = None) -> Instance:
    """Pads the menus, with `times` (milliseconds for every level of every menu) as a second constraint."""
    if not menus:
        raise ValueError("no menus: give one for every layer")
    shape = (len(menus), max(menu.costs.size for menu in menus))
    costs = np.zeros((1 if times is None else 2, *shape))
    losses = np.full(shape, np.inf)
    for i, menu in enumerate(menus):
        costs[0, i, : menu.costs.size] = menu.costs
        losses[i, : menu.costs.size] = menu.losses
    for i, (menu, layer_times) in enumerate(zip(menus, times or (), strict=times is not None)):
        milliseconds = np.asarray(layer_times, dtype=np.float64)
        if milliseconds.shape != menu.costs.shape or not (np.isfinite(milliseconds) & (milliseconds >= 0)).all():
            raise ValueError(f"times of layer {i}: give one finite number >= 0 for each of {menu.costs.size} levels")
        costs[1, i, : menu.costs.size] = milliseconds
    return Instance(costs, losses)


# --- dominance and the convex hull (11.2) ---------------------------------------------------------------


def efficient(menu: Menu) -> Ints:
    """Levels (kept,) that no other dominates, by rising cost and strictly falling loss; of equal levels the first."""
    order = np.lexsort((menu.losses, menu.costs))
    losses = menu.losses[order]
    before = np.concatenate(([np.inf], np.minimum.accumulate(losses)[:-1]))
    return order[losses < before]


def hull(menu: Menu) -> Ints:
    """Levels (kept,) on the lower convex hull of the efficient ones, by rising cost."""
    path = _path(prepare([menu]), menu.costs[None].astype(np.float64))
    return np.concatenate((path.start, path.target))


@dataclass(frozen=True, slots=True, eq=False)
class _Path:
    """Every solution of the Lagrangian relaxation, as steps from one to the next by falling gain per cost.

    `start` (layers,) levels; step s moves `layer[s]` from level `origin[s]` to `target[s]`, at `slope[s]` < 0, and
    adds `cost[:, s]` (constraints, steps) to a total that begins at `base` (constraints,).
    """

    start: Ints
    layer: Ints
    origin: Ints
    target: Ints
    slope: Floats
    base: Floats
    cost: Floats


def _path(instance: Instance, mixed: Floats, start: Ints | None = None) -> _Path:
    """Gift wrapping in all layers at once, along the cost `mixed` (layers, levels), from `start` or the cheapest."""
    losses = instance.losses  # (layers, levels)
    rows = np.arange(len(losses))
    if start is None:
        least = np.where(np.isinf(losses), np.inf, mixed).min(axis=1, keepdims=True)
        start = np.where(mixed == least, losses, np.inf).argmin(axis=1)
    steps = _wrap(mixed, losses, start)
    layer, origin, target = (np.concatenate([step[i] for step in steps]) for i in range(3))
    slope = np.concatenate([step[3] for step in steps])
    order = slope.argsort(kind="stable")  # equal slopes of a layer stay in their order
    layer, origin, target = layer[order], origin[order], target[order]
    cost = instance.costs[:, layer, target] - instance.costs[:, layer, origin]
    return _Path(start, layer, origin, target, slope[order], instance.costs[:, rows, start].sum(axis=1), cost)


def _wrap(cost: Floats, losses: Floats, start: Ints) -> list[tuple[Ints, Ints, Ints, Floats]]:
    """Rounds of (layer, origin, target, slope): from every layer's level to the one of steepest fall."""
    rows, current = np.arange(len(cost)), start
    past = np.full(len(cost), -np.inf)
    found = [(rows[:0], rows[:0], rows[:0], past[:0])]
    while rows.size:
        here = np.arange(rows.size)
        run = cost - cost[here, current][:, None]  # (layers left, levels)
        rise = losses - losses[here, current][:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = np.where(run > 0, rise / run, 0.0)
        target = slope.argmin(axis=1)
        steepest = slope[here, target]
        falls = steepest < 0
        past = np.maximum(past, steepest)  # rounding must not put a later step before an earlier one
        if not falls.all():  # leave out the layers that are done
            rows, current, target, past = rows[falls], current[falls], target[falls], past[falls]
            cost, losses = cost[falls], losses[falls]
        found.append((rows, current, target, past))
        current = target
    return found


# --- one budget: greedy, fill, swap ---------------------------------------------------------------------


def greedy(instance: Instance, capacity: int) -> Solution | None:
    """The linear relaxation cut to whole levels (Sinha and Zoltners 1979), filled and swapped; None: nothing fits.

    Of an instance with two constraints only the first counts.
    """
    one = replace(instance, costs=instance.costs[:1])
    return _descend(one, _path(one, one.costs[0]), np.array([float(capacity)]))


def bound(instance: Instance, capacity: int) -> float:
    """Loss of the linear relaxation, which no solution is below; infinite where nothing fits."""
    return _bound(instance, _path(instance, instance.costs[0]), capacity)


def _bound(instance: Instance, path: _Path, capacity: int) -> float:
    slack = capacity - path.base[0]
    if slack < 0:
        return float("inf")
    total = np.concatenate(([0.0], path.cost[0].cumsum()))
    share = np.clip((slack - total[:-1]) / path.cost[0], 0.0, 1.0)
    return float(_loss(instance, path.start) + (share * path.cost[0] * path.slope).sum())


def _loss(instance: Instance, levels: Ints) -> float:
    return float(instance.losses[np.arange(levels.size), levels].sum())


def _spent(instance: Instance, levels: Ints) -> Floats:
    spent: Floats = instance.costs[:, np.arange(levels.size), levels].sum(axis=1)
    return spent


def _solution(instance: Instance, levels: Ints) -> Solution:
    return Solution(tuple(levels.tolist()), int(_spent(instance, levels)[0]), _loss(instance, levels))


def _descend(instance: Instance, path: _Path, limits: Floats, weights: Floats | None = None) -> Solution | None:
    """The last solution of the path within all limits (constraints,), filled and swapped; None where none is.

    `weights` (constraints,) mix the costs to the one that the path follows.
    """
    totals = np.concatenate((path.base[:, None], path.base[:, None] + path.cost.cumsum(axis=1)), axis=1)
    fitting = np.flatnonzero((totals <= limits[:, None]).all(axis=0))
    if not fitting.size:
        return None
    taken = int(fitting[-1])
    levels = path.start.copy()
    levels[path.layer[:taken]] = path.target[:taken]  # of several steps of a layer the last counts
    _fill(levels, path, taken, limits - totals[:, taken])
    if (_spent(instance, levels) > limits).any():  # milliseconds in another order sum up to another last digit
        return None
    price = -path.slope[min(taken, path.slope.size - 1)] if path.slope.size else 0.0
    _swap(instance, levels, limits, price * (np.ones(1) if weights is None else weights))
    return _solution(instance, levels)


def _fill(levels: Ints, path: _Path, taken: int, slack: Floats) -> None:
    """Goes on along the path past steps that do not fit; changes `levels`."""
    left = taken + np.flatnonzero((path.cost[:, taken:] <= slack[:, None]).all(axis=0))
    steps = (path.layer[left].tolist(), path.origin[left].tolist(), path.target[left].tolist())
    now, rest = levels.tolist(), slack.tolist()
    for layer, origin, target, *need in zip(*steps, *path.cost[:, left].tolist(), strict=True):
        if now[layer] == origin and all(map(le, need, rest)):
            now[layer] = target
            rest = [r - n for r, n in zip(rest, need, strict=True)]
    levels[:] = now


def _swap(instance: Instance, levels: Ints, limits: Floats, price: Floats) -> None:
    """Up to `SWAPS` times the best pair of an upgrade and a downgrade, or upgrade alone; changes `levels`.

    `price` (constraints,) is loss per cost at the break of the path: moves of least loss + price * cost come first.
    """
    rows = np.arange(levels.size)
    for _ in range(SWAPS):
        cost = instance.costs - instance.costs[:, rows, levels][:, :, None]  # (constraints, layers, levels)
        gain = instance.losses - instance.losses[rows, levels][:, None]  # (layers, levels)
        reduced = gain + np.tensordot(price, cost, axes=1)
        up, down = _least(np.where(gain < 0, reduced, np.inf)), _least(np.where(gain > 0, reduced, np.inf))
        # the last downgrade is none
        both = _pairs(gain.ravel(), up, down)
        need = _pairs(cost.reshape(len(cost), -1), up, down)  # (constraints, ups, downs + 1)
        width = gain.shape[1]
        both[:, :-1] += np.where((up // width)[:, None] == down // width, np.inf, 0.0)  # two moves of a layer
        slack = limits - _spent(instance, levels)
        both = np.where((need <= slack[:, None, None]).all(axis=0), both, np.inf)
        if not both.size or both.min() >= 0:
            return
        i, j = divmod(int(both.argmin()), both.shape[1])
        moves = [*up[[i]], *down[j : j + 1]]
        before = levels.copy()
        for move in moves:
            levels[move // width] = move % width
        if (_spent(instance, levels) > limits).any():  # as in `_descend`
            levels[:] = before
            return


def _least(scores: Floats) -> Ints:
    """Flat indices of up to `SHORTLIST` least finite scores, rising, so that of equal pairs the first is taken."""
    flat = scores.ravel()
    nearest = np.argpartition(flat, SHORTLIST)[:SHORTLIST] if flat.size > SHORTLIST else np.arange(flat.size)
    return np.sort(nearest[np.isfinite(flat[nearest])])


def _pairs(values: Floats, up: Ints, down: Ints) -> Floats:
    """Sums (..., ups, downs + 1) of `values` (..., moves) over all pairs; the last column is the upgrade alone."""
    alone = np.zeros((*values.shape[:-1], 1))
    sums: Floats = values[..., up][..., :, None] + np.concatenate((values[..., down], alone), axis=-1)[..., None, :]
    return sums


# --- every budget: dynamic programming (11.5) -----------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    """One layer of the table: `levels`, `weights` (cells) and `losses` (kept,) of its efficient levels.

    `below[c]` is the least loss of the layers before within c cells; more cells than it has buy nothing.
    """

    layer: int
    levels: Ints
    weights: Ints
    losses: Floats
    below: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Solutions for every budget up to `capacity`. `exact`: each is optimal; else `cell` bytes were too many for that.

    A table that is not exact rounds costs up to cells. What that wastes comes back by looking beyond the budget's
    cells for a solution whose true cost fits, by a fill and by swaps; the better of this and `greedy` is the solution.
    With hundreds of layers that is `greedy`, which is then within `NEAR` of the linear relaxation: the table helps
    where a few layers outweigh the rest.
    """

    instance: Instance
    capacity: int
    cell: int
    exact: bool
    _path: _Path
    _rows: tuple[_Row, ...]

    def choose(self, budget: int) -> Solution | None:
        """Least loss whose true cost is within `budget` bytes; None where nothing fits.

        Raises `ValueError` beyond `capacity`. Of a table that is not exact a larger budget may get a slightly greater
        loss: `front` sees to it that none does.
        """
        if budget > self.capacity:
            raise ValueError(f"the table ends at {self.capacity} bytes: solve with a capacity of {budget}")
        slack = budget - int(self._path.base[0])
        if slack < 0:
            return None
        if self.exact:
            return _solution(self.instance, self._trace(slack // self.cell))
        limits = np.array([float(budget)])
        relaxed = _descend(self.instance, self._path, limits)
        assert relaxed is not None
        least, most = _bound(self.instance, self._path, budget), _loss(self.instance, self._path.start)
        if relaxed.loss - least <= NEAR * (most - least):
            return relaxed
        levels = self._search(budget, slack // self.cell)
        onward = _descend(self.instance, _path(self.instance, self.instance.costs[0], levels), limits)
        assert onward is not None
        return min(onward, relaxed, key=lambda s: (s.loss, s.cost, s.levels))

    def _search(self, budget: int, fits: int) -> Ints:
        """Bisects for the most cells whose solution is within the budget: rounding wastes less than one a layer."""
        levels, above = self._trace(fits), fits + len(self._rows)
        while above - fits > 1:
            cells = (fits + above) // 2
            new = self._trace(cells)
            if _spent(self.instance, new)[0] <= budget:
                fits, levels = cells, new
            else:
                above = cells
        return levels

    def _trace(self, cells: int) -> Ints:
        """Levels (layers,) of the table's solution within `cells`: the last decision first."""
        levels = self._path.start.copy()
        for row in reversed(self._rows):
            left = np.minimum(cells - row.weights, row.below.size - 1)
            loss = np.where(left < 0, np.inf, row.below[np.maximum(left, 0)]) + row.losses  # the sums of `_extend`
            chosen = int(loss.argmin())
            levels[row.layer] = row.levels[chosen]
            cells -= int(row.weights[chosen])
        return levels


def solve(menus: Sequence[Menu], capacity: int, cells: int | None = None) -> Table:
    """Dynamic programming over bytes above every layer's least, in at most `cells` cells.

    Without `cells`, as many as `TABLE_ENTRIES` and `TABLE_STEPS` allow. One greatest common divisor of the costs per
    cell is exact.
    """
    if cells is not None and cells < 1:
        raise ValueError(f"{cells} cells: give at least one")
    instance = prepare(menus)
    path = _path(instance, instance.costs[0])
    kept = [efficient(menu) for menu in menus]
    extra = [menu.costs[k] - menu.costs[k[0]] for menu, k in zip(menus, kept, strict=True)]
    room = min(capacity - int(path.base[0]), sum(int(e[-1]) for e in extra))
    if room <= 0:
        return Table(instance, capacity, 1, True, path, ())
    divisor = int(np.gcd.reduce(np.concatenate(extra)))
    cell = divisor * _stride(extra, room // divisor, divisor, cells)
    most = room // cell + (len(menus) if cell > divisor else 0)  # cells; see `_search`
    rows: list[_Row] = []
    for layer in sorted(range(len(menus)), key=lambda i: int(extra[i][-1])):  # narrow rows first
        weights = -(-extra[layer] // cell)
        last = np.append(np.diff(weights) > 0, True)  # of levels in one cell the one of least loss
        weights, levels = weights[last], kept[layer][last]
        if kept[layer].size > 1:
            below = _extend(rows[-1], most) if rows else np.zeros(1)
            rows.append(_Row(layer, levels, weights, menus[layer].losses[levels], below))
    return Table(instance, capacity, cell, cell == divisor, path, tuple(rows))


def _stride(extra: Sequence[Ints], room: int, divisor: int, cells: int | None) -> int:
    """Divisors per cell: 1 if that is few enough cells."""
    if cells is not None:
        return max(1, -(-room // cells))
    stride = max(1, -(-room * len(extra) // TABLE_ENTRIES))
    while room // stride * sum(min(e.size, int(e[-1]) // (stride * divisor) + 1) for e in extra) > TABLE_STEPS:
        stride *= 2
    return stride


def _extend(row: _Row, cells: int) -> Floats:
    """The least losses (cells + 1,) of the row's layer and those before, or fewer where more cells buy nothing."""
    size = min(row.below.size - 1 + int(row.weights[-1]), cells) + 1
    below = np.concatenate((row.below, np.full(size - row.below.size, row.below[-1])))
    best, candidate = np.full(size, np.inf), np.empty(size)
    for weight, loss in zip(row.weights.tolist(), row.losses.tolist(), strict=True):
        if weight >= size:
            break
        new = np.add(below[: size - weight], loss, out=candidate[: size - weight])
        np.minimum(best[weight:], new, out=best[weight:])
    return best


def front(menus: Sequence[Menu], budgets: Sequence[int]) -> list[Solution | None]:
    """The solution for every budget, in the given order; a larger budget never has the greater loss."""
    if not budgets:
        return []
    table = solve(menus, max(budgets))
    found: dict[int, Solution | None] = {}
    best: Solution | None = None
    for budget in sorted(set(budgets)):
        new = table.choose(budget)
        if new is not None and (best is None or new.loss < best.loss):
            best = new
        found[budget] = best
    return [found[budget] for budget in budgets]


# --- two constraints ------------------------------------------------------------------------------------


def sweep(instance: Instance, limits: tuple[float, float], mixes: int = 16) -> Solution | None:
    """Least loss found within both limits (bytes, milliseconds), over `mixes` convex mixes of the two costs.

    Every mix turns the two into one cost, a surrogate relaxation: the last solution on its path within both limits is
    filled and swapped within both. None where no mix reaches the limits: a choice off the lower hull of the two summed
    costs still might, in the gap of one level of one layer.
    """
    if instance.costs.shape[0] != 2 or mixes < 2:
        raise ValueError("sweep wants menus prepared with times, and at least two mixes")
    allowed = np.array(limits, dtype=np.float64)
    top = np.minimum(allowed, instance.costs.max(axis=2).sum(axis=1))
    scale = np.where(top > 0, top, 1.0)
    shares = np.linspace(0.0, 1.0, mixes).tolist()
    found = [_along(instance, allowed, scale, share) for share in shares]
    if all(solution is None for solution in found):
        found = [_meet(instance, allowed, scale)]
    fits = [solution for solution in found if solution is not None]
    return min(fits, key=lambda s: (s.loss, s.cost, s.levels), default=None)


def _mixed(instance: Instance, scale: Floats, share: float) -> tuple[Floats, Floats]:
    """Weights (2,), and the cost (layers, levels) of which `share` is milliseconds."""
    weights = np.array([1.0 - share, share]) / scale
    return weights, np.tensordot(weights, instance.costs, axes=1)


def _along(instance: Instance, limits: Floats, scale: Floats, share: float) -> Solution | None:
    weights, cost = _mixed(instance, scale, share)
    return _descend(instance, _path(instance, cost), limits, weights)


def _meet(instance: Instance, limits: Floats, scale: Floats) -> Solution | None:
    """Bisects for a mix whose cheapest choice is within both limits: more share buys milliseconds with bytes."""
    low, high = 0.0, 1.0
    for _ in range(50):
        share = (low + high) / 2
        over = _path(instance, _mixed(instance, scale, share)[1]).base > limits
        if not over.any():
            return _along(instance, limits, scale, share)
        if over.all():
            return None
        low, high = (low, share) if over[0] else (share, high)
    return None
