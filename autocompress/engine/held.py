"""Keeps entropy coded codes as short as they were while their weights train. Knows nothing about files."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from autocompress.engine.constraint import Constraint

SHARE = 0.995
"""Of the codes' entropy before training, what is aimed at: a file has up to a few thousandths beside it."""
EVERY = 4
"""Steps of the optimizer between two pulls: counting codes takes as long as some layers do."""
PACE = 4.0
"""By how much the price of a bit rises in a pull for the whole entropy too much."""


class Held:
    """A pull that follows an optimizer's steps, toward codes that cost fewer bits.

    Per layer it is `price` times as long as what the last steps did together, by root mean square, for weights whose
    codes are one bit away from the next ones. The price rises while the entropy of all codes together is above `SHARE`
    of what it was, and falls below: dual ascent on entropy-constrained training (the Lagrangian of Chou et al. 1989,
    "Entropy-constrained vector quantization"). Codes may become more in one layer and fewer in another.
    """

    def __init__(self, weights: Mapping[str, Tensor], constraints: Mapping[str, Constraint]) -> None:
        """`weights` learn on the grids of `constraints`; those whose codes are entropy coded are held."""
        self._layers = [
            (name, weights[name], c)
            for name, c in constraints.items()
            if c.coded and c.grid is not None and weights[name].numel()
        ]
        self._before: list[Tensor] = []
        self._steps = 0
        self.price, self.limit = 0.0, 0.0

    def begin(self) -> None:
        """Call before the first step of each epoch: what counts steps starts anew there, as a resumed training does."""
        self._steps = 0
        self._remember()
        self.limit = self.limit or SHARE * sum(bits for bits, _ in self._costs({}))

    def stepped(self, scales: Mapping[str, Tensor]) -> None:
        """Call after each step of the optimizer. `scales` are those that learn, by the name of their weight."""
        self._steps += 1
        if self._steps % EVERY == 0 and self._layers:
            self._pull(scales)
            self._remember()

    def _remember(self) -> None:
        self._before = [weight.detach().clone() for _, weight, _ in self._layers]

    @torch.no_grad()
    def _pull(self, scales: Mapping[str, Tensor]) -> None:
        costs = self._costs(scales)
        bits = sum(cost for cost, _ in costs)
        self.price = max(0.0, self.price + PACE * (bits / self.limit - 1.0)) if self.limit else 0.0
        if not self.price:
            return
        for (_, weight, _), before, (_, slope) in zip(self._layers, self._before, costs, strict=True):
            weight.sub_(self.price * (weight - before).square().mean().sqrt() * slope)

    @torch.no_grad()
    def _costs(self, scales: Mapping[str, Tensor]) -> list[tuple[float, Tensor]]:
        return [self._cost(weight, c, scales.get(name)) for name, weight, c in self._layers]

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
