"""How wide channel groups stay so that a model keeps to its multiply-accumulates and milliseconds.

Widths couple neighbouring layers, so this is no knapsack: from all channels, the step goes first that costs least
loss for what it brings the model nearer to its limits. Knows no bits and no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median

import numpy as np

from autocompress.policy import Policy
from autocompress.space import Space
from autocompress.trial import Budget

MARGIN = 0.97
"""Share of a latency budget that a predicted latency may take."""
ROUNDS = 4
"""Passes over all groups in search of the fastest widths."""
DRAW = 0.5
"""Spread of the logarithm of the losses when widths are drawn instead of chosen."""

Keep = tuple[int, ...]
"""Per group the index of its keep ratio; the last is all channels."""


class Widths:
    """The groups of a space under the limits of a budget."""

    def __init__(
        self,
        space: Space,
        budget: Budget,
        losses: Mapping[str, Sequence[float]],
        times: Callable[[Policy], float] | None = None,
    ) -> None:
        """`losses` are each group's, per keep ratio; `times` predicts milliseconds.

        Without it a line through the latencies measured so far tells them from multiply-accumulates.
        """
        self._space, self._budget, self._losses, self._times = space, budget, losses, times
        self.groups = list(space.keep)
        self.whole: Keep = tuple(len(space.keep[name]) - 1 for name in self.groups)
        self._measured: list[tuple[float, float]] = []  # what tells the latency, and milliseconds
        self._known: dict[tuple[Keep, int], float] = {}

    @property
    def limited(self) -> bool:
        """Whether anything but the loss of channels depends on the widths: bytes alone are saved by bits and zeros."""
        return bool(self.groups) and (self._budget.macs is not None or self._budget.ms is not None)

    def policy(self, keep: Keep, activations: int = 32) -> Policy:
        """Dense weights with these widths; at 8 bits where activations are integers, since that decides the kernels."""
        ratios = {n: self._space.keep[n][i] for n, i in zip(self.groups, keep, strict=True)}
        if activations == 32:
            return Policy(keep=ratios)
        return replace(self._space.uniform(bits=8), keep=ratios, activations=activations)

    def learn(self, policy: Policy, macs: int, ms: float) -> None:
        """A measured latency."""
        if self._budget.ms is not None and math.isfinite(ms):
            told = self._times(policy) if self._times is not None else float(macs)
            self._measured.append((told, ms))

    def choose(self, draw: np.random.Generator | None, activations: int) -> Keep | None:
        """Widths within the limits, of least loss or, with `draw`, of nearly so; None if no widths are.

        Where only the latency stays too long, the fastest that was found: what it really takes will be measured.
        """
        return self.fitted(self.whole, draw, activations) if self.limited else self.whole

    def fitted(self, keep: Keep, draw: np.random.Generator | None, activations: int) -> Keep | None:
        """`keep` with as little taken away as brings it within the limits."""
        noise = [math.exp(draw.normal(0.0, DRAW)) if draw is not None else 1.0 for _ in self.groups]
        need = self._need(keep, activations)
        while need > 1:
            steps = []
            for g, lower in self._narrower(keep):
                saved = need - max(1.0, self._need(lower, activations))  # what is saved beyond the limit is not wanted
                price = noise[g] * (self._loss(g, lower) - self._loss(g, keep))
                if saved > 1e-9:
                    steps.append((price / saved, lower))
            if not steps:
                return None if self._static(keep) > 1 else keep
            _, keep = min(steps)
            need = self._need(keep, activations)
        return keep

    def moved(self, keep: Keep, draw: np.random.Generator, activations: int) -> Keep:
        """One group a step wider or narrower, another the other way, then within the limits again."""
        moved = list(keep)
        for step in (1, -1):
            g = int(draw.integers(len(moved)))
            moved[g] = min(max(moved[g] + step, 0), self.whole[g])
        return self.fitted(tuple(moved), None, activations) or keep

    def _narrower(self, keep: Keep) -> list[tuple[int, Keep]]:
        """Each group at each of its narrower ratios: one step may be slower, and two much faster."""
        return [(g, (*keep[:g], index, *keep[g + 1 :])) for g in range(len(keep)) for index in range(keep[g])]

    def _loss(self, group: int, keep: Keep) -> float:
        return self._losses[self.groups[group]][keep[group]]

    def _static(self, keep: Keep) -> float:
        """Multiply-accumulates as a share of their limit."""
        limit = self._budget.macs
        return 0.0 if limit is None else self._space.graph.macs(self.policy(keep)) / max(limit, 1)

    def _need(self, keep: Keep, activations: int) -> float:
        """The larger share of its limit that multiply-accumulates and milliseconds take."""
        share = self._static(keep)
        if self._budget.ms is None:
            return share
        ms = self._ms(keep, activations)
        return max(share, ms / (MARGIN * self._budget.ms))

    def _ms(self, keep: Keep, activations: int) -> float:
        """Predicted milliseconds, corrected by what was measured; 0 before anything is known."""
        if self._times is not None:
            return self.predicted(keep, activations) * self._correction()
        if not self._measured:
            return 0.0
        told, ms = np.array(self._measured).T
        slope, start = float(ms.mean() / told.mean()), 0.0
        if len(set(told)) > 1:
            slope, start = np.polyfit(told, ms, 1)
        return float(start + slope * self._space.graph.macs(self.policy(keep))) if slope > 0 else 0.0

    def predicted(self, keep: Keep, activations: int) -> float:
        """What `times` says of these widths."""
        assert self._times is not None
        if (keep, activations) not in self._known:
            self._known[keep, activations] = self._times(self.policy(keep, activations))
        return self._known[keep, activations]

    def _correction(self) -> float:
        ratios = [ms / told for told, ms in self._measured if told > 0]  # a table may know nothing of a tiny model
        return median(ratios) if ratios else 1.0


def fastest_widths(space: Space, times: Callable[[Policy], float], activations: int) -> tuple[Policy, float]:
    """The policy that layer times call fastest, and its milliseconds: one group after the other, until none changes."""
    widths = Widths(space, Budget(ms=0.0), {}, times)
    keep = tuple(0 for _ in widths.groups)
    best = widths.predicted(keep, activations)
    for _ in range(ROUNDS):
        before = best
        for g, ratios in enumerate(space.keep.values()):
            options = [(*keep[:g], index, *keep[g + 1 :]) for index in range(len(ratios))]
            best, keep = min((widths.predicted(option, activations), option) for option in options)
        if best >= before:
            break
    return widths.policy(keep, activations), best
