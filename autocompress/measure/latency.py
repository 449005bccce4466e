"""Milliseconds of a model on this machine's CPU: of a file in ONNX Runtime, or of a module in PyTorch eager.

Each sample times the candidate and a reference back to back, and the result is the reference's latency times the
median ratio: what slows the machine for a while slows both. Knows no policy and no budget.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import onnxruntime
import torch
from filelock import FileLock
from torch import nn

from autocompress.errors import LatencyError
from autocompress.files import cache_folder
from autocompress.measure.node_times import layer_times
from autocompress.runtime import feeds, session
from autocompress.task import call, few, length

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

RUNTIME = "torch-eager"
WARM_UP = 3
SAMPLES = 15
RUNTIME_SAMPLES = 40
ATTEMPTS = 4
"""A sample that was preempted is taken again, up to so many times as many as are wanted."""

Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Latency:
    """Median and quartiles over `samples` runs."""

    ms: float
    low: float
    high: float
    samples: int

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


class RuntimeMeter:
    """Times the content of `.onnx` files in ONNX Runtime on one example, against a reference file.

    With one thread it takes the CPU time of the calling thread, which other processes hardly change; with more, wall
    time, of samples during which this process was not preempted, where the system can tell.
    """

    def __init__(self, reference: bytes, inputs: Any, *, threads: int = 1, dense_ms: float | None = None) -> None:
        """`inputs` is one example of the batch size to time at. `dense_ms` is the reference of an earlier run that
        this one continues; None measures it now. Raises `ExportError` for a file that the runtime does not take.
        """
        if threads < 1:
            raise LatencyError(f"{threads} threads cannot run a model; give 1 or more")
        self.threads, self.batch, self._inputs = threads, length(inputs), inputs
        self._reference = session(reference, threads)
        self.dense = median(self._times([self._reference], 2 * RUNTIME_SAMPLES)[0]) if dense_ms is None else dense_ms

    def __call__(self, content: bytes, samples: int = RUNTIME_SAMPLES) -> Latency:
        """Latency of a file, in milliseconds per batch. Its session lives only as long."""
        own, reference = self._times([session(content, self.threads), self._reference], samples)
        return self._latency(own, reference)

    def traced(self, content: bytes, samples: int = RUNTIME_SAMPLES) -> Traced:
        """Latency of a file, and right after it that of its layers, on the reference's scale too."""
        latency = self(content, samples)
        with tempfile.TemporaryDirectory() as folder:
            probe = session(content, self.threads, trace=Path(folder) / "trace")
            _, reference = self._times([probe, self._reference], samples)
            events = Path(probe.end_profiling()).read_bytes()
        scale = self.dense / median(reference)
        return Traced(latency, {i: scale * ms for i, ms in layer_times(events, content, skip=WARM_UP).items()})

    def against(self, reference: bytes, dense_ms: float) -> RuntimeMeter:
        """A meter of the same deployment with another reference, which takes `dense_ms`."""
        return RuntimeMeter(reference, self._inputs, threads=self.threads, dense_ms=dense_ms)

    def _latency(self, own: Sequence[float], reference: Sequence[float]) -> Latency:
        low, middle, high = quantiles((a / b for a, b in zip(own, reference, strict=True)), n=4)
        return Latency(self.dense * middle, self.dense * low, self.dense * high, len(own))

    def _times(self, sessions: Sequence[onnxruntime.InferenceSession], count: int) -> list[list[float]]:
        given = feeds(self._reference, self._inputs)
        runs = [_bound(ran, given) for ran in sessions]
        return _samples(runs, count) if self.threads == 1 else _undisturbed(runs, count)


def _bound(ran: onnxruntime.InferenceSession, given: Mapping[str, Any]) -> Run:
    return lambda: ran.run(None, given)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """No other process of this user times anything meanwhile; waits until that is so."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "timing.lock"):
        yield


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
            return median(_samples([self._call(self._dense)], 2 * SAMPLES)[0])

    def _call(self, model: nn.Module) -> Run:
        return lambda: call(model, self._inputs)

    def __call__(self, model: nn.Module, architecture: Hashable = None) -> Latency:
        """Latency of `model`; with `architecture` given, measured once for all models that share it."""
        if architecture is None or architecture not in self._known:
            with _one_thread(), torch.inference_mode():
                own, reference = _samples([self._call(_on_cpu(model)), self._call(self._dense)], SAMPLES)
            ratios = [a / b for a, b in zip(own, reference, strict=True)]
            low, middle, high = quantiles(ratios, n=4)
            measured = Latency(self.dense * middle, self.dense * low, self.dense * high, SAMPLES)
            if architecture is None:
                return measured
            self._known[architecture] = measured
        return self._known[architecture]


def _samples(runs: Sequence[Run], count: int) -> list[list[float]]:
    """CPU milliseconds of the calling thread per run, taking turns, after a warm-up: (runs, count)."""
    rounds = [_round(runs, time.thread_time_ns) for _ in range(WARM_UP + count)]
    return [list(times) for times in zip(*rounds[WARM_UP:], strict=True)]


def _undisturbed(runs: Sequence[Run], count: int) -> list[list[float]]:
    """Wall milliseconds per run, taking turns: of rounds without preemption, or of all where few are: (runs, n)."""
    for _ in range(WARM_UP):
        _round(runs, time.perf_counter_ns)
    calm: list[list[float]] = []
    every: list[list[float]] = []
    while len(calm) < count and len(every) < ATTEMPTS * count:
        before = _preemptions()
        every.append(_round(runs, time.perf_counter_ns))
        if _preemptions() == before:
            calm.append(every[-1])
    chosen = calm if len(calm) >= count // 2 else every
    return [list(times) for times in zip(*chosen, strict=True)]


def _round(runs: Sequence[Run], clock: Callable[[], int]) -> list[float]:
    times = []
    for run in runs:
        start = clock()
        run()
        times.append((clock() - start) / 1e6)
    return times


def _preemptions() -> int:
    """How often this process lost a core before it was done; 0 where the system does not count."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


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
