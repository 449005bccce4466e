"""Compress and measure one policy: a pure function of task, seed and policy. Contains no loop and no choice."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import nn

from autocompress.artifact.layout import Header, file_bytes, weight_entry
from autocompress.artifact.packed import Artifact, build, pack, read
from autocompress.engine import Compressed, Progress, Workbench, compress
from autocompress.errors import PolicyError
from autocompress.files import write
from autocompress.graph import Layer
from autocompress.measure.latency import LatencyMeter
from autocompress.measure.quality import QualityMeter, screening
from autocompress.measure.size import Size
from autocompress.policy import LayerChoice, Policy, Solver
from autocompress.profile import Level
from autocompress.stored import Quantised
from autocompress.task import Task
from autocompress.trial import Evaluation, Measurement


class Job(NamedTuple):
    """A policy, its rung, where to keep its artifact, and whether to score it on a part of `val` only."""

    policy: Policy
    rung: int
    keep: Path | None = None
    screen: bool = False


Evaluate = Callable[[Job], Evaluation]
"""What a runner runs, and what tests fake."""


class Evaluator:
    """Holds the resident models and meters of one task."""

    def __init__(self, task: Task, *, seed: int = 0, dense_ms: float | None = None) -> None:
        """`dense_ms` is the dense latency that an earlier part of the same run measured."""
        self.task, self.seed = task, seed
        self.bench = Workbench(task, seed=seed)
        self.graph = self.bench.graph
        self.size = Size(self.graph, task.name, task.metric)
        self.quality = QualityMeter(task, self.bench.teacher)
        self.screen = screening(task, self.bench.teacher)
        self.latency = LatencyMeter(self.bench.teacher, self.bench.example.inputs, dense_ms)

    @property
    def dense(self) -> Measurement:
        """The uncompressed model: four bytes a value, its quality, its latency."""
        return Measurement(self.graph.dense_bytes, self.graph.dense_macs, self.quality.dense, 0.0, self.latency.dense)

    def predict(self, policy: Policy) -> Measurement:
        """Bytes and multiply-accumulates; those of the one-shot policy, since training may change how codes compress.

        Exact without it. Finds the layers' codes, but measures nothing.
        """
        self.graph.check(policy)
        return Measurement(self.size(policy, self.bench.coded_lengths(policy)), self.graph.macs(policy))

    def bound(self, policy: Policy) -> Measurement:
        """What `policy` takes at most, by arithmetic alone: bytes without entropy coding, multiply-accumulates."""
        self.graph.check(policy)
        return Measurement(self.size(policy), self.graph.macs(policy))

    def header(self, compressed: Compressed) -> Header:
        """The header of the file that holds exactly these tensors."""
        return self.size.header(compressed.policy, compressed.coded_lengths())

    @property
    def screens(self) -> bool:
        """Whether `val` is so large that candidates are first scored on a part of it."""
        return self.screen is not None

    def level(self, layer: Layer, choice: LayerChoice, solver: Solver) -> Level:
        """One layer's solution under `choice`: bytes of its section, and the share of its outputs' power it loses."""
        stored = self.bench.level(layer, choice, solver)
        count = math.prod(layer.shape)
        coded = stored.coded if isinstance(stored, Quantised) else None
        entry = weight_entry(layer.weight, layer.shape, choice, count - choice.zeros(count), coded)
        if solver == "database":
            return Level(choice, entry.nbytes, self.bench.database.error_of(layer, choice))
        return Level(choice, entry.nbytes, self.bench.database.error(layer, stored))

    def loss(self, policy: Policy) -> float:
        """The distance from the dense model's outputs, on what candidates are screened on."""
        return (self.screen or self.quality)(self.build(policy)[1]).loss

    def __call__(
        self,
        policy: Policy,
        rung: int = 0,
        keep: Path | None = None,
        progress: Progress | None = None,
        *,
        screen: bool = False,
    ) -> Evaluation:
        """Build and measure `policy`, on a part of `val` if `screen`. With `keep`, its artifact is written there.

        A candidate that fails (training diverges, a value is not finite, anything it raises) is a `failed`
        evaluation with its traceback; a policy of another model raises `PolicyError`.
        """
        start = time.perf_counter()
        meter = self.screen if screen and self.screen else self.quality
        screened = meter is self.screen
        try:
            compressed, model = self.build(policy, progress)
            measured = self._measure(compressed, model, meter)
            if keep is not None:
                write(keep, self.pack(compressed, measured.quality))
            return Evaluation(
                policy,
                self.seed,
                rung,
                "ok",
                measured,
                seconds=time.perf_counter() - start,
                screened=screened,
            )
        except PolicyError:
            raise
        except Exception:
            return Evaluation(
                policy,
                self.seed,
                rung,
                "failed",
                error=traceback.format_exc(limit=-6),
                seconds=time.perf_counter() - start,
                screened=screened,
            )

    def build(self, policy: Policy, progress: Progress | None = None) -> tuple[Compressed, nn.Module]:
        """The compressed tensors and the resident model filled with them."""
        compressed = compress(self.bench, policy, progress)
        return compressed, self.bench.realise(compressed)

    def _measure(self, compressed: Compressed, model: nn.Module, meter: QualityMeter) -> Measurement:
        policy = compressed.policy
        quality = meter(model)
        latency = self.latency(model, self.graph.architecture(policy))
        size, macs = file_bytes(self.header(compressed)), self.graph.macs(policy)
        return Measurement(size, macs, quality.score, quality.loss, latency.ms)

    def pack(self, compressed: Compressed, quality: float) -> bytes:
        """The content of the file for a compressed model that scored `quality`."""
        return pack(self.header(compressed), compressed.tensors, quality, compressed.policy.key())

    def reload(self, path: Path) -> tuple[Artifact, nn.Module]:
        """The file at `path` read back and rebuilt on a fresh model of the task."""
        artifact = read(path)
        return artifact, build(artifact, self.task.model())
