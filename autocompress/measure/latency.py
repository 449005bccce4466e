"""Milliseconds of a model in a real runtime: PyTorch eager, one thread, batch 1, on this machine's CPU.

Each sample times the candidate and the dense reference back to back, and the result is the dense model's latency
times the median ratio: what slows the machine for a while slows both.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Hashable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
from torch import nn

from autocompress.task import call, few

RUNTIME = "torch-eager"
WARM_UP = 3
SAMPLES = 15


@dataclass(frozen=True, slots=True)
class Latency:
    """Median and quartiles over `samples` runs."""

    ms: float
    low: float
    high: float
    samples: int


class LatencyMeter:
    """Times models on one example. Results are remembered by architecture, so equal shapes get equal numbers."""

    def __init__(self, dense: nn.Module, inputs: Any, dense_ms: float | None = None) -> None:
        """`dense_ms` is the reference of an earlier run that this one continues; None measures it now."""
        self._dense = _on_cpu(dense)
        self._inputs = few(self._dense, inputs, 1)
        self._known: dict[Hashable, Latency] = {}
        self.dense = self._reference() if dense_ms is None else dense_ms

    def _reference(self) -> float:
        with _one_thread(), torch.inference_mode():
            return median(_samples([self._dense], self._inputs, 2 * SAMPLES)[0])

    def __call__(self, model: nn.Module, architecture: Hashable = None) -> Latency:
        """Latency of `model`; with `architecture` given, measured once for all models that share it."""
        if architecture is None or architecture not in self._known:
            with _one_thread(), torch.inference_mode():
                own, reference = _samples([_on_cpu(model), self._dense], self._inputs, SAMPLES)
            ratios = [a / b for a, b in zip(own, reference, strict=True)]
            low, middle, high = quantiles(ratios, n=4)
            measured = Latency(self.dense * middle, self.dense * low, self.dense * high, SAMPLES)
            if architecture is None:
                return measured
            self._known[architecture] = measured
        return self._known[architecture]


def _samples(models: list[nn.Module], inputs: Any, count: int) -> list[list[float]]:
    """CPU milliseconds of the calling thread per run, models taking turns, after a warm-up."""
    times: list[list[float]] = [[] for _ in models]
    for sample in range(-WARM_UP, count):
        for i, model in enumerate(models):
            start = time.thread_time_ns()
            call(model, inputs)
            if sample >= 0:
                times[i].append((time.thread_time_ns() - start) / 1e6)
    return times


def _on_cpu(model: nn.Module) -> nn.Module:
    """`model` itself, or a copy of one that lives on another device."""
    away = any(p.device.type != "cpu" for p in model.parameters())
    return copy.deepcopy(model).cpu() if away else model


class _one_thread:  # noqa: N801 (used as a statement)
    """One computing thread, so that the caller's CPU time is the whole time."""

    def __enter__(self) -> None:
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._before)
