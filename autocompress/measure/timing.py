"""What a stopwatch says, as plain data. Knows no runtime and no model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Latency:
    """Median and quartiles over `samples` runs; `reference` is what the reference took meanwhile, in milliseconds."""

    ms: float
    low: float
    high: float
    samples: int
    reference: float = 0.0

    @classmethod
    def from_json(cls, data: Any) -> Latency:
        """What `asdict` gave. Raises `TypeError` or `ValueError` on anything else."""
        found = cls(**data)
        numbers = (found.ms, found.low, found.high, found.samples, found.reference)
        if not all(type(number) in (int, float) and 0 <= number < math.inf for number in numbers):
            raise ValueError(f"a latency has the numbers {numbers}; each must be finite and 0 or more")
        return found

    def decides(self, limit: float) -> bool:
        """Whether the difference from `limit` milliseconds is larger than the spread on that side."""
        return limit < self.low or limit > self.high

    def doubt(self, limit: float) -> str:
        """Why this measurement does not say on which side of `limit` the model is; empty if it does."""
        if self.decides(limit):
            return ""
        return (
            f"this machine is too noisy to decide: {self.ms:.4g} ms differs from {limit:.4g} ms by less than its "
            f"spread of {self.low:.4g} to {self.high:.4g} ms (quartiles of {self.samples} runs). Measure on an idle "
            "machine, or leave the budget some margin"
        )


@dataclass(frozen=True, slots=True)
class Traced:
    """A file's latency, and the milliseconds of its layers by the runtime's own profile.

    `layers` maps a node's number to the time from its start to the next numbered node's; -1 is what comes before the
    first. Tracing slows every node by a few microseconds, so these rank and do not add up to the latency.
    """

    latency: Latency
    layers: Mapping[int, float]


def calmest(repeated: Sequence[Latency]) -> Latency:
    """Of repeated measurements of one model, the median of the third during which the machine was fastest."""
    calm = sorted(repeated, key=lambda latency: latency.reference)[: max(1, len(repeated) // 3)]
    return sorted(calm, key=lambda latency: latency.ms)[len(calm) // 2]
