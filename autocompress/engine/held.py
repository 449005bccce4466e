"""Keeps entropy coded codes as short as they were while their weights train. Knows nothing about files."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from autocompress.engine.constraint import Constraint

SHARE = 0.995
"""Of the codes' entropy before training, what is aimed at: a file has up to a few thousandths beside it."""
PACE = 1.0
"""By how much the price of a bit rises in a step for the whole entropy too much."""


class Held:
    """A pull that follows each step of an optimizer, toward codes that cost fewer bits.

    Per layer it is `price` times as long as the step, by root mean square, for weights whose codes are one bit away
    from the next ones. The price rises while the entropy of all codes together is above `SHARE` of what it was, and
    falls below: dual ascent on entropy-constrained training (the Lagrangian of Chou et al. 1989, "Entropy-constrained
    vector quantization"). Codes may become more in one layer and fewer in another.
    """

    def __init__(self, weights: Mapping[str, Tensor], constraints: Mapping[str, Constraint]) -> None:
        """`weights` learn on the grids of `constraints`; those whose codes are entropy coded are held."""
        self._layers = [
            (name, weights[name], c)
            for name, c in constraints.items()
            if c.coded and c.grid is not None and weights[name].numel()
        ]
        self._before: list[Tensor] = []
        self.price, self.limit = 0.0, 0.0

    def remember(self) -> None:
        """Call before a step of the optimizer."""
        self._before = [weight.detach().clone() for _, weight, _ in self._layers]

    @torch.no_grad()
    def pull(self, scales: Mapping[str, Tensor]) -> None:
        """Call after it. `scales` are those that learn, by the name of their weight."""
        if not self._layers:
            return
        pairs = list(zip(self._layers, self._before, strict=True))
        costs = [self._cost(before, c, scales.get(name)) for (name, _, c), before in pairs]
        bits = sum(cost for cost, _ in costs)
        self.limit = self.limit or SHARE * bits
        self.price = max(0.0, self.price + PACE * (bits / self.limit - 1.0)) if self.limit else 0.0
        if not self.price:
            return
        for ((_, weight, _), before), (_, slope) in zip(pairs, costs, strict=True):
            weight.sub_(self.price * (weight - before).square().mean().sqrt() * slope)

    def _cost(self, weight: Tensor, constraint: Constraint, scale: Tensor | None) -> tuple[float, Tensor]:
        """Entropy of the codes in bits, and how it changes with each weight, in bits per code; 0 where pruned."""
        assert constraint.grid is not None
        scale = constraint.grid.scale if scale is None else scale
        steps = constraint.steps(constraint.positions(weight, scale))
        low = int(steps.min())
        index = (steps - low).long() + 1  # with room for a neighbour on each side
        counts = torch.bincount(index.flatten(), minlength=int(index.max()) + 2).float()
        shares = counts[counts > 0] / counts.sum()
        bits = float(-(shares * shares.log2()).sum() * counts.sum())
        lengths = -((counts + 0.5) / (counts.sum() + 0.5 * len(counts))).log2()  # an unseen one is dear
        slope = torch.zeros_like(lengths)
        slope[1:-1] = (lengths[2:] - lengths[:-2]) / 2
        sign = constraint.rows(torch.sign(scale), weight)  # of a row whose codes fall where its weights rise
        return bits, constraint.only_kept(slope[index] * sign)
