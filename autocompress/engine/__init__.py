"""The engine: the only way a model gets changed.

`Workbench` holds what is the same for every candidate (the dense model, calibration batches, channel importance,
quantised layers seen before, two resident models to fill). `compress` applies one policy. Knows nothing about
budgets, searches or files.
"""

from __future__ import annotations

import copy
import gc
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.channels_last import bears_channels_last, channels_last
from autocompress.engine.cache import Cache, digest
from autocompress.engine.checkpoint import Checkpoint
from autocompress.engine.constraint import Constraint
from autocompress.engine.database import LayerDatabase, remembered_moments
from autocompress.engine.distill import Teacher
from autocompress.engine.finetune import Course, Hints, train
from autocompress.engine.precision import Precision, quickest
from autocompress.engine.prune import (
    Importance,
    Remaining,
    magnitude_mask,
    remaining,
    slice_of,
    sliced,
)
from autocompress.engine.quantize import Grid, quantise
from autocompress.engine.recalibrate import anchored, constant, fold, norms, reestimate, statistics
from autocompress.engine.reconstruct import INPUTS, Reconstruction
from autocompress.errors import TaskError
from autocompress.graph import Graph, Group, Layer
from autocompress.measure.quality import screening_part
from autocompress.memory import give_back, trim
from autocompress.policy import LayerChoice, Policy, Solver
from autocompress.stored import Half, Quantised, Stored, StoredModel
from autocompress.surgery import fold_scale, hold, install, shadow, without
from autocompress.task import Batch, Split, Task, length, probe
from autocompress.trace import trace
from autocompress.trial import Curve
from autocompress.views import views_of

CALIBRATION_INPUTS = 512
REESTIMATION_INPUTS = 128
"""Enough, since the statistics are anchored to the dense model's."""
DATABASE_INPUTS = 1024
NARROW_MODELS = 3
"""Models of certain widths that stay in memory, with the statistics of their layers."""
_CACHE_BYTES = 512 * 2**20
"""Solutions that stay in memory; of a large model a sixteenth of its size: they are read from disk soon enough."""
LARGE_BYTES = 256 * 2**20
"""In single precision a model that is larger is large: what is only kept to be quick makes room for it."""
LARGE_WEIGHT = 2**21
"""Numbers in a weight whose solution leaves much memory behind."""
_TRAINING_VERSION = 4
"""Rises when training changes, so that a checkpoint of the old one is not continued."""

Widths = tuple[Any, ...]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Compressed:
    """What `compress` made: `tensors` is the whole model as the file will hold it, `curve` that of its training."""

    policy: Policy
    tensors: StoredModel
    curve: Curve | None = None
    known: Mapping[str, tuple[int, int]] | None = None
    """The codings, if `tensors` need not be there any more."""

    def codings(self) -> dict[str, tuple[int, int]]:
        """`Quantised.coding` of each weight: what the exact length of the file depends on beside the policy."""
        return _codings(self.tensors) if self.known is None else dict(self.known)


def _codings(tensors: StoredModel) -> dict[str, tuple[int, int]]:
    known = {name: t.coding() for name, t in tensors.items() if isinstance(t, Quantised)}
    return {name: coding for name, coding in known.items() if coding is not None}


@dataclass(frozen=True, eq=False)
class Narrow:
    """The model with only some channels, in float: `kept` ones per group, what `stays` of each tensor, all tensors.

    `layers` are those whose solutions come from `database`, as they are now, by the name of their weight.
    """

    kept: Mapping[str, Tensor]
    stays: Remaining
    state: Mapping[str, Tensor]
    layers: Mapping[str, Layer]
    database: LayerDatabase | None


@dataclass(frozen=True, eq=False)
class OneShot:
    """A policy before recovery training: kept channels per group, what stays of each tensor, compressed weights.

    `compensated` names the weights that come from the layer database.
    """

    kept: Mapping[str, Tensor]
    stays: Remaining
    state: Mapping[str, Tensor]
    weights: dict[str, Stored]
    compensated: frozenset[str]


