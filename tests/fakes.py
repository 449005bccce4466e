"""A network as plain data with an analytic loss: controllers, runners and studies run in milliseconds."""

from __future__ import annotations

import math
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autocompress import study
from autocompress.artifact.layout import Entry, weight_entry
from autocompress.artifact.packed import pack, read
from autocompress.engine.precision import PLAIN
from autocompress.errors import TaskError
from autocompress.evaluate import Evaluate, Job
from autocompress.files import write
from autocompress.front import Trial
from autocompress.graph import Graph, Group, Layer, Member
from autocompress.journal import Journal
from autocompress.measure.latency import Latency
from autocompress.measure.quality import Quality
from autocompress.measure.size import Size
from autocompress.policy import LayerChoice, Policy, Recovery
from autocompress.profile import Level, Profile, measure, with_groups
from autocompress.runners.base import Result, keep_busy
from autocompress.space import Space, load_space, parse_space
from autocompress.stored import Byte, Full, Half, Quantised, Raw, Stored
from autocompress.study import Outcome, Settings, search
from autocompress.target import Place, Reloaded
from autocompress.trial import Curve, Evaluation, Measurement

SPACE_TEXT = """
[layers]
bits = [2, 4, 8, 32]
sparsity = [0.0, 0.5]
scheme = ["symmetric", "asymmetric"]
[channels]
keep = [0.5, 0.75, 1.0]
criterion = ["l1", "l2"]
[batch_norm]
reestimate = [true, false]
[recovery]
lr = [0.001, 0.1]
decay = ["cosine", "step"]
distill_weight = [0.5, 1.0]
adjust_factor = [0.5, 1.0]
gradient = ["none", "centralise"]
"""
NOTES: Path | None = None
"""A file that names the folder of notes to fake workers, where the place of an artifact does not tell it."""
TINY_SPACE_TEXT = "[layers]\nbits = [4]\nsparsity = [0.0, 0.5]\n[recovery]\nlr = [0.001, 0.1]\n"
"""Eight policies."""
DENSE_MS = 2.0


def _channels(count: int) -> tuple[tuple[int, ...], ...]:
    return tuple((i,) for i in range(count))


def make_graph(rename: Callable[[str], str] = lambda name: name) -> Graph:
    """Two convolutions and a classifier; `rename` changes the layers' names."""
    a, b, fc, bn = rename("conv1"), rename("conv2"), rename("fc"), "bn1"
    layers = (
        Layer(a, "conv2d", (8, 3, 3, 3), positions=64, batch_norm=bn),
        Layer(b, "conv2d", (16, 8, 3, 3), positions=16, has_bias=True),
        Layer(fc, "linear", (10, 16), has_bias=True),
    )
    tensors: dict[str, tuple[tuple[int, ...], str]] = {f"{a}.weight": ((8, 3, 3, 3), "float32")}
    tensors |= {f"{bn}.{name}": ((8,), "float32") for name in ("weight", "bias", "running_mean", "running_var")}
    tensors |= {f"{b}.weight": ((16, 8, 3, 3), "float32"), f"{b}.bias": ((16,), "float32")}
    tensors |= {f"{fc}.weight": ((10, 16), "float32"), f"{fc}.bias": ((10,), "float32")}
    eight, sixteen, ten = _channels(8), _channels(16), _channels(10)
    norm = tuple(Member(f"{bn}.{name}", 0, eight) for name in ("weight", "bias", "running_mean", "running_var"))
    reader = Member(f"{fc}.weight", 1, sixteen)
    groups = (
        Group(a, 8, (Member(f"{a}.weight", 0, eight), *norm, Member(f"{b}.weight", 1, eight))),
        Group(b, 16, (Member(f"{b}.weight", 0, sixteen), Member(f"{b}.bias", 0, sixteen), reader)),
        Group(fc, 10, (Member(f"{fc}.weight", 0, ten), Member(f"{fc}.bias", 0, ten)), frozen="they are the output"),
    )
    return Graph(layers, groups, tensors, dense_bytes=4 * sum(prod(shape) for shape, _ in tensors.values()))


GRAPH = make_graph()


def make_space(text: str = SPACE_TEXT, graph: Graph = GRAPH) -> Space:
    """The open choices of the fake network."""
    return Space(parse_space(text, "fake.toml"), graph)


