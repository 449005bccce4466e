"""Recovery training: the compressed weights learn again, on their grid and under their masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

from autocompress.channels_last import channels_last
from autocompress.engine.checkpoint import Checkpoint
from autocompress.engine.constraint import Constraint
from autocompress.engine.distill import Features, Teacher, hint_loss, in_single_precision, recovery_loss
from autocompress.engine.held import Held
from autocompress.engine.muon import Muon
from autocompress.engine.precision import PLAIN, Precision
from autocompress.engine.schedules import Plateau, learning_rate
from autocompress.policy import Gradient, Recovery
from autocompress.task import Batch, Task, arguments, length, to_device
from autocompress.trial import Curve

MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4
ADAM_SHARE, BETAS = 0.02, (0.9, 0.99)
"""AdamW's learning rate as a share of the recipe's, so that the same recipes serve: 0.02, good for SGD on networks with
batch norms, becomes 4e-4. Its second moment is that of some hundred steps, since recoveries are short."""
REPORTS_PER_EPOCH = 4
"""How often the plateau adjustment hears the validation metric."""
LARGEST_NORM = 2.0
"""What `clip` shortens the gradient of all weights together to. That of ResNet-20 is 1 to 2 long in calm training,
and up to 9 in the first steps after a cut to 2 bits: those are clipped."""
STATISTICS = ("running_mean", "running_var")
"""What is averaged of the buffers: others are constants, and may be infinite."""
CURVE_POINTS = 48
"""Points of a training's curve: enough to see it, and few enough to stand in a journal."""
LEAST_SCALE = 0.1
"""Share of its first size that a learning scale keeps: one that passed zero would turn its row's grid around."""


@dataclass(frozen=True)
class Hints:
    """Layers whose outputs are compared with the teacher's, and the channels that a pruned one kept."""

    layers: tuple[str, ...] = ()
    kept: Mapping[str, Tensor] = field(default_factory=dict)


