"""What ships, and where it runs: the packed file in PyTorch, or the ONNX file in ONNX Runtime.

A target says how large a policy's file is, makes it, and times it where it will run. Knows nothing about searches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from autocompress import runtime
from autocompress.artifact import packed
from autocompress.artifact.layout import Header, file_bytes, rest_entry, weight_entry
from autocompress.artifact.onnx import About, Candidate, Exporter, filling
from autocompress.artifact.onnx_graph import LONG, LONGEST, Filling, Halves, cost, functions_bytes
from autocompress.engine import Compressed, Workbench, compress
from autocompress.errors import ArtifactError, ExportError, LatencyError
from autocompress.graph import Layer, Shape
from autocompress.measure.latency import RUNTIME, Latency, LatencyMeter, RememberedTimes, RuntimeMeter, Times, alone
from autocompress.measure.latency_table import LatencyTable, Model, Predictor, build
from autocompress.measure.size import Size
from autocompress.measure.timing import calmest
from autocompress.policy import LayerChoice, Policy, Recovery
from autocompress.stored import Quantised, Stored
from autocompress.task import call, few, length, tensors
from autocompress.trial import Measurement

FORMATS = ("packed", "onnx")
RANGE_BATCHES = 2
"""Calibration batches over which activations' ranges are gathered."""
FINAL_SAMPLES, FINAL_ROUNDS = 200, 6
"""Runs of a file that is timed alone, and into how many rounds they go, of which the calmest count."""
FASTER = 0.99
"""A layer keeps float kernels if the network then takes no more than this share: noise decides nothing."""
SLACK = 64
"""Bytes by which a predicted file may be too short: lengths of lengths."""
MANY = 200
"""Tensors of a model from which on its graph may need names of three letters."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model will run: threads, inputs at once, and a table of another machine's times, if it is that one."""

    threads: int = 1
    batch: int = 1
    table: LatencyTable | None = None


@dataclass(frozen=True, eq=False)
class Shipped:
    """A candidate as it ships: bytes of its file, the model that runs it, and how long that takes (timed if asked)."""

    bytes: int
    model: nn.Module
    time: Callable[[], Latency]


class Reloaded(NamedTuple):
    """A file read back: its length, the quality on `val` that it claims, and the model that runs it."""

    bytes: int
    quality: float
    model: nn.Module


class Target(Protocol):
    """One kind of file with its runtime."""

    suffix: str
    runtime: str
    times: Times
    """Who measures latencies, and remembers them."""

    @property
    def dense_ms(self) -> float:
        """Latency of the dense model in this runtime."""
        ...

    def predict(self, policy: Policy) -> Measurement:
        """Bytes, multiply-accumulates and, where they can be told, milliseconds of the one-shot policy."""
        ...

    def bound(self, policy: Policy) -> Measurement:
        """The same by arithmetic alone: no fewer bytes than its file."""
        ...

    def level_bytes(self, layer: Layer, choice: LayerChoice, stored: Stored) -> int:
        """Bytes of one layer's part of the file, its weight and its bias."""
        ...

    def prepared(self, policy: Policy) -> Policy:
        """The policy as the engine must apply it for this file."""
        ...

    def ship(self, compressed: Compressed, model: nn.Module) -> Shipped:
        """The candidate with exactly these tensors, which `model` holds too."""
        ...

    def predicted_ms(self, policy: Policy) -> float:
        """Milliseconds that a table of layer times foretells; NaN without one."""
        ...

    def pack(self, compressed: Compressed, quality: float) -> bytes:
        """The file's content."""
        ...

    def reload(self, path: Path) -> Reloaded:
        """The file at `path`. Raises `ArtifactError`."""
        ...

    def retime(self, path: Path) -> Latency:
        """The file at `path` alone on this machine, with many samples."""
        ...

    def about(self) -> dict[str, Any]:
        """How latencies were measured, for the run's record."""
        ...