def level_error(choice: LayerChoice) -> float:
    """0 for the dense choice, more for fewer bits and more zeros."""
    grid = 0.0 if choice.bits == 32 else 2.0**-choice.bits * (0.9 if choice.scheme == "asymmetric" else 1.0)
    return grid + 0.05 * choice.sparsity**2


def damage(policy: Policy, graph: Graph = GRAPH) -> float:
    """Analytic loss: 0 for the dense model, more for fewer bits, more zeros and fewer channels, less after recovery."""
    total = sum(prod(layer.shape) for layer in graph.layers)
    lost = 0.0
    for i, (layer, choice) in enumerate(graph.choices(policy)):
        share = (prod(layer.shape) / total) ** 0.5 * (1 + 0.1 * i)
        lost += share * level_error(choice)
    lost += sum(0.1 * (1 - ratio) ** 2 for ratio in policy.keep.values())
    lost *= {"l1": 1.0, "l2": 0.97}.get(policy.criterion, 1.0) * (0.98 if policy.recovery.reestimate_bn else 1.0)
    if policy.recovery.epochs:
        lost *= min(1.0, 0.4 + 0.2 * abs(math.log10(policy.recovery.lr / 0.02)))
    return lost


PACKED: dict[str, Policy] = {}
"""Policy of every file that a fake wrote, by the key that stands in it; it outlives evaluators as files do."""


class Killed(BaseException):
    """Stands for the death of the process: no handler of the package catches it."""


@dataclass
class FakeModel:
    """What `build` and `reload` give: it only remembers its policy."""

    policy: Policy


@dataclass
class FakeTask:
    """Scores fake models and records each request as (split, policy key)."""

    name: str = "fake"
    metric: str = "accuracy"
    direction: str = "max"
    scored: list[tuple[str, str]] = field(default_factory=list)
    detailed: list[str] = field(default_factory=list)
    graph: Graph = GRAPH
    weights: float = 0.5
    screens: bool = False

    def quality_of(self, policy: Policy) -> float:
        """The metric: falls from 0.95 with the damage, or rises from 0.05 where lower is better."""
        lost = damage(policy, self.graph)
        return 0.95 * math.exp(-lost) if self.direction == "max" else 0.05 + lost

    def score(self, model: Any, split: str) -> float:
        """A different but fixed number on `test`."""
        self.scored.append((split, model.policy.key()))
        return self.quality_of(model.policy) - (0.01 if split == "test" else 0.0)

    def details(self, model: Any, split: str) -> dict[str, float]:
        """Two classes, of which one loses more than the metric says."""
        self.detailed.append("dense" if model is None else model.policy.key())
        quality = self.quality_of(getattr(model, "policy", Policy()))
        return {f"class 0 of {self.name}": quality, f"class 1 of {split}": quality**2}

    def count(self, split: str) -> int:
        """How often `split` was read."""
        return sum(1 for name, _ in self.scored if name == split)


Progress = Callable[[int, int], None]
Fault = Callable[[Policy, int], str | None]
"""(policy, rung) -> "raise", "nan", "kill" or None."""


@dataclass
class FakeTarget:
    """Has what `Study` uses of a target."""

    evaluator: FakeEvaluator
    suffix: str
    slower: float

    def retime(self, path: Path) -> Latency:
        """The latency that the search measured, times a factor."""
        policy = PACKED[read(path).key]
        ms = self.slower * self.evaluator.latency(policy)
        return Latency(ms, 0.99 * ms, 1.01 * ms, 9)

    def about(self) -> dict[str, Any]:
        return {"latency_runtime": "fake", "device": "fake"}


