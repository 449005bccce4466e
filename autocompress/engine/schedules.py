"""Learning-rate decay and adjustment, as pure functions and one small state. Knows nothing about models."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from autocompress.policy import Decay, Recovery


def constant(step: int, total: int, rate: float) -> float:  # noqa: ARG001 (one signature for all)
    """1 throughout."""
    return 1.0


def step_decay(step: int, total: int, rate: float) -> float:
    """Two equal drops, at one and two thirds, that end at `rate` (torch `StepLR`, gamma = sqrt(rate)).

    With fewer than three steps there is no room for both.
    """
    return math.sqrt(rate) ** (step // math.ceil(total / 3))


def exponential(step: int, total: int, rate: float) -> float:
    """A constant ratio per step that reaches `rate` at `total` (torch `ExponentialLR`)."""
    return float(rate ** (step / total))


def cosine(step: int, total: int, rate: float) -> float:
    """Half a cosine from 1 to `rate` (SGDR, 1608.03983, equation 5; torch `CosineAnnealingLR`)."""
    return rate + (1 - rate) * (1 + math.cos(math.pi * step / total)) / 2


def polynomial(step: int, total: int, rate: float) -> float:
    """A parabola from 1 to `rate` (torch `PolynomialLR`, power 2, above a floor)."""
    return rate + (1 - rate) * (1 - step / total) ** 2


DECAYS: dict[Decay, Callable[[int, int, float], float]] = {
    "constant": constant,
    "step": step_decay,
    "exponential": exponential,
    "cosine": cosine,
    "polynomial": polynomial,
}
"""`(step, total, rate) -> factor`, with 0 <= step <= total and rate in (0, 1] the share left at the end."""


@dataclass
class Plateau:
    """Lowers a factor when a lower-is-better value has not improved for more than `patience` reports.

    As torch `ReduceLROnPlateau` with relative threshold 1e-4 and no cooldown; a `factor` of 1 never changes anything.
    """

    factor: float
    patience: int
    threshold: float = 1e-4
    scale: float = field(default=1.0, init=False)
    _best: float = field(default=math.inf, init=False)
    _bad: int = field(default=0, init=False)

    def report(self, value: float) -> None:
        """Tell the latest measured performance."""
        if value < self._best * (1 - self.threshold):
            self._best, self._bad = value, 0
        else:
            self._bad += 1
        if self._bad > self.patience:
            self.scale *= self.factor
            self._bad = 0


def learning_rate(recovery: Recovery, step: int, total: int, plateau: Plateau) -> float:
    """Peak rate times decay times adjustment at `step` of `total`."""
    return recovery.lr * DECAYS[recovery.decay](step, total, recovery.decay_rate) * plateau.scale