class Record:
    """The curve of a training while it grows: means over equal stretches of steps."""

    def __init__(self) -> None:
        self._points: list[tuple[int, float, float]] = []
        self._heard: list[tuple[int, float]] = []
        self._sum, self._count = 0.0, 0

    def add(self, step: int, total: int, loss: float, rate: float) -> None:
        """Loss and rate of `step`, counted from 1."""
        self._sum, self._count = self._sum + loss, self._count + 1
        if step % max(1, -(-total // CURVE_POINTS)) == 0 or step == total:
            self._points.append((step, self._sum / self._count, rate))
            self._sum, self._count = 0.0, 0

    def hear(self, step: int, quality: float) -> None:
        """What the plateau adjustment was told."""
        self._heard.append((step, quality))

    def curve(self) -> Curve:
        """What there is so far."""
        steps, losses, rates = zip(*self._points, strict=True) if self._points else ((), (), ())
        return Curve(steps, losses, rates, tuple(self._heard))

    def state(self) -> list[Any]:
        """Plain data for `restore`."""
        return [self._points, self._heard, self._sum, self._count]

    def restore(self, state: list[Any]) -> None:
        """Become what `state` was taken of."""
        points, heard, self._sum, self._count = state
        self._points, self._heard = [tuple(p) for p in points], [tuple(h) for h in heard]


@dataclass(frozen=True, eq=False)
class Course:
    """What one training is: data, recipe, order, arithmetic, and who hears of it.

    Batches of epoch e come from `task.batches("train", seed + e)`. `validate(model)` gives the task's metric, which the
    plateau adjustment hears. `progress(step, total)` is called after each step. With `checkpoint`, a training that was
    interrupted goes on after its last whole epoch. `record` becomes its curve.
    """

    task: Task
    recovery: Recovery
    steps_per_epoch: int
    seed: int = 0
    hints: Hints = Hints()
    precision: Precision = PLAIN
    validate: Callable[[nn.Module], float] | None = None
    progress: Callable[[int, int], None] | None = None
    checkpoint: Checkpoint | None = None
    record: Record = field(default_factory=Record)

    @property
    def total(self) -> int:
        """Steps of all epochs."""
        return self.recovery.epochs * self.steps_per_epoch


def normalise_gradients(parameters: Iterable[Tensor], kind: Gradient) -> None:
    """Rewrite gradients in place: `clip` those of all parameters, the others of those with two or more dimensions.

    `centralise` removes each output row's mean (Yong et al., 2004.01461, equation 1). `standardise` gives each
    tensor's gradient mean 0 and standard deviation 1, times the weight's root mean square, so that the learning
    rate becomes the relative change per step (in the manner of LARS, 1708.03888). `clip` shortens the gradient of all
    parameters together to `LARGEST_NORM` (Pascanu et al., 1211.5063, algorithm 1).
    """
    if kind == "none":
        return
    if kind == "clip":
        nn.utils.clip_grad_norm_(parameters, LARGEST_NORM)
        return
    for p in parameters:
        if p.grad is None or p.ndim < 2:
            continue
        if kind == "centralise":
            p.grad -= p.grad.mean(dim=tuple(range(1, p.ndim)), keepdim=True)
        else:
            spread = p.grad.std(unbiased=False)
            spread = spread.clamp_min(1e-6 * float(p.grad.abs().max())).clamp_min(1e-12)  # a constant has none
            p.grad = (p.grad - p.grad.mean()) / spread * p.detach().square().mean().sqrt()


def train(
    student: nn.Module, teacher: Teacher, constraints: Mapping[str, Constraint], course: Course
) -> dict[str, Constraint]:
    """Train `student` in place; `constraints` maps weight names to what they must obey.

    Afterwards each of these weights is what the file will hold, on the grid that is returned for it. Raises
    `FloatingPointError` when the loss or a weight is not finite.
    """
    layers = course.hints.layers if course.recovery.hint_weight > 0 else ()
    learner = _Learner(student, constraints, course.recovery)
    teacher.begin()
    try:
        with (
            torch.random.fork_rng(devices=[]),
            channels_last(teacher.model, wanted=course.precision.channels_last),
            channels_last(teacher.quick, wanted=course.precision.channels_last),
            Features(student, layers) as own,
            Features(teacher.model, layers) as given,
        ):
            torch.manual_seed(course.seed)
            _Training(learner, teacher, course, own, given).run()
        return learner.finish()
    except FloatingPointError:
        if course.checkpoint is not None:
            course.checkpoint.remove()  # it would diverge again
        raise
    finally:
        learner.freeze()


def in_training(model: nn.Module) -> nn.Module:
    """`model` itself, set to train as it will run: its norms gather statistics, and nothing is dropped at random.

    Dropout keeps large networks from learning their data by heart; a compressed one in a short recovery is told what
    its teacher says without dropout, and would be taught to make up for noise. Recurrent modules keep their own between
    layers: without it they were worth less on `val`, and on an accelerator they cannot be trained in evaluation mode.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, _NormBase | nn.RNNBase):
            module.train()
    return model


class _Average:
    """Exponential moving average of `tensors`; its decay grows to `decay`, so that the first steps do not linger.

    min(decay, (1 + n) / (10 + n)) at update n, as TensorFlow's `ExponentialMovingAverage` with `num_updates`.
    """

    def __init__(self, tensors: list[Tensor], decay: float) -> None:
        self._tensors, self._decay, self.updates = tensors, decay, 0
        self.values = [t.detach().clone() for t in tensors]

    def update(self) -> None:
        self.updates += 1
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.values, [t.detach() for t in self._tensors], 1 - decay)

    def install(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self._tensors, self.values)


class _Learner:
    """The student: float weights that learn, and what its forward pass sees of them."""

    def __init__(self, model: nn.Module, constraints: Mapping[str, Constraint], recovery: Recovery) -> None:
        self.model = in_training(model)
        self.parameters = [p.requires_grad_() for p in model.parameters() if p.is_floating_point()]
        self.device = next(model.parameters()).device
        self._constraints = {name: c.on(self.device) for name, c in constraints.items()}
        self._weights = {name: model.get_parameter(name) for name in constraints}
        self.scales: Tensor | None = None
        grids = {name: c.grid for name, c in self._constraints.items() if c.grid is not None}
        if recovery.scales == "learned" and grids:
            self._rows = {name: len(grid.scale) for name, grid in grids.items()}
            first = torch.cat([grid.scale for grid in grids.values()])  # (rows of all layers,)
            self.scales, self._least = first.clone().requires_grad_(), LEAST_SCALE * first.abs()
            self._sign = first.sign()
        learnt = [*self.parameters, *([self.scales] if self.scales is not None else [])]
        self._all = [*learnt, *(b for name, b in model.named_buffers() if name.endswith(STATISTICS))]
        self.average = _Average(self._all, recovery.ema) if recovery.ema > 0 else None
        self.held = Held(self._weights, self._constraints)

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups of the optimizer: a decaying scale would only shrink its grid."""
        found: list[dict[str, Any]] = [{"params": self.parameters}]
        return found if self.scales is None else [*found, {"params": [self.scales], "weight_decay": 0.0}]

    def _scales(self) -> dict[str, Tensor]:
        if self.scales is None:
            return {}
        return dict(zip(self._rows, torch.split(self.scales, list(self._rows.values())), strict=True))

    def __call__(self, inputs: Any, precision: Precision) -> Any:
        """Outputs in single precision; None for a lone example that a batch norm cannot train on."""
        scales = self._scales()
        weights = {
            name: precision.laid_out(c.apply(self._weights[name], scales.get(name)))
            for name, c in self._constraints.items()
        }
        positional, named = arguments(precision.laid_out(inputs))
        try:
            with precision.computing():
                return in_single_precision(functional_call(self.model, weights, positional, named))
        except ValueError:
            if length(inputs) > 1:
                raise
            return None

    def stepped(self) -> None:
        """After each step of the optimizer."""
        self.held.stepped(self._scales())
        if self.scales is not None:
            with torch.no_grad():
                self.scales.copy_(self._sign * torch.maximum(self._sign * self.scales, self._least))
        if self.average is not None:
            self.average.update()

    @contextmanager
    def as_kept(self) -> Iterator[nn.Module]:
        """Inside, the model is what would be kept if training ended now, in evaluation mode."""
        before = [t.detach().clone() for t in self._all]
        try:
            self._project()
            yield self.model.eval()
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._all, before)
            in_training(self.model)

    def _project(self) -> dict[str, Constraint]:
        """Make the weights their average, if there is one, then what is stored of them; on which grids."""
        if self.average is not None:
            self.average.install()
        scales = self._scales()
        found = {n: c.rescaled(scales[n]) if n in scales else c for n, c in self._constraints.items()}
        with torch.no_grad():
            for name, constraint in found.items():
                self._weights[name].copy_(constraint.stored(self._weights[name]))
        return found

    def finish(self) -> dict[str, Constraint]:
        """Leave the model as it is kept, and give the constraints with their final grids."""
        if not all(bool(torch.isfinite(t).all()) for t in self._all):
            raise FloatingPointError("a weight or statistic is not finite after the last step of recovery training")
        return {name: c.on(torch.device("cpu")) for name, c in self._project().items()}

    def freeze(self) -> None:
        """Nothing learns any more."""
        self.model.eval()
        for p in self.parameters:
            p.requires_grad_(False).grad = None

    def state(self) -> dict[str, Tensor]:
        """All that changes while it learns."""
        found = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        if self.scales is not None:
            found["scales"] = self.scales
        if self.average is not None:
            found |= {f"average/{i}": value for i, value in enumerate(self.average.values)}
        return found

    def restore(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Become what `state` was taken of."""
        named = {n.removeprefix("model/"): value for n, value in state.items() if n.startswith("model/")}
        self.model.load_state_dict(named)
        with torch.no_grad():
            if self.scales is not None:
                self.scales.copy_(state["scales"])
            if self.average is not None:
                self.average.updates = updates
                for i, value in enumerate(self.average.values):
                    value.copy_(state[f"average/{i}"])


def _optimizer(learner: _Learner, recovery: Recovery) -> torch.optim.Optimizer:
    """Its rate is set before each step."""
    groups, decay = learner.groups(), WEIGHT_DECAY
    if recovery.optimizer == "adam":
        return torch.optim.AdamW(groups, betas=BETAS, weight_decay=decay, foreach=True)
    if recovery.optimizer == "muon":
        return Muon(groups, momentum=MOMENTUM, weight_decay=decay)
    return torch.optim.SGD(groups, momentum=MOMENTUM, nesterov=True, weight_decay=decay, foreach=True)


class _Training:
    """The steps of one training, and the state between them."""

    def __init__(self, learner: _Learner, teacher: Teacher, course: Course, own: Features, given: Features) -> None:
        self._learner, self._teacher, self._course = learner, teacher, course
        self._own, self._given = own, given
        r = course.recovery
        self._optimizer = _optimizer(learner, r)
        rising = course.task.direction == "max"
        self._plateau = Plateau(r.adjust_factor, r.adjust_patience, r.adjust_cooldown, rising)
        self._interval = max(1, course.steps_per_epoch // REPORTS_PER_EPOCH)
        self._step, self._epoch = 0, 0

    def run(self) -> None:
        """All epochs that are left."""
        course = self._course
        self._resume()
        while self._epoch < course.recovery.epochs:
            self._learner.held.begin()
            for pair in course.task.batches("train", course.seed + self._epoch):
                self._learn(Batch(*pair))
            self._epoch += 1
            if course.checkpoint is not None and self._epoch < course.recovery.epochs:
                self._save(course.checkpoint)

    def _learn(self, batch: Batch) -> None:
        """One step on one batch."""
        inputs = to_device(batch.inputs, self._learner.device)
        outputs = self._learner(inputs, self._course.precision)
        if outputs is not None:
            self._descend(self._loss(outputs, batch))
        self._step += 1
        if self._plateau.factor < 1 and self._course.validate is not None and self._step % self._interval == 0:
            with self._learner.as_kept() as kept, torch.random.fork_rng(devices=[]):
                quality = float(self._course.validate(kept))
            self._plateau.report(quality)
            self._course.record.hear(self._step, quality)
        if self._course.progress is not None:
            self._course.progress(self._step, self._course.total)

    def _loss(self, outputs: Any, batch: Batch) -> Tensor:
        course, hinted = self._course, bool(self._own.names)
        told, distilled = None, course.recovery.distill_weight > 0
        if distilled or hinted:
            views = course.recovery.views if distilled else 1
            told = self._teacher(batch.inputs, course.precision, remember=not hinted, views=views)
        hint = hint_loss(self._own.values, self._given.values, course.hints.kept) if hinted else None
        return recovery_loss(course.task, course.recovery, outputs, told, batch, hint)

    def _descend(self, loss: Tensor) -> None:
        course, learner = self._course, self._learner
        rate = learning_rate(course.recovery, min(self._step, course.total), course.total, self._plateau)
        if not math.isfinite(value := float(loss.detach())):
            raise FloatingPointError(
                f"the recovery loss became {value} at step {self._step} of {course.total}, at learning rate {rate:.3g}"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = rate * (ADAM_SHARE if course.recovery.optimizer == "adam" else 1.0)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        normalise_gradients(self._learnt(), course.recovery.gradient)
        self._optimizer.step()
        learner.stepped()
        course.record.add(self._step + 1, course.total, value, rate)

    # --- between epochs ---------------------------------------------------------------------------------

    def _learnt(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _save(self, checkpoint: Checkpoint) -> None:
        state, plateau = self._learner.state(), self._plateau
        for i, p in enumerate(self._learnt()):
            kept = {name: value for name, value in self._optimizer.state[p].items() if isinstance(value, Tensor)}
            state |= {f"optimizer/{i}/{name}": value for name, value in kept.items()}
        state["rng"] = torch.get_rng_state()
        average = self._learner.average
        facts: dict[str, Any] = {"step": self._step, "epoch": self._epoch, "updates": average.updates if average else 0}
        facts["plateau"] = [plateau.scale, plateau.best, plateau.bad, plateau.cooling]
        facts["held"] = [self._learner.held.price, self._learner.held.limit]
        facts["record"] = self._course.record.state()
        checkpoint.save(state, facts)

    def _resume(self) -> None:
        """Go on from the last whole epoch, if there is one."""
        found = self._course.checkpoint.load() if self._course.checkpoint is not None else None
        if found is None:
            return
        state, facts = found
        self._learner.restore(state, facts["updates"])
        learnt = self._learnt()
        for key, value in state.items():
            if key.startswith("optimizer/"):
                _, i, name = key.split("/")
                self._optimizer.state[learnt[int(i)]][name] = value
        torch.set_rng_state(state["rng"])
        self._step, self._epoch = facts["step"], facts["epoch"]
        if "held" in facts:
            self._learner.held.price, self._learner.held.limit = facts["held"]
        if "record" in facts:
            self._course.record.restore(facts["record"])
        plateau = self._plateau
        plateau.scale, plateau.best, plateau.bad, plateau.cooling = facts["plateau"]