class FakeEvaluator:
    """Has what `Study` uses of `Evaluator`; sizes and files are real, tensors are zeros, quality is a formula."""

    def __init__(
        self,
        task: FakeTask | None = None,
        *,
        seed: int = 0,
        dense_ms: float | None = None,
        fault: Fault | None = None,
        kill_at: int | None = None,
        format: str = "packed",
        retimed: float = 1.0,
    ) -> None:
        """`retimed` is how much longer every file takes at the end, when it is timed alone.

        `fault` decides what goes wrong with a policy; the `kill_at`-th evaluation (from 0) kills the process.
        """
        self.task, self.seed, self.format = task or FakeTask(), seed, format
        self.target = FakeTarget(self, ".onnx" if format == "onnx" else ".acz", retimed)
        self.graph = self.task.graph
        state = {name: torch.full(shape, self.task.weights) for name, (shape, _) in self.graph.tensors.items()}
        self.bench = SimpleNamespace(state=state, teacher=None, trainable=True, untrainable="", precision=PLAIN)
        self.size = Size(self.graph, self.task.name, self.task.metric)
        self.fault, self.kill_at = fault or (lambda *_: None), kill_at
        self.calls: list[tuple[Policy, int, Path | None]] = []
        self.screens = self.task.screens
        self.screened: list[bool] = []
        self.trained_with: list[tuple[int | None, Path | None]] = []
        ms = DENSE_MS if dense_ms is None else dense_ms
        self.dense = Measurement(
            self.graph.dense_bytes, self.graph.dense_macs, self.task.quality_of(Policy(recovery=Recovery())), 0.0, ms
        )

    def predict(self, policy: Policy) -> Measurement:
        """Exact bytes and multiply-accumulates."""
        self.graph.check(policy)
        return Measurement(self.size(policy), self.graph.macs(policy))

    bound = predict

    def level(self, layer: Layer, choice: LayerChoice, solver: str) -> Level:  # noqa: ARG002
        """Exact bytes; the error is what `damage` asks of the choice."""
        count = prod(layer.shape)
        size = weight_entry(layer.weight, layer.shape, choice, count - choice.zeros(count)).nbytes
        return Level(choice, size, level_error(choice))

    def loss(self, policy: Policy) -> float:
        """The analytic loss."""
        return damage(policy, self.graph)

    def __call__(
        self,
        policy: Policy,
        rung: int = 0,
        keep: Path | None = None,
        progress: Progress | None = None,
        *,
        screen: bool = False,
        seed: int | None = None,
        checkpoint: Path | None = None,
    ) -> Evaluation:
        """Measure `policy` like the real evaluator: what goes wrong is a `failed` evaluation."""
        screened = screen and self.screens
        self.trained_with.append((seed, checkpoint))
        self.screened.append(screened)  # before the fault: it may ask what this evaluation is
        fault = "kill" if len(self.calls) == self.kill_at else self.fault(policy, rung)
        self.calls.append((policy, rung, keep))
        if fault == "kill":
            raise Killed
        start = time.perf_counter()
        try:
            if fault == "raise":
                raise ValueError("made to fail")
            compressed, model = self.build(policy, progress)
            quality = self.quality(model)
            if screened:  # a part of `val` says something a little different
                wobble = 1 + 0.02 * math.sin(int(policy.key()[:6], 16))
                quality = Quality(quality.score * wobble, quality.loss * wobble)
            if fault == "nan":
                raise FloatingPointError("accuracy is nan")
            known = self.predict(policy)
            ms = self.latency(policy)
            measured = Measurement(known.bytes, known.macs, quality.score, quality.loss, ms)
            if keep is not None:
                write(keep, self.pack(compressed, quality.score))
        except (ValueError, FloatingPointError):
            seconds = time.perf_counter() - start
            error = traceback.format_exc(limit=-6)
            return Evaluation(policy, self.seed, rung, "failed", error=error, seconds=seconds, screened=screened)
        seconds = time.perf_counter() - start
        return Evaluation(
            policy, self.seed, rung, "ok", measured, seconds=seconds, screened=screened, curve=self.curve(policy)
        )

    def curve(self, policy: Policy) -> Curve | None:
        """A loss that halves with every step of a training."""
        steps = tuple(range(1, 1 + 2 * policy.recovery.epochs))
        rates = tuple(policy.recovery.lr for _ in steps)
        return Curve(steps, tuple(0.5**step for step in steps), rates) if steps else None

    def latency(self, policy: Policy) -> float:
        """Proportional to multiply-accumulates."""
        return self.dense.latency_ms * self.graph.macs(policy) / self.dense.macs

    def run(self, job: Job, progress: Progress | None = None) -> Evaluation:
        """What a runner runs."""
        return self(job.policy, job.rung, job.keep, progress, screen=job.screen, checkpoint=job.checkpoint)

    def build(self, policy: Policy, progress: Progress | None = None) -> tuple[FakeModel, FakeModel]:
        """The policy stands for its tensors and for its model; an epoch has two steps."""
        for step in range(1, 1 + 2 * policy.recovery.epochs):
            if progress is not None:
                progress(step, 2 * policy.recovery.epochs)
        return FakeModel(policy), FakeModel(policy)

    def quality(self, model: FakeModel) -> Quality:
        """One reading of `val`."""
        return Quality(self.task.score(model, "val"), damage(model.policy, self.graph))

    def pack(self, compressed: FakeModel, quality: float) -> bytes:
        """A real, readable file of exactly the predicted length."""
        header = self.size.header(compressed.policy)
        PACKED[compressed.policy.key()] = compressed.policy
        return pack(header, {entry.name: _zeros(entry) for entry in header.entries}, quality, compressed.policy.key())

    def reload(self, path: Path) -> Reloaded:
        """The file at `path` and the model it describes."""
        artifact = read(path)
        return Reloaded(artifact.bytes, artifact.quality, FakeModel(PACKED[artifact.key]))  # type: ignore[arg-type]