class Workbench:
    """Resident state of one task. Not safe for threads: `compress` and `realise` reuse its models."""

    def __init__(self, task: Task, *, seed: int = 0) -> None:
        """Loads and checks the dense model, traces it, and draws the calibration batches."""
        self.task, self.seed = task, seed
        self.teacher, self.example = probe(task)
        self._is_large = 4 * sum(p.numel() for p in self.teacher.parameters()) > LARGE_BYTES
        if self._is_large:
            give_back()
        for parameter in self.teacher.parameters():
            parameter.requires_grad_(False)
        self.graph: Graph = trace(self.teacher, self.example.inputs)
        self._tidy()
        state = self.teacher.state_dict()
        self.state = {name: value.detach().cpu() for name, value in state.items() if isinstance(value, Tensor)}
        self.eps = {name: float(norm.eps) for name, norm in norms(self.teacher).items()}  # type: ignore[arg-type]
        self._split: Split = "train"
        self.untrainable = ""
        """Why there is no recovery training, or nothing; calibration then takes the inputs of `val`."""
        self.calibration = self._first_calibration()
        self.importance = Importance(task, self.teacher, self.graph, self.calibration, self._reconstruction)
        self._deployed: dict[bool, nn.Module] = {}
        self._layers: OrderedDict[Any, tuple[Stored, int]] = OrderedDict()
        self._known_codings: dict[Any, tuple[int, int] | None] = {}
        self._narrow: OrderedDict[Widths, Narrow] = OrderedDict()
        self._steps: int | None = None

    def _first_calibration(self) -> list[Batch]:
        """Calibration batches, after finding out whether there are any to train on."""
        try:
            found = self._calibration(CALIBRATION_INPUTS)
            self.untrainable = "" if found else "its batches('train') are empty"
        except Exception as error:  # whatever a task raises that has no such split
            self.untrainable = f"its batches('train') raised {type(error).__name__}: {' '.join(str(error).split())}"
        if self.trainable:
            return found
        self._split = "val"
        return self._calibration(CALIBRATION_INPUTS)

    def forget(self) -> None:
        """Let go of what a large model's last candidate was deployed as: the next one needs the room."""
        if self._is_large:
            self._deployed.clear()
            self._tidy()

    def _tidy(self) -> None:
        """Give back what a large model left behind: holes of memory as large as itself, between what is in use."""
        if self._is_large:
            gc.collect()
            trim()

    @property
    def _cache_bytes(self) -> int:
        return self.graph.dense_bytes // 16 if self._is_large else _CACHE_BYTES

    @property
    def trainable(self) -> bool:
        """Whether the task has batches to train on; if not, `untrainable` says why."""
        return not self.untrainable

    def _calibration(self, inputs: int) -> list[Batch]:
        """Training batches, augmented as in training, the same ones for every candidate."""
        found: list[Batch] = []
        count = 0
        for batch in self.task.batches(self._split, self.seed):
            found.append(Batch(*batch))
            count += length(found[-1].inputs)
            if count >= inputs:
                break
        return found

    @property
    def steps_per_epoch(self) -> int:
        """Training batches in one epoch."""
        if self._steps is None and not self.trainable:
            self._steps = 0
        if self._steps is None:
            epoch = self.task.batches("train", self.seed)
            self._steps = len(epoch) if isinstance(epoch, Sized) else sum(1 for _ in epoch)
        return self._steps

    @cached_property
    def precision(self) -> Precision:
        """What recovery training computes in: what is fastest here, unless it was set."""
        return quickest(self.teacher, self.calibration[0].inputs)

    @cached_property
    def told(self) -> Teacher:
        """The dense model and what it said in earlier trainings."""
        return Teacher(self.teacher, views=views_of(self.task), quick=self._without_norms())

    def _without_norms(self) -> nn.Module | None:
        """The dense model with its batch norms folded, which is quicker; None without any, or if it is large."""
        folded = self.graph.folded(Policy())
        if not folded or self._is_large:
            return None
        model = shadow(self.teacher)
        without(model, folded)
        for norm, layer in folded.items():
            scale, bias = fold_scale(self.state, layer, self.eps[norm])  # (out,)
            weight = self.state[layer.weight]
            rows = scale.reshape(-1, *[1] * (weight.ndim - 1))
            hold(model, layer.weight, (weight.double() * rows).to(weight.dtype))
            hold(model, layer.bias, bias.to(weight.dtype))
        return model.eval()

    @cached_property
    def _validation(self) -> list[Batch] | None:
        return screening_part(self.task)

    def validate(self, model: nn.Module) -> float:
        """The task's metric on the part of `val` that candidates are screened on, or on all of it if it is small."""
        if self._validation is None:
            return float(self.task.score(model, "val"))
        return float(self.task.score_batches(model, self._validation))  # type: ignore[attr-defined]  # optional member

    @cached_property
    def _student(self) -> nn.Module:
        return copy.deepcopy(self.teacher)

    def student(self, state: Mapping[str, Tensor]) -> nn.Module:
        """The resident model with its batch norms, filled with `state`, and no memory of earlier candidates."""
        counters = [name for name in self.state if name.endswith(".num_batches_tracked")]
        install(self._student, {name: state[name] for name in self.graph.tensors})
        install(self._student, {name: self.state[name] for name in counters})
        return self._student.eval()

    def statistics(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Batch-norm statistics over the re-estimation batches of the model with these tensors."""
        student = self.student(state)
        with channels_last(student, wanted=self._channels_last):
            reestimate(student, self.calibration[: self._reestimation])
        found = student.state_dict()
        return {name: found[name].detach().cpu().clone() for name in statistics(student)}

    @cached_property
    def dense_statistics(self) -> dict[str, Tensor]:
        """The same of the dense model."""
        return self.statistics(self.state)

    @cached_property
    def _channels_last(self) -> bool:
        return bears_channels_last(self.teacher, self.example.inputs)

    @property
    def _reestimation(self) -> int:
        """How many calibration batches hold enough inputs."""
        inputs, batches = 0, 0
        while inputs < REESTIMATION_INPUTS and batches < len(self.calibration):
            inputs += length(self.calibration[batches].inputs)
            batches += 1
        return batches

    def realise(self, compressed: Compressed) -> nn.Module:
        """The resident model as it will be deployed, filled with exactly what the file holds.

        Weights that are the dense model's share its memory, so none of its parameters may be written to.
        """
        return self._filled(compressed, compressed.tensors.items())

    def spend(self, compressed: Compressed) -> tuple[Compressed, nn.Module]:
        """`realise`, and what is left of `compressed`: of a large model no more than its codings.

        Each of its tensors goes as soon as the weight is there that it becomes, four times as large.
        """
        tensors = compressed.tensors
        if not (self._is_large and isinstance(tensors, dict)):
            return compressed, self.realise(compressed)
        left = replace(compressed, tensors={}, known=compressed.codings())
        return left, self._filled(left, ((name, tensors.pop(name)) for name in tuple(tensors)))

    def _filled(self, compressed: Compressed, tensors: Iterable[tuple[str, Stored]]) -> nn.Module:
        folds = compressed.policy.recovery.fold_bn
        if folds not in self._deployed:
            self._deployed[folds] = shadow(self.teacher)
            without(self._deployed[folds], self.graph.folded(compressed.policy))
        model = self._deployed[folds]
        if self._is_large and "database" in self.__dict__:
            self.database.release()
        self._tidy()
        for name, stored in tensors:
            hold(model, name, stored.dense())
        return model.eval()

    @cached_property
    def database(self) -> LayerDatabase:
        """Layer solutions; the pass that gathers their statistics runs on first use, unless a run before did it."""
        batches, cache = self._calibration(DATABASE_INPUTS), Cache()
        self._tidy()
        seen = remembered_moments(cache, self.teacher, self.graph, batches, self.seed)
        self._tidy()
        return LayerDatabase(self.state, seen, cache)

    def _reconstruction(self, group: Group) -> Tensor:
        """Ranks (channels,) of a group's channels by what its readers lose without them."""
        layers = {layer.weight: layer for layer in self.graph.layers}
        return self.database.channel_ranks([(layers[m.tensor], m) for m in group.consumers])

    @cached_property
    def reconstruction(self) -> Reconstruction:
        """The dense model's outputs, gathered on first use."""
        return Reconstruction(self.teacher, self.graph, self._calibration(INPUTS), self.seed)

    def compensates(self, layer: Layer, solver: Solver) -> bool:
        """Whether this layer's solution comes from the database."""
        return solver == "database" and self.database.knows(layer)

    def narrow(self, policy: Policy) -> Narrow:
        """The model with the policy's channels; with the database, what is left makes up for those that went.

        The last few are remembered: fitting takes seconds, and levels of the same widths are asked for in turn.
        """
        kept = self.importance.kept(policy)
        key = _widths(kept, policy)
        if key not in self._narrow:
            stays = remaining(self.graph, kept)
            state = self._silenced(sliced(self.state, stays), stays)
            layers = {
                x.weight: x for x in self.graph.layers if state[x.weight].numel() and self.compensates(x, policy.solver)
            }
            base = self.database if layers else None
            found = Narrow(kept, stays, state, layers, base)
            self._narrow[key] = self._fitted(found, policy) if kept and layers else found
            while len(self._narrow) > NARROW_MODELS:
                self._narrow.popitem(last=False)
        self._narrow.move_to_end(key)
        return self._narrow[key]

    def _silenced(self, state: Mapping[str, Tensor], stays: Remaining) -> dict[str, Tensor]:
        """`state` in which layers that lost all inputs give the mean of what they gave, behind their norm if any."""
        found = dict(state)
        for layer in self.graph.layers:
            if len(state[layer.weight]) and not state[layer.weight].numel() and self.state[layer.weight].numel():
                mean = self.reconstruction.mean(layer)
                if mean is not None:
                    own = mean[stays[layer.weight, 0]] if (layer.weight, 0) in stays else mean
                    found |= constant(layer, state, own, self.eps)
        return found

    def _fitted(self, cut: Narrow, policy: Policy) -> Narrow:
        """`cut` with its layers fitted: each for itself to the dense inputs, then in turn to what they really see."""
        state, h, layers = dict(cut.state), dict[str, Tensor](), dict[str, Layer]()
        for weight, layer in cut.layers.items():
            part = slice_of(weight, cut.stays)
            layers[weight], state[weight], h[layer.name] = self.database.narrowed(layer, part)
        renewed = policy.recovery.reestimate_bn
        fitted = self.reconstruction.fit(
            self.student(state),
            {x.name: cut.stays[x.weight, 0] for x in layers.values() if (x.weight, 0) in cut.stays},
            {x.name: renewed and x.batch_norm is not None for x in layers.values()},
        )
        for layer in layers.values():
            if layer.name in fitted:
                found = fitted[layer.name]
                state[layer.weight], h[layer.name] = found.weight, found.h
                if found.bias is not None:
                    state[layer.bias] = found.bias
        return Narrow(cut.kept, cut.stays, state, layers, self.database.beside(state, h))

    def level(self, layer: Layer, choice: LayerChoice, solver: Solver) -> Stored:
        """The layer under `choice` when all channels stay."""
        return self._stored(self.narrow(Policy(solver=solver)), (solver,), layer, choice)

    def _stored(self, model: Narrow, widths: Widths, layer: Layer, choice: LayerChoice) -> Stored:
        """One weight of `model` under `choice`, from the cache if it was seen before with the same `widths`."""
        key = (layer.name, choice, widths, layer.weight in model.layers)
        if key not in self._layers:
            weight = model.state[layer.weight]
            narrow = model.layers.get(layer.weight)
            if narrow is not None and model.database is not None and model.database.knows(narrow):
                stored = model.database.solve(narrow, choice)
            else:
                stored = quantise(weight, choice, magnitude_mask(weight, choice.zeros(weight.numel())))
            self._layers[key] = stored, _memory(stored, weight)
            if len(widths) == 1:  # all channels stay
                coding = stored.coding() if isinstance(stored, Quantised) else None
                self._known_codings[layer.name, choice, *widths] = coding
            if weight.numel() > LARGE_WEIGHT:
                trim()
            while sum(size for _, size in self._layers.values()) > self._cache_bytes and len(self._layers) > 1:
                self._layers.popitem(last=False)
        self._layers.move_to_end(key)
        return self._layers[key][0]

    def one_shot(self, policy: Policy) -> OneShot:
        """Channels, zeros and bits of `policy`, from the cache as far as possible."""
        model = self.narrow(policy)
        widths = _widths(model.kept, policy)
        weights = {
            layer.weight: self._stored(model, widths, layer, choice) for layer, choice in self.graph.choices(policy)
        }
        return OneShot(model.kept, model.stays, model.state, weights, frozenset(model.layers))

    def codings(self, policy: Policy) -> dict[str, tuple[int, int]]:
        """`Compressed.codings` of the policy without its recovery training."""
        if all(choice.bits >= 16 for _, choice in self.graph.choices(policy)):
            return {}  # nothing has codes, so nothing needs to be solved
        if self.narrow(policy).kept:
            return _codings(self.one_shot(policy).weights)
        found = {
            layer.weight: self._coding(layer, choice, policy.solver) for layer, choice in self.graph.choices(policy)
        }
        return {weight: coding for weight, coding in found.items() if coding is not None}

    def _coding(self, layer: Layer, choice: LayerChoice, solver: Solver) -> tuple[int, int] | None:
        """`Quantised.coding` of `level`, remembered when the level itself is not."""
        key = layer.name, choice, solver
        if key not in self._known_codings:
            self.level(layer, choice, solver)
        return self._known_codings[key]


def _memory(stored: Stored, weight: Tensor) -> int:
    """Bytes that `stored` takes beside the `weight` that it came from."""
    held = (getattr(stored, name, None) for name in ("codes", "values", "mask"))
    return sum(t.nbytes for t in held if t is not None and t.data_ptr() != weight.data_ptr())


def _widths(kept: Mapping[str, Tensor], policy: Policy) -> Widths:
    """Stands for all that decides a narrower model before zeros and bits; norms only matter to what is fitted."""
    if not kept:
        return (policy.solver,)
    return policy.solver, policy.recovery.reestimate_bn, *((name, *left.tolist()) for name, left in kept.items())


def compress(
    bench: Workbench,
    policy: Policy,
    progress: Progress | None = None,
    *,
    checkpoint: Path | None = None,
    seed: int | None = None,
) -> Compressed:
    """The dense model under `policy`: channels, zeros, bits, recovery training, batch norms, in this order.

    A pure function of the task, the workbench's seed and precision, the policy, and `seed`, which decides order and
    augmentation of recovery training in place of the workbench's. `progress(step, total)` follows that training; with
    `checkpoint`, a training of the same policy that was interrupted goes on after its last whole epoch.
    Raises `PolicyError` if the policy is not of this model, `TaskError` if it wants training and the task has no
    batches for it, `FloatingPointError` if training diverges.
    """
    graph = bench.graph
    graph.check(policy)
    bench.forget()
    parent = bench.one_shot(policy)
    state, weights, curve = parent.state, parent.weights, None
    if policy.recovery.epochs:
        course = _course(bench, policy, parent, progress, seed)
        state, weights = _recover(bench, policy, parent, course, checkpoint)
        curve = course.record.curve()
    if policy.recovery.reestimate_bn and bench.eps and bench.calibration:
        silent = _silent(graph, state)
        found = _statistics(bench, {**state, **{n: s.dense() for n, s in weights.items()}}, parent)
        state = {**state, **{name: value for name, value in found.items() if name not in silent}}
    return Compressed(policy, fold(weights, state, graph, policy, bench.eps), curve)


def _statistics(bench: Workbench, state: Mapping[str, Tensor], parent: OneShot) -> dict[str, Tensor]:
    """Batch-norm statistics for the compressed tensors in `state`; the dense model's are those of `parent`."""
    return anchored(bench.statistics(state), sliced(bench.dense_statistics, parent.stays), parent.state)


def _silent(graph: Graph, state: Mapping[str, Tensor]) -> set[str]:
    """Statistics of norms behind layers that give a constant: there is nothing to estimate."""
    norms_ = [x.batch_norm for x in graph.layers if x.batch_norm and not state[x.weight].numel()]
    return {f"{norm}.{key}" for norm in norms_ for key in ("running_mean", "running_var")}


def _course(bench: Workbench, policy: Policy, parent: OneShot, progress: Progress | None, seed: int | None) -> Course:
    """The recovery training of `policy`."""
    if not bench.trainable:
        raise TaskError(f"task {bench.task.name!r} has no recovery training, {bench.untrainable}: ask for 0 epochs")
    return Course(
        bench.task,
        policy.recovery,
        bench.steps_per_epoch,
        bench.seed if seed is None else seed,
        _hints(bench.graph, parent.kept, parent.state),
        bench.precision,
        bench.validate,
        progress,
    )


def _recover(
    bench: Workbench, policy: Policy, parent: OneShot, course: Course, path: Path | None
) -> tuple[dict[str, Tensor], dict[str, Stored]]:
    """All tensors after recovery training, and the compressed weights on the grids that they were trained on."""
    coded = {layer.weight for layer, choice in bench.graph.choices(policy) if choice.entropy}
    constraints = {name: _constraint(stored, name in coded) for name, stored in parent.weights.items()}
    start = dict(parent.state)  # a plainly rounded weight starts from its dense value, which rounds to what is stored
    for name in parent.compensated:
        start[name] = constraints[name].toward(parent.weights[name].dense(), parent.state[name])
    if path is not None:
        course = replace(course, checkpoint=Checkpoint(path, _identity(bench, policy, course, start)))
    student = bench.student(start)
    constraints = train(student, bench.told, constraints, course)
    state = {n: v.detach().cpu().clone() for n, v in student.state_dict().items() if isinstance(v, Tensor)}
    weights = dict(parent.weights)
    for layer, choice in bench.graph.choices(policy):
        final = constraints[layer.weight]
        weights[layer.weight] = quantise(state[layer.weight], choice, final.mask, final.grid)
    if course.checkpoint is not None:
        course.checkpoint.remove()
    return state, weights


def _identity(bench: Workbench, policy: Policy, course: Course, start: Mapping[str, Tensor]) -> str:
    """Stands for all that decides what a training gives."""
    about = _TRAINING_VERSION, bench.task.name, policy.key(), bench.seed, course.seed, course.precision
    return digest(*about, course.steps_per_epoch, *(part for item in sorted(start.items()) for part in item))


def _constraint(stored: Stored, coded: bool) -> Constraint:
    mask = getattr(stored, "mask", None)
    if isinstance(stored, Quantised):
        return Constraint(mask, Grid(stored.scale, stored.zero.float(), stored.bits, stored.symmetric), coded=coded)
    return Constraint(mask, None, isinstance(stored, Half))


def _hints(graph: Graph, kept: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Hints:
    """Three layers at a quarter, half and three quarters of the network's depth, of those that are left."""
    inner = [layer for layer in graph.layers[:-1] if layer.is_affine and state[layer.weight].numel()]
    chosen = {inner[len(inner) * quarter // 4].name for quarter in (1, 2, 3)} if inner else set()
    channels = {}
    for group in graph.prunable:
        for member in group.producers:
            layer = member.tensor.removesuffix(".weight")
            if layer in chosen and group.name in kept:
                channels[layer] = torch.tensor(member.index)[kept[group.name]].flatten()
    return Hints(tuple(sorted(chosen)), channels)
