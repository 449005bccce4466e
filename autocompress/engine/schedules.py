"""Learning-rate decay and adjustment, as pure functions and one small state. Knows nothing about models."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from autocompress.policy import Decay, Recovery

RISE = 0.3
"""Share of the steps in which a one-cycle rate rises, where the policy names none (torch's default)."""
CYCLE_START = 1 / 25
"""Share of its peak at which a one-cycle rate starts (torch's default)."""


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


def one_cycle(step: int, total: int, rate: float, rise: float = RISE) -> float:
    """Half a cosine up from 1/25 to 1 during the share `rise` of the steps, then one down to `rate` (1708.07120).

    As torch `OneCycleLR`, whose last step, `total - 1`, has the rate of the end.
    """
    top, last = rise * total - 1, total - 1
    if step <= top:
        share, low = step / top if top > 0 else 1.0, CYCLE_START
        return 1 - (1 - low) * (1 + math.cos(math.pi * share)) / 2
    share = min(1.0, (step - top) / (last - top))
    return rate + (1 - rate) * (1 + math.cos(math.pi * share)) / 2


DECAYS: dict[Decay, Callable[[int, int, float], float]] = {
    "constant": constant,
    "step": step_decay,
    "exponential": exponential,
    "cosine": cosine,
    "polynomial": polynomial,
    "one-cycle": one_cycle,
}
"""`(step, total, rate) -> factor`, with 0 <= step <= total and rate in (0, 1] the share left at the end."""


def factor(recovery: Recovery, step: int, total: int) -> float:
    """Share of the peak rate at `step` of `total`: a linear warm-up, then the decay over the steps that are left.

    As torch `SequentialLR` of `LinearLR` and the decay. A one-cycle decay rises by itself: there `warmup` is the share
    of the steps in which it does.
    """
    if recovery.decay == "one-cycle":
        return one_cycle(step, total, recovery.decay_rate, recovery.warmup or RISE)
    warm = min(round(recovery.warmup * total), total - 1)
    if step < warm:
        return (step + 1) / (warm + 1)
    return DECAYS[recovery.decay](step - warm, total - warm, recovery.decay_rate)


@dataclass
class Plateau:
    """Lowers a factor when a value has not improved for more than `patience` reports.

    For `cooldown` reports after that, nothing counts against it. As torch `ReduceLROnPlateau` with relative threshold
    1e-4; a `factor` of 1 never changes anything. `rising` says that higher values are better.
    """

    factor: float
    patience: int
    cooldown: int = 0
    rising: bool = False
    threshold: float = 1e-4
    scale: float = field(default=1.0, init=False)
    best: float = field(default=math.inf, init=False)
    bad: int = field(default=0, init=False)
    cooling: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.best = -math.inf if self.rising else math.inf

    def report(self, value: float) -> None:
        """Tell the latest measured performance; what is not a number is no improvement."""
        if value > self.best * (1 + self.threshold) if self.rising else value < self.best * (1 - self.threshold):
            self.best, self.bad = value, 0
        else:
            self.bad += 1
        if self.cooling:
            self.cooling, self.bad = self.cooling - 1, 0
        if self.bad > self.patience:
            self.scale *= self.factor
            self.cooling, self.bad = self.cooldown, 0


def learning_rate(recovery: Recovery, step: int, total: int, plateau: Plateau) -> float:
    """Peak rate times warm-up and decay times adjustment at `step` of `total`."""
    return recovery.lr * factor(recovery, step, total) * plateau.scale