class PackedTarget:
    """`.acz` files, which PyTorch runs."""

    suffix, runtime = ".acz", RUNTIME

    def __init__(self, bench: Workbench, dense_ms: float | None = None) -> None:
        self._bench, self._task, self._graph = bench, bench.task, bench.graph
        self.size = Size(bench.graph, bench.task.name, bench.task.metric)
        self._meter = LatencyMeter(bench.teacher, bench.example.inputs, dense_ms)
        self.times: Times = RememberedTimes()

    @property
    def dense_ms(self) -> float:
        return self._meter.dense

    def predict(self, policy: Policy) -> Measurement:
        return Measurement(self.size(policy, self._bench.codings(policy)), self._graph.macs(policy))

    def bound(self, policy: Policy) -> Measurement:
        # rows of the header with different widths deflate less well than those with the widest for all
        varied = sum(choice.entropy for _, choice in self._graph.choices(policy))
        return Measurement(self.size(policy) + varied, self._graph.macs(policy))

    def level_bytes(self, layer: Layer, choice: LayerChoice, stored: Stored) -> int:
        count = math.prod(layer.shape)
        coded = stored.coding() if isinstance(stored, Quantised) else None
        size = weight_entry(layer.weight, layer.shape, choice, count - choice.zeros(count), coded).nbytes
        bias = self._graph.biases.get(layer.weight)
        if bias is None:
            return size
        return size + rest_entry(bias, layer.shape[:1], "float32", small=choice.small_floats).nbytes

    def prepared(self, policy: Policy) -> Policy:
        return policy

    def ship(self, compressed: Compressed, model: nn.Module) -> Shipped:
        shapes = self._graph.architecture(compressed.policy)
        return Shipped(
            file_bytes(self.header(compressed)), model, lambda: self.times(shapes, b"", lambda: self._meter(model))
        )

    def predicted_ms(self, policy: Policy) -> float:  # noqa: ARG002
        return math.nan

    def header(self, compressed: Compressed) -> Header:
        """The header of the file that holds exactly these tensors."""
        return self.size.header(compressed.policy, compressed.codings())

    def pack(self, compressed: Compressed, quality: float) -> bytes:
        return packed.pack(self.header(compressed), compressed.tensors, quality, compressed.policy.key())

    def reload(self, path: Path) -> Reloaded:
        artifact = packed.read(path)
        return Reloaded(artifact.bytes, artifact.quality, packed.build(artifact, self._task.model()))

    def retime(self, path: Path) -> Latency:
        return self._meter(self.reload(path).model)

    def about(self) -> dict[str, Any]:
        return {"latency_runtime": RUNTIME, "device": runtime.device()}


