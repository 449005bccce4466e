"""Compress and measure one policy: a pure function of task, seed and policy. Contains no loop and no choice."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from autocompress.engine import Compressed, Progress, Workbench, compress
from autocompress.errors import PolicyError, RunError
from autocompress.files import write
from autocompress.graph import Layer
from autocompress.measure.quality import QualityMeter, screening
from autocompress.policy import LayerChoice, Policy, Solver
from autocompress.profile import Level
from autocompress.target import OnnxTarget, PackedTarget, Place, Reloaded, Target
from autocompress.task import Task
from autocompress.trial import Evaluation, Measurement
from autocompress.views import views_of

_PATHS = ("keep", "checkpoint")


class Job(NamedTuple):
    """A policy, its rung, where to keep its artifact, and whether to score it on a part of `val` only.

    `checkpoint` is where its recovery training can be interrupted and go on; `number` is its trial's.
    """

    policy: Policy
    rung: int
    keep: Path | None = None
    screen: bool = False
    checkpoint: Path | None = None
    number: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain data, which travels to another process; `from_json` gives an equal job back."""
        paths = {name: None if (path := getattr(self, name)) is None else str(path) for name in _PATHS}
        return {**self._asdict(), "policy": self.policy.to_json(), **paths}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Job:
        """What `to_json` wrote."""
        paths = {name: None if data[name] is None else Path(data[name]) for name in _PATHS}
        return cls(**{**data, "policy": Policy.from_json(data["policy"]), **paths})


Evaluate = Callable[[Job, Progress], Evaluation]
"""What a runner runs, and what tests fake; the second hears of training steps."""


class Evaluator:
    """Holds the resident models and meters of one task."""

    def __init__(
        self,
        task: Task,
        *,
        seed: int = 0,
        format: str = "packed",
        place: Place | None = None,
        dense_ms: float | None = None,
        recovers: bool = True,
    ) -> None:
        """`format` is what ships, `place` where ONNX files run, `dense_ms` what an earlier part of the run measured.

        Unless it `recovers`, no candidate is compared with a teacher that has seen several views of an input. Raises
        `ExportError` for a model that has no ONNX file.
        """
        self.task, self.seed, self.format = task, seed, format
        self.bench = Workbench(task, seed=seed)
        self.graph = self.bench.graph
        self.target: Target = PackedTarget(self.bench, dense_ms)
        if format == "onnx":
            self.target = OnnxTarget(self.bench, place, dense_ms)
        views = views_of(task) if recovers else None
        self.quality = QualityMeter(task, self.bench.teacher, views=views)
        self.screen = screening(task, self.bench.teacher, views=views)

    @property
    def dense(self) -> Measurement:
        """The uncompressed model: four bytes a value, its quality, its latency."""
        return Measurement(self.graph.dense_bytes, self.graph.dense_macs, self.quality.dense, 0.0, self.target.dense_ms)

    def predict(self, policy: Policy) -> Measurement:
        """Bytes and multiply-accumulates; those of the one-shot policy, since training may change how codes compress.

        Exact for packed files without it. Measures nothing.
        """
        self.graph.check(policy)
        return self.target.predict(policy)

    def bound(self, policy: Policy) -> Measurement:
        """What `policy` takes at most, by arithmetic alone: bytes without entropy coding, multiply-accumulates."""
        self.graph.check(policy)
        return self.target.bound(policy)

    @property
    def screens(self) -> bool:
        """Whether `val` is so large that candidates are first scored on a part of it."""
        return self.screen is not None

    def level(self, layer: Layer, choice: LayerChoice, solver: Solver) -> Level:
        """One layer's solution under `choice`: bytes of its section, and the share of its outputs' power it loses."""
        stored = self.bench.level(layer, choice, solver)
        size = self.target.level_bytes(layer, choice, stored)
        if solver == "database":
            return Level(choice, size, self.bench.database.error_of(layer, choice))
        return Level(choice, size, self.bench.database.error(layer, stored))

    def loss(self, policy: Policy) -> float:
        """The distance from the dense model's outputs, on what candidates are screened on."""
        return (self.screen or self.quality)(self.build(policy, spent=True)[1]).loss

    def __call__(
        self,
        policy: Policy,
        rung: int = 0,
        keep: Path | None = None,
        progress: Progress | None = None,
        *,
        screen: bool = False,
        checkpoint: Path | None = None,
        seed: int | None = None,
    ) -> Evaluation:
        """Build and measure `policy`, on a part of `val` if `screen`. With `keep`, its artifact is written there.

        `checkpoint` and `seed` are those of `compress`. A candidate that fails (training diverges, a value is not
        finite, anything it raises) is a `failed` evaluation with its traceback; a policy of another model raises
        `PolicyError`, and a disk that takes no file `RunError`: that is no fault of the candidate's.
        """
        start = time.perf_counter()
        meter = self.screen if screen and self.screen else self.quality
        screened = meter is self.screen
        try:
            spent = keep is None
            compressed, model = self.build(policy, progress, checkpoint=checkpoint, seed=seed, spent=spent)
            measured = self._measure(compressed, model, meter)
            if keep is not None:
                _write(keep, self.pack(compressed, measured.quality))
            return Evaluation(
                policy,
                self.seed,
                rung,
                "ok",
                measured,
                seconds=time.perf_counter() - start,
                screened=screened,
                curve=compressed.curve,
            )
        except (PolicyError, RunError):
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

    def run(self, job: Job, progress: Progress | None = None) -> Evaluation:
        """Evaluate a job."""
        return self(job.policy, job.rung, job.keep, progress, screen=job.screen, checkpoint=job.checkpoint)

    def build(
        self,
        policy: Policy,
        progress: Progress | None = None,
        *,
        checkpoint: Path | None = None,
        seed: int | None = None,
        spent: bool = False,
    ) -> tuple[Compressed, nn.Module]:
        """The compressed tensors and the resident model filled with them.

        If `spent`, nobody will write a file: what only a file needs may be gone (`Workbench.spend`).
        """
        compressed = compress(self.bench, self.target.prepared(policy), progress, checkpoint=checkpoint, seed=seed)
        if spent and isinstance(self.target, PackedTarget):  # the others write one to measure it
            return self.bench.spend(compressed)
        return compressed, self.bench.realise(compressed)

    def _measure(self, compressed: Compressed, model: nn.Module, meter: QualityMeter) -> Measurement:
        shipped = self.target.ship(compressed, model)
        quality = meter(shipped.model)
        latency, policy = shipped.time(), compressed.policy
        predicted = self.target.predicted_ms(policy)
        macs = self.graph.macs(policy)
        told = float(self.target.predict(policy).bytes)
        return Measurement(
            shipped.bytes, macs, quality.score, quality.loss, latency.ms, predicted, told, quality.teacher_loss
        )

    def pack(self, compressed: Compressed, quality: float) -> bytes:
        """The content of the file for a compressed model that scored `quality`."""
        return self.target.pack(compressed, quality)

    def reload(self, path: Path) -> Reloaded:
        """The file at `path` read back and rebuilt on a fresh model of the task."""
        return self.target.reload(path)


def _write(path: Path, content: bytes) -> None:
    """Write a file of the run. Raises `RunError`."""
    try:
        write(path, content)
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror or error}; make room there, then continue with --resume"
        ) from error
