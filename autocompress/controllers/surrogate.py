"""A Bayesian model of a policy's loss: the sum of what its levels cost, corrected by what evaluations taught.

loss = g(sum over layers of prior_loss(level) * (1 + theta . bumps(level))), with Gaussian theta and a power law g. The
prior is the profile; exact conjugate updates keep it cheap. Knows nothing about budgets, policies or tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SHARED, OWN = 0.35, 0.2
"""Prior standard deviations of a layer's relative correction: common to its levels, and of each bump alone."""
NOISE = 0.08
"""Relative standard deviation of what the additive model cannot say."""
BUMPS = 3
"""Corrections along a layer's levels: at its smallest, middle and largest."""
MANY_LAYERS = 200
"""From here on one correction a layer: the Cholesky factor of more unknowns would take too long."""
LEAST = 0.05
"""Sampled losses stay above this share of the prior's."""


@dataclass(eq=False)
class Surrogate:
    """`prior` (layers, levels): predicted loss of each level, by falling cost from left to right; padding is inf.

    `observe` takes rows of levels with their measured loss; `mean` and `sample` give losses in the prior's shape.
    """

    prior: Floats
    _rows: list[Floats] = field(default_factory=list, init=False)
    _sums: list[float] = field(default_factory=list, init=False)
    _losses: list[float] = field(default_factory=list, init=False)
    _fitted: int = field(default=0, init=False)
    _law: tuple[float, float] = field(default=(0.0, 1.0), init=False)

    def __post_init__(self) -> None:
        layers, levels = self.prior.shape
        finite = np.isfinite(self.prior)
        self._known = np.where(finite, np.maximum(self.prior, 1e-12), 0.0)
        counts = np.maximum(finite.sum(axis=1) - 1, 1)
        place = np.minimum(np.arange(levels) / counts[:, None], 1.0)  # (layers, levels) in [0, 1]
        if layers >= MANY_LAYERS:
            self._bumps = np.ones((layers, levels, 1))
        else:
            knots = np.linspace(0.0, 1.0, BUMPS)
            self._bumps = np.maximum(0.0, 1.0 - np.abs(place[..., None] - knots) * (BUMPS - 1))
        size = self._bumps.shape[2]
        block = np.linalg.inv(SHARED**2 * np.ones((size, size)) + OWN**2 * np.eye(size))
        self._precision0 = np.kron(np.eye(layers), block)
        self._precision = self._precision0.copy()
        self._right = np.zeros(len(self._precision))
        self._believed: tuple[Floats, Floats] | None = None  # Cholesky factor of the precision, and theta's mean

    # --- learning ---

    def observe(self, levels: Ints, loss: float) -> None:
        """What a policy with these `levels` (layers,) measured; a loss without a finite logarithm is left out."""
        if not 0 < loss < math.inf:
            return
        layers = np.arange(len(self.prior))
        known = self._known[layers, levels]  # (layers,)
        self._rows.append((known[:, None] * self._bumps[layers, levels]).ravel())
        self._sums.append(float(known.sum()))
        self._losses.append(loss)
        self._believed = None
        if len(self._losses) >= 1.25 * self._fitted:
            self._refit()
        else:
            self._update(len(self._losses) - 1)

    def _update(self, i: int) -> None:
        """Conjugate update by observation `i`, which is turned back from g's scale to the sum's."""
        offset, power = self._law
        seen = math.exp((math.log(self._losses[i]) - offset) / power)
        row, weight = self._rows[i], 1.0 / (NOISE * max(seen, self._sums[i] * LEAST)) ** 2
        self._precision += np.outer(row * weight, row)
        self._right += row * (weight * (seen - self._sums[i]))

    def _refit(self) -> None:
        """Fit g to everything observed, then all corrections anew: g moves every observation."""
        sums = np.array(self._sums)
        if self._fitted:
            sums = np.maximum(sums + np.array(self._rows) @ self._theta(), LEAST * sums)
            self._believed = None
        self._law = _power_law(sums, np.array(self._losses))
        self._fitted = len(self._losses)
        offset, power = self._law
        seen = np.exp((np.log(self._losses) - offset) / power)
        weights = 1.0 / (NOISE * np.maximum(seen, LEAST * np.array(self._sums))) ** 2
        rows = np.array(self._rows)
        self._precision = self._precision0 + (rows * weights[:, None]).T @ rows
        self._right = rows.T @ (weights * (seen - np.array(self._sums)))

    # --- predicting ---

    def _belief(self) -> tuple[Floats, Floats]:
        """Found once for all that is asked before something else is observed."""
        if self._believed is None:
            factor = np.linalg.cholesky(self._precision)
            half = solve_triangular(factor, self._right, lower=True)
            self._believed = factor, solve_triangular(factor, half, trans="T", lower=True)
        return self._believed

    def _theta(self) -> Floats:
        return self._belief()[1]

    def mean(self) -> Floats:
        """Losses (layers, levels) as believed now, on the additive scale."""
        return self._losses_of(self._theta())

    def sample(self, draw: np.random.Generator) -> Floats:
        """Losses (layers, levels) drawn from what is believed: optimal for them is a Thompson proposal."""
        factor, mean = self._belief()
        noise = solve_triangular(factor, draw.standard_normal(len(mean)), trans="T", lower=True)
        return self._losses_of(mean + noise)

    def _losses_of(self, theta: Floats) -> Floats:
        layers = len(self.prior)
        correction = np.einsum("lkb,lb->lk", self._bumps, theta.reshape(layers, -1))
        return np.asarray(self._known * np.maximum(LEAST, 1.0 + correction))


def _power_law(sums: Floats, losses: Floats) -> tuple[float, float]:
    """(offset, power) of log loss = offset + power * log sum: ridge regression towards (0, 1)."""
    x, y = np.log(np.maximum(sums, 1e-12)), np.log(losses)
    center = float(x.mean())
    design = np.stack([np.ones_like(x), x - center], axis=1)
    ridge = np.diag([1.0, 10.0])
    found = np.linalg.solve(design.T @ design + ridge, design.T @ (y - x) + 0.0)
    power = min(max(1.0 + float(found[1]), 0.5), 2.0)
    return float(found[0]) + (1.0 - power) * center, power
