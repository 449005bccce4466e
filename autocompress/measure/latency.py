"""Milliseconds of a model on this machine's CPU: of a file in ONNX Runtime, or of a module in PyTorch eager.

Each sample times the candidate and a reference back to back, and the result is the reference's latency times the
median ratio: what slows the machine for a while slows both. Knows no policy and no budget.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from torch import nn

from autocompress.errors import LatencyError
from autocompress.files import cache_folder, write
from autocompress.measure.node_times import layer_times
from autocompress.measure.timing import Latency, Traced
from autocompress.runtime import feeds, session
from autocompress.task import call, few, length

if TYPE_CHECKING:  # its import starts threads, which processes that fork later would miss
    import onnxruntime

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

__all__ = ["Latency", "LatencyMeter", "RememberedTimes", "RuntimeMeter", "Times", "Traced", "alone"]

RUNTIME = "torch-eager"
WARM_UP = 3
SAMPLES = 15
RUNTIME_SAMPLES = 40
MIN_CALM = 8
ATTEMPTS = 3
"""A disturbed round is repeated, until there are so many times as many rounds as are wanted."""
DISTURBED = 1.15
"""A round counts as disturbed if the reference takes so many times its fastest. Neighbours on the machine slow
integer kernels less than float ones (1.3 against 1.5 times on ResNet-20), so that ratios do not cancel it."""

Run = Callable[[], object]


class RuntimeMeter:
    """Times the content of `.onnx` files in ONNX Runtime on one example, against a reference file.

    With one thread it takes the CPU time of the calling thread; with more, wall time. Rounds in which the reference is
    much slower than it can be, or with several threads the process was preempted, are left out as long as others can
    be had.
    """

    def __init__(self, reference: bytes, inputs: Any, *, threads: int = 1, dense_ms: float | None = None) -> None:
        """`inputs` is one example of the batch size to time at. `dense_ms` is the reference of an earlier run that
        this one continues; None measures it now. Raises `ExportError` for a file that the runtime does not take.
        """
        if threads < 1:
            raise LatencyError(f"{threads} threads cannot run a model; give 1 or more")
        self.threads, self.batch, self._inputs = threads, length(inputs), inputs
        self._reference = session(reference, threads)
        self._fastest = math.inf
        self.dense = median(self._rounds([], 2 * RUNTIME_SAMPLES).reference) if dense_ms is None else dense_ms

    def __call__(self, content: bytes, samples: int = RUNTIME_SAMPLES) -> Latency:
        """Latency of a file, in milliseconds per batch. Its session lives only as long."""
        rounds = self._rounds([session(content, self.threads)], samples)
        ratios = [own / reference for own, reference in rounds.times]
        low, middle, high = quantiles(ratios, n=4)
        return Latency(self.dense * middle, self.dense * low, self.dense * high, len(ratios), median(rounds.reference))

    def traced(self, content: bytes, samples: int = RUNTIME_SAMPLES) -> Traced:
        """Latency of a file, and right after it that of its layers, on the reference's scale too."""
        latency = self(content, samples)
        with tempfile.TemporaryDirectory() as folder:
            probe = session(content, self.threads, trace=Path(folder) / "trace")
            rounds = self._rounds([probe], samples)
            profile = Path(probe.end_profiling()).read_bytes()
        scale = self.dense / median(rounds.reference)
        layers = layer_times(profile, content, [WARM_UP + i for i in rounds.numbers])
        return Traced(latency, {number: scale * ms for number, ms in layers.items()})

    def against(self, reference: bytes, dense_ms: float) -> RuntimeMeter:
        """A meter of the same deployment with another reference, which takes `dense_ms`."""
        return RuntimeMeter(reference, self._inputs, threads=self.threads, dense_ms=dense_ms)

    def _rounds(self, sessions: Sequence[onnxruntime.InferenceSession], count: int) -> _Rounds:
        """The sessions and then the reference taking turns, after a warm-up: `count` calm rounds if there are any."""
        given = feeds(self._reference, self._inputs)
        runs = [_bound(ran, given) for ran in (*sessions, self._reference)]
        clock = time.thread_time_ns if self.threads == 1 else time.perf_counter_ns
        for _ in range(WARM_UP):
            _round(runs, clock)
        every: list[list[float]] = []
        whole: list[int] = []  # those in which the clock moved
        clean: list[int] = []
        calm: list[int] = []
        while len(every) < ATTEMPTS * count:
            before = _preemptions()
            every.append(_round(runs, clock))
            if min(every[-1]) <= 0:
                continue
            whole.append(len(every) - 1)
            self._fastest = min(self._fastest, every[-1][-1])
            if self.threads == 1 or _preemptions() == before:
                clean.append(len(every) - 1)
            calm = [i for i in clean if every[i][-1] <= DISTURBED * self._fastest]
            if len(calm) == count:
                break
        numbers = next((found for found in (calm, clean) if len(found) >= min(count, MIN_CALM)), whole)
        _require_some(numbers)
        return _Rounds([every[i] for i in numbers], list(numbers))