def _zeros(entry: Entry) -> Stored:
    mask = None
    if entry.coding == "bitmask":
        mask = (torch.arange(prod(entry.shape)) < entry.count).reshape(entry.shape)
    if entry.kind == "quantised":
        zero = torch.full(entry.shape[:1], 2 ** (entry.bits - 1), dtype=torch.uint8)
        codes = torch.full(entry.shape, 2 ** (entry.bits - 1), dtype=torch.uint8)
        grid = (entry.bits, entry.symmetric, mask)
        return Quantised(codes, torch.ones(entry.shape[:1]), zero, *grid, scale_bits=8 if entry.scale_bits == 8 else 16)
    if entry.kind == "raw":
        return Raw(torch.zeros(entry.shape, dtype=getattr(torch, entry.dtype)))
    if entry.kind == "byte":
        return Byte(torch.zeros(entry.shape))
    return (Half if entry.kind == "half" else Full)(torch.zeros(entry.shape), mask)


def make_profile(space: Space, evaluator: FakeEvaluator | None = None) -> Profile:
    """What a search would measure first."""
    fake = evaluator or FakeEvaluator()
    profile = measure(fake, space, "fake", lambda *_: None, lambda: 0.0)
    return with_groups(profile, fake, space, lambda *_: None, lambda: 0.0)


def evaluation(
    quality: float = 0.9,
    size: int = 1000,
    ms: float = 1.0,
    *,
    bits: int = 8,
    status: str = "ok",
    rung: int = 0,
    copy_of: int | None = None,
) -> Evaluation:
    """An evaluation made by hand, of a policy that names the fake network's first layer."""
    policy = Policy({"conv1": LayerChoice(bits)})
    measured = None if status == "failed" else Measurement(size, 10_000, quality, 1.0 - quality, ms)
    return Evaluation(
        policy,
        0,
        rung,
        status,
        measured,
        error="it broke" if status == "failed" else "",
        copy_of=copy_of,  # type: ignore[arg-type]
    )


# --- whole runs ---

BLOBS = """
import torch
from torch import nn

from autocompress import ClassificationTask


def task():
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(700, 16, generator=draw)
    targets = (inputs @ torch.randn(16, 4, generator=draw)).argmax(dim=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[:400]), targets[:400]).backward()
            optimizer.step()
    splits = [(inputs[part], targets[part]) for part in (slice(400), slice(400, 550), slice(550, 700))]
    return ClassificationTask(model.eval(), *splits, name="blobs", batch_size=100)
"""
"""A task file: a small network on random, separable data."""

Row = dict[str, Any]