class OnnxTarget:
    """`.onnx` files, which ONNX Runtime runs. Batch norms are always folded: the runtime would do it anyway."""

    suffix, runtime = ".onnx", runtime.NAME

    def __init__(self, bench: Workbench, place: Place | None = None, dense_ms: float | None = None) -> None:
        """Exports the dense model and times it. Raises `ExportError`."""
        self._bench, self._task, self._graph = bench, bench.task, bench.graph
        self._place = place or Place()
        inputs = few(bench.teacher, bench.example.inputs, self._place.batch)
        if length(inputs) < self._place.batch:
            raise LatencyError(
                f"--batch {self._place.batch} is more than the {length(inputs)} inputs of the task's batches: give "
                "less, or let the task make larger batches"
            )
        self.table: LatencyTable | None = None
        self._predictor: Predictor | None = None
        if (carried := self._place.table) is not None:
            carried.check(self._graph, runtime.version(), self._place.threads, self._place.batch)
            self.use(carried)
            dense_ms = carried.dense
        dense = self._candidate(compress(bench, Policy()), Policy())
        examples = [batch.inputs for batch in bench.calibration[:RANGE_BATCHES]]
        self.exporter = Exporter(self._graph.layers, dense, examples)
        self.meter = RuntimeMeter(self.exporter.original, inputs, threads=self._place.threads, dense_ms=dense_ms)
        self.times: Times = RememberedTimes()
        self._names = LONG if len(self._graph.tensors) < MANY else LONGEST
        self._cost = lru_cache(maxsize=4096)(self._cost_of)
        self._base = lru_cache(maxsize=None)(self._frame)

    @property
    def dense_ms(self) -> float:
        return self.meter.dense

    # --- times ---

    @property
    def measures(self) -> bool:
        """Whether latencies are those of this machine, not of a table that was carried here."""
        return self._place.table is None

    def use(self, table: LatencyTable) -> None:
        """Predict with `table` from now on."""
        self.table, self._predictor = table, Predictor(table, self._graph)

    def measure_table(self, keep: Mapping[str, Sequence[float]]) -> LatencyTable:
        """Times of this machine for the widths that groups may keep; predictions use it from now on."""

        def file_of(policy: Policy, activations: int) -> bytes:
            wanted = replace(policy, activations=activations)
            return self.exporter.build(self._candidate(compress(self._bench, wanted), wanted), self._about(wanted))

        model = Model(self._graph, keep, self.exporter.computed, file_of)
        place = (runtime.NAME, runtime.version(), runtime.device())
        with alone():
            self.use(build(model, self.meter, place, time.monotonic))
        assert self.table is not None
        return self.table

    def predicted_ms(self, policy: Policy) -> float:
        return math.nan if self._predictor is None else self._predictor(policy, policy.activations)

    def _about(self, policy: Policy, quality: float = math.nan) -> About:
        return About(self._task.name, self._task.metric, policy.key(), quality)

    def _candidate(self, compressed: Compressed, policy: Policy, model: nn.Module | None = None) -> Candidate:
        module = self._bench.realise(compressed) if model is None else model
        floats = frozenset(layer.weight for layer in self._graph.layers if layer.name in policy.floats)
        return Candidate(compressed.tensors, module, self._graph.architecture(policy), policy.activations, floats)

    def faster_as_floats(self, policy: Policy) -> tuple[str, ...]:
        """Layers that make a network of integer kernels faster when they keep float ones, for these widths and bits.

        Those of which the layer times say so, each kept only if the whole network measures faster.
        """
        assert self.table is not None
        layers = {layer.weight: layer for layer in self._graph.layers}
        names = [layers[weight].name for weight in self.exporter.computed]
        base = self.predicted_ms(policy)
        gains = {name: base - self.predicted_ms(replace(policy, floats=(name,))) for name in names}
        found: tuple[str, ...] = ()
        best = self.time(policy).ms
        for name in sorted((name for name in names if gains[name] > 0), key=lambda name: -gains[name]):
            ms = self.time(replace(policy, floats=(*found, name))).ms
            if ms < FASTER * best:
                found, best = (*found, name), ms
        return tuple(sorted(found))

    def time(self, policy: Policy) -> Latency:
        """The latency of a policy whose tensors do not matter."""
        plain = replace(policy, solver="nearest", recovery=Recovery(reestimate_bn=False))
        compressed = compress(self._bench, plain)
        candidate = self._candidate(compressed, plain)
        return self._timed(candidate, self.exporter.build(candidate, self._about(plain)), plain)

    # --- sizes ---

    def predict(self, policy: Policy) -> Measurement:
        return self.bound(policy)

    def bound(self, policy: Policy) -> Measurement:
        policy = self.prepared(policy)
        size, called = self._parts(policy)
        whole = self._base(policy.activations) + size + functions_bytes(called) + SLACK
        return Measurement(whole, self._graph.macs(policy), predicted_ms=self.predicted_ms(policy))

    def _parts(self, policy: Policy) -> tuple[int, frozenset[str]]:
        """Bytes of the tensors, and what they call."""
        choices = {layer.weight: choice for layer, choice in self._graph.choices(policy)}
        integer = policy.activations == 8
        parts = [
            self._cost(choices.get(name), self._graph.tensors.get(name, ((), "float32"))[1], shape, integer)
            for name, shape in self._graph.contents(policy).items()
        ]
        return sum(size for size, _ in parts), frozenset().union(*(called for _, called in parts))

    def _cost_of(
        self, choice: LayerChoice | None, dtype: str, shape: Shape, integer: bool
    ) -> tuple[int, frozenset[str]]:
        if not math.prod(shape):  # a removed layer is not in the graph
            return 0, frozenset()
        return cost(_dummy(choice, dtype, shape), integer=integer, names=self._names)

    def _frame(self, activations: int) -> int:
        """Bytes of everything that is no tensor of the model, at most."""
        policy = Policy({x.name: LayerChoice(8) for x in self._graph.layers}, activations=activations)
        candidate = self._candidate(compress(self._bench, policy), policy)
        whole = self.exporter.length(candidate, self._about(policy), self._names)
        size, called = self._parts(policy)
        return whole - size - functions_bytes(called)

    def level_bytes(self, layer: Layer, choice: LayerChoice, stored: Stored) -> int:  # noqa: ARG002
        return self._cost(choice, "float32", layer.shape, True)[0]

    # --- files ---

    def prepared(self, policy: Policy) -> Policy:
        return replace(policy, recovery=replace(policy.recovery, fold_bn=True))

    def ship(self, compressed: Compressed, model: nn.Module) -> Shipped:
        candidate = self._candidate(compressed, compressed.policy, model)
        content = self.exporter.build(candidate, self._about(compressed.policy))
        ran = self.exporter.module(runtime.session(content, torch.get_num_threads()))
        return Shipped(len(content), ran, lambda: self._timed(candidate, content, compressed.policy))

    def _timed(self, candidate: Candidate, content: bytes, policy: Policy) -> Latency:
        """Equal kernels get equal numbers: a search does not choose by noise."""
        if self._place.table is not None:
            ms = self.predicted_ms(policy)
            return Latency(ms, ms, ms, 0)
        key = self.exporter.kernels(candidate)
        return self.times(key, content, lambda: self.meter(content))

    def pack(self, compressed: Compressed, quality: float) -> bytes:
        candidate = self._candidate(compressed, compressed.policy)
        return self.exporter.build(candidate, self._about(compressed.policy, quality))

    def reload(self, path: Path) -> Reloaded:
        notes, content = About.read(path)
        inputs = few(self._bench.teacher, self._bench.example.inputs, 2)
        try:
            model = self.exporter.module(runtime.session(content, torch.get_num_threads()))
            fits = _shapes(model, inputs) == _shapes(self._bench.teacher, inputs)
        except ExportError:
            fits = False
        if not fits:
            raise ArtifactError(
                f"{path} and the model of task {self._task.name!r} do not belong together, or the file is damaged: it "
                f"was made for task {notes.task!r}"
            )
        return Reloaded(len(content), notes.quality, model)

    def retime(self, path: Path) -> Latency:
        _, content = About.read(path)
        with alone():
            try:
                return calmest([self.meter(content, FINAL_SAMPLES // FINAL_ROUNDS) for _ in range(FINAL_ROUNDS)])
            except Exception as error:  # whatever the runtime raises where the file's inputs are others
                raise ArtifactError(f"{path} does not run on the task's inputs: {error}") from error

    def about(self) -> dict[str, Any]:
        place = self._place
        device = runtime.device() if place.table is None else place.table.deployment.device
        return {
            "latency_runtime": f"{runtime.NAME} {runtime.version()}",
            "device": device,
            "threads": place.threads,
            "batch": place.batch,
        }


def _shapes(model: nn.Module, inputs: Any) -> list[Shape]:
    with torch.no_grad():
        return [tuple(value.shape) for value in tensors(call(model, inputs))]


def _dummy(choice: LayerChoice | None, dtype: str, shape: Shape) -> Filling:
    """What takes as many bytes as any tensor of this shape under `choice`, or beside the layers (None)."""
    width = 16 if choice is None else choice.width
    if width == 32 or dtype == "exact" or not dtype.startswith(("float", "bfloat")):
        return np.zeros(shape, dtype=np.float32 if width == 32 or dtype in ("exact", "bfloat16") else dtype)
    if choice is None or width == 16:
        return Halves(np.zeros(shape, dtype=np.float16), 1.0)
    count = math.prod(shape)
    stays = (torch.arange(count) >= choice.zeros(count)).reshape(shape)
    zero = torch.full((shape[0],), 2 ** (width - 1), dtype=torch.uint8)
    codes = torch.where(stays, 0, zero.reshape(-1, *[1] * (len(shape) - 1))).to(torch.uint8)
    mask = None if bool(stays.all()) else stays
    return filling(Quantised(codes, torch.ones(shape[0]), zero, width, choice.symmetric, mask))