@dataclass(frozen=True, slots=True)
class _Rounds:
    """Milliseconds of each run in some rounds, the reference's last, and the numbers of those rounds."""

    times: list[list[float]]
    numbers: list[int]

    @property
    def reference(self) -> list[float]:
        return [times[-1] for times in self.times]


def _bound(ran: onnxruntime.InferenceSession, given: Mapping[str, Any]) -> Run:
    return lambda: ran.run(None, given)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """No other process of this user times anything meanwhile; waits until that is so."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "timing.lock"):
        yield


Times = Callable[[Hashable, bytes, Callable[[], Latency]], Latency]
"""(what determines a latency, the file if there is one, how to measure it here) -> the latency."""


def no_times(key: Hashable, content: bytes, measure: Callable[[], Latency]) -> Latency:  # noqa: ARG001
    """Of a worker that is too busy to measure: NaN. See `Times`."""
    return Latency(math.nan, math.nan, math.nan, 0)


class RememberedTimes:
    """Equal kernels get equal numbers, so that a search does not choose by noise: each is measured once.

    With `folder` once by all processes that share it, one at a time, whichever is first; it may be absent. What
    determines a latency must have the same `repr` in each of them.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._known: dict[Hashable, Latency] = {}

    def __call__(self, key: Hashable, content: bytes, measure: Callable[[], Latency]) -> Latency:
        """See `Times`."""
        del content
        if key not in self._known:
            self._known[key] = measure() if self._folder is None else self._shared(self._folder, key, measure)
        return self._known[key]

    def _shared(self, folder: Path, key: Hashable, measure: Callable[[], Latency]) -> Latency:
        path = folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.json"
        with alone():
            try:
                return Latency.from_json(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError, RecursionError):  # not measured yet, or not by this version
                found = measure()
            write(path, json.dumps(asdict(found)).encode())
            return found


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
            measured = Latency(self.dense * middle, self.dense * low, self.dense * high, len(ratios))
            if architecture is None:
                return measured
            self._known[architecture] = measured
        return self._known[architecture]


def _samples(runs: Sequence[Run], count: int) -> list[list[float]]:
    """CPU milliseconds of the calling thread per run, taking turns, after a warm-up: (runs, at most count)."""
    rounds = [_round(runs, time.thread_time_ns) for _ in range(WARM_UP + count)][WARM_UP:]
    whole = [times for times in rounds if min(times) > 0]
    _require_some(whole)
    return [list(times) for times in zip(*whole, strict=True)]


def _require_some(rounds: Sequence[object]) -> None:
    """A thread's clock may stand still for a moment, on a virtual machine under load: such rounds say nothing."""
    if len(rounds) < 2:
        raise LatencyError(
            "the processor's clock did not move while the model ran, in all rounds but one: run it again when less "
            "else runs here, or give a larger --batch"
        )


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