class World:
    """A folder for runs, and the task and evaluator that `search` gets."""

    def __init__(self, folder: Path) -> None:
        self.run, self.space = folder / "run", folder / "space.toml"
        self.space.write_text(SPACE_TEXT)
        self.task = FakeTask()
        self.fault: Fault | None = None
        self.kill_at: int | None = None
        self.retimed = 1.0
        self.places: list[Place] = []
        self.evaluators: list[FakeEvaluator] = []

    def install(self, patch: pytest.MonkeyPatch) -> World:
        """Make `search` use the fakes for as long as `patch` holds."""
        patch.setattr(study, "load_task", lambda *_, **__: self.task)
        patch.setattr(study, "Evaluator", lambda *given, **named: self.make(*given, **named))
        return self

    def make(
        self,
        task: FakeTask,
        *,
        seed: int,
        dense_ms: float | None,
        format: str = "packed",
        place: Place | None = None,
        recovers: bool = True,  # noqa: ARG002 - the fake task has no views
    ) -> FakeEvaluator:
        self.places.append(place or Place())
        self.evaluators.append(
            FakeEvaluator(
                task,
                seed=seed,
                dense_ms=dense_ms,
                fault=self.fault,
                kill_at=self.kill_at,
                format=format,
                retimed=self.retimed,
            )
        )
        return self.evaluators[-1]

    def settings(self, **given: Any) -> Settings:
        plain = {"task": "fake", "budgets": ("1.5kB",), "space": str(self.space), "controller": "random", "trials": 20}
        plain |= {"fresh": True}
        return Settings(**(plain | given))

    def search(self, *, resume: bool = False, folder: Path | None = None, **given: Any) -> Outcome:
        """`search` with settings and arguments mixed."""
        other = {name: given.pop(name) for name in ("timeout", "watch", "started", "make_runner") if name in given}
        if "space" in given:
            other["space"] = load_space(given["space"])
        return search(self.settings(**given), folder or self.run, resume=resume, **other)

    def killed(self, at: int, **given: Any) -> None:
        """A part of a run that dies at its evaluation number `at`."""
        self.kill_at = at
        with pytest.raises(Killed):
            self.search(**given)
        self.kill_at = None

    def trials(self, folder: Path | None = None) -> list[Trial]:
        with Journal.reading(folder or self.run) as journal:
            return journal.trials()

    def rows(self, folder: Path | None = None) -> list[Row]:
        """The journal without timings."""
        return [
            t.evaluation.to_json()
            | {"number": t.number, "policy": t.evaluation.policy.to_json(), "artifact": t.artifact}
            | {"test": repr(t.quality_test), "seconds": 0, "error": bool(t.evaluation.error)}
            for t in self.trials(folder)
        ]

    @property
    def calls(self) -> list[tuple[Policy, int, Path | None]]:
        return [call for evaluator in self.evaluators for call in evaluator.calls]


# --- many workers ---


class ScriptedRunner:
    """As many workers as wanted, in this process: which of the jobs in flight ends next is drawn."""

    def __init__(
        self,
        evaluate: Callable[[Job], Evaluation],
        workers: int,
        draw: random.Random,
        *,
        lost: Callable[[Job], bool] = lambda _: False,
        isolated: bool = True,
    ) -> None:
        """`lost` says, when a job is about to end, that its worker died."""
        self.workers, self.isolated = workers, isolated
        self._evaluate, self._draw, self._lost = evaluate, draw, lost
        self.flying: list[Job] = []
        self.most = 0
        self.ended: list[int] = []
        self.closed = False

    def run(self, jobs: Iterable[Job | None], steps: Any = None) -> Generator[Result, None, None]:
        """See `Runner`."""
        del steps
        try:
            yield from keep_busy(jobs, lambda: self.workers, self._start, self._end)
        finally:
            self.flying.clear()

    def _start(self, job: Job) -> None:
        self.flying.append(job)
        self.most = max(self.most, len(self.flying))

    def _end(self) -> Result:
        job = self.flying.pop(self._draw.randrange(len(self.flying)))
        self.ended.append(job.number)
        return Result(job, None if self._lost(job) else self._evaluate(job))

    def close(self) -> None:
        """Nothing may run any more."""
        assert not self.flying
        self.closed = True


def broken_worker() -> Evaluate:
    """What a worker builds that has no data."""
    raise TaskError("no such data here")


def lacking_worker() -> Evaluate:
    """What a worker builds whose task imports what its machine does not have."""
    import not_on_this_node  # type: ignore[import-not-found]  # noqa: F401

    return fake_worker()


def fake_worker(sleep: float = 0.0) -> Evaluate:
    """What a worker process builds: a fake evaluation that does to itself what the policy's seed bits ask for."""
    evaluator = FakeEvaluator()

    def evaluate(job: Job, progress: Progress | None = None) -> Evaluation:
        told = NOTES is not None and NOTES.exists()
        folder = (
            Path(NOTES.read_text()) if NOTES is not None and told else None if job.keep is None else job.keep.parent
        )
        note = folder / f"do-{job.number}" if folder is not None else None
        wanted = note.read_text().split() if note is not None and note.exists() else []
        for word in wanted:
            name, _, value = word.partition("=")
            if name == "sleep":
                time.sleep(float(value))
            elif name == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            elif name == "die-once" and note is not None:
                note.write_text("")
                os.kill(os.getpid(), signal.SIGKILL)
            elif name == "where" and note is not None:
                import ray

                (note.parent / f"ran-{job.number}").write_text(ray.get_runtime_context().get_node_id())
            elif name == "raise":
                evaluator.fault = lambda *_: "raise"
        time.sleep(sleep)
        try:
            return evaluator.run(job, progress)
        finally:
            evaluator.fault = lambda *_: None

    return evaluate
